"""Any PyTorch decoder, against its arithmetic done once more in float64."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

import sinktrack as st
from sinktrack import Decoder, MeasurementError, Probe, ProbeError, Run, measure
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.cli import app
from sinktrack.interventions.replay import Edit, replaying
from tests.helpers import torch_models
from tests.helpers.commands import two_processes
from tests.helpers.torch_models import (
    BLOCKS,
    HEADS,
    KINDS,
    VOCABULARY,
    Kind,
    Net,
    by_hand,
    reading,
    shares,
)
from tests.helpers.trainings import assert_identical

PROBE = Probe.random(VOCABULARY, sequences=5, length=17)


def check(found: st.Measurement, model: Net, tokens: torch.Tensor, atol: float = 5e-7) -> None:
    """Against the sums by hand: attention within 5e-7, norms and shares to rounding."""
    hand = by_hand(model, tokens)
    for block, a in enumerate(hand.attention):
        visible = (a[0, 0, 1:, 0] > 0).sum()
        p0 = (a[:, :, 1:, 0].sum(-1) / visible).float()
        assert float((found.p0_attention_by_sequence[:, block] - p0).abs().max()) < atol
        assert found.visible_queries[block] == int(visible)
        mixing = a[:, :, 1:].square().sum(-1).mean((0, 2))
        torch.testing.assert_close(found.mixing[block].double(), mixing, rtol=1e-5, atol=1e-6)

    for block, state in enumerate(hand.states):
        size = state.norm(dim=-1)
        torch.testing.assert_close(
            found.p0_norm[block].double(), size[:, 0].mean(), rtol=2e-6, atol=0
        )
        ratio = size[:, 0].mean() / size[:, 1:].median()
        assert float(found.norm_ratio[block]) == pytest.approx(float(ratio), rel=0.2)
    total, parts = shares(hand)
    assert found.localization.share_sum == pytest.approx(1, abs=1e-5)
    seen = {
        part.kind if part.block is None else (part.kind, part.block): part.share
        for part in found.localization.shares
    }
    scale = max(abs(value) for value in total.values())
    assert {key for key in total if abs(total[key]) > 1e-9} <= set(seen)
    for key, share in seen.items():
        assert share == pytest.approx(total[key], abs=2e-6 * scale), key
    told = {
        (part.kind, part.block, part.index): part.share
        for part in found.localization.parts if part.kind in ("head", "expert")
    }  # fmt: skip
    for key, share in parts.items():
        if abs(share) > 1e-9:
            assert told[key] == pytest.approx(share, abs=4e-6 * scale), key


@pytest.mark.parametrize("name", KINDS)
def test_exact(name: str) -> None:
    model = reading(KINDS[name], PROBE.tokens)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = measure(model, PROBE)
    check(found, model, PROBE.tokens)
    assert found.model == {
        "type": "Net", "blocks": BLOCKS, "heads": HEADS,
        "experts": torch_models.EXPERTS if KINDS[name].experts else None,
    }  # fmt: skip
    assert found.block_kinds == ("sliding" if KINDS[name].window else "full",) * BLOCKS
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if KINDS[name].experts:
        assert any(part.kind == "expert" for part in found.localization.parts)
        assert "parts" not in found.missing


@pytest.mark.parametrize("name", ["plain", "time first", "flat", "modded", "experts"])
@pytest.mark.parametrize("sequences", [1, 2, 17, 19])
def test_any_number_of_sequences(name: str, sequences: int) -> None:
    """As many as positions leave the layout to be told by value."""
    probe = Probe.random(VOCABULARY, sequences=sequences, length=17)
    model = reading(KINDS[name], probe.tokens)
    check(measure(model, probe), model, probe.tokens, 2e-6)
    half = measure(model, probe, batch_size=2)
    if sequences > 1:
        whole = measure(model, probe)
        torch.testing.assert_close(half.p0_norm, whole.p0_norm)


def test_batches_join_to_the_same() -> None:
    model = reading(KINDS["modded"], PROBE.tokens)
    whole, parts = measure(model, PROBE), measure(model, PROBE, batch_size=2)
    torch.testing.assert_close(whole.p0_attention, parts.p0_attention)
    for one, two in zip(whole.localization.shares, parts.localization.shares, strict=True):
        assert one.share == pytest.approx(two.share, abs=1e-6)


class Broken(torch_models.Block):
    """A block that does something else on its way, by name."""

    how = ""

    def forward(self, x: Any, value: Any = None, late: Any = None) -> Any:
        how, attention = self.how, self.attention
        wrote, value = attention(torch_models.norm(x), value)
        if how == "in place out of sight":
            x = x + wrote
            x.data.copy_(x.data * 3)
        elif how == "one position in place":
            x = x + wrote
            x[:, 0] = x[:, 0] * 2
        elif how == "through numpy":
            x = torch.from_numpy((x + wrote).numpy().copy())
        elif how == "gated sum":
            gate = torch.sigmoid(torch_models.norm(x))
            x = gate * x + (1 - gate) * wrote
        elif how == "norm after the sum":
            x = torch_models.norm(x + wrote)
        elif how == "halves":
            half = x.shape[-1] // 2
            x = torch.cat(
                [x[..., :half] + wrote[..., :half], x[..., half:] + wrote[..., half:]], -1
            )
        elif how == "a scaled operator":
            x = torch.ops.sinktrack_tests.scaled_add(wrote, x)
        elif how == "an embedding in every block":
            x = x + wrote + self.weight
            x = x + torch.arange(x.numel(), dtype=x.dtype).view(x.shape) / x.numel()
        elif how == "a convolution":
            kernel = torch.ones(x.shape[-1], 1, 3) / 3
            past = torch.nn.functional.pad(x.transpose(1, 2), (2, 0))
            mixed = torch.nn.functional.conv1d(past, kernel, groups=x.shape[-1])
            x = x + wrote + mixed.transpose(1, 2)
        elif how == "channels scaled":
            x = x * self.weight.mul(1.5) + wrote
        elif how == "fused projection":
            x = x + torch.cat([wrote, self.mlp.up(torch_models.norm(x))[..., :8]], -1)[..., :32]  # type: ignore[operator]
        elif how == "a layer on the attention":
            x = x + self.mlp(torch.tanh(wrote))
        elif how == "a factor of the tokens":
            x = x * (1 + 0.1 * torch.tanh(x.mean())) + wrote
        else:
            raise AssertionError(how)
        return x + self.mlp(torch_models.norm(x)), value


@torch.library.custom_op("sinktrack_tests::scaled_add", mutates_args=())
def scaled_add(write: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    return stream + 0.7 * write


UNTOLD = (
    "in place out of sight", "one position in place", "through numpy", "gated sum",
    "norm after the sum", "halves", "a scaled operator", "an embedding in every block",
    "a convolution", "channels scaled", "fused projection", "a layer on the attention",
    "a factor of the tokens",
)  # fmt: skip


@pytest.mark.parametrize("how", UNTOLD)
def test_writes_that_cannot_be_told_are_null(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and norms stand, by the blocks' own inputs."""
    model = Net(Kind())
    for block in model.layers:
        block.__class__ = Broken
    monkeypatch.setattr(Broken, "how", how)
    norms, taken = [], []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: taken.append(args[0].clone()))
        for block in model.layers
    ]
    hooks.append(model.layers[-1].register_forward_hook(lambda _, args, out: taken.append(out[0])))
    with torch.no_grad():
        model(PROBE.tokens)
    for hook in hooks:
        hook.remove()
    norms = [state[:, 0].norm(dim=-1).mean() for state in taken]
    found = measure(model, PROBE)
    assert found.localization.share_sum is None
    assert found.localization.parts == ()
    assert "block" in found.missing["shares"], found.missing
    assert "reads P0" not in found.missing["shares"], found.missing
    torch.testing.assert_close(found.p0_norm, torch.stack(norms))


