"""Steps that hold the same weights are told: while scanning, in `show`, and in the report."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from sinktrack import Probe, Run, scan
from sinktrack.records.twins import equal_weights, told
from sinktrack.signal import analyze
from sinktrack.views.report.data import embedded
from sinktrack.views.terminal import show
from tests.helpers import models
from tests.helpers.synthetic import synthetic_records

PROBE = Probe.random(models.VOCABULARY, sequences=2, length=6)


def record(step: int, weights: str | None) -> dict[str, object]:
    return {"step": step, "weights": weights}


def test_groups_of_steps() -> None:
    records = [record(step, weights) for step, weights in
               [(40, "a"), (10, "b"), (20, "a"), (30, "a"), (50, "b"), (60, None), (70, None),
                (80, "c"), (80, "c")]]  # fmt: skip
    assert equal_weights(records) == [[10, 50], [20, 30, 40]]
    assert equal_weights([]) == equal_weights([{"step": 1}]) == []
    assert told([20, 30, 40]) == "steps 20, 30 and 40 hold the same weights, by their digest"
    assert told(range(100)).startswith("steps 0, 1, 2, 3, 4, 5, 6 and 93 others hold")


def test_a_scan_and_what_is_shown_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed, step in ((1, 10), (2, 20), (2, 30), (2, 40)):
        path = tmp_path / f"a/checkpoint-{step}"
        models.build(models.llama(num_hidden_layers=2).config, seed).save_pretrained(path)
    shutil.move(tmp_path / "a/checkpoint-40", tmp_path / "checkpoint-40")
    list(scan(tmp_path / "a", probe=PROBE, run=tmp_path / "run"))
    first = "steps 20 and 30 hold the same weights, by their digest"
    assert caplog.messages == [first]
    list(scan(tmp_path / "checkpoint-40", run=tmp_path / "run"))
    both = "steps 20, 30 and 40 hold the same weights, by their digest"
    assert caplog.messages == [first, both]

    records = Run.read(tmp_path / "run").records
    assert len(records) == 4
    console = Console(width=80, color_system=None, file=io.StringIO())
    show(records, analyze(records), "run", console)
    assert isinstance(console.file, io.StringIO)
    assert f"{both.capitalize()}.\n" in console.file.getvalue()
    (run,) = json.loads(embedded({"run": records}))["runs"]
    assert run["same_weights"] == [both]


def test_a_usual_run_says_nothing() -> None:
    (run,) = json.loads(embedded({"run": synthetic_records()}))["runs"]
    assert run["same_weights"] == []
