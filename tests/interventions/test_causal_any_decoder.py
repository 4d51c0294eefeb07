"""Causal tests of models that are not transformers': the same as of the same model there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import sinktrack as st
from sinktrack import Decoder, MeasurementError, Probe, Run, measure
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.events import Uneditable
from sinktrack.interventions import run_causal_tests
from sinktrack.interventions.knockout import AttentionKnockout
from sinktrack.interventions.patching import Patch, Term
from sinktrack.interventions.replay import Edit, Outcome, replaying
from tests.helpers import planted, torch_models
from tests.helpers.commands import two_processes
from tests.helpers.hand_written import Block, Transformer
from tests.helpers.planted import in_series, readers
from tests.helpers.torch_models import BLOCKS, KINDS, Net, by_hand
from tests.helpers.trainings import assert_identical

TOKENS = Probe.random(torch_models.VOCABULARY, sequences=5, length=17)
FIRST = torch.zeros(TOKENS.sequences, dtype=torch.long)

PROBE = planted.probe()


def apart(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two results of causal tests differ by more than 1e-5."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in apart(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for at, pair in pairs for place in apart(*pair, f"{path}[{at}]")]
    if isinstance(one, float) and isinstance(other, float):
        return [] if one == pytest.approx(other, abs=1e-5, rel=1e-5) else [f"{path} {one} {other}"]
    return [] if one == other else [f"{path} {one} {other}"]


def circuit(name: str) -> Any:
    if name == "series":
        return in_series()
    model = readers(planted.mixture() if name == "expert" else planted.dense(), 2)
    if name == "neuron":
        planted.neuron_writer(model, 1)
    elif name == "head":
        planted.head_writer(model, 1, head=0)
    else:
        planted.expert_writer(model, 1, expert=2, size=3.0)
    return model


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("series", "sdpa", marks=pytest.mark.slow),
        ("head", "scores"),
        ("expert", "sdpa"),
    ],
)
def test_the_same_as_of_transformers(name: str, how: str) -> None:
    """All of it: effects, controls, intervals, verdicts, losses, experts and the position card."""
    model = circuit(name)
    hand = Transformer(model, how)
    found = measure(hand, PROBE)
    measured = measure(model, PROBE)
    for one, other in zip(measured.sinks, found.sinks, strict=True):
        told = [{e[:3]: e[3] for e in map(_row, s.total_effects or ())} for s in (one, other)]
        assert told[0] == pytest.approx(told[1], abs=1e-5)
    wanted, got = run_causal_tests(model, PROBE, measured), run_causal_tests(hand, PROBE, found)
    assert any(row["verdict"] for row in wanted["necessity"])
    for result in (wanted, got):  # of experts it is tried too that a batch does not mix them
        del result["seconds"], result["forwards"]
    for result in (wanted, got):
        for expert in result["experts"]:  # of 1e-12 here, which is lost among other experts
            if expert["gate"] is not None and expert["gate"] < 1e-6:
                expert["gate"] = None
    assert not apart(wanted, got)
    assert "missing" not in got


@pytest.mark.distributed
@pytest.mark.slow
def test_over_two_processes(tmp_path: Path) -> None:
    """FSDP2: total effects and all causal tests are those of the whole model, on both processes."""
    two_processes(
        tmp_path,
        """
        from torch.distributed.fsdp import fully_shard
        from sinktrack.interventions import run_causal_tests
        from tests.helpers import planted
        from tests.helpers.hand_written import Transformer
        dist.init_process_group("gloo")
        probe = planted.probe()
        for expert in (False, True):
            model = planted.readers(planted.mixture() if expert else planted.dense(), 2)
            if expert:
                planted.expert_writer(model, 1, expert=2, size=3.0)
            else:
                planted.head_writer(model, 1, head=0)
            hand = Transformer(model)
            whole = measure(hand, probe)
            wanted = run_causal_tests(hand, probe, whole)
            for block in hand.layers:
                fully_shard(block)
            fully_shard(hand)
            tracker = SinkTracker(
                probe, out / f"{expert} {dist.get_rank()}", every=1, causal_every=1,
                on_error="raise",
            )
            tracker.step(1, hand)
            found = measure(hand, probe)
            got = run_causal_tests(hand, probe, found)
            effects = [sink.total_effects for sink in whole.sinks]
            assert effects[0] and [sink.total_effects for sink in found.sinks] == effects
            for result in (wanted, got):
                del result["seconds"]
            assert got == wanted
            assert any(row["verdict"] for row in got["necessity"])
            if dist.get_rank() == 0:
                (record,) = Run.read(out / f"{expert} 0").records
                assert record["causal"]["necessity"] == json.loads(json.dumps(wanted["necessity"]))
            hand(probe.tokens).square().mean().backward()
        dist.barrier()
        """,
    )


def _row(effect: Any) -> tuple[Any, ...]:
    return effect.kind, effect.block, effect.index, effect.effect


class AtP0(torch_models.Unedited):
    """A write at P0 gives way to nothing, or to that at another position."""

    def __init__(self, sublayer: str, block: int, at: torch.Tensor | None) -> None:
        self.of, self.at = (sublayer, block), at

    def write(self, sublayer: str, block: int, wrote: torch.Tensor) -> torch.Tensor:
        if self.of != (sublayer, block):
            return wrote
        row = torch.zeros_like(wrote[:, 0]) if self.at is None else wrote[range(5), self.at]
        return torch.cat([row[:, None], wrote[:, 1:]], 1)


class Moved(torch_models.Unedited):
    """The state at P0 at the input of a block is put on another position."""

    def __init__(self, block: int, at: torch.Tensor) -> None:
        self.block, self.at = block, at

    def state(self, block: int, x: torch.Tensor) -> torch.Tensor:
        if block == self.block:
            x = x.clone()
            x[range(5), self.at] = x[:, 0]
        return x


class Sees(torch_models.Unedited):
    """One position sees itself alone, or everything, in some blocks."""

    def __init__(self, blocks: range, at: torch.Tensor, all_keys: bool) -> None:
        self.blocks, self.at, self.all_keys = blocks, at, all_keys

    def seen(self, block: int, seen: torch.Tensor) -> torch.Tensor:
        if block in self.blocks:
            seen = seen.clone()
            rows = torch.arange(5)
            seen[rows, self.at] = self.all_keys
            seen[rows, self.at, self.at] = True
        return seen


def shown(model: Net, edit: torch_models.Unedited | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to P0 ``[B, L]`` and the loss ``[B]`` of the arithmetic by hand."""
    hand = by_hand(model, TOKENS.tokens, edit)
    p0 = [a[:, :, 1:, 0].sum(-1).mean(1) / (a[:, 0, 1:, 0] > 0).sum(-1) for a in hand.attention]
    assert hand.logits is not None
    loss = torch.nn.functional.cross_entropy(
        hand.logits[:, :-1].mT, TOKENS.tokens[:, 1:], reduction="none"
    )
    return torch.stack(p0, 1), loss[:, 1:].mean(1)