class Attends(torch_models.Attention):
    """An attention that does something else, by name."""

    how = ""

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        how, length = self.how, q.shape[2]
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        at = torch.arange(length)
        seen = at[:, None] >= at
        attention = torch.nn.functional.scaled_dot_product_attention
        weights = (q @ k.mT / 3).masked_fill(~seen, -torch.inf)
        talk = torch.eye(4) + 0.1
        if how == "not causal":
            return attention(q, k, v)
        if how == "two attentions":
            return attention(q, k, v, is_causal=True) - attention(k, q, v, is_causal=True)
        if how == "talking heads by einsum":
            return torch.einsum("bhij,hg->bgij", weights.softmax(-1), talk) @ v
        if how == "talking heads by a product":
            mixed = talk @ weights.softmax(-1).flatten(2)
            return mixed.view(*weights.shape) @ v
        if how == "talking heads by a convolution":
            return torch.nn.functional.conv2d(weights.softmax(-1), talk[:, :, None, None]) @ v
        if how == "a factor after the softmax":
            return (weights.softmax(-1) * 0.5) @ v
        if how == "through numpy":
            return torch.from_numpy(weights.softmax(-1).numpy() ** 2) @ v
        if how == "exponentials by hand":
            high = (weights - weights.amax(-1, keepdim=True)).exp()
            return high / high.sum(-1, keepdim=True) @ v
        if how == "memory keys":
            more = torch.cat([torch.zeros(length, 1), weights.new_zeros(length, 0)], -1)
            scores = torch.cat([more.expand(*weights.shape[:2], -1, -1), weights], -1)
            return scores.softmax(-1)[..., 1:] @ v
        if how == "an operator with a soft cap":
            return torch.ops.sinktrack_tests.capped(q, k, v)
        if how == "linear":
            return (q.unsqueeze(-1) * (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)).sum(-2)
        if how == "heads that see differently":
            mask = seen.repeat(4, 1, 1)
            mask[0] &= at[:, None] - at < 3
            return attention(q, k, v, attn_mask=mask[None])
        if how == "pieces of a sequence":
            parts = [z.reshape(-1, 4, 2, z.shape[-1]) for z in (q, k, v)]
            return attention(*parts, is_causal=True).reshape(q.shape)  # type: ignore[misc]
        if how == "a mask of the learned sort":
            return attention(q, k, v, attn_mask=torch.zeros(length, length))
        raise AssertionError(how)


