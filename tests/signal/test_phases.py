"""Sink phases and sink heads over training: made-up, of a real model, and published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_runs import names, published

import sinktrack
from sinktrack.signal import Event, Stages, analyze, timeline
from sinktrack.signal.analysis import Migration, shown
from sinktrack.signal.robust import Interval
from tests.helpers.paths import DATA
from tests.helpers.synthetic import synthetic_records

DATA = DATA
BLOCKS = 12
Spans = dict[tuple[int, int], float]


def record(step: int, phases: Spans, **more: Any) -> dict[str, Any]:
    """One whose concentration is so high in these blocks."""
    concentration = [0.05] * BLOCKS
    for (first, last), value in phases.items():
        concentration[first : last + 1] = [value] * (last + 1 - first)
    return {
        "schema": 2,
        "step": step,
        "tokens": 10 * step,
        "source": "checkpoint",
        "model": {"blocks": BLOCKS, "heads": 4},
        "concentration": concentration,
        "formed": bool(phases),
        "sink_rate": sum(value >= 0.3 for value in concentration) / BLOCKS,
        "depth": 3.0,
        "first_two_share": 0.2,
        "sinks": [
            {"first_block": first, "last_block": last, "mass": value * (last + 1 - first)}
            for (first, last), value in phases.items()
        ],
        "intervals": {},
    } | more


def events(*histories: Spans | tuple[int, Spans]) -> list[tuple[int, str, int, Any, Any]]:
    """Of a run with these phases, each so many records long."""
    steps = 0
    written = []
    for part in histories:
        count, phases = part if isinstance(part, tuple) else (1, part)
        for _ in range(count):
            written.append(record(100 * steps, phases))
            steps += 1
    found = analyze(written).phases
    assert all(one.tokens == 10 * one.step and one.told == one.step + 200 for one in found)
    return [(one.step, one.what, one.phase, one.blocks[:2], one.before and one.before[:2])
            for one in found]  # fmt: skip


ONE: Spans = {(3, 5): 0.5}
TWO: Spans = {(3, 5): 0.5, (7, 10): 0.6}


def test_birth_change_of_the_main_one_and_loss() -> None:
    assert events((3, {}), (3, ONE), (3, TWO), (3, {(7, 10): 0.6})) == [
        (300, "born", 0, (3, 5), None),
        (600, "born", 1, (7, 10), None),
        (600, "main", 1, (7, 10), (3, 5)),
        (900, "lost", 0, (3, 5), None),
    ]


def test_growth_is_no_birth() -> None:
    """As in OLMoE: the first block goes up, a record at a time."""
    path: list[tuple[int, Spans]] = [(3, {(first, 10): 0.5}) for first in (7, 6, 5, 3, 2)]
    assert events(*path) == [
        (0, "born", 0, (7, 10), None),
        *((300 * i, "grew", 0, (first, 10), (before, 10))
          for i, (before, first) in enumerate([(7, 6), (6, 5), (5, 3), (3, 2)], 1)),
    ]  # fmt: skip
    assert [one[1] for one in events((3, TWO), (3, {(3, 4): 0.5, (7, 10): 0.6}))] == [
        "born", "born", "shrank",
    ]  # fmt: skip
    moved = events((3, {(3, 5): 0.5}), (3, {(4, 6): 0.5}))
    assert [one[1] for one in moved] == ["born", "moved"]


def test_two_that_become_one_and_part_again() -> None:
    whole: Spans = {(3, 10): 0.5}
    found = events((3, TWO), (3, whole), (3, TWO))
    assert [one[:3] for one in found] == [
        (0, "born", 0), (0, "born", 1), (300, "merged", 0), (300, "grew", 1),
        (600, "shrank", 1), (600, "split", 2),
    ]  # fmt: skip
    assert found[2][4] == (3, 10) and found[5][3:] == ((3, 5), (3, 10))


@pytest.mark.parametrize("other", [{}, TWO, {(3, 9): 0.5}])
def test_what_two_records_show_is_no_event(other: Spans) -> None:
    assert len(events((4, ONE), (2, other), (4, ONE), (1, other), (3, ONE))) == 1


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from([0.05, 0.2, 0.5]), min_size=6, max_size=6), max_size=30).map(
        lambda rows: [row for row in rows for _ in range(2)]
    )
)
def test_phases_over_any_concentrations(rows: list[list[float]]) -> None:
    """A run that is told while it goes on; each phase is born once and lost at most once."""
    written = [
        {"step": step, "concentration": row, "formed": max(row) >= 0.3, "sink_rate": 0.1,
         "depth": None, "first_two_share": None}
        for step, row in enumerate(rows)
    ]  # fmt: skip
    stages = Stages()
    told: list[Event] = []
    for one in written:
        stages.add(one)
        assert stages.story.events[: len(told)] == told, "what was told stays"
        assert all(event.told == one["step"] for event in stages.story.events[len(told) :])
        told = list(stages.story.events)
    assert tuple(told) == analyze(written).phases
    began = [one.phase for one in told if one.what in ("born", "split")]
    ended = [one.phase for one in told if one.what in ("lost", "merged")]
    assert began == sorted(set(began)) and len(ended) == len(set(ended))
    alive: set[int] = set()
    for event in told:
        assert (event.phase in alive) != (event.what in ("born", "split"))
        assert event.blocks.first_block <= event.blocks.last_block and str(event)
        alive = alive - {event.phase} if event.what in ("lost", "merged") else alive | {event.phase}
    for value in (tuple(row) for row in rows[-1:]):
        assert bool(stages.story.now) == (max(value) >= 0.3)


def test_a_new_main_phase_is_no_jump_of_the_depth() -> None:
    """The depth goes from 3 to 9 with the phases; across that nothing is compared."""
    draw = np.random.default_rng(0)
    before = [record(100 * i, ONE if i > 9 else {}) for i in range(40)]
    after = [record(100 * i, TWO, depth=9.0, first_two_share=0.01) for i in range(40, 70)]
    written = [one | {"depth": one["depth"] + 0.02 * draw.normal()} for one in [*before, *after]]
    signal = analyze(written)
    assert [one.what for one in signal.phases] == ["born", "born", "main"]
    assert {one.quantity for one in signal.regressions} <= {"sink_rate"}
    assert not {"migrating", "displaced"} & set(signal.stages)
    assert all(one.since == 4000 and one.records == 30 for one in signal.migration)
    assert len(signal.migration) == 2
    assert any("main sink phase is blocks 7 to 10, no longer blocks 3 to 5" in line
               for line in signal.lines())  # fmt: skip
    soon = analyze(written[:44])
    assert not soon.migration and soon.missing[-1] == (
        "migration: 4 more records (4 of 8) of a formed sink since step 4,000, where the sink "
        "phases last changed"
    )
    same = [one | {"sinks": None, "concentration": None} for one in written]
    assert [one.quantity for one in analyze(same).regressions] == ["first_two_share", "depth"]


def test_records_of_two_schemas() -> None:
    """Share and depth of the older count as missing, and that is said once."""
    old = [record(100 * i, ONE if i > 9 else {}, schema=1, depth=8.0) for i in range(40)]
    new = [record(100 * i, ONE, depth=3.0) for i in range(40, 55)]
    for one in old:
        del one["sinks"]
    signal = analyze([*old, *new])
    assert [one.what for one in signal.phases] == ["born"], "by their concentrations"
    assert all(one.quantity == "sink_rate" for one in signal.regressions)
    assert all(one.records == 15 for one in signal.migration) and len(signal.migration) == 2
    assert signal.notes == (
        "depth and first-two share of the 40 records of an older schema than 2 are other "
        "quantities: they count as missing",
    )
    assert str(signal).count("older schema") == 1
    online = Stages()
    for one in [*old, *new]:
        online.add(one)
    assert tuple(one.stage for one in online.found) == signal.stages
    assert online.found[:40] == Stages.of(old).found
    late = analyze([*old[:30], *new, record(9000, ONE, schema=1, depth=8.0)])
    assert "the 31 records" in late.notes[0] and all(m.records == 15 for m in late.migration)
    (alone,) = analyze(old).notes
    assert "a threshold chose" in alone


def test_one_record_says_what_it_shows() -> None:
    whole = synthetic_records()
    signal = analyze(whole[-1:])
    assert signal.stage is None and signal.stages == (None,)
    last = whole[-1]
    main = last["sinks"][0]
    assert signal.lines()[:2] == [
        f"step 1,900 shows a sink rate of {last['sink_rate']:.1%} (95 %: "
        f"{last['intervals']['sink_rate'][0]:.1%} to {last['intervals']['sink_rate'][1]:.1%})",
        f"step 1,900 shows a sink phase: blocks {main['first_block']} to {main['last_block']}",
    ]
    assert "absent" not in str(signal)
    assert "stage and onset: 3 more records (1 of 4)" in signal.missing
    (first,) = shown(record(0, {}) | {"concentration": None, "sinks": None})
    assert first == "step 0 shows a sink rate of 0.0%"
    assert shown(record(0, TWO))[1] == (
        "step 0 shows sink phases: blocks 3 to 5, blocks 7 to 10 (main)"
    )
    assert shown(record(0, {}))[1] == "step 0 shows no block that rests on P0"


def test_a_sink_among_the_first_records_is_never_absent() -> None:
    """One of them below the threshold does not make the others a floor."""
    rates = [0.7, 0.72, 0.1, *[0.7] * 20]
    written = [record(i, ONE if rate > 0.3 else {}, sink_rate=rate) for i, rate in enumerate(rates)]
    signal = analyze(written)
    assert signal.stage not in (None, "absent") and signal.onset is None
    assert "onset: the sink was there at the first records; measure earlier" in signal.missing[0]


def test_intervals_that_say_nothing() -> None:
    wide = Interval(-0.3, -0.63, 0.0014)
    signal = analyze([record(0, ONE)])
    for per, change, words in (
        (wide, wide, "cannot be told yet"),
        (wide, Interval(0, -0.01, 0.01), "stays within 5.0 points"),
    ):
        found = Migration("first_two_share", 9, per, None, change, 400)
        said = sinktrack.signal.analysis._moved(found)
        assert said == f"candidate migration: first-two share since step 400: {words}"
    assert not signal.migration


def kept(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "runs" / name / "records.jsonl").open()]


def test_a_made_up_trace_of_a_real_model() -> None:
    """Weights between random and SmolLM2's: both phases are born, and nothing migrates.

    The first edition's depth fell from 10.7 to 1.6 between two of these and its first-two share
    rose from .01 to .32, because block 3 crossed the threshold.
    """
    written = kept("made-up-trace")
    signal = analyze(written)
    assert [(one.what, one.phase) for one in signal.phases[:2]] == [("born", 0), ("born", 1)]
    assert [one.blocks[:2] for one in signal.phases[:2]] == [(2, 10), (12, 29)]
    assert not signal.regressions and not {"migrating", "displaced"} & set(signal.stages)
    formed = [one for one in written if one["formed"]]
    for name, most in (("depth", 0.35), ("first_two_share", 0.02)):
        steps = np.abs(np.diff([one[name] for one in formed]))
        assert steps.max() < most
    share, depth = signal.migration
    assert not share.change or share.change.rules_out(0.05)
    assert depth.per_1000_steps.low <= 0 <= depth.per_1000_steps.high
    main = max(written[-1]["sinks"], key=lambda sink: sink["mass"])
    assert (main["writers"][0]["kind"], main["writers"][0]["block"]) == ("mlp", 11)
    assert (main["first_block"], main["last_block"]) == (12, 29)
    lived = timeline(written)
    assert sum(lived.births) - sum(lived.deaths) == lived.sink_heads[-1] > 200
    assert set(lived.first_sink_block) == {None, 2}


def test_published_traces() -> None:
    """Counts of sink heads alone: the first block's path, the onset, and what cannot be told."""
    paths = {
        name: [one.block for one in analyze(published(name)).first_sink_block] for name in names()
    }
    assert paths == {
        "OLMo-1B-0724": [None, 4, None, 3, 2],
        "OLMoE-1B-7B-0924": [7, 6, 5, 3, 2],
        "Pythia-1B": [None, 6, 4],
    }
    signal = analyze(published("OLMoE-1B-7B-0924"))
    assert signal.rate == "share of sink heads" and signal.onset is None
    assert "there at the first records" in signal.missing[0]
    assert not signal.migration and not signal.phases and not signal.regressions
    tokens = [one.tokens for one in signal.first_sink_block]
    assert tokens == [20e9, 104e9, 419e9, 838e9, 2516e9]
    assert any("7 from step 5,000, 6 from step 25,000" in line for line in signal.lines())
    olmo = analyze(published("OLMo-1B-0724"))
    assert olmo.onset is not None and olmo.onset.high == 126_000
    assert "by step 126,000; how long before cannot be told yet" in olmo.lines()[1]
    assert timeline(published("Pythia-1B")).heads == ()
    assert "10 records do not tell" in str(timeline(published("Pythia-1B")))


