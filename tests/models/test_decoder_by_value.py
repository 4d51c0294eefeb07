"""Any PyTorch decoder: what is told apart, or refused, by what its tensors hold."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sinktrack import Decoder, MeasurementError, Probe, measure
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.interventions.replay import Edit, replaying
from sinktrack.models.any_decoder import experts
from sinktrack.models.any_decoder.passes import check as start_line
from tests.helpers import torch_models
from tests.helpers.elsewhere import elsewhere
from tests.helpers.torch_models import (
    EXPERTS,
    HEADS,
    VOCABULARY,
    WIDTH,
    Kind,
    Net,
    by_hand,
    norm,
    reading,
)  # fmt: skip
from tests.models.test_any_decoder import PROBE, check


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


# Where the keys stand


def scores(q: Any, k: Any) -> Any:
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~causal(q.shape[2]), -torch.inf)


def flipped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (value.flip(2) for value in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).flip(2)


def rolled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (torch.cat([value[:, :, -1:], value[:, :, :-1]], 2) for value in (k, v))
    return scores(q, k).softmax(-1) @ v  # type: ignore[no-any-return]


def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (F.pad(value, (0, 0, 1, 0))[:, :, :-1] for value in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def zero_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (F.pad(value, (0, 0, 1, 0)) for value in (k, v))
    seen = F.pad(causal(q.shape[2]), (1, 0), value=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def later_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (F.pad(value, (0, 0, 0, 1)) for value in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    total = scores(q, k).logsumexp(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True) * torch.sigmoid(total - 1)


def by_largest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    own = scores(q, k)
    return (own.softmax(-1) @ v) / (1 + (-own.amax(-1, keepdim=True)).exp())  # type: ignore[no-any-return]


def by_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, "cpu")
    made, total = flex_attention(q, k, v, block_mask=mask, return_lse=True)
    return made * torch.sigmoid(total - 0.5)[..., None]


class Attends(torch_models.Attention):
    own: Callable[[Tensor, Tensor, Tensor], Tensor]

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        return type(self).own(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (flipped, "positions in another order"),
        (rolled, "positions in another order"),
        (shifted, "the same for all tokens"),
        (zero_key, "over 18 keys for 17 positions"),
        (later_key, "over 18 keys for 17 positions"),
        (by_logsumexp, "what their scores add up to"),
        (by_largest, "what their scores add up to"),
        (by_flex, "what their scores add up to"),
    ],
)
def test_another_attention_than_over_the_keys_in_order(own: Any, reason: str) -> None:
    model = Net(Kind())
    for block in model.layers:
        block.attention.__class__ = type("Own", (Attends,), {"own": staticmethod(own)})
    with pytest.raises(MeasurementError, match=rf"block 0 \(Block\).*{reason}"):
        measure(model, PROBE)
    with pytest.raises(MeasurementError, match=rf"block 0 \(Block\).*({reason}|over 9 keys)"):
        start_line(Decoder(model), PROBE)


def test_tokens_that_are_read_from_their_end() -> None:
    class Reversed(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens.flip(1)).flip(1)

    with pytest.raises(MeasurementError, match="reads its tokens in another order"):
        measure(Reversed(Kind()), PROBE)


# Which tensor is the stream


class Beside(torch_models.Block):
    """It takes something else of the stream's size first."""

    def forward(self, x: Tensor, value: Any = None, late: Any = None) -> Any:
        assert x.isfinite().all()
        return super().forward(value)


class Embedded(Net):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = torch.cat([x[:, :1] + self.start, x[:, 1:]], 1)
        other = norm(self.embed(tokens).flip(-1))
        for block in self.layers:
            x, _ = block(other, x)
        return self.head(norm(x))  # type: ignore[no-any-return]


