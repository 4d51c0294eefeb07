"""The signal on curves of known truth, and followed online by real callbacks."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from check_signal import judge, table
from hypothesis import given, settings
from hypothesis import strategies as st_
from scipy.stats import theilslopes
from typer.testing import CliRunner

import sinktrack as st
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.cli import app
from sinktrack.signal import Analysis, Stages, analyze, robust
from sinktrack.signal.analysis import Migration, Plateau
from sinktrack.signal.robust import Interval
from sinktrack.signal.stages import Found, Regression
from tests.helpers import models
from tests.helpers.curves import CLEAR, curve
from tests.helpers.paths import DATA
from tests.helpers.synthetic import synthetic_records
from tests.helpers.wandb_files import finished

PROBE = st.Probe.random(models.VOCABULARY, sequences=4, length=16, seed=5)


def stages_in_order(signal: st.signal.Analysis) -> list[str]:
    """Without those of the first records, too few to tell."""
    assert signal.stages[:3] == (None,) * 3
    return [stage for stage in dict.fromkeys(signal.stages) if stage is not None]


def recorded(
    directory: Path, written: list[dict[str, Any]], live: st.Measurement | None = None
) -> st.Run:
    """A run of such records, which go on with those of a live model."""
    run = st.Run.open(directory, PROBE if live else None)
    (whole,) = synthetic_records(steps=[0])
    for record in written:
        run.append(whole | record | ({"probe": live.probe, "model": live.model} if live else {}))
    return run


def test_a_clear_run() -> None:
    signal = analyze(curve())
    assert stages_in_order(signal) == ["absent", "emerging", "settled"]
    assert signal.onset is not None and signal.onset.low <= 2000 <= signal.onset.high
    assert signal.onset.high - signal.onset.low < 800
    assert signal.onset_tokens is not None
    assert np.allclose(signal.onset_tokens, np.array(signal.onset) * 2048)
    assert signal.plateau is not None and 0.68 < signal.plateau.level.value < 0.72
    assert signal.plateau.change.low <= 0 <= signal.plateau.change.high
    assert not signal.regressions and not signal.missing
    assert "little about later progress" in " ".join(signal.lines())


def test_a_drop_is_a_regression_and_a_return_makes_it_good() -> None:
    written = curve(replace(CLEAR, drop=7000))
    signal = analyze(written)
    (found,) = signal.regressions
    assert (found.quantity, found.detected) == ("sink_rate", 7100)
    assert found.since.low < 7000 <= found.since.high
    assert found.size.low <= 0.4 <= found.size.high
    assert signal.stage == "displaced" and signal.plateau is None
    back = [record | {"step": record["step"] + 5000} for record in curve()[40:90]]
    again = analyze([r for r in written if r["step"] < 9000] + back)
    assert again.stages[again.steps.index(8900)] == "displaced"
    assert again.stage == "settled" and len(again.regressions) == 1


def test_a_sink_that_goes_is_lost_and_may_emerge_again() -> None:
    written = curve(replace(CLEAR, drop=6000, dropped=0.02))
    assert analyze(written).stage == "lost"
    again = [record | {"step": record["step"] + 10_100} for record in curve(seed=1)]
    signal = analyze(written + again)
    assert stages_in_order(signal)[-1] == "lost" and signal.stage == "settled"
    assert signal.onset is not None and signal.onset.low <= 12_100 <= signal.onset.high


def test_the_alarm_of_a_sink_that_is_lost() -> None:
    """Told once, with the numbers that decided it; a drop is told where it is seen first."""
    told = []
    stages = st.signal.Stages.of([])
    for record in curve(replace(CLEAR, drop=6000, dropped=0.02, width=100, onset=5500)):
        before = stages.stage
        told.append((record["step"], st.signal.alarm(stages.add(record), before)))
    words = [(step, text) for step, text in told if text is not None]
    assert stages.stage == "lost" and len(words) == 1 and 6000 <= words[0][0] <= 6200
    assert "the sink rate is back at its floor of" in words[0][1]


def test_a_circuit_that_moves_back_is_settled_again() -> None:
    written = curve()
    for record in written[70:85]:
        record["depth"] += 0.5
    signal = analyze(written)
    assert [r.quantity for r in signal.regressions] == ["depth"]
    assert signal.stages[80] == "displaced" and signal.stage != "displaced"


@pytest.mark.parametrize(("quantity", "sign"), [("depth", 1), ("first_two_share", -1)])
def test_a_circuit_that_moves_is_displaced(quantity: str, sign: int) -> None:
    written = curve()
    for record in written[70:]:
        record[quantity] += sign * 0.5
    signal = analyze(written)
    assert signal.stage == "displaced"
    assert signal.regressions[0].quantity == quantity
    assert signal.regressions[0].since.high == 7000


def test_migration() -> None:
    written = curve()
    for record in written:
        record["depth"] += 2 - 2e-4 * record["step"]
    signal = analyze(written)
    assert signal.stage == "migrating"
    depth = next(m for m in signal.migration if m.quantity == "depth")
    assert depth.per_1000_steps.low <= -0.2 <= depth.per_1000_steps.high
    assert depth.per_doubling is not None and depth.per_doubling.high < 0
    assert any(
        line.startswith("candidate migration: depth since step 2,400: -0.")
        for line in signal.lines()
    )


def test_nothing_is_claimed_before_there_is_enough() -> None:
    written = curve()
    assert analyze([]).stage is None and analyze([]).missing
    early = analyze(written[:3])
    assert early.stage is None and early.missing == ("stage and onset: 1 more record (3 of 4)",)
    assert analyze(written[:4]).stage == "absent"
    young = analyze(written[:26])
    assert young.stage == "emerging" and young.plateau is None
    assert "plateau: 3 more records (5 of 8) since the rise" in young.missing
    late = analyze([record for record in written if record["step"] >= 5000])
    assert late.onset is None and late.stage == "settled"
    assert "there at the first records" in late.missing[0]
    assert late.plateau is not None and set(late.plateau.since) == {5000.0}, "all of it is level"


def test_what_is_said() -> None:
    """Each sentence to the letter, from numbers that can be read off."""
    fell = Regression(
        "first_two_share", 300, Interval(300, 200, 300), Interval(0.2, 0.15, 0.25), 0.01, 0.06
    )
    signal = Analysis(
        steps=(0, 1000, 2000, 3000),
        stages=("settled", "emerging", "settled", "settled"),
        because=({},) * 4,
        onset=Interval(1400.4, 1200, 1600),
        onset_tokens=Interval(2.0, 1.0, 3.0),
        plateau=Plateau(
            Interval(1800, 1700, 1900), Interval(0.7, 0.68, 0.72), Interval(0, -0.01, 0.024)
        ),
        regressions=(
            fell,
            replace(fell, quantity="depth", since=Interval(2500, 2400, 2600), needed=0.125),
            replace(fell, quantity="sink_rate"),
        ),
        migration=(
            Migration("first_two_share", 9, Interval(0.02, 0.01, 0.03), None),
            Migration("depth", 9, Interval(-0.2, -0.3, -0.1), Interval(-1.5, -2, -1)),
        ),
        missing=(),
        abandoned=(1500, 11_600),
        loss=None,
    )
    settled = "candidate stage: settled, as could be told from step 2,000 on"
    saturated = (
        "A settled rate, a candidate sign and no more, says little about later progress: in the "
        "source paper an earlier sink went with better scores at 20B tokens, and with none at "
        "100B, where the rate was high already."
    )
    assert signal.lines() == [
        settled,
        "candidate onset: the sink rate left its floor at step 1,400 (95 %: 1,200 to 1,600)",
        "candidate plateau: 70.0% (95 %: 68.0% to 72.0%) since step 1,800; "
        "change over the last window -1.0 to +2.4 points",
        "candidate migration: first-two share since the onset: +2 points per 1,000 steps "
        "(95 %: +1 to +3)",
        "candidate migration: depth since the onset: -0.2 blocks per 1,000 steps "
        "(95 %: -0.3 to -0.1), -1.5 blocks per doubling of the tokens (-2 to -1)",
        "candidate regression: first-two share fell by 20.0 points (95 %: 15.0 to 25.0) between "
        "steps 200 and 300; noise explains 6.0",
        "candidate regression: depth rose by 0.20 blocks (95 %: 0.15 to 0.25) between steps 2,400 "
        "and 2,600; noise explains 0.12",
        "candidate regression: sink rate fell by 20.0 points (95 %: 15.0 to 25.0) between steps "
        "200 and 300; noise explains 6.0",
        saturated,
        "left out: 2 records up to step 11,600, which training has left behind: it went on from "
        "before them",
    ]
    assert str(replace(signal, missing=("one", "two"))).splitlines() == [
        *signal.lines(), "not claimed: one", "not claimed: two",
    ]  # fmt: skip
    bare = replace(
        signal, onset=None, plateau=None, regressions=(), migration=(), abandoned=()
    )  # fmt: skip
    assert bare.lines() == [settled, saturated]
    emerging = replace(bare, stages=(*bare.stages[:3], "emerging"))
    assert emerging.lines() == ["candidate stage: emerging, as could be told from step 3,000 on"]
    assert replace(bare, stages=("settled",) * 4).lines()[0].endswith("step 0 on")
    assert replace(bare, steps=(), stages=(), because=()).lines() == []
    plain = signal.to_json()
    assert (plain["stage"], plain["onset_tokens"]) == ("settled", {"value": 2, "low": 1, "high": 3})
    assert plain["stages"] == [*signal.stages] and plain["abandoned"] == [1500, 11_600]
    assert plain["plateau"]["level"] == {"value": 0.7, "low": 0.68, "high": 0.72}
    assert plain["regressions"][1]["size"] == {"value": 0.2, "low": 0.15, "high": 0.25}
    assert plain["migration"][0]["per_doubling"] is None
    found = Found(300, "displaced", {}, fell)
    assert st.signal.alarm(found, "settled") == signal.lines()[5]
    said = [line for line in signal.lines() if not line.startswith("left out")]
    assert all("candidate" in line for line in said)
    lost = Found(1300, "lost", {"floor": 0.021, "sink_rate": 0.034}, None)
    assert st.signal.alarm(lost, "settled") == (
        "candidate regression: the sink rate is back at its floor of 2.1% (3.4% at step 1,300)"
    )
    assert st.signal.alarm(lost, "lost") is st.signal.alarm(replace(lost, stage="settled"), "x")


def test_what_is_missing() -> None:
    """Why nothing is said yet of onset, plateau, falls and migration, with the counts."""
    written = curve(replace(CLEAR, noise=0.005))
    moving = "migration: 5 more records (3 of 8) of a formed sink"
    assert analyze(written[:5]).missing == (
        "onset: the rate has not left its floor by 5 points for 3 records in a row "
        "(5 records so far)",
    )
    assert analyze(written[:4]).missing == (analyze(written[:5]).missing[0].replace("(5", "(4"),)
    assert analyze(written[:3]).missing == ("stage and onset: 1 more record (3 of 4)",)
    short = [*written[18:20], *written[40:43]]
    assert analyze(short).missing == (
        "onset: 1 more record (2 of 3) from before the rise",
        "plateau: 5 more records (3 of 8) since the rise",
        "regression: 5 more records (3 of 8) since the rise",
        moving,
    )
    assert analyze([*written[17:20], *written[40:43]]).missing == (
        *analyze(short).missing[1:],
    )  # fmt: skip
    least = analyze([written[19], *written[40:43]])
    assert least.stages == (None,) * 3 + ("emerging",)
    assert least.missing[0] == "onset: 2 more records (1 of 3) from before the rise"
    there = "onset: the sink was there at the first records; measure earlier checkpoints"
    assert analyze(written[40:48]).missing == (there,)
    assert analyze(written[40:47]).missing[1] == "plateau: 1 more record (7 of 8) since the rise"
    assert analyze(written[40:47]).missing[3] == moving.replace(
        "5 more records (3", "1 more record (7"
    )
    lost = analyze(curve(replace(CLEAR, drop=6000, dropped=0.02))[:70])
    assert lost.stage == "lost" and lost.missing == ("plateau: the sink is lost",)
    rising = analyze(written[:33])
    change, rise = (rising.because[-1][name] for name in ("change", "rise"))
    low, high = (100 * bound for bound in change["sink_rate"][1:])
    assert low > 0 and rising.stage == "emerging"
    assert rising.missing[0] == (
        f"plateau: the change over the last window lies between {low:+.1f} and {high:+.1f} points; "
        f"flat is 0 within {10 * rise:.1f} points"
    )
    displaced = analyze(curve(replace(CLEAR, drop=7000)))
    assert displaced.stage == "displaced" and displaced.missing == ()


@pytest.mark.parametrize("seed", [1, 2, 5, 6])
def test_a_plateau_is_claimed_by_its_rule(seed: int) -> None:
    """Settled, and the trend's interval within a fifth of the rise; else `missing` says why not.

    Noise that grows once the rate has settled takes the plateau away, and leaves the stage.
    """
    written = curve(replace(CLEAR, noise=0.01, width=1000, onset=500), seed)
    draw = np.random.default_rng(seed)
    for record in written[45:]:
        wilder = record["sink_rate"] + (0.08 if seed % 2 else 0.03) * float(draw.normal())
        record["sink_rate"] = min(1.0, wilder)
    seen = set()
    for count in range(36, 101, 9):
        signal = analyze(written[:count])
        because = signal.because[-1]
        _, low, high = because["change"]["sink_rate"]
        wanted = signal.stage == "settled" and max(-low, high) <= 0.2 * because["rise"]
        seen.add((signal.stage, wanted))
        assert (signal.plateau is not None) == wanted
        unsure = signal.stage != "displaced" and not wanted
        assert any("over the last window" in one for one in signal.missing) == unsure
        if signal.plateau is not None:
            assert signal.plateau.change[1:] == (low, high)
            stages = Stages.of(written[:count])
            assert signal.plateau.since == stages.top() and signal.plateau.level == stages.level()
    assert ("settled", True) in seen and (("settled", False) in seen or seed % 2 == 0)


@pytest.mark.parametrize("count", [7, 8, 20, 60])
def test_migration_is_the_slope_since_the_onset(count: int) -> None:
    """Of the records since the rise that hold a formed sink, by steps and by log2 of the tokens."""
    written = curve()[: 30 + count]
    draw = np.random.default_rng(count)
    for index, record in enumerate(written):
        record["formed"] = index >= 30
        record["tokens"] = 100 + 3 * record["step"] ** 2
        record["depth"] = float(draw.normal())
    signal = analyze(written)
    assert len(signal.migration) == (2 if count >= 8 else 0)
    shorter = {one.quantity: one for one in signal.migration}
    for name, one in shorter.items():
        y = np.array([record[name] for record in written[30:]])
        steps = np.array([record["step"] for record in written[30:]], float) / 1000
        doublings = np.log2([record["tokens"] for record in written[30:]])
        assert one.records == count and one.per_doubling is not None
        for x, found in ((steps, one.per_1000_steps), (doublings, one.per_doubling)):
            slope, _, low, high = theilslopes(y, x, alpha=0.95)
            if count <= 24:
                assert found.value == pytest.approx(slope)
                assert found.low <= low + 1e-9 and found.high >= high - 1e-9
            assert found == pytest.approx(robust.change(x, y) / (x[-1] - x[0]), rel=0.1)
    gap = written[40 if count > 10 else 35]
    known, gap["tokens"] = gap["tokens"], None
    unknown = analyze(written)
    assert all(one.per_doubling is None for one in unknown.migration)
    assert unknown.onset_tokens is None
    gap["tokens"], written[30]["tokens"] = known, 0
    assert all(one.per_doubling is None for one in analyze(written).migration)
    for record in written:
        record["tokens"] = 4096
    assert all(one.per_doubling is None for one in analyze(written).migration)
    assert [one.per_1000_steps for one in analyze(written).migration] == [
        one.per_1000_steps for one in signal.migration
    ]


def test_records_of_the_first_blocks_alone_do_not_count() -> None:
    written = curve()
    some = [record | {"step": record["step"] + 7, "sink_rate": None} for record in written[::10]]
    mixed = analyze(sorted(written + some, key=lambda record: record["step"]))
    assert mixed.stages == analyze(written).stages
    assert mixed.missing[0] == "records of the first blocks alone have no sink rate (11)"
    assert analyze(some).stage is None and "4 more records (0 of 4)" in analyze(some).missing[1]


def test_a_single_wild_record_says_nothing() -> None:
    written = curve()
    written[10]["sink_rate"], written[70]["sink_rate"] = 0.9, 0.0
    for record in (written[10], written[70]):
        record["intervals"] = {"sink_rate": [record["sink_rate"]] * 2}
    signal = analyze(written)
    assert stages_in_order(signal) == ["absent", "emerging", "settled"]
    assert not signal.regressions


@pytest.mark.parametrize("seed", range(5))
def test_a_stage_depends_on_no_later_record(seed: int) -> None:
    written = curve(replace(CLEAR, drop=7000, noise=0.05, lasting=0.5), seed)
    whole = analyze(written)
    for count in (1, 5, 25, 31, 60, 74, 90):
        assert analyze(written[:count]).stages == whole.stages[:count]


def test_a_restart_leaves_the_abandoned_records_behind(tmp_path: Path) -> None:
    first, second = curve(replace(CLEAR, drop=5000, dropped=0.02)), curve(seed=1)
    abandoned = [record for record in first if record["step"] <= 6000]
    resumed = [record | {"step": record["step"] + 50} for record in second if record["step"] > 4000]
    run = recorded(tmp_path / "run", abandoned + resumed)
    signal = analyze(run)
    assert signal.abandoned == tuple(range(4200, 6001, 100))
    assert 4200 in {record["step"] for record in run.history}, "the record file keeps them"
    assert stages_in_order(signal) == ["absent", "emerging", "settled"]
    assert not signal.regressions
    stages = Stages()
    for record in abandoned + resumed:
        stages.add(record)
    assert stages.abandoned == set(signal.abandoned)
    assert tuple(found.stage for found in stages.found) == signal.stages


def test_a_checkpoint_scanned_before_a_restart_is_kept() -> None:
    """Its weights are those that the archive holds, whatever training did since."""
    online = curve()[:60]
    scanned = online[50] | {"source": "checkpoint-5000"}
    resumed = [record | {"step": record["step"] + 50} for record in online[40:]]
    signal = analyze([*online, scanned, *resumed])
    assert 5000 in signal.steps and 5000 not in signal.abandoned
    assert signal.abandoned == tuple(s for s in range(4100, 6000, 100) if s != 5000)


def test_scanned_checkpoints_may_come_in_any_order() -> None:
    written = [record | {"source": f"checkpoint-{record['step']}"} for record in curve()]
    shuffled = [written[i] for i in np.random.default_rng(3).permutation(len(written))]
    assert analyze(shuffled) == analyze(written)


def test_show_says_it_and_json_holds_it(tmp_path: Path, demo: tuple[Path, str]) -> None:
    runner = CliRunner()
    lines = runner.invoke(app, ["show", str(demo[0] / "run"), "--json"]).stdout.splitlines()
    signal = json.loads(lines[-1])["signal"]
    assert signal["stages"] == list(analyze(st.Run.read(demo[0] / "run")).stages)
    text = " ".join(runner.invoke(app, ["show", str(demo[0] / "run")]).stdout.split())
    assert "a candidate" in text and signal["missing"][0].split(":")[0] in text


def test_a_callback_tells_of_a_fall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run with a sink goes on with a model that has none: log and W&B both say so."""
    monkeypatch.chdir(tmp_path)
    model = models.llama()
    recorded(tmp_path / "run", curve(), st.measure(model, PROBE))
    active = wandb.init(project="test", mode="offline", dir=tmp_path)
    tracker = SinkTracker(PROBE, tmp_path / "run", every=100, on_error="raise")
    with caplog.at_level(logging.WARNING, "sinktrack"):
        for step in range(10_100, 10_600, 100):
            tracker.step(step, model)
    active.finish()
    (told,) = [r.getMessage() for r in caplog.records if r.name == "sinktrack"]
    assert told.startswith("at step 10200 candidate regression: sink rate fell by ")
    (alert,) = [r.alert for r in finished(tmp_path) if r.WhichOneof("record_type") == "alert"]
    assert alert.text.endswith(told.removeprefix("at step 10200 "))
    signal = analyze(st.Run.read(tmp_path / "run"))
    assert signal.stage == "displaced" and signal.regressions[0].detected == 10_200