def check(found: Outcome, model: Net, edit: torch_models.Unedited | None, start: int = 0) -> None:
    p0, loss = shown(model, edit)
    torch.testing.assert_close(found.p0[:, start:], p0[:, start:], atol=2e-6, rtol=0)
    torch.testing.assert_close(found.loss, loss, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_edits_equal_the_arithmetic_by_hand(name: str) -> None:
    """Ablation, resampling, patching and knockouts, in float64 without torch's attention."""
    model = Net(KINDS[name], seed=3)
    with replaying(model, TOKENS) as replay:
        at = replay.position
        plain = replay.plain({1, 2})
        edits: list[tuple[Edit, torch_models.Unedited]] = [
            (Patch([Term("mlp", 1)], FIRST, "zero"), AtP0("mlp", 1, None)),
            (Patch([Term("attention", 2)], FIRST, at), AtP0("attention", 2, at)),
            (Patch([Term("state", 2)], at, FIRST), Moved(2, at)),
            (
                AttentionKnockout(at, (1, 3), lambda row, at, n: torch.arange(n) == at),
                Sees(range(1, 3), at, False),
            ),
            (
                AttentionKnockout(FIRST, (0, 2), lambda row, at, n: torch.ones(n).bool()),
                Sees(range(2), FIRST, True),
            ),
        ]
        together = replay.run([edit for edit, _ in edits], loss=True)
    check(plain, model, None)
    for found, (_, by) in zip(together, edits, strict=True):
        check(found, model, by)


@pytest.mark.parametrize("name", ["experts", "stacked experts"])
def test_experts_anywhere(name: str) -> None:
    """What all experts and the rest of an MLP write at any position makes its write."""
    model = Net(KINDS[name], seed=3)
    seen: list[float] = []

    class Whole(Edit):
        def write(self, block: int, write: Any, rows: torch.Tensor) -> None:
            if write.routed is not None:
                parts = [write.part(kind, index) for kind, index in write.parts()]
                seen.append(float((sum(parts) - write.added).abs().max()))
                gate = write.routed.gate()
                for index in write.routed.index.unique().tolist():
                    own = write.routed.ungated(index) * write.routed.gates_of(index)[..., None]
                    came = (write.routed.index == index).any(-1)
                    if not bool(gate.isnan().any()):
                        seen.append(float((own - write.routed.of(index))[came].abs().max()))

    with replaying(model, TOKENS) as replay:
        replay.run([Whole()])
    assert len(seen) >= BLOCKS
    assert max(seen) < 1e-5


def test_a_pass_restarts_where_only_the_stream_goes_on() -> None:
    hand = Transformer(circuit("neuron"))
    first = torch.zeros(PROBE.sequences, dtype=torch.long)
    with replaying(hand, PROBE) as replay:
        replay.plain({1, 3})
        assert set(replay.kept) == {1, 3}
        before = replay.blocks_run
        (short,) = replay.run([Patch([Term("mlp", 3)], first, "zero")], loss=True)
        assert replay.blocks_run - before == PROBE.sequences * (planted.BLOCKS - 3)
        replay.kept.clear()
        (whole,) = replay.run([Patch([Term("mlp", 3)], first, "zero")], loss=True)
    torch.testing.assert_close(short.p0, whole.p0, atol=1e-6, rtol=0)
    torch.testing.assert_close(short.loss, whole.loss, atol=1e-6, rtol=0)


def test_an_operator_that_is_attention_by_value_is_edited() -> None:
    model, outcomes = circuit("neuron"), []
    first = torch.zeros(PROBE.sequences, dtype=torch.long)
    for how in ("sdpa", "operator"):
        with replaying(Transformer(model, how), PROBE) as replay:
            replay.plain(())
            edits: list[Edit] = [
                AttentionKnockout(
                    replay.position, (0, 2), lambda row, at, n: torch.arange(n) == at
                ),
                AttentionKnockout(first, (0, 2), lambda row, at, n: torch.ones(n).bool()),
                Patch([Term("head", 1, 1)], first, "zero"),
            ]
            outcomes.append(replay.run(edits, loss=True))
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one.p0, other.p0, atol=1e-6, rtol=0)
        torch.testing.assert_close(one.loss, other.loss, atol=1e-6, rtol=0)


