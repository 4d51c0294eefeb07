"""Causal tests of live Megatron-Core models say what those of their saved checkpoints say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sinktrack import Probe, Run, scan
from tests.helpers.commands import launch

pytest.importorskip("megatron.core")

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

FAMILIES = ["llama", "qwen3_moe", "deepseek_v3", "glm4_moe", "nemotron", "gated_attention"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("causal")
    launch(1, "megatron_causal.py", str(out), *FAMILIES)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_live_and_scanned_agree(
    family: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same trials, controls and verdicts; every effect within rounding."""
    epsilon = float((trained / family / "epsilon").read_text())
    monkeypatch.setattr("sinktrack.metrics.phases.EPSILON", epsilon)
    monkeypatch.setattr("sinktrack.metrics.phases.GOES_ON", epsilon)
    (online,) = Run.read(trained / family / "run").records
    probe = Probe.load(trained / family / "run" / "probe.safetensors")
    (offline,) = scan(trained / family, probe=probe, run=tmp_path / "run", causal=True)
    assert online["step"] == offline["step"] == 10
    assert online["causal"]["phases"], "nothing was tested"
    compare(online["causal"], offline["causal"], "causal")


def compare(live: Any, scanned: Any, where: str) -> None:
    if isinstance(live, dict):
        assert live.keys() == scanned.keys(), where
        for name in live.keys() - {"seconds"}:
            compare(live[name], scanned[name], f"{where}/{name}")
    elif isinstance(live, list):
        assert len(live) == len(scanned), where
        for place, (one, other) in enumerate(zip(live, scanned, strict=True)):
            compare(one, other, f"{where}/{place}")
    elif isinstance(live, float):
        assert live == pytest.approx(scanned, rel=1e-3, abs=1e-4), where
    else:
        assert live == scanned, where