def test_the_stream_need_not_come_first() -> None:
    model = reading(Kind(), PROBE.tokens)
    wanted = measure(model, PROBE)
    model.__class__ = Embedded
    for block in model.layers:
        block.__class__ = Beside
    found = measure(model, PROBE)
    torch.testing.assert_close(found.p0_norm, wanted.p0_norm)
    torch.testing.assert_close(found.p0_attention, wanted.p0_attention)


def test_two_streams_are_refused() -> None:
    class Reversible(torch_models.Block):
        def forward(self, x: Tensor, y: Any = None, late: Any = None) -> Any:
            x = x + self.attention(norm(y), None)[0]
            return x, y + self.mlp(norm(x))

    class Two(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            y = x * 0.5
            for block in self.layers:
                x, y = block(x, y)
            return self.head(norm(x + y))  # type: ignore[no-any-return]

    model = Two(Kind())
    for block in model.layers:
        block.__class__ = Reversible
    with pytest.raises(MeasurementError, match=r"block 0 \(Reversible\): 2 tensors.*side by side"):
        measure(model, PROBE)


# Sublayers side by side


class Beneath(torch_models.Block):
    """Attention and MLP added up, and then changed as a whole, by name."""

    how = ""
    plainly = False

    def forward(self, x: Tensor, value: Any = None, late: Any = None) -> Any:
        wrote, value = self.attention(norm(x), value)
        made = self.mlp(norm(x))
        how, gain = self.how, 0.1 * self.weight + torch.arange(WIDTH) / WIDTH
        one, two = {
            "scaled": (0.5, 0.5), "divided": (0.5, 0.5), "twice": (1.5, 1.5), "difference": (1, -1),
            "lerp": (0.7, 0.3), "alpha": (1, 0.25), "channels": (gain, gain),
            "in place": (0.5, 0.5), "parts first": (0.1, 0.2),
        }[how]  # fmt: skip
        if self.plainly:
            return x + wrote * one + made * two, value
        if how == "scaled":
            total = 0.5 * (wrote + made)
        elif how == "divided":
            total = (wrote + made) / 2
        elif how == "twice":
            total = (wrote + made) * 0.5 * 3
        elif how == "difference":
            total = wrote - made
        elif how == "lerp":
            total = torch.lerp(wrote, made, 0.3)
        elif how == "alpha":
            total = torch.add(wrote, made, alpha=0.25)
        elif how == "channels":
            total = gain * (wrote + made)
        elif how == "parts first":
            total = (wrote * 0.2 + made * 0.4) * 0.5
        else:
            wrote += made
            wrote *= 0.5
            total = wrote
        return x + total, value


@pytest.mark.parametrize(
    ("how", "experts"),
    [
        ("scaled", None), ("scaled", "list"), ("divided", None), ("twice", None),
        ("difference", None), ("lerp", None), ("alpha", None), ("channels", None),
        ("in place", None), ("parts first", None),
    ],
)  # fmt: skip
def test_factors_over_sublayers_side_by_side(
    how: str, experts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where each is multiplied for itself."""
    monkeypatch.setattr(Beneath, "how", how)
    for seed in range(20):
        model = Net(Kind(experts=experts), seed)
        for block in model.layers:
            block.__class__ = Beneath
        monkeypatch.setattr(Beneath, "plainly", True)
        plain = measure(model, PROBE)
        if plain.localization.share_sum is not None:
            break
    monkeypatch.setattr(Beneath, "plainly", False)
    found = measure(model, PROBE)
    assert found.localization.share_sum == pytest.approx(1, abs=1e-5)

    def of(measured: Any) -> dict[Any, float]:
        local = measured.localization
        return {
            (part.kind, part.block, getattr(part, "index", None)): part.share
            for part in (*local.shares, *local.parts)
        }

    assert of(found) == pytest.approx(of(plain), abs=2e-5)


# Routers


def by_argmax(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.softmax(self.router(x), -1)
    index = share.argmax(-1, keepdim=True)
    return share.gather(-1, index), index


def by_sort(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    gate, index = torch.softmax(self.router(x), -1).sort(-1, descending=True)
    gate, index = gate[:, :2], index[:, :2]
    return gate / gate.sum(-1, keepdim=True), index


def by_argsort(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.softmax(self.router(x), -1)
    index = share.argsort(-1)[:, -2:]
    gate = share.gather(-1, index)
    return gate / gate.sum(-1, keepdim=True), index


def by_two(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.softmax(self.router(x), -1)
    first = share.argmax(-1, keepdim=True)
    second = share.scatter(-1, first, -1.0).argmax(-1, keepdim=True)
    index = torch.cat([first, second], -1)
    gate = share.gather(-1, index)
    return gate / gate.sum(-1, keepdim=True), index


def by_kth(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.softmax(self.router(x), -1)
    index = torch.stack([share.kthvalue(EXPERTS - n, -1).indices for n in range(2)], -1)
    gate = share.gather(-1, index)
    return gate / gate.sum(-1, keepdim=True), index


@pytest.mark.parametrize("how", ["list", "stacked"])
@pytest.mark.parametrize("choose", [by_sort, by_argsort, by_two, by_kth])
def test_the_two_best_by_other_means_than_topk(
    choose: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every expert's part is that of the arithmetic by hand."""
    model = reading(Kind(experts=how), PROBE.tokens)
    monkeypatch.setattr(torch_models.Experts, "choose", choose)
    found = measure(model, PROBE)
    assert "parts" not in found.missing
    check(found, model, PROBE.tokens)
    hand = by_hand(model, PROBE.tokens)
    read: dict[Any, Tensor] = {}

    class Reads(Edit):
        def write(self, block: int, write: Any, rows: Any) -> None:
            if write.routed is not None:
                assert write.routed.index.shape[-1] == 2
                for expert in range(EXPERTS):
                    read[block, expert] = write.part("expert", expert)[rows, 0]

    with replaying(Decoder(model), PROBE) as replay:
        replay.run([Reads()])
    for (block, expert), part in read.items():
        own = hand.parts["expert", block, expert]
        atol = 2e-6 * float(own.abs().max() + 1)
        torch.testing.assert_close(part.double(), own, rtol=1e-4, atol=atol)


def test_the_best_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(Kind(experts="list", shared=True))
    monkeypatch.setattr(torch_models.Experts, "choose", by_argmax)
    found = measure(model, PROBE)
    assert "parts" not in found.missing
    assert found.model["experts"] == EXPERTS
    assert "5 experts told apart" in start_line(Decoder(model), PROBE)


def apart() -> Probe:
    """Of first tokens that go to different experts."""
    generator = torch.Generator().manual_seed(0)
    return Probe.from_tokens(torch.randint(VOCABULARY, (8, 17), generator=generator))


def test_experts_that_are_left_out_together() -> None:
    """No row chose two of a group, and one row shows that they act on no other."""
    chosen = torch.tensor([[0, 1], [2, 3], [4, 5], [0, 3], [6, 7]])
    groups = experts._groups(chosen)
    assert sorted(expert for group in groups for expert in group) == list(range(8))
    assert len(groups) < 5
    for group in groups:
        out = torch.isin(chosen, torch.tensor(group)).sum(-1)
        assert out.max() == 1 and out.min() == 0


@pytest.mark.parametrize("how", ["list", "stacked"])
def test_many_experts_at_once_are_those_one_by_one(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_models, "EXPERTS", 16)
    runs = []
    groups_of = experts._groups

    def groups(chosen: Tensor) -> list[list[int]]:
        runs.append((len(found := groups_of(chosen)), len(chosen.unique())))
        return found

    monkeypatch.setattr(experts, "_groups", groups)
    probe = apart()
    for seed in range(40):
        model = Net(Kind(experts=how), seed)
        model.embed.weight.data.mul_(8)  # else all first tokens choose the same
        if torch_models.read(by_hand(model, probe.tokens))[-1] > 0.02:
            break
    found = measure(model, probe)
    assert "parts" not in found.missing
    check(found, model, probe.tokens)
    assert any(together < alone for together, alone in runs)


@pytest.mark.parametrize("how", ["list", "stacked"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_choice_of_others_than_were_seen(
    turned: bool, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts that run are others than the topk gave: they are one MLP."""

    def choose(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, index = torch.softmax(self.router(x), -1).topk(2, -1)
        index = (index + 1) % 16 if turned else torch.randperm(16, generator=seeded())[index]
        return gate, index

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    monkeypatch.setattr(torch_models, "EXPERTS", 16)
    monkeypatch.setattr(torch_models.Experts, "choose", choose)
    missing = measure(Net(Kind(experts=how)), apart()).missing
    assert "one MLP" in missing["parts"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("how", ["list", "stacked"])
@pytest.mark.parametrize("inside", [False, True])
def test_one_expert_under_a_norm_is_one_mlp(
    inside: bool, how: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Normed(torch_models.Experts):
        def forward(self, x: Tensor) -> Tensor:
            made = super().forward(x)
            return norm(made) if inside else made

    model = Net(Kind(experts=how, shared=shared))
    monkeypatch.setattr(torch_models, "CHOSEN", 1)  # by topk
    for block in model.layers:
        block.mlp.__class__ = Normed
    missing = measure(model, PROBE).missing
    assert ("no sum" in missing["parts"]) if inside else ("parts" not in missing)


def test_a_choice_that_is_not_seen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_numpy(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.softmax(self.router(x), -1)
        index = torch.from_numpy(share.detach().numpy().argsort(-1)[:, -2:].copy())
        return share.gather(-1, index), index

    model = Net(Kind(experts="list"))
    monkeypatch.setattr(torch_models.Experts, "choose", by_numpy)
    said = "Experts holds 5 modules alike, of which some run on some tokens alone"
    found = measure(model, PROBE)
    assert said in found.missing["parts"]
    assert found.model["experts"] == EXPERTS
    assert said in start_line(Decoder(model), PROBE)


def test_what_an_attention_chooses_is_no_expert() -> None:
    """An indexer's keys, as in sparse attention: no number of experts, and no word of them."""

    class Sparse(torch_models.Attention):
        def attend(self, q: Any, k: Any, v: Any) -> Any:
            k, v, length = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), q.shape[2]
            best = (q.mean(1) @ k.mean(1).mT).masked_fill(~causal(length), -1e9)
            best = best.topk(min(6, length), -1).indices
            seen = torch.zeros(len(q), length, length, dtype=torch.bool).scatter(-1, best, True)
            seen = (seen | torch.eye(length, dtype=torch.bool)) & causal(length)
            seen[:, :, 0] = True
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])

    model = Net(Kind())
    for block in model.layers:
        block.attention.__class__ = Sparse
    found = measure(model, PROBE)
    assert found.model["experts"] is None
    assert "parts" not in found.missing


# Said at once


def test_the_start_line_comes_before_a_first_probe_too(tmp_path: Path, caplog: Any) -> None:
    """And where all sequences begin with one token."""
    tokens = PROBE.tokens.clone()
    tokens[:, 0] = 3
    tracker = SinkTracker(Probe.from_tokens(tokens), tmp_path, every=2, on_error="raise")
    with caplog.at_level(logging.INFO, "sinktrack"):
        for step in range(3):
            tracker.step(step, Net(Kind()))
    assert caplog.text.count("Net: 4 of 4 blocks, SDPA, 4 heads") == 1


# Refused by name


def test_a_model_that_is_split_over_devices() -> None:
    with elsewhere() as move:
        model = Net(Kind())
        move(model.layers[2])
        wanted = r"split over devices \(.* on cpu and .* on cuda"
        with pytest.raises(MeasurementError, match=wanted):
            measure(model, PROBE)


def changed_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1).mul_(0.5) @ v  # type: ignore[no-any-return]


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A convolution of one place over the scores' heads, which changes none."""
    same = torch.eye(HEADS)[..., None, None].to(q)
    mixed = F.conv2d(q @ k.mT * q.shape[-1] ** -0.5, same)
    return mixed.masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1) @ v