@pytest.mark.parametrize("how", ["compiled", "blocks compiled", "checkpointed", "bfloat16"])
def test_what_wraps_a_model_changes_nothing(how: str) -> None:
    first = torch.zeros(PROBE.sequences, dtype=torch.long)
    outcomes = []
    for wrapped in (False, True):
        hand: Any = Transformer(circuit("neuron"))
        if how == "bfloat16":
            hand = circuit("neuron").bfloat16() if not wrapped else hand.bfloat16()
        elif wrapped and how == "compiled":
            hand = torch.compile(hand, backend="eager")
        elif wrapped:
            for number, block in enumerate(hand.layers):
                compiled: Any = torch.compile(block, backend="eager")
                hand.layers[number] = checkpoint_wrapper(block) if how[0] == "c" else compiled
        if wrapped or how != "bfloat16":
            hand = Decoder(hand, blocks=lambda model: model.layers)
        with replaying(hand, PROBE) as replay:
            replay.plain({1})
            edits = [
                Patch([Term("mlp", 1)], first, "zero"),
                Patch([Term("state", 0)], first, replay.position),
            ]
            outcomes.append(replay.run(edits, loss=True))
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one.p0, other.p0, atol=1e-6, rtol=0)
        torch.testing.assert_close(one.loss, other.loss, atol=1e-6, rtol=0)


def test_a_stream_that_comes_back_later_is_not_restarted() -> None:
    """The loss shows what attention does not: a skip from block 0 to the head."""
    hand = Transformer(circuit("neuron"))
    hand.output.weight.data.normal_()
    kept: list[torch.Tensor] = []
    hand.layers[0].register_forward_hook(lambda module, args, output: kept.append(output))
    hand.output.register_forward_pre_hook(lambda module, args: (args[0] + 9 * kept.pop(),))
    with replaying(hand, PROBE) as replay:
        replay.plain({2})
        assert not replay.kept


def odd(how: str) -> Any:
    """A model with one operation that is exact in a measurement, and may not be editable."""
    hand = Transformer(circuit("neuron"))

    class Other(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wrote = self.attention(norm(x, self.attention_norm))
            if how == "addcmul":
                x = torch.addcmul(x, wrote, torch.ones(()))
            elif how == "lerp":
                x = torch.lerp(x, wrote, 0.5) * 2
            elif how == "subtracted":
                x = x - (-wrote)
            elif how == "in place of the write":
                wrote += x
                x = wrote
            elif how == "operator":
                x = _add_norm(wrote, x)[0]
            elif how == "operator in place":
                _add_in_place(x, wrote)
            else:
                x = x + wrote
            written: torch.Tensor = self.feed_forward(norm(x, self.ffn_norm))
            return x + written

    for block in hand.layers:
        block.__class__ = Other
    return hand


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)