@torch.library.custom_op("sinktrack_tests::capped", mutates_args=())
def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = 5 * torch.tanh(q @ k.mT / 5)
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("not causal", "not causal"),
        ("a mask of the learned sort", "not causal"),
        ("two attentions", "attends more than once|beside the softmax"),
        ("talking heads by einsum", "changed after the softmax"),
        ("talking heads by a product", "changed after the softmax"),
        ("talking heads by a convolution", "changed after the softmax"),
        ("a factor after the softmax", "changed after the softmax"),
        ("through numpy", "not seen to meet its values"),
        ("exponentials by hand", "no softmax attention was seen"),
        ("memory keys", r"a softmax over \(5, 4, 16, 17\) for tokens \(5, 16\).*memory keys"),
        ("memory keys", "no softmax attention was seen"),
        ("an operator with a soft cap", "capped.* something else than causal softmax"),
        ("linear", "no softmax attention was seen"),
        ("heads that see differently", "heads differ in which queries see P0"),
        ("pieces of a sequence", "chunks of a sequence"),
    ],
)
def test_attention_that_is_not_known_is_refused(
    how: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net(Kind())
    for block in model.layers:
        block.attention.__class__ = Attends
    monkeypatch.setattr(Attends, "how", how)
    with pytest.raises(MeasurementError, match=rf"block 0 \(Block\).*({reason})"):
        measure(model, Probe.random(VOCABULARY, sequences=5, length=16))


def train(steps: int, tracker: Any = None, model: Any = None) -> dict[str, Any]:
    torch.manual_seed(3)
    model = Net(KINDS["stacked experts"]) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(1, steps + 1):
        tokens = torch.randint(VOCABULARY, (4, 12), generator=generator)
        logits = model(tokens)
        dropped = torch.nn.functional.dropout(logits, 0.1)  # draws a random number
        loss = torch.nn.functional.cross_entropy(
            dropped[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if tracker is not None:
            tracker.step(step, model)
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "losses": losses,
        "random": torch.get_rng_state(),
    }


def test_training_is_the_same_to_the_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = train(8)
    tracker = SinkTracker(
        PROBE, tmp_path / "run", every=3, on_error="raise",
        decoder=Decoder(blocks=lambda model: model.layers),
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "sinktrack"):
        tracked = train(8, tracker)
    assert_identical(plain, tracked)
    told = f"Net: {BLOCKS} of {BLOCKS} blocks, SDPA, {HEADS} heads, 5 experts told apart"
    assert told in caplog.text
    records = Run.read(tmp_path / "run").records
    assert [record["step"] for record in records] == [3, 6]
    assert records[-1]["model"]["type"] == "Net"
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert "Net" in shown.output or "blocks" in shown.output


def test_a_compiled_model_trains_on_without_compiling_again(tmp_path: Path) -> None:
    tracker = SinkTracker(PROBE, tmp_path / "run", every=2, on_error="raise")
    own = Net(KINDS["nanochat"])
    model = torch.compile(own, backend="eager")
    train(2, None, model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(5, tracker, model)
    found = measure(model, PROBE)  # type: ignore[arg-type]
    torch.testing.assert_close(found.p0_norm, measure(own, PROBE).p0_norm)
    assert found.model["type"] == "Net"


class Unknown(torch.nn.Module):
    """Two lists of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = Net(Kind()), Net(Kind())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.net(tokens)  # type: ignore[no-any-return]


def test_what_to_write_is_said_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = r"decoder=sinktrack\.Decoder\(blocks=lambda model: model\.net\.layers\)"
    with pytest.raises(MeasurementError, match=line):
        measure(Unknown(), PROBE)
    tracker = SinkTracker(PROBE, tmp_path / "run", every=100)
    tracker.step(1, Unknown())
    assert re.search(line, caplog.text)
    named = Decoder(Unknown(), blocks=lambda model: model.net.layers)
    assert measure(named, PROBE).model["blocks"] == BLOCKS


def test_tokens_beyond_the_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    large = Probe.from_tokens([[1, 2, 3, 4], [4, VOCABULARY + 7, 6, 5]])
    with pytest.raises(ProbeError, match=f"token id {VOCABULARY + 7}"):
        measure(Net(Kind()), large)
    tracker = SinkTracker(large, tmp_path / "run", every=100)
    tracker.step(1, Net(Kind()))
    assert f"token id {VOCABULARY + 7}" in caplog.text


def test_a_forward_that_takes_more_than_tokens() -> None:
    class Picky(Net):
        def forward(self, tokens: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
            return super().forward(tokens) * scale

    with pytest.raises(MeasurementError, match="forward=lambda model, tokens"):
        measure(Picky(Kind()), PROBE)
    named = Decoder(Picky(Kind()), forward=lambda model, tokens: model(tokens, scale=1.0))
    assert measure(named, PROBE).model["type"] == "Picky"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = reading(KINDS["nanochat"], PROBE.tokens)
    exact = measure(model, PROBE)
    found = measure(model.to(dtype), PROBE)
    atol = 0.03 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found.p0_attention, exact.p0_attention, atol=atol, rtol=0)
    assert found.localization.share_sum == pytest.approx(1, abs=0.02)
    heads = [part.share for part in found.localization.parts if part.kind == "head"]
    wanted = [part.share for part in exact.localization.parts if part.kind == "head"]
    assert len(heads) == len(wanted) > 0


def test_several_streams_are_refused() -> None:
    class Streams(torch_models.Block):
        def forward(self, x: Any, value: Any = None, late: Any = None) -> Any:
            return super().forward(x.mean(2))[0].unsqueeze(2) + x, value

    class Wide(Net):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens).unsqueeze(2).expand(-1, -1, 3, -1)
            for block in self.layers:
                x, _ = block(x)
            return self.head(x.mean(2))  # type: ignore[no-any-return]

    model = Wide(Kind())
    for block in model.layers:
        block.__class__ = Streams
    with pytest.raises(MeasurementError, match="hyper-connections"):
        measure(model, PROBE)


def test_one_block_twice_is_refused() -> None:
    model = Net(Kind())
    model.layers[1] = model.layers[0]
    with pytest.raises(MeasurementError, match="several depths"):
        measure(model, PROBE)


def test_an_encoder_layer_of_torch() -> None:
    """``nn.TransformerEncoderLayer``, whose fast path has no functions to see."""

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = torch.nn.Embedding(VOCABULARY, 32)
            layer = torch.nn.TransformerEncoderLayer(32, 4, 64, norm_first=True, batch_first=True)
            self.encoder = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            for value in self.parameters():
                torch.nn.init.normal_(value, std=0.3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
            return self.encoder(self.embed(tokens), mask=mask, is_causal=True)  # type: ignore[no-any-return]

    model, matrices = Encoder().eval(), []
    found = measure(model, PROBE)
    with torch.no_grad():
        x = model.embed(PROBE.tokens)
        hidden = torch.ones(17, 17, dtype=torch.bool).triu(1)
        for layer in model.encoder.layers:
            y = layer.norm1(x)
            wrote, weights = layer.self_attn(
                y, y, y, attn_mask=hidden, need_weights=True, average_attn_weights=False
            )
            matrices.append(weights)
            x = x + wrote
            x = x + layer.linear2(torch.relu(layer.linear1(layer.norm2(x))))
    for block, weights in enumerate(matrices):
        p0 = weights[:, :, 1:, 0].mean(-1)
        torch.testing.assert_close(found.p0_attention_by_sequence[:, block], p0, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.p0_norm[-1], x[:, 0].norm(dim=-1).mean())


@pytest.mark.distributed
@pytest.mark.slow
def test_over_two_processes(tmp_path: Path) -> None:
    """FSDP2 gathers whole weights and is exact; tensor parallelism is refused on both, at once."""
    two_processes(
        tmp_path,
        """
        from tests.helpers import torch_models
        from sinktrack.models.base import adapt
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel, RowwiseParallel, parallelize_module,
        )
        from tests.helpers.torch_models import Kind, Net
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        probe = Probe.random(torch_models.VOCABULARY, sequences=5, length=17)
        for kind in (Kind(qk_norm=True, lambdas=True), Kind(experts="list", shared=True)):
            whole = measure(Net(kind), probe)
            model = Net(kind)
            for block in model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            tracker = SinkTracker(probe, out / str(kind.lambdas), every=1, on_error="raise")
            found = tracker.step(1, model)
            if dist.get_rank() == 0:
                assert found.model == whole.model, found.model
                assert found.weights == whole.weights
                assert torch.equal(found.p0_attention, whole.p0_attention)
                assert torch.equal(found.p0_norm, whole.p0_norm)
                assert found.localization == whole.localization
                assert found.missing == whole.missing
            assert adapt(model).no_causal_tests is None
            train = model(probe.tokens).square().mean()
            train.backward()

        model = Net(Kind())
        for block in model.layers:
            parts = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
            parallelize_module(block, mesh, parts | {"attention.o": RowwiseParallel()})
        model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(AssertionError("ran")))
        try:
            measure(model, probe)
            raise SystemExit("measured")
        except MeasurementError as error:
            assert "tensor" in str(error)
        assert "tensor parallelism" in adapt(model).no_causal_tests
        dist.barrier()
        """,
    )


def test_accelerate(tmp_path: Path) -> None:
    """The lines of the documentation: tokens of all processes, and a clip that shows the loop's."""
    from accelerate import Accelerator

    found = []
    for tracked in (False, True):
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(2)
        plain = Net(KINDS["nanochat"])
        model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters()))
        tracker = SinkTracker(PROBE, tmp_path / "run", every=2, on_error="raise")
        seen = 0
        for step in range(1, 5):
            tokens = torch.randint(VOCABULARY, (4, 12))
            loss = torch.nn.functional.cross_entropy(
                model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            )
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            seen += tokens.numel() * accelerator.num_processes
            if tracked:
                tracker.step(step, model, tokens=seen)
        found.append((plain.state_dict(), torch.get_rng_state()))
    assert_identical(found[0], found[1])
    records = Run.read(tmp_path / "run").records
    assert [(record["step"], record["tokens"]) for record in records] == [(2, 96), (4, 192)]
    assert records[-1]["weights"] == measure(plain, PROBE).weights


