"""The Megatron callback: training is unchanged, events are understood, failures are shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sinktrack import Run
from sinktrack.loggers.curves import metrics
from tests.helpers.commands import asked_cases, launch
from tests.helpers.wandb_files import read_back, read_summary

pytestmark = pytest.mark.distributed

pytest.importorskip("megatron.core")

ALONE = [
    "bridge",
    "bridge_async",
    "megatron_lm",
    "ramped",
    "refusals",
    "untold",
    "logged",
    "kept",
    "edited",
    "edited_more",
    "causal",
]
SLOW = ["bridge_async", "deepseek:pp2 vp2", "deepseek:tp2 sp ep2", "edited_more", "causal_over_two"]
TWO = [
    "deepseek:ep2 overlap",
    "deepseek:pp2 vp2",
    "deepseek:tp2 sp ep2",
    "failing_alone",
    "windows",
    "stale",
    "apart",
    "untold",
    "logged",
    "kept",
    "causal_over_two",
]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of processes, where they write."""
    return {processes: tmp_path_factory.mktemp("megatron") for processes in (1, 2)}


@pytest.fixture(scope="module")
def failures(where: dict[int, Path], request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    """By case, what failed on each process; of those that are asked for."""
    found: dict[str, list[Any]] = {}
    asked = {"logged"} | asked_cases(request)
    for processes, cases in ((1, ALONE), (2, TWO)):
        wanted = [case for case in cases if case in asked]
        out = where[processes]
        launch(processes, "megatron_training.py", str(out), *wanted)
        for rank in range(processes):
            for case, failure in json.loads((out / f"{rank}.json").read_text()).items():
                found.setdefault(case, []).append(failure)
    return found


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case
        for case in (*ALONE, *TWO)
    ],
)
def test_case(case: str, failures: dict[str, list[Any]]) -> None:
    for failure in failures[case]:
        assert failure is None, failure


@pytest.mark.parametrize("processes", [1, 2])
def test_wandb_on_the_last_process(
    processes: int, failures: dict[str, list[Any]], where: dict[int, Path]
) -> None:
    """No row of Megatron's is lost to ours, nor of ours; all records, on their own axis."""
    assert not any(failures["logged"])
    here = where[processes] / "logged"
    rows, definitions = read_back(here)
    theirs: dict[str, list[int]] = {}
    for row in rows:
        for key, value in row.items():
            if not key.startswith(("sinktrack/", "_")):
                assert row["_step"] == value
                theirs.setdefault(key, []).append(int(value))
    every = list(range(1, 7))
    assert theirs == {
        "loss": every,
        "learning-rate": every,
        "lm loss validation before": [3, 6],
        "lm loss validation": [3, 6],
        "validation at the end": [6],
        "test at the end": [6],
    }
    run = Run.read(here / "run")
    assert run.steps == [0, 1, 2, 3, 4, 6]
    ours = [row for row in rows if "sinktrack/step" in row]
    assert [row["sinktrack/step"] for row in ours] == run.steps
    for row, record in zip(ours, run.records, strict=True):
        for key, value in metrics(record).items():
            assert row[key] == value
    axes = {definition.name: definition.step_metric for definition in definitions}
    assert {axes[key] for row in ours for key in row if key in axes} == {"", "sinktrack/step"}
    assert axes["sinktrack/sink_rate"] == "sinktrack/step"
    summary = read_summary(here)
    assert summary["sinktrack/stage"] and summary["sinktrack/probes_failed"] == 0
    (known,) = json.loads((here / "run" / "wandb.json").read_text()).values()
    assert known["steps"] == run.steps and known["whole"] == 6
    assert known["project"] == "training"
