"""The onset under other definitions, on curves whose onset is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sinktrack.signal import Sensitivity, analyze, sensitivity
from sinktrack.signal.sensitivity import METHODS
from tests.helpers.synthetic import BLOCKS, HEADS, synthetic_records


def curves(start: float, width: float, noise: float = 0.0) -> list[dict[str, Any]]:
    """All shares rise along one straight line from ``start`` on, to 0.8."""
    draws = np.random.default_rng(0)
    records = synthetic_records(steps=range(0, 6000, 50))
    for record in records:
        rate = 0.02 + 0.78 * min(1.0, max(0.0, (record["step"] - start) / width))
        rate = float(np.clip(rate + noise * draws.normal(), 0, 1))
        record["sink_rate"], record["formed"] = rate, rate > 0.3
        record["sink_rate_by_block"] = {
            level: [rate] * BLOCKS for level in record["sink_rate_by_block"]
        }
        record["sink_heads"] = {level: [rate * HEADS] * BLOCKS for level in record["sink_heads"]}
        record["intervals"] = {"sink_rate": [rate - 0.001, rate + 0.001]}
    return records


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_definitions_agree_where_all_curves_are_one(noise: float) -> None:
    start, width = 2000, 800
    found = sensitivity(curves(start, width, noise))
    assert len(found.onsets) == 3 * (4 + 2) and len(found.steps) == 18
    for one in found.onsets:
        wanted = start + 0.1 * width if one.method == "crossing" else start
        reach = width / 4 if one.method == "fitted curve" else 60
        assert one.step == pytest.approx(wanted, abs=reach), one
    assert "under 18 definitions (threshold 0.1 to 0.5" in str(found)
    assert len(found.table()) == 7 and all(method in found.table()[0] for method in METHODS)


def test_a_threshold_that_is_never_met_is_told() -> None:
    records = curves(2000, 800)
    for record in records:
        record["sink_rate_by_block"]["0.5"] = [0.0] * BLOCKS
    found = sensitivity(records)
    none = [one for one in found.onsets if one.step is None]
    assert [(one.over, one.threshold) for one in none] == [("mean", 0.5)] * 3
    assert str(found).endswith("; 3 find none")


def test_blocks_weigh_by_their_heads() -> None:
    records = curves(2000, 800)
    for record in records:
        rates = record["sink_rate_by_block"]["0.3"]
        rates[0], record["p0_attention"][0] = None, [None] * HEADS
        rates[1], record["p0_attention"][1] = 0.0, [0.1] + [None] * (HEADS - 1)
    (one,) = [o for o in sensitivity(records).onsets
              if (o.over, o.threshold, o.method) == ("mean", 0.3, "change point")]  # fmt: skip
    assert one.step == pytest.approx(2000, abs=60)


def test_an_analysis_gives_it_with_its_onset() -> None:
    records = curves(2000, 800, 0.01)
    found = analyze(records)
    assert found.onset is not None and found.sensitivity == sensitivity(records)
    assert str(found.sensitivity) in found.lines()
    assert found.to_json()["sensitivity"]["onsets"][0]["over"] == "mean"
    flat = analyze(synthetic_records(formed=False))
    assert flat.onset is None and flat.sensitivity is None
    assert str(Sensitivity(())) == "no other definition finds an onset"
