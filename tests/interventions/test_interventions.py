"""Planted circuits: the causal tests name what was planted, and nothing where nothing was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sinktrack import MeasurementError, Probe, Run, measure
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.interventions import (
    examine,
    necessity,
    position,
    run_causal_tests,
    sufficiency,
)
from sinktrack.interventions.bench import seed_of
from sinktrack.interventions.effects import Effect
from sinktrack.interventions.experts import super_experts
from sinktrack.interventions.replay import replaying
from sinktrack.interventions.trials import is_testable, screen
from sinktrack.records.rows import rows as export_rows
from tests.helpers import models, planted
from tests.helpers.commands import sinktrack
from tests.helpers.planted import in_series, readers
from tests.helpers.reference import blocks_of
from tests.helpers.trainings import fingerprint, same

PROBE = planted.probe()


def verdicts(
    model: Any, probe: Probe = PROBE
) -> dict[tuple[str, str, int | None, int | None], str]:
    """All verdicts, by test, kind, block and index."""
    found = examine(model, probe, measure(model, probe))
    json.dumps(found, allow_nan=False)
    return {
        (test, row["kind"], row.get("block"), row.get("index")): row["verdict"]
        for test in ("necessity", "sufficiency", "position")
        for row in found[test]
        if row["verdict"] and row["kind"] != "embedding"
    }


@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_neuron(block: int) -> None:
    model = readers(planted.dense(), block + 1)
    planted.neuron_writer(model, block)
    assert verdicts(model) == {
        ("necessity", "mlp", block, None): "necessary",
        ("sufficiency", "state", block + 1, None): "sufficient",
        ("sufficiency", "mlp", block, None): "sufficient",
    }


@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_head(block: int) -> None:
    model = readers(planted.dense(), block + 1)
    planted.head_writer(model, block, head=1)
    assert verdicts(model) == {
        ("necessity", "attention", block, None): "necessary",
        ("necessity", "head", block, 1): "necessary",
        ("sufficiency", "state", block + 1, None): "sufficient",
        ("sufficiency", "attention", block, None): "sufficient",
    }


@pytest.mark.parametrize("block", [0, 1, 3])
def test_an_expert(block: int) -> None:
    model = readers(planted.mixture(), block + 1)
    planted.expert_writer(model, block, expert=2)
    assert verdicts(model) == {
        ("necessity", "mlp", block, None): "necessary",
        ("necessity", "expert", block, 2): "necessary",
        ("sufficiency", "state", block + 1, None): "sufficient",
        ("sufficiency", "mlp", block, None): "sufficient",
    }


@pytest.mark.parametrize("size", [1.0, 4.0])
def test_a_decoy_with_a_large_share_is_not_named(size: int) -> None:
    """The larger one has all but a thousandth of the share, so that the screen alone misses."""
    model = readers(planted.dense(), 3)
    planted.neuron_writer(model, 0)
    planted.neuron_writer(model, 1, size=size, to=planted.DECOY)
    shares = {(c.kind, c.block): c.share for c in measure(model, PROBE).localization.shares}
    assert shares["mlp", 1] > 0.15
    found = verdicts(model)
    assert found["necessity", "mlp", 0, None] == "necessary"
    assert ("necessity", "mlp", 1, None) not in found
    assert ("sufficiency", "mlp", 1, None) not in found


def test_an_expert_behind_a_decoy() -> None:
    """The screen sees the decoy alone; the expert that matters is found all the same."""
    model = readers(planted.mixture(), 3)
    planted.expert_writer(model, 0, expert=2)
    planted.expert_writer(model, 1, expert=3, size=20.0, to=planted.DECOY)
    measured = measure(model, PROBE)
    (screened,) = screen(measured.localization.shares, ("attention", "mlp"))
    assert (screened.kind, screened.block) == ("mlp", 1)
    found = verdicts(model)
    named = {key: value for key, value in found.items() if key[1] in ("mlp", "expert")}
    assert named["necessity", "mlp", 0, None] == named["necessity", "expert", 0, 2] == "necessary"
    assert not any(block == 1 for _, _, block, _ in named)


@pytest.mark.parametrize("size", [1.0, 12.0], ids=["side by side", "the second steps in"])
def test_two_redundant_writers(size: float) -> None:
    model = readers(planted.dense(), 2)
    planted.neuron_writer(model, 0, size)
    planted.neuron_writer(model, 1, size)
    found = verdicts(model)
    assert {key: value for key, value in found.items() if key[0] == "necessity"} == {
        ("necessity", "mlp", 0, None): "redundant",
        ("necessity", "mlp", 1, None): "redundant",
        ("necessity", "joint", 0, None): "necessary",
    }


def test_two_redundant_heads_of_a_block() -> None:
    model = readers(planted.dense(), 1)
    planted.head_writer(model, 0, head=0)
    planted.head_writer(model, 0, head=1)
    found = verdicts(model)
    assert found["necessity", "attention", 0, None] == "necessary"
    assert found["necessity", "head", 0, 0] == found["necessity", "head", 0, 1] == "redundant"


def test_what_the_others_are_marked_with() -> None:
    """Every token but [BOS] is marked, and the sink is where no mark is."""
    model = readers(planted.dense(), 1)
    planted.marker(model, 0)
    assert verdicts(model)["necessity", "mlp", 0, None] == "distinguishing"


def test_position_decides() -> None:
    """P0 is told by its unmixed value alone: any position that is unmixed gets a sink."""
    model = planted.dense()
    planted.unmixed(model)
    probe = planted.without_bos()
    found = verdicts(readers(model, 2), probe)
    assert found["position", "other_position_alone", None, None] == "follows"
    assert found["position", "p0_mixed", None, None] == "unmixed"
    assert found["necessity", "mlp", 1, None] == "necessary"
    assert found["sufficiency", "state", 2, None] == "sufficient"


def test_a_sink_of_the_embedding_has_no_writer() -> None:
    """[BOS] itself carries the state that later blocks look for."""
    for seed in range(8):
        model = readers(planted.dense(seed), 2)
        with torch.no_grad():
            model.model.embed_tokens.weight[0, planted.SINK] = 4.0
        found = examine(model, PROBE, measure(model, PROBE))
        tested = {(row["kind"], row["verdict"]) for row in found["necessity"]}
        assert ("embedding", "necessary") in tested
        assert set(verdicts(model)) <= {("sufficiency", "state", 2, None)}


def test_no_circuit_no_verdict() -> None:
    """At most 5 % of 40 random models get a verdict, short sequences making many a sink."""
    tested = wrong = 0
    for seed in range(40):
        model, probe = planted.random_model(seed)
        measured = measure(model, probe)
        tested += is_testable(measured)
        found = examine(model, probe, measured)
        tests = (*found["necessity"], *found["sufficiency"], *found["position"])
        wrong += any(row["verdict"] for row in tests)
    assert tested >= 8
    assert wrong <= 2


@pytest.mark.parametrize("kind", ["neuron", "head"])
def test_necessity_equals_brute_force(kind: str) -> None:
    """A plain hook on the sublayer, whole forwards, eager attention matrices."""
    model = readers(planted.dense(), 2)
    model.set_attn_implementation("eager")
    if kind == "neuron":
        planted.neuron_writer(model, 1)
        sublayer, module = "mlp", blocks_of(model)[1].mlp
    else:
        planted.head_writer(model, 1, head=0)
        sublayer, module = "attention", blocks_of(model)[1].self_attn
    (row,) = [
        row
        for row in necessity(model, PROBE, measure(model, PROBE))
        if row["kind"] == sublayer and row["block"] == 1
    ]

    with replaying(model, PROBE) as replay:
        resampled = replay.elsewhere(seed_of("resample"))

    def attention_and_loss() -> tuple[float, float, float]:
        with torch.no_grad():
            found = model(PROBE.tokens, output_attentions=True, use_cache=False)
        matrices = torch.stack(found.attentions[2:])
        loss = torch.nn.functional.cross_entropy(
            found.logits[:, :-1].mT, PROBE.tokens[:, 1:], reduction="none"
        )
        return (
            float(matrices[..., 1:, 0].mean()),
            float(loss[:, 1:].mean()),
            float(loss[:, 0].mean()),
        )

    for mode in ("resample", "mean", "zero"):
        before = attention_and_loss()

        def hook(module: Any, args: Any, output: Any, mode: str = mode) -> Any:
            written = output[0] if isinstance(output, tuple) else output
            written = written.clone()
            if mode == "resample":
                written[:, 0] = written[torch.arange(len(written)), resampled]
            else:
                written[:, 0] = written[:, 1:].mean(1) if mode == "mean" else 0
            return (written, *output[1:]) if isinstance(output, tuple) else written

        handle = module.register_forward_hook(hook)
        after = attention_and_loss()
        handle.remove()
        found: Any = row if mode == "resample" else dict(row)[mode]
        assert found["effect"] == pytest.approx(1 - after[0] / before[0], abs=1e-5)
        if mode == "resample":
            assert row["loss"]["effect"] == pytest.approx(after[1] - before[1], abs=1e-5)
            assert row["p0_loss"]["effect"] == pytest.approx(after[2] - before[2], abs=1e-5)


def test_two_sinks_in_series() -> None:
    """Each phase has its own writer; the main lists are those of the main phase."""
    model = in_series()
    measured = measure(model, PROBE)
    spans = [(sink.first_block, sink.last_block) for sink in measured.sinks]
    assert spans == [(1, 1), (4, 4)]
    found: Any = run_causal_tests(model, PROBE, measured)
    named = [
        {
            (r["kind"], r["block"]): r["verdict"]
            for r in phase["necessity"]
            if r["block"] is not None
        }
        for phase in found["phases"]
    ]
    assert named[0]["mlp", 0] == named[1]["mlp", 3] == "necessary"
    assert named[1]["mlp", 0] is None and ("mlp", 3) not in named[0]
    assert [(p["first_block"], p["last_block"]) for p in found["phases"]] == spans
    sink = measured.main_sink
    assert sink is not None
    main = spans.index((sink.first_block, sink.last_block))
    for test in ("necessity", "sufficiency", "position"):
        assert found[test] == found["phases"][main][test]
    (row,) = [r for r in found["phases"][0]["necessity"] if (r["kind"], r["block"]) == ("mlp", 0)]
    assert row["outcome"] == "lost" and row["set_size"]["before"] == 1
    assert row["by_block"][1] > 0.3 and abs(row["by_block"][4]) < 0.05
    kinds = [(r["kind"], r["blocks"]) for r in found["phases"][1]["position"]]
    assert ("other_position_alone_since_last_sink", [2, 3]) in kinds
    assert ("other_position_alone_in_first_two", [0, 1]) in kinds


def test_a_test_alone_is_the_same_as_inside_the_whole() -> None:
    model = readers(planted.dense(), 2)
    planted.neuron_writer(model, 0)
    planted.head_writer(model, 1, head=0)
    measured = measure(model, PROBE)
    whole: Any = run_causal_tests(model, PROBE, measured)
    alone = {"necessity": necessity, "sufficiency": sufficiency, "position": position}
    for name, test in alone.items():
        assert test(model, PROBE, measured) == whole[name], name


def test_experts_at_p0() -> None:
    """[BOS] alone is routed to the planted expert, whose output is extreme."""
    model = readers(planted.mixture(), 2)
    planted.expert_writer(model, 1, expert=2)
    found = examine(model, PROBE, measure(model, PROBE))["experts"]
    rows = {(row["block"], row["index"]): row for row in found}
    (extreme,) = [expert for expert, row in rows.items() if row["super_expert"]]
    assert extreme == (1, 2)
    row = rows[1, 2]
    assert row["p0_rate"] == 1 and row["verdict"] == "necessary"
    seen: list[torch.Tensor] = []
    experts = blocks_of(model)[1].mlp.experts
    handle = experts.register_forward_hook(lambda module, args, output: seen.extend(args))
    with torch.no_grad():
        model(PROBE.tokens[:, :1], use_cache=False)
    handle.remove()
    x, index, gate = seen
    chosen = index == 2
    assert chosen.any(-1).all()
    assert row["gate"] == pytest.approx(float(gate[chosen].mean()), rel=1e-5)
    inner = experts.gate_up_proj.shape[1] // 2
    gated = experts.gate_up_proj[2] @ x[0]
    active = torch.nn.functional.silu(gated[:inner]) * gated[inner:]
    plain = (experts.down_proj[2] @ active).detach()
    assert row["output_norm"] == pytest.approx(float(plain.norm()), rel=1e-4)
    assert row["largest_output"] == pytest.approx(float(plain.abs().max()), rel=1e-4)
    shares = [other["share"] for other in found if other["share"] is not None]
    assert row["share"] == max(shares)
    assert all(other["p0_rate"] > 0 for other in found if not other["super_expert"])


def test_the_published_criterion_by_hand() -> None:
    largest = {(block, index): 1.0 for block in range(8) for index in range(64)}
    largest |= {(1, 5): 90.0, (2, 7): 8.0, (7, 3): 500.0}
    assert super_experts(largest, blocks=8) == {(1, 5)}, "(2, 7) is below a tenth, (7, 3) too late"
    assert super_experts({}, blocks=8) == set()


def test_meaning_of_the_first_token() -> None:
    """With [BOS] the sink needs it; where position decides, any token will do."""
    model = readers(planted.dense(), 1)
    planted.neuron_writer(model, 0)
    found: Any = examine(model, PROBE, measure(model, PROBE))["meaning"]
    assert found["bos"] == 0
    assert found["norm_ratio"]["bos"] > 2 > found["norm_ratio"]["quantiles"]["95"]
    assert found["as_is"]["sink_rate"] == 0.8
    assert found["random_first"]["sink_rate"] < 0.05
    model = planted.dense()
    planted.unmixed(model)
    probe = planted.without_bos()
    found = examine(readers(model, 2), probe, measure(model, probe))["meaning"]
    assert found["bos"] is None and found["norm_ratio"]["bos"] is None
    assert found["norm_ratio"]["quantiles"]["5"] > 2
    assert found["random_first"]["sink_rate"] > 0.9 * found["as_is"]["sink_rate"] > 0.4


def test_leaves_no_trace() -> None:
    model = readers(planted.mixture(), 1).train()
    planted.expert_writer(model, 0, expert=1)
    measured = measure(model, PROBE)
    before = fingerprint(model)
    assert examine(model, PROBE, measured)["necessity"]
    after = fingerprint(model)
    assert [name for name in before if not same(before[name], after[name])] == []
    assert not any("forward" in vars(block) for block in blocks_of(model))


def test_a_part_is_cheaper_than_the_whole() -> None:
    """Passes restart at the changed block: a writer in block 3 of 5 costs 2 blocks a pass."""
    model = readers(planted.dense(), 4)
    planted.neuron_writer(model, 3)
    measured = measure(model, PROBE)
    found = examine(model, PROBE, measured)
    early = readers(planted.dense(), 1)
    planted.neuron_writer(early, 0)
    assert found["forwards"] < 0.8 * examine(early, PROBE, measure(early, PROBE))["forwards"]


def test_batches_do_not_change_effects() -> None:
    model = readers(planted.dense(), 2)
    planted.neuron_writer(model, 1)
    measured = measure(model, PROBE)
    whole = necessity(model, PROBE, measured)
    parts = necessity(model, PROBE, measured, batch_size=5)
    for one, other in zip(whole, parts, strict=True):
        assert one["effect"] == pytest.approx(other["effect"], abs=1e-5)
        assert (one["zero"] is None) == (other["zero"] is None)
    zeros = [[row["zero"]["interval"] for row in rows if row["zero"]] for rows in (whole, parts)]
    assert zeros[0]
    np.testing.assert_allclose(zeros[0], zeros[1], atol=1e-5)


def test_half_precision_names_the_same() -> None:
    model = readers(planted.mixture(), 2).to(torch.bfloat16)
    planted.expert_writer(model, 1, expert=2)
    assert verdicts(model)["necessity", "expert", 1, 2] == "necessary"


def test_without_a_sink_nothing_is_tested() -> None:
    model = models.llama()
    measured = measure(model, PROBE_OF_65)
    found = examine(model, PROBE_OF_65, measured)
    assert not found["formed"] and found["forwards"] == 0
    for test in ("necessity", "sufficiency", "position"):
        assert dict(found)[test] == []
    assert necessity(model, PROBE_OF_65, measured) == []
    assert sufficiency(model, PROBE_OF_65, measured) == []
    assert position(model, PROBE_OF_65, measured) == []


PROBE_OF_65 = Probe.random(65, sequences=8, length=24)


def test_few_sequences_give_no_verdict() -> None:
    model = readers(planted.dense(), 1)
    planted.neuron_writer(model, 0)
    assert verdicts(model, planted.probe(sequences=4)) == {}


def test_controls_and_intervals() -> None:
    """Paired: what varies between sequences alike in test and control does not widen it."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.rand(64, generator=generator, dtype=torch.float64)
    before = torch.ones(64, dtype=torch.float64)
    effect = Effect(shared + 0.2, before, {"control": shared})
    row = effect.to_record()
    assert row["effect"] == pytest.approx(float(shared.mean()) + 0.2)
    assert row["controls"]["control"]["difference"] == pytest.approx([0.2, 0.2])
    assert effect.holds
    assert not Effect(shared + 0.2, before, {"control": shared + 0.15}).holds
    assert not Effect(shared + 0.2, before, {}).holds