def test_a_signal_that_fails_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.llama()
    run = recorded(tmp_path / "run", curve()[:3], st.measure(model, PROBE))
    with (run.directory / "records.jsonl").open("a") as file:
        file.write('{"schema": 2, "step": 400, "sink_rate": "high"}\n')
    tracker = SinkTracker(PROBE, run.directory, every=100)
    with caplog.at_level(logging.WARNING, "sinktrack"):
        assert tracker.step(500, model) is not None and tracker.step(600, model) is not None
    (told,) = caplog.records
    assert "the signal at step 500 failed" in told.getMessage()
    assert run.steps[-2:] == [500, 600]


def test_curves_of_known_truth() -> None:
    """A small share of what `scripts/check_signal.py` does; the docs hold its own numbers."""
    shares = {name: share for name, (share, _) in table([judge(s) for s in range(90)]).items()}
    assert shares["onset claimed"] > 0.8 and shares["onset in its interval"] > 0.85
    assert shares["drop found"] > 0.9 and shares["drop's size in its interval"] > 0.8
    assert shares["false plateau"] <= 0.05 and shares["false fall"] <= 0.05


RUNS = DATA / "runs"
SEEDS = [f"seed{seed}-lr{rate}" for seed in (1, 2, 3) for rate in ("0.005", "0.01")]


