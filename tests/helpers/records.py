"""Records made up for tests."""

from __future__ import annotations

from typing import Any

from sinktrack import Probe
from tests.helpers.synthetic import synthetic_records

PROBE = Probe.random(9, sequences=2, length=4)


def record(step: int, **changes: object) -> dict[str, object]:
    return {"schema": 2, "step": step, "probe": PROBE.digest, "sink_rate": 0.5} | changes


def serial_record() -> dict[str, Any]:
    """Two sinks in series, as of a pretrained model of 30 blocks."""
    record = synthetic_records(30)[-1]

    def part(kind: str, block: int, share: float) -> dict[str, Any]:
        return {"kind": kind, "block": block, "index": None, "share": share}

    for block in range(30):
        record["concentration"][block] = 0.6 if block >= 12 else 0.4 if 3 <= block <= 9 else 0.05
    first = {"first_block": 3, "last_block": 9, "mass": 2.8, "peak_block": 3, "step_up_block": 2,
             "step_down_block": 9, "writers": [part("mlp", 2, 0.7), part("mlp", 1, 0.25)],
             "erasers": [part("mlp", 8, -0.2), part("mlp", 9, -0.7)],
             "top_components": []}  # fmt: skip
    main = {"first_block": 12, "last_block": 29, "mass": 10.8, "peak_block": 12,
            "step_up_block": 11, "step_down_block": 29, "writers": [part("mlp", 11, 0.93)],
            "erasers": [part("mlp", 29, -0.5)], "top_components": [],
            "total_effects": [{"kind": "mlp", "block": 0, "index": None, "effect": 0.61},
                              {"kind": "mlp", "block": 11, "index": None, "effect": 1.0}],
            }  # fmt: skip
    rivals = [0.0] * 31
    rivals[3] = 0.03
    return record | {"sinks": [first, main], "reference_block": 12, "position_share": 0.02,
                     "formed": True, "rivals": rivals}  # fmt: skip