@torch.library.custom_op("sinktrack_tests::add_norm", mutates_args=())
def add_norm(write: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = stream + write
    return torch_models.norm(total), total


class Launch(torch.autograd.Function):
    """A kernel's launch, of which no operator is seen."""

    @staticmethod
    def forward(ctx: Any, write: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(write.numpy() + stream.numpy())


class Odd(torch_models.Block):
    """A block that adds in another way, by name; or the same sum plainly."""

    how = ""
    plainly = False

    def forward(self, x: Any, value: Any = None, late: Any = None) -> Any:
        how, plainly, norm = self.how, self.plainly, torch_models.norm
        wrote, value = self.attention(norm(x), value)
        inner = None
        gamma = self.weight * 1.5
        if how == "fused add and norm":
            if plainly:
                x = x + wrote
            else:
                inner, x = torch.ops.sinktrack_tests.add_norm(wrote, x)
        elif how == "lerp":
            x = 0.7 * x + 0.3 * wrote if plainly else torch.lerp(x, wrote, 0.3)
        elif how == "addcmul":
            x = x + gamma * wrote if plainly else torch.addcmul(x, gamma, wrote)
        elif how == "in place":
            if plainly:
                x = 0.5 * (x + wrote)
            else:
                x = x + wrote
                x.mul_(0.5)
        elif how == "stack and sum":
            x = x + wrote if plainly else torch.stack([x, wrote]).sum(0)
        elif how == "a product with the stream as its bias":
            made = torch.nn.functional.gelu(self.mlp.up(norm(x + wrote)))  # type: ignore[operator]
            down = self.mlp.down.weight.T  # type: ignore[union-attr]
            x = x + wrote
            if plainly:
                return x + made @ down, value
            rows = torch.addmm(x.view(-1, x.shape[-1]), made.view(-1, made.shape[-1]), down)
            return rows.view(x.shape), value
        elif how == "a kernel's launch":
            x = x + wrote if plainly else Launch.apply(wrote, x)  # type: ignore[no-untyped-call]
        else:
            raise AssertionError(how)
        return x + self.mlp(norm(x) if inner is None else inner), value


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("fused add and norm", True),
        ("lerp", True),
        ("addcmul", True),
        ("in place", True),
        ("stack and sum", False),
        ("a product with the stream as its bias", False),
        ("a kernel's launch", False),
    ],
)
def test_a_sum_by_other_means_is_the_plain_one(
    how: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the same is written plainly; or nobody's share is told, with the block."""
    for seed in range(40):
        model = Net(Kind(), seed)
        for block in model.layers:
            block.__class__ = Odd
        monkeypatch.setattr(Odd, "how", how)
        monkeypatch.setattr(Odd, "plainly", True)
        plain = measure(model, PROBE)
        if plain.localization.share_sum is not None:
            break
    monkeypatch.setattr(Odd, "plainly", False)
    found = measure(model, PROBE)
    torch.testing.assert_close(found.p0_attention, plain.p0_attention, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.p0_norm, plain.p0_norm)
    if not told:
        assert found.localization.share_sum is None
        assert "block" in found.missing["shares"]
        return
    for one, two in zip(found.localization.shares, plain.localization.shares, strict=True):
        assert (one.kind, one.block) == (two.kind, two.block)
        assert one.share == pytest.approx(two.share, abs=1e-5)


@torch.library.custom_op("sinktrack_tests::flash", mutates_args=())
def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, left: int, right: int
) -> torch.Tensor:
    """``[B, T, H, D]``, grouped queries, a window of ``left`` keys before the query's own."""
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    at = torch.arange(q.shape[2])
    seen = at[:, None] >= at
    if left >= 0:
        seen &= at[:, None] - at <= left
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q.float() @ k.float().mT * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype).transpose(1, 2).contiguous()


