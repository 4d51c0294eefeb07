"""Modules whose output torch does not see being computed, as those of a C++ extension.

Their arithmetic runs where no mode sees it, which is how such an extension's does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinktrack import Decoder, MeasurementError, Probe, measure
from sinktrack.interventions.patching import Patch, Term
from sinktrack.interventions.replay import replaying
from tests.helpers import planted, torch_models
from tests.helpers.torch_models import KINDS, VOCABULARY, WIDTH, Kind, Net, norm, reading
from tests.models.test_any_decoder import check

PROBE = Probe.random(VOCABULARY, sequences=5, length=17)


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return F.linear(input, self.weight, self.bias)


class Twice(Linear):
    def forward(self, input: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return 2 * super().forward(input)


def unseen(name: str) -> Net:
    """A model all of whose linear layers are out of sight."""
    model = reading(KINDS[name], PROBE.tokens)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model


@pytest.mark.parametrize("name", KINDS)
def test_linear_layers(name: str) -> None:
    """Heads too, by the layer's own weight, and experts."""
    model = unseen(name)
    found = measure(model, PROBE)
    check(found, model, PROBE.tokens)
    assert not found.missing


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [True, False])
def test_dtypes(out: bool, dtype: torch.dtype) -> None:
    """The same parts as in torch's sight."""
    model = unseen("plain") if out else reading(KINDS["plain"], PROBE.tokens)
    found, wanted = (
        measure(net.to(dtype), PROBE) for net in (model, reading(KINDS["plain"], PROBE.tokens))
    )
    assert not found.missing
    assert found.localization == wanted.localization
    assert any(part.kind == "head" for part in found.localization.parts)


def planted_model() -> Any:
    model = planted.dense()
    planted.head_writer(model, 0, 1)
    planted.reader(model, 1)
    return model


@pytest.mark.parametrize("doubled", [False, True])
def test_in_transformers(doubled: bool) -> None:
    """Heads where the layer's weight makes its output by value, else nothing of shares."""
    probe, model = planted.probe(), planted_model()
    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    for block in model.model.layers if doubled else ():
        block.self_attn.o_proj.__class__ = Twice
    wanted = measure(planted_model(), probe).localization
    assert any(part.kind == "head" for part in wanted.parts)
    found = measure(model, probe)
    if doubled:
        assert found.localization.share_sum is None
        assert "attention's output was not seen" in found.missing["shares"]
    else:
        assert found.localization == wanted


def test_in_batches() -> None:
    """What was shown before modules were asked is shown once."""
    whole, parts = measure(unseen("plain"), PROBE), measure(unseen("plain"), PROBE, batch_size=2)
    assert len(parts.p0_attention_by_sequence) == PROBE.sequences
    torch.testing.assert_close(whole.p0_norm, parts.p0_norm)
    assert parts.localization.share_sum == pytest.approx(1, abs=1e-5)


def test_an_edited_pass() -> None:
    """As that of the same model in torch's sight."""
    outcomes = []
    for model in (unseen("plain"), reading(KINDS["plain"], PROBE.tokens)):
        with replaying(Decoder(model), PROBE) as replay:
            replay.plain({1})
            first = torch.zeros(PROBE.sequences, dtype=torch.long)
            edits = [Patch([Term(kind, 1)], first, "zero") for kind in ("attention", "mlp")]
            outcomes.append(replay.run(edits, loss=True))
    for one, two in zip(*outcomes, strict=True):
        torch.testing.assert_close(one.norm_ratio, two.norm_ratio)
        torch.testing.assert_close(one.loss, two.loss)