def kept(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RUNS / name / "records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [*SEEDS, "sliding-window"])
def test_real_runs_leave_their_floor(name: str) -> None:
    """The onset lies between the last record that shows nothing and the first formed ones."""
    written = kept(name)
    signal = analyze(written, loss=RUNS / name / "loss.csv")
    formed = [record["step"] for record in written if record["formed"]]
    assert signal.onset is not None and signal.loss is not None
    assert 100 < signal.onset.low <= signal.onset.value <= signal.onset.high <= formed[2]
    assert signal.onset.high - signal.onset.low <= 140
    assert not signal.regressions
    assert not signal.loss.adds


def test_a_real_run_that_diverges() -> None:
    written = kept("diverges")
    signal = analyze(written, loss=RUNS / "diverges" / "loss.csv")
    assert set(signal.stages) == {None, "absent"} and signal.onset is None
    assert written[-1]["sink_rate"] > 0.15, "what the last records show is no onset yet"


def test_a_real_collapse_is_a_loss() -> None:
    """Forty steps at a far too high learning rate from step 600 on end the sink phase."""
    signal = analyze(kept("spike"))
    assert signal.stage == "lost" and signal.onset is None
    assert 600 < signal.steps[signal.stages.index("lost")] <= 680
    last = signal.phases[-1]
    assert last.what == "lost" and 600 < last.step <= 640


RATES = st_.one_of(st_.sampled_from([0.0, 0.25, 0.5, 1.0]), st_.floats(0, 1))
ANY_RECORD = st_.fixed_dictionaries(
    {
        "step": st_.integers(0, 60),
        "tokens": st_.one_of(st_.none(), st_.integers(0, 10**12)),
        "source": st_.sampled_from(["callback", "checkpoint-1"]),
        "sink_rate": RATES,
        "formed": st_.booleans(),
        "first_two_share": st_.one_of(st_.none(), st_.floats(-2, 2)),
        "depth": st_.one_of(st_.none(), st_.floats(0, 40)),
        "intervals": st_.one_of(st_.none(), st_.fixed_dictionaries({"sink_rate": st_.none()})),
    }
)


@settings(max_examples=40)
@given(st_.lists(ANY_RECORD, max_size=60), st_.booleans())
def test_any_records_are_judged_and_online_as_offline(
    written: list[dict[str, Any]], ordered: bool
) -> None:
    if ordered:
        written = [record | {"step": index} for index, record in enumerate(written)]
    losses = {step: 1 / (step + 1) for step in range(0, 60, 3)}
    signal = analyze(written, loss=losses)
    text = json.dumps(signal.to_json(), allow_nan=False)
    assert json.loads(text)["stages"] == list(signal.stages)
    assert signal.lines() or not written
    online = Stages()
    for record in written:
        online.add(record)
    assert [found.stage for found in online.found] == list(signal.stages)
    assert tuple(sorted(online.abandoned)) == signal.abandoned
    assert online.onset() == signal.onset