class Flash(torch_models.Attention):
    """By an operator that nobody knows, or by torch's."""

    left = -1
    cap = False
    packed = False
    plainly = False

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        if self.plainly:
            kind = torch_models.Kind(window=None if self.left < 0 else self.left + 1)
            self.kind, own = kind, self.kind
            y = super().attend(q, k, v)
            self.kind = own
            return y
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if self.cap:
            return torch.ops.sinktrack_tests.capped_flash(q, k, v).transpose(1, 2)
        scale = q.shape[-1] ** -0.5
        if self.packed:
            rows = (z.flatten(0, 1) for z in (q, k, v))
            ends = torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1], dtype=torch.int32)
            y = torch.ops.sinktrack_tests.packed(*rows, ends, q.shape[1], scale, [self.left, 0])
            return y.unflatten(0, q.shape[:2]).transpose(1, 2)
        return torch.ops.sinktrack_tests.flash(q, k, v, scale, self.left, 0).transpose(1, 2)


@torch.library.custom_op("sinktrack_tests::packed", mutates_args=())
def packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int,
    scale: float, window: list[int],
) -> torch.Tensor:  # fmt: skip
    """``[B * T, H, D]``, each sequence for itself, as kernels of variable lengths take them."""
    pairs = list(itertools.pairwise(ends.tolist()))
    rows = [
        torch.ops.sinktrack_tests.flash(
            *(z[None, start:end] for z in (q, k, v)), scale, window[0], window[1]
        )
        for start, end in pairs
    ]
    return torch.cat([row[0] for row in rows])