class Fused(nn.Module):
    """Adds to the stream, and gives its norm beside it."""

    def forward(self, x: Tensor, wrote: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch._C.DisableTorchFunction():
            total = x + wrote
            return norm(total), {"stream": total}


class Dense(torch_models.Dense):
    """An MLP whose norm is its own."""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return super().forward(norm(x))


class Block(torch_models.Block):
    def forward(self, x: Any, value: Any = None, late: Any = None) -> Any:
        wrote, value = self.attention(norm(x), value)
        fused: Any = getattr(self, "fused", None)
        if fused is not None:
            normed, beside = fused(x, wrote)
            return beside["stream"] + self.mlp(normed), value
        x = x + wrote
        return x + self.mlp(x), value


@pytest.mark.parametrize("fused", [False, True])
def test_fused(fused: bool) -> None:
    """A norm and an MLP as one module of the stream; a norm that adds the attention's write."""
    model = reading(KINDS["plain"], PROBE.tokens)
    block: Any
    for block in model.layers:
        block.__class__ = Block
        block.fused = Fused() if fused else None
        if not fused:
            block.mlp.__class__ = Dense
    found = measure(model, PROBE)
    check(found, model, PROBE.tokens)
    assert not found.missing
    first = torch.zeros(PROBE.sequences, dtype=torch.long)
    for kind in ("attention", "mlp"):
        with replaying(Decoder(model), PROBE) as replay:
            replay.plain({1})
            edit = Patch([Term(kind, 1)], first, "zero")
            if fused and kind == "attention":
                with pytest.raises(MeasurementError, match="Fused adds a write out of torch's"):
                    replay.run([edit], loss=True)
            else:
                assert replay.run([edit], loss=True)


ROOM: dict[Any, list[Tensor]] = {}


class Odd(torch_models.Dense):
    """An MLP that does something else out of sight, by name."""

    how = ""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return self.odd(x)

    def odd(self, x: Tensor) -> Tensor:
        how, own = self.how, super().forward
        if how == "stream and residual":
            return x + own(norm(x))
        if how == "a thousandth of the stream":
            return 1e-3 * x + own(norm(x))
        if how == "the stream at P0":
            return torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], 1) + own(norm(x))
        if how == "the stream, in place":
            wrote = own(norm(x))
            x.mul_(1.1)
            return wrote
        if how == "half of the stream":
            return x / 2
        if how == "the memory of its input":
            return x.view(x.shape)
        if how == "constants":
            return torch.linspace(-1, 1, x.numel()).view(x.shape)
        if how == "another position":
            return own(norm(x)).roll(4, 1)
        if how == "all positions":
            return own(norm(x)) + norm(x).mean((0, 1))
        if how == "attention":
            return F.scaled_dot_product_attention(norm(x), norm(x), x, is_causal=True)
        if how == "what it gave before":
            return ROOM.setdefault((id(self), x.shape), [own(norm(x))])[0]
        if how == "by chance":
            return own(norm(x)) * (1 + 0.1 * torch.rand_like(x))
        kept = ROOM.setdefault((how, x.shape), [torch.empty(x.shape) for _ in range(3)])
        if how == "memory of all blocks":
            return kept[0].copy_(own(norm(x)))
        if how == "memory by turns":
            kept.append(kept.pop(0))
            return kept[-1].copy_(own(norm(x)))
        raise AssertionError(how)


HOWS = (
    "stream and residual", "a thousandth of the stream", "the stream at P0",
    "the stream, in place", "half of the stream", "the memory of its input", "constants",
    "another position", "all positions", "attention", "what it gave before", "by chance",
    "memory of all blocks", "memory by turns",
)  # fmt: skip


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("raw", [True, False])
def test_what_is_no_write_is_null(how: str, raw: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the stream itself, or of a norm of it; norms stand, by the blocks' own inputs."""
    if not raw and "stream" in how:
        pytest.skip("it does not get the stream")
    ROOM.clear()
    monkeypatch.setattr(Odd, "how", how)
    model = reading(Kind(), PROBE.tokens)
    for block in model.layers:
        block.mlp.__class__ = Odd
        if raw:
            block.__class__ = Block
    found = measure(model, PROBE)
    assert found.localization.share_sum is None
    assert found.localization.parts == ()
    assert "block" in found.missing["shares"], found.missing
    assert "reads P0" not in found.missing["shares"], found.missing
    if how != "by chance":
        ROOM.clear()
        taken: list[Tensor] = []
        for block in model.layers:
            block.register_forward_pre_hook(lambda _, args: taken.append(args[0].clone()))
        with torch.no_grad():
            model(PROBE.tokens)
        norms = torch.stack([state[:, 0].norm(dim=-1).mean() for state in taken])
        torch.testing.assert_close(found.p0_norm[:-1], norms)


class Joined(torch_models.Block):
    """What attention and MLP write leaves it by one module."""

    last: Any

    def forward(self, x: Any, value: Any = None, late: Any = None) -> Any:
        wrote, value = self.attention(norm(x), value)
        return x + self.last(wrote + self.mlp(norm(x))), value


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return 2 * x


def test_attention_and_mlp_through_one_module() -> None:
    """Which of them writes what cannot be told."""
    model = reading(Kind(), PROBE.tokens)
    for block in model.layers:
        block.__class__, block.last = Joined, Doubled()
    found = measure(model, PROBE)
    assert found.localization.share_sum is None
    assert "attention's output was not seen" in found.missing["shares"]


class Attends(torch_models.Attention):
    """Values meet their probabilities out of sight."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~torch.ones(17, 17).tril().bool(), -torch.inf).softmax(-1)
        with torch._C.DisableTorchFunction():
            mixed: Tensor = weights @ v
            return mixed


def test_values() -> None:
    model = Net(Kind())
    for block in model.layers:
        block.attention.__class__ = Attends
    with pytest.raises(MeasurementError, match="were not seen to meet its values"):
        measure(model, PROBE)


class Counting(Linear):
    """Notes how often it ran, and on what."""

    largest: Tensor

    def __init__(self) -> None:
        super().__init__(48, WIDTH, bias=False)
        self.ran = 0
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.ran += 1
        self.largest.copy_(torch.maximum(self.largest, input.detach().abs().max()))
        return super().forward(input)


def test_state() -> None:
    """What an asked module notes is as it was."""
    model = Net(Kind())
    block: Any
    for block in model.layers:
        block.mlp.down = Counting()
    model(PROBE.tokens)
    down = block.mlp.down
    ran, largest = down.ran, down.largest.clone()
    assert "out of" not in measure(model, PROBE).missing.get("shares", "")
    assert down.ran == ran
    assert torch.equal(down.largest, largest)