@torch.library.custom_op("sinktrack_tests::add_and_normalize", mutates_args=())
def _add_norm(write: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = write + stream
    return total, torch.nn.functional.normalize(total, dim=-1)


@torch.library.custom_op("sinktrack_tests::add_out_of_sight", mutates_args=("stream",))
def _add_in_place(stream: torch.Tensor, write: torch.Tensor) -> None:
    stream += write


@pytest.mark.parametrize(
    "how", ["addcmul", "lerp", "subtracted", "in place of the write", "operator"]
)
def test_a_sum_by_other_means_is_edited_too(how: str) -> None:
    first = torch.zeros(PROBE.sequences, dtype=torch.long)
    edits = [Patch([Term("attention", 1)], first, "zero"), Patch([Term("mlp", 1)], first, "mean")]
    outcomes = []
    for hand in (odd("plain"), odd(how)):
        with replaying(hand, PROBE) as replay:
            replay.plain(())
            outcomes.append(replay.run(edits, loss=True))
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one.p0, other.p0, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.loss, other.loss, atol=1e-5, rtol=0)


def test_what_cannot_be_edited_is_said_and_the_rest_stands() -> None:
    """Scores that are masked by an assignment are not seen without the mask."""
    model = circuit("neuron")
    wanted, found = (
        run_causal_tests(hand, PROBE, measure(hand, PROBE))
        for hand in (Transformer(model, "scores"), Transformer(model, "assigned"))
    )
    assert set(found["missing"]) == {"p0_mixed"}
    assert "masked before they can be seen" in found["missing"]["p0_mixed"]
    assert not apart(found["necessity"], wanted["necessity"])
    kinds = {row["kind"] for row in wanted["position"]} - {row["kind"] for row in found["position"]}
    assert kinds == {"p0_mixed"}


def test_a_write_that_enters_out_of_sight_is_refused_by_name() -> None:
    hand = odd("operator in place")
    with pytest.raises(MeasurementError, match=r"block \d|at block"), replaying(hand, PROBE):
        pass


def test_experts_with_a_capacity_are_refused() -> None:
    hand = Transformer(circuit("expert"))
    for block in hand.layers:
        feed_forward: Any = block.feed_forward

        def dropped(x: torch.Tensor, own: Any = feed_forward.forward) -> torch.Tensor:
            keep = torch.arange(x.shape[0] * x.shape[1]) < PROBE.sequences * PROBE.length
            return own(x) * keep.view(*x.shape[:2], 1)  # type: ignore[no-any-return]

        feed_forward.forward = dropped
    with replaying(hand, PROBE) as replay, pytest.raises(MeasurementError, match="capacity"):
        replay.plain(())


def train(directory: Path | None) -> dict[str, Any]:
    hand = Transformer(circuit("neuron"))
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(hand.parameters(), lr=1e-5)
    tracker = SinkTracker(PROBE, directory, 2, causal_every=1) if directory else None
    for step in range(1, 4):
        loss = torch.nn.functional.cross_entropy(
            hand(PROBE.tokens[:4, :-1]).flatten(0, 1), PROBE.tokens[:4, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if tracker is not None:
            tracker.step(step, hand)
    return {"model": hand.state_dict(), "random": torch.get_rng_state()}


def test_training_is_the_same_to_the_bit_and_the_record_holds_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sinktrack"):
        assert_identical(train(None), train(tmp_path))
    assert "failed" not in caplog.text
    (record,) = [r for r in Run.read(tmp_path).records if r["step"] == 2]
    assert any(row["verdict"] == "necessary" for row in record["causal"]["necessity"])
    assert record["position_card"]["answer"] is not None or record["position_card"]["missing"]


def test_a_named_forward_and_logits_beside_a_loss() -> None:
    """The loss is told where logits of every position come out, whatever stands beside them."""

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Transformer(circuit("neuron"))

        def forward(self, ids: torch.Tensor, targets: Any = None) -> Any:
            logits = self.inner(ids)
            if targets is None:
                return logits[:, -1:], None
            return logits, torch.nn.functional.cross_entropy(logits.mT, targets)

    model = Wrapped()
    short = Decoder(model, blocks=lambda model: model.inner.layers)
    full = Decoder(
        model,
        blocks=lambda model: model.inner.layers,
        forward=lambda model, tokens: model(tokens, targets=tokens),
    )
    with replaying(short, PROBE) as replay:
        assert bool(replay.plain(()).loss.isnan().all())
    with replaying(full, PROBE) as replay:
        found = replay.plain(()).loss
    with replaying(model.inner, PROBE) as replay:
        torch.testing.assert_close(found, replay.plain(()).loss)
    assert st.position_card(full, PROBE)["start_token"] == {"id": 0, "of": "probe"}


def test_an_edit_that_meets_nothing_is_no_edit() -> None:
    hand = Transformer(circuit("neuron"))
    first = torch.zeros(PROBE.sequences, dtype=torch.long)
    with (
        replaying(hand, PROBE) as replay,
        pytest.raises(Uneditable, match="block 1: what its expert 3 writes"),
    ):
        replay.run([Patch([Term("expert", 1, 3)], first, "zero")])