@torch.library.custom_op("sinktrack_tests::capped_flash", mutates_args=())
def capped_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """With a soft cap, in the dtype of its arguments."""
    q, k, v = (z.transpose(1, 2).float() for z in (q, k, v))
    k, v = (z.repeat_interleave(q.shape[1] // k.shape[1], 1) for z in (k, v))
    scores = torch.tanh(q @ k.mT * q.shape[-1] ** -0.5)
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    made = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return made.transpose(1, 2).contiguous().to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("left", [-1, 5])
def test_an_operator_is_attention_by_value(
    left: int, packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped queries, a window among its numbers, and sequences in one row."""
    monkeypatch.setattr(Flash, "packed", packed)
    model = Net(Kind()).to(dtype)
    for block in model.layers:
        block.attention.__class__ = Flash
    monkeypatch.setattr(Flash, "left", left)
    monkeypatch.setattr(Flash, "plainly", True)
    plain = measure(model, PROBE)
    monkeypatch.setattr(Flash, "plainly", False)
    found = measure(model, PROBE)
    atol = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.p0_attention, plain.p0_attention, atol=atol, rtol=0)
    assert found.visible_queries == plain.visible_queries
    assert found.block_kinds == plain.block_kinds
    rtol = 2e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.p0_norm, plain.p0_norm, rtol=rtol, atol=0)


def test_an_operator_with_a_soft_cap_is_refused_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its output differs by more than rounding does, though bfloat16 rounds coarsely."""
    model = Net(Kind()).to(torch.bfloat16)
    for block in model.layers:
        block.attention.__class__ = Flash
    monkeypatch.setattr(Flash, "cap", True)
    with pytest.raises(MeasurementError, match="something else than causal softmax"):
        measure(model, PROBE)


@pytest.mark.parametrize("how", ["every other checkpointed", "compiled", "both"])
def test_blocks_that_are_wrapped_are_found(how: str) -> None:
    """As selective activation checkpointing and compilation of each block leave them."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Net(Kind())
    wanted = measure(model, PROBE)
    for number, block in enumerate(model.layers):
        if how != "compiled" and number % 2:
            model.layers[number] = checkpoint_wrapper(block)
        if how != "every other checkpointed":
            model.layers[number] = cast(
                torch.nn.Module, torch.compile(model.layers[number], backend="eager")
            )
    found = measure(model, PROBE)
    assert torch.equal(found.p0_attention, wanted.p0_attention)
    assert found.localization == wanted.localization


def test_a_kernel_of_half_precision_alone_says_how_to_go_on() -> None:
    """As flash attention in a model of float32 weights that trains under autocast."""

    def forward(model: Any, tokens: torch.Tensor) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return model(tokens)

    model = Net(Kind())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(MeasurementError, match="open torch.autocast within forward= of"),
    ):
        measure(Decoder(model, forward=forward), PROBE)

    def opened(model: Any, tokens: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(model, tokens)

    found = measure(Decoder(model, forward=opened), PROBE)
    plain = measure(model, PROBE)
    torch.testing.assert_close(found.p0_attention, plain.p0_attention, atol=2e-2, rtol=0)


def test_experts_that_cannot_be_told_apart_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start, in the record and in ``show``; and how it ended."""

    class Biased(torch_models.Experts):
        def __init__(self, own: torch_models.Experts) -> None:
            torch.nn.Module.__init__(self)
            self.__dict__.update(own.__dict__)
            self.bias = torch.nn.Parameter(torch.zeros(torch_models.EXPERTS, torch_models.WIDTH))

        def one(self, expert: int, x: torch.Tensor) -> torch.Tensor:
            return super().one(expert, x) + self.bias[expert]

    model = reading(Kind(experts="stacked"), PROBE.tokens)
    for block in model.layers:
        block.mlp = Biased(block.mlp)  # type: ignore[arg-type]
    tracker = SinkTracker(PROBE, tmp_path / "run", every=2, on_error="raise")
    with caplog.at_level(logging.INFO, "sinktrack"):
        tracker.step(1, model)
        tracker.step(2, model)
        tracker.finish()
    assert "5 experts; block 0 (Block): its experts are one MLP here" in caplog.text
    assert "1 records written" in caplog.text and "0 probes failed" in caplog.text
    (record,) = Run.read(tmp_path / "run").records
    assert "one MLP" in record["missing"]["parts"]
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "run")])
    assert "its experts are one MLP here" in " ".join(shown.output.split()), shown.output