def over_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A convolution of two places over the values, of which the last counts."""
    wide = F.pad(v.transpose(2, 3).flatten(1, 2), (1, 0))
    kernel = torch.tensor([0.0, 1.0]).expand(wide.shape[1], 1, 2).contiguous()
    v = F.conv1d(wide, kernel, groups=wide.shape[1]).unflatten(1, (HEADS, -1)).transpose(2, 3)
    return scores(q, k).softmax(-1) @ v  # type: ignore[no-any-return]


def positions_as_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A convolution of one place that maps the positions."""
    wide = v.transpose(1, 2).flatten(2)
    v = F.conv1d(wide, torch.eye(v.shape[2])[..., None]).unflatten(2, (HEADS, -1)).transpose(1, 2)
    return scores(q, k).softmax(-1) @ v  # type: ignore[no-any-return]


def attending(own: Any, monkeypatch: pytest.MonkeyPatch, kind: type[Net] = Net) -> Net:
    model = reading(Kind(), PROBE.tokens)
    model.__class__ = kind
    for block in model.layers:
        block.attention.__class__ = Attends
    monkeypatch.setattr(Attends, "own", staticmethod(own), raising=False)
    return model


class Inference(Net):
    """Its pass counts no changes in place, as that of models written for inference."""

    @torch.inference_mode()
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)