def test_published_traces_as_runs(tmp_path: Path) -> None:
    run = sinktrack.Run.open(tmp_path / "olmoe")
    for one in published("OLMoE-1B-7B-0924"):
        run.append(one)
    assert analyze(run) == analyze(published("OLMoE-1B-7B-0924"))
    table = run.to_pandas()
    assert table.first_sink_block.tolist() == [7, 7, 6, 6, 5, 3, 3, 2, 2, 2]


GRIDS = st.lists(
    st.lists(st.lists(st.sampled_from([None, 0.0, 0.49, 0.5, 1.0]), min_size=2, max_size=2),
             min_size=3, max_size=3),
    max_size=8,
)  # fmt: skip


@given(GRIDS)
def test_the_timeline_of_any_heads(grids: list[Any]) -> None:
    """Against a loop over the letters of each head's life: + a sink head, - none, blank unknown."""
    written = [{"step": 7 * i, "tokens": None, "source": "x", "sink_sequences": grid}
               for i, grid in enumerate(grids)]  # fmt: skip
    found = timeline(written)
    lives = {
        (block, head): [
            (one["step"], one["sink_sequences"][block][head] >= 0.5)
            for one in written if one["sink_sequences"][block][head] is not None
        ]
        for block in range(3) for head in range(2)
    }  # fmt: skip
    assert [(one.block, one.head) for one in found.heads] == [
        k for k, life in lives.items() if life
    ]
    for one in found.heads:
        life = lives[one.block, one.head]
        text = "".join("-+"[is_one] for _, is_one in life)
        assert (one.births, one.deaths) == (text.count("-+"), text.count("+-"))
        run_of = len(text) - len(text.rstrip(text[-1]))
        begins = life[len(text) - run_of][0]
        for_good = begins if text[-1] == "+" and run_of >= 3 else None
        ceased = begins if text[-1] == "-" and run_of >= 3 and "+" in text else None
        assert (one.since and one.since.step, one.ceased and one.ceased.step) == (for_good, ceased)
        assert (one.first and one.first.step) == next((s for s, is_one in life if is_one), None)
    counts = [sum((v or 0) >= 0.5 for row in grid for v in row) for grid in grids]
    assert found.sink_heads == tuple(counts) and json.dumps(found.to_json()) and str(found)