class Soft(torch_models.Experts):
    """All experts write; a top-k only counts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = torch.softmax(self.router(x), -1)
        self.load = gates.topk(torch_models.CHOSEN, -1).indices.flatten().bincount()
        return sum(gates[..., i, None] * self.one(i, x) for i in range(torch_models.EXPERTS))  # type: ignore[return-value]


class Normed(torch_models.Experts):
    """A norm over the sum of experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch_models.norm(super().forward(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", ["any", "one"])
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (None, "list"),
        ("shared", "list"),
        ("shared", "stacked"),
        (Soft, "list"),
        (Normed, "stacked"),
    ],
)
def test_experts_told_apart_make_the_sum(kind: Any, how: str, first: str, dtype: Any) -> None:
    """Whatever the dtype, and where every sequence chooses the same ones."""
    model = Net(Kind(experts=how, shared=kind == "shared")).to(dtype)
    if isinstance(kind, type):
        for block in model.layers:
            block.mlp.__class__ = kind
    tokens = PROBE.tokens.clone()
    if first == "one":
        tokens[:, 0] = 3
    probe = Probe.from_tokens(tokens)
    reason = measure(model, probe).missing.get("parts")
    read: list[torch.Tensor] = []

    class Reads(Edit):
        def write(self, block: int, write: Any, rows: Any) -> None:
            if write.routed is not None:
                read.append(write.routed.total())

    with replaying(Decoder(model), probe) as replay:
        if isinstance(kind, type):
            assert reason is not None and "one MLP here" in reason
            assert "no sum" in reason or "did not choose it" in reason
            with pytest.raises(MeasurementError, match="no sum|did not choose it"):
                replay.run([Reads()])
        else:
            assert reason is None
            replay.run([Reads()])
            assert len(read) == BLOCKS