def test_a_pass_under_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).softmax(-1) @ v  # type: ignore[no-any-return]

    model = attending(plain, monkeypatch, Inference)
    found = measure(model, PROBE)
    model.__class__ = Net
    check(found, model, PROBE.tokens)
    model.__class__ = Inference
    monkeypatch.setattr(Attends, "own", staticmethod(changed_in_place))
    with pytest.raises(MeasurementError, match="changed after the softmax"):
        measure(model, PROBE)


def test_a_convolution_of_one_place_mixes_no_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attending(over_heads, monkeypatch)
    check(measure(model, PROBE), model, PROBE.tokens)
    for own in (over_positions, positions_as_channels):
        model = attending(own, monkeypatch)
        assert "conv1d mixes positions" in measure(model, PROBE).missing["shares"]


def test_a_model_whose_weights_are_out_of_sight() -> None:
    """As Keras's are, until it is asked for them."""

    class Hidden(Net):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return iter(())

    model = reading(Kind(), PROBE.tokens)
    expected = measure(model, PROBE)
    model.__class__ = Hidden
    assert torch.equal(measure(model, PROBE).p0_attention, expected.p0_attention)


def test_modules_of_torchscript() -> None:
    model = Net(Kind())
    model.layers[1].mlp = torch.jit.trace(model.layers[1].mlp, torch.randn(3, WIDTH))
    with pytest.raises(MeasurementError, match="compiled by TorchScript"):
        measure(model, PROBE)


def test_a_model_that_wants_more_than_two_tokens() -> None:
    class Picks(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            self.embed(tokens).sum(-1).topk(5, 1)
            return super().forward(tokens)

    with pytest.raises(MeasurementError, match=r"does not run on tokens .*, two as each first"):
        measure(Picks(Kind()), PROBE)


def test_heads_of_branches_in_half_precision_are_told() -> None:
    """Under a stream of full precision."""

    class Half(torch_models.Block):
        def forward(self, x: Tensor, value: Any = None, late: Any = None) -> Any:
            x = x + self.attention(norm(x).bfloat16(), None)[0].float()
            return x + self.mlp(norm(x).bfloat16()).float(), None

    model = Net(Kind())
    for block in model.layers:
        block.__class__ = Half
        block.bfloat16()
    probe = Probe.random(VOCABULARY, sequences=5, length=17)
    assert "parts" not in measure(model, probe).missing
    assert measure(model, probe).model["heads"] == HEADS
