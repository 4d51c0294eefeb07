"""Marks: where something but the model changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sinktrack import RecordError, Run
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.records.marks import Mark
from sinktrack.signal import Stages, analyze
from tests.helpers import models
from tests.helpers.commands import sinktrack
from tests.helpers.synthetic import synthetic_records
from tests.helpers.trainings import PROBE


def a_run(jump: float = 0.0) -> list[dict[str, object]]:
    """Rises to 0.5 by step 1,500, and is higher by ``jump`` from step 6,000 on."""
    draws = np.random.default_rng(0)
    records = synthetic_records(steps=range(0, 7000, 100))
    for record in records:
        step = record["step"]
        rate = 0.02 + 0.5 * min(1.0, max(0.0, (step - 1000) / 500)) + jump * (step >= 6000)
        record["sink_rate"], record["formed"] = rate + 0.004 * float(draws.normal()), step > 1200
        record["intervals"] = {"sink_rate": [rate - 0.01, rate + 0.01]}
        record["depth"], record["first_two_share"] = 1.0, 0.5
    return records


def test_they_stay_with_the_run(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run")
    run.mark(5000, "learning  rate decays")
    run.mark(100, "other data é")
    run.mark(5000, "learning rate decays")
    assert Run.read(tmp_path / "run").marks == (
        Mark(100, "other data é"), Mark(5000, "learning rate decays"),
    )  # fmt: skip
    for step, what in ((-1, "x"), (1.5, "x"), (True, "x"), (3, " ")):
        with pytest.raises(ValueError, match="step of|says nothing"):
            run.mark(step, what)  # type: ignore[arg-type]
    (tmp_path / "run" / "marks.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RecordError, match="line 1 is no mark"):
        _ = run.marks


def test_the_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Run.open(run).append(a_run()[0])
    (tmp_path / "marks.csv").write_text("step,what\n200,longer context\n100,decay\n")
    told = sinktrack("mark", run, "--from", tmp_path / "marks.csv")
    assert told.returncode == 0, told.stderr
    assert told.stderr.split("\n")[:2] == ["step 100: decay", "step 200: longer context"]
    assert sinktrack("mark", run, "300", "restart").returncode == 0
    assert [mark.step for mark in Run.read(run).marks] == [100, 200, 300]
    assert sinktrack("mark", run, "300").returncode == 2
    (tmp_path / "marks.csv").write_text("when,what\n200,longer context\n")
    wrong = sinktrack("mark", run, "--from", tmp_path / "marks.csv")
    assert wrong.returncode == 2 and "columns step and what" in wrong.stderr


def test_a_tracker_marks_and_its_signal_follows(tmp_path: Path) -> None:
    tracker = SinkTracker(PROBE, tmp_path, every=1, on_error="raise")
    model = models.mixtral()
    tracker.step(0, model)
    tracker.mark(1, "other data")
    tracker.step(1, model)
    assert Run.read(tmp_path).marks == (Mark(1, "other data"),)
    assert tracker._stages is not None and tracker._stages.marks == (1,)


def test_trends_are_judged_from_the_last_mark_on() -> None:
    """A jump at a mark is no trend: the level after it stands."""
    records = a_run(jump=0.2)
    at = [Mark(6000, "other data")]
    marked, plain = analyze(records, marks=at), analyze(records)
    assert plain.plateau is None
    assert marked.stage == "settled" and marked.plateau is not None
    assert marked.plateau.level.value == pytest.approx(0.72, abs=0.01)
    assert "marked at step 6,000: other data" in marked.lines()
    early = [record for record in records if record["step"] < 6300]  # type: ignore[operator]
    assert "trends: 5 more records (3 of 8) since the last mark" in analyze(early, marks=at).missing
    online = Stages(marks=(6000,))
    for record in records:
        online.add(record)
    assert [one.stage for one in online.found] == list(marked.stages)