def test_experts_whose_module_adds_to_the_stream() -> None:
    """As gpt-oss's reference code: shares stand, and its experts are one MLP."""

    class Adds(torch.nn.Module):
        def __init__(self, own: Any) -> None:
            super().__init__()
            self.own = own

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.own.__class__.forward(self.own, torch_models.norm(x))  # type: ignore[no-any-return]

    class Own(torch_models.Block):
        def forward(self, x: torch.Tensor, *_: Any) -> Any:
            made, value = self.attention(torch_models.norm(x), None)
            return self.mlp(x + made), value

    model = reading(Kind(experts="list"), PROBE.tokens)
    hand = shares(by_hand(model, PROBE.tokens))[0]
    for block in model.layers:
        block.__class__ = Own
        block.mlp = Adds(block.mlp)
    found = measure(model, PROBE)
    assert "one MLP here: Adds adds what they write to the stream itself" in found.missing["parts"]
    told = {share.block: share.share for share in found.localization.shares if share.kind == "mlp"}
    assert told == pytest.approx(
        {
            block: share
            for (kind, block), share in (
                (key, value) for key, value in hand.items() if key != "embedding"
            )
            if kind == "mlp"
        },
        abs=1e-5,
    )


def test_a_block_that_is_several_modules() -> None:
    """As in packages that keep sublayers in one long list."""

    class Sub(torch.nn.Module):
        def __init__(self, block: torch_models.Block, first: bool) -> None:
            super().__init__()
            self.block, self.first = (block.attention if first else block.mlp), first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = self.block(torch_models.norm(x), *([None] if self.first else []))
            return x + (made[0] if self.first else made)  # type: ignore[no-any-return]

    class Long(torch.nn.Module):
        def __init__(self, own: Net) -> None:
            super().__init__()
            self.embed, self.start = own.embed, own.start
            parts = [Sub(block, first) for block in own.layers for first in (True, False)]  # type: ignore[arg-type]
            self.parts = torch.nn.ModuleList(parts)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            x = torch.cat([x[:, :1] + self.start, x[:, 1:]], 1)
            for part in self.parts:
                x = part(x)
            return x  # type: ignore[no-any-return]

    whole = reading(Kind(), PROBE.tokens)
    model = Long(whole)
    decoder = Decoder(
        model, blocks=lambda model: list(zip(model.parts[::2], model.parts[1::2], strict=True))
    )
    check(measure(decoder, PROBE), whole, PROBE.tokens)
    with pytest.raises(MeasurementError, match=r"block 1 \(Sub\): no softmax attention"):
        measure(model, PROBE)


def test_a_router_that_takes_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """``max`` in place of ``topk``: parts are told, and make the MLP's share."""

    def choose(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.softmax(self.router(x), -1).max(-1, keepdim=True)

    model = reading(Kind(experts="list"), PROBE.tokens)
    monkeypatch.setattr(torch_models.Experts, "choose", choose)
    found = measure(model, PROBE)
    assert "parts" not in found.missing
    assert found.model["experts"] == torch_models.EXPERTS
    for whole in found.localization.shares:
        if whole.kind == "mlp" and abs(whole.share) > 1e-9:
            parts = [
                part.share for part in found.localization.parts
                if part.kind == "expert" and part.block == whole.block
            ]  # fmt: skip
            assert sum(parts) == pytest.approx(whole.share, abs=1e-5)


def test_fabric_is_looked_through(tmp_path: Path) -> None:
    """As litgpt wraps its models, compiled or not."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    own = Net(KINDS["nanochat"])
    for given in (own, torch.compile(own, backend="eager")):
        model = fabric.setup(given)  # type: ignore[arg-type]
        found = measure(model, PROBE)
        assert found.model["type"] == "Net"
        assert found.weights == measure(own, PROBE).weights