def test_the_screen_takes_what_carries_95_percent() -> None:
    model = planted.dense()
    planted.neuron_writer(readers(model, 2), 1)
    where = measure(model, PROBE).localization
    (chosen,) = screen(where.shares, ("attention", "mlp"))
    assert (chosen.kind, chosen.block) == ("mlp", 1)


def test_the_callback_runs_them_every_so_many_probes(tmp_path: Path) -> None:
    model = readers(planted.dense(), 1)
    planted.neuron_writer(model, 0)
    tracker = SinkTracker(PROBE, tmp_path, every=2, causal_every=2, on_error="raise")
    for step in range(6):
        tracker.step(step, model)
    records = Run.read(tmp_path).records
    assert ["causal" in record for record in records] == [True, False, True]
    rows = records[2]["causal"]["necessity"]
    assert [row["kind"] for row in rows] == ["mlp", "embedding"]
    assert rows[0]["verdict"] == "necessary"


def test_the_scanner_and_the_table(tmp_path: Path) -> None:
    """``scan --causal`` also fills up what was scanned without; ``show`` tells the verdicts."""
    model = readers(planted.mixture(), 2)
    planted.expert_writer(model, 1, expert=3)
    model.save_pretrained(tmp_path / "archive" / "checkpoint-7")
    planted.mixture().save_pretrained(tmp_path / "archive" / "checkpoint-2")
    PROBE.save(tmp_path / "probe")
    command = (
        "scan",
        tmp_path / "archive",
        "--run",
        tmp_path / "run",
        "--probe",
        tmp_path / "probe",
    )
    assert "2 measured" in sinktrack(*command).stderr
    assert "2 measured" in sinktrack(*command, "--causal").stderr
    assert "2 already recorded" in sinktrack(*command, "--causal").stderr
    assert sinktrack(*command, "--causal", "--blocks", "1").returncode == 2
    first, last = Run.read(tmp_path / "run").records
    assert not first["causal"]["formed"] and first["causal"]["necessity"] == []
    live = examine(model, PROBE, measure(model, PROBE))
    for row, other in zip(last["causal"]["necessity"], live["necessity"], strict=True):
        assert row["verdict"] == other["verdict"]
        assert row["effect"] == pytest.approx(other["effect"], abs=1e-6)
    shown = sinktrack("show", tmp_path / "run").stdout
    assert "expert 3 of block 1 from another position: necessary" in shown
    assert "Sink in blocks 2 to 4" in shown
    assert "MLP 1 of P0, put elsewhere: sufficient" in shown
    assert "sink rate with random first tokens: 0.0% (as it is: 60.0%)" in shown
    assert "super experts by their largest output: block 1 expert 3, at P0" in shown
    assert max(map(len, shown.splitlines())) <= 80
    metrics = {row["metric"] for row in export_rows(last)}
    assert {"causal_necessity", "causal_sufficiency", "causal_position"} <= metrics


def test_failing_tests_leave_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise MeasurementError("planted")

    monkeypatch.setattr("sinktrack.callbacks.loop.examine", broken)
    SinkTracker(PROBE, tmp_path, every=1, causal_every=1).step(0, planted.dense())
    (record,) = Run.read(tmp_path).records
    assert "causal" not in record
    assert "the causal tests at step 0 failed, training goes on" in caplog.text
