"""The Megatron callback: training is unchanged, events are understood, failures are shared."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_megatron import launch

pytest.importorskip("megatron.core")

ALONE = ["bridge", "megatron_lm", "refusals"]
TWO = ["deepseek:ep2 overlap", "deepseek:pp2 vp2", "deepseek:tp2 sp ep2", "failing_alone"]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By case, what failed on each process."""
    found: dict[str, list[Any]] = {}
    for processes, wanted in ((1, ALONE), (2, TWO)):
        out = tmp_path_factory.mktemp("megatron")
        launch(processes, "megatron_training.py", str(out), *wanted)
        for rank in range(processes):
            for case, failure in json.loads((out / f"{rank}.json").read_text()).items():
                found.setdefault(case, []).append(failure)
    return found


@pytest.mark.parametrize("case", [*ALONE, *TWO])
def test_case(case: str, failures: dict[str, list[Any]]) -> None:
    for failure in failures[case]:
        assert failure is None, failure
