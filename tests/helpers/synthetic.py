"""Plausible records, made without a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sinktrack.metrics import FIELDS

BLOCKS = 4
HEADS = 4
EXPERTS = 8
STEPS = range(0, 2000, 100)


def synthetic_records(
    blocks: int = BLOCKS, steps: Sequence[int] = STEPS, formed: bool = True
) -> list[dict[str, Any]]:
    """A run whose sink forms and moves to the first two blocks, or one where none forms."""
    return [
        _record(blocks, step, (index + 1) / len(steps), formed) for index, step in enumerate(steps)
    ]


def counts_alone(steps: Sequence[int] = STEPS) -> list[dict[str, Any]]:
    """As of published counts: sink heads by block, and nothing else."""
    records = synthetic_records(steps=steps)
    for record in records:
        for name, value in record.items():
            field = FIELDS.get(name)
            if field is None or name in ("sink_heads", "first_sink_block"):
                continue
            if field.axes[:1] in (("block",), ("boundary",)):
                record[name] = [None] * (BLOCKS + (field.axes[0] == "boundary"))
            else:
                levels = field.axes[:1] == ("level",)
                record[name] = {level: [None] * BLOCKS for level in value} if levels else None
        record |= {"intervals": {}, "probe": None, "versions": {}, "seconds": None}
    return records


def restarted_records() -> list[dict[str, Any]]:
    """A callback's, in the order of writing: up to step 2,900, then again from 1,000 to 1,400."""
    steps = (range(0, 3000, 100), range(1000, 1500, 100))
    return [
        record | {"source": "callback"}
        for part in steps
        for record in synthetic_records(steps=part)
    ]


def _record(blocks: int, step: int, progress: float, formed: bool) -> dict[str, Any]:
    top = 0.8 if formed else 0.12
    centre = 0.5 + (1 - progress) * 0.6 * blocks
    concentration = [
        0.02 + top * _rise(10 * (progress - 0.4)) * _rise(3 * (block - centre - 1))
        for block in range(blocks)
    ]
    height = 3 * _rise(8 * (progress - 0.3)) if formed else 0.3
    norm_ratio = [
        0.9 * math.exp(height * _rise(3 * (block - centre))) - 0.05 * height * (block == blocks)
        for block in range(blocks + 1)
    ]
    reached = [block for block, value in enumerate(concentration) if value >= 0.3]
    reference = reached[0] if reached else None
    shares, parts = (None, None) if reference is None else _shares(reference, centre, progress)
    by_block = [
        sum(abs(part["share"]) for part in shares or () if part["block"] == block)
        for block in range(reference or 0)
    ]
    total = sum(by_block)
    peak = norm_ratio.index(max(norm_ratio))
    logs = [math.log(value) for value in norm_ratio]
    grown = logs[peak] - logs[0]
    rates = {
        str(eps): [_rise(25 * (value - eps)) for value in concentration]
        for eps in (0.1, 0.2, 0.3, 0.5)
    }
    sink_rate = sum(rates["0.3"]) / blocks
    first_two_share = sum(by_block[:2]) if reference else None
    depth = sum(i * value for i, value in enumerate(by_block)) / total if reference else None
    span = {name: part for name, part in (("first", reached[:1]), ("last", reached[-1:])) if part}
    first_two_gain = (logs[min(2, peak)] - logs[0]) / grown if grown >= math.log(2) else None
    consistency = [None] + [0.5 + 0.4 * progress] * blocks
    return {
        "schema": 2,
        "dtype": "float32",
        "step": step,
        "tokens": step * 2048,
        "source": "callback",
        "weights": f"{step:032x}",
        "probe": "758e6409a456cc954365be3ff1d9b9c5",
        "model": {"type": "mixtral", "blocks": blocks, "heads": HEADS, "experts": EXPERTS},
        "versions": {"sinktrack": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "seconds": 0.4,
        "block_kinds": ["full"] * blocks,
        "visible_queries": [63] * blocks,
        "p0_attention": [[value] * HEADS for value in concentration],
        "concentration": concentration,
        "uniform": [0.06] * blocks,
        "sink_rate": sink_rate,
        "sink_rate_from_2": sum(rates["0.3"][2:]) / max(1, blocks - 2),
        "sink_rate_by_block": rates,
        "sink_heads": {
            str(eps): [HEADS * (value > eps) for value in concentration] for eps in (0.1, 0.3)
        },
        "sink_sequences": [[value] * HEADS for value in rates["0.3"]],
        "first_sink_block": next((b for b, v in enumerate(concentration) if v > 0.3), None),
        "p0_norm": norm_ratio,
        "norm_ratio": norm_ratio,
        "direction_consistency": consistency,
        "direction_to_mean": consistency,
        "rivals": [0.1] * (blocks + 1),
        "first_token": {
            "tokens": 64,
            "norm_ratio": {
                name: [value * factor for value in norm_ratio]
                for name, factor in (("5", 0.9), ("50", 1.0), ("95", 1.1))
            },
            "direction_consistency": consistency,
        },
        "formed": bool(reached),
        "reference_block": reference,
        "sinks": [_sink(span, concentration, norm_ratio, shares, parts)] if reached else [],
        "shares": shares,
        "share_sum": None if shares is None else sum(part["share"] for part in shares),
        "first_two_share": first_two_share,
        "depth": depth,
        "effective_blocks": (
            math.exp(-sum(v / total * math.log(v / total) for v in by_block)) if reference else None
        ),
        "top_components": parts,
        "gain": [logs[block + 1] - logs[block] for block in range(blocks)],
        "peak_block": peak,
        "first_two_gain": first_two_gain,
        "position_share": 0.9 if reached else None,
        "mixing": [[0.3] * HEADS] * blocks,
        "attention_write_ratio": [1.5] * blocks,
        "mlp_write_ratio": [12.0 * progress] * blocks,
        "value_ratio": [[0.4] * HEADS] * blocks,
        "max_activation": {
            "p0": [30.0] * (blocks + 1),
            "others": [3.0] * (blocks + 1),
            "p0_channel": [7] * (blocks + 1),
            "others_channel": [1] * (blocks + 1),
            "ratio": [60.0] * (blocks + 1),
        },
        "p0_channels": [{"channel": 7, "share": 0.8}] if reached else None,
        "intervals": {
            "sink_rate": _interval(sink_rate, 0.04),
            "sink_rate_from_2": _interval(sum(rates["0.3"][2:]) / max(1, blocks - 2), 0.05),
            "concentration": [_interval(value, 0.02) for value in concentration],
            "first_two_share": _interval(first_two_share, 0.03),
            "depth": _interval(depth, 0.1),
            "first_two_gain": _interval(first_two_gain, 0.02),
        },
    }


def _sink(
    span: dict[str, list[int]],
    concentration: list[float],
    norm_ratio: list[float],
    shares: list[dict[str, Any]] | None,
    parts: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """The one phase, from the first block that reached the threshold to the last."""
    (first,), (last,) = span["first"], span["last"]
    inside = norm_ratio[first : last + 1]
    peak = first + inside.index(max(inside))
    return {
        "first_block": first,
        "last_block": last,
        "mass": sum(concentration[first : last + 1]),
        "peak_block": peak,
        "step_up_block": peak - 1 if peak else None,
        "step_down_block": None,
        "writers": sorted(shares or (), key=lambda part: -part["share"])[:16],
        "erasers": [],
        "top_components": parts or [],
    }


def _shares(
    reference: int, centre: float, progress: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Shares that sum to 1, and their largest parts; the MLP's goes to one expert."""
    start = 1.0 if reference == 0 else 0.2 - 0.15 * progress
    weights = [math.exp(-abs(block + 0.5 - centre)) for block in range(reference)]
    shares: list[dict[str, Any]] = [
        {"kind": "embedding", "block": None, "index": None, "share": start}
    ]
    parts = [dict(shares[0])]
    for block, weight in enumerate(weights):
        here = (1 - start) * weight / sum(weights)
        attention, mlp = 0.25 * here, 0.75 * here
        shares.append({"kind": "attention", "block": block, "index": None, "share": attention})
        shares.append({"kind": "mlp", "block": block, "index": None, "share": mlp})
        parts.append({"kind": "head", "block": block, "index": 1, "share": attention})
        parts.append({"kind": "expert", "block": block, "index": 5, "share": mlp, "gate": 0.8})
    parts.sort(key=lambda part: -abs(part["share"]))
    return shares, parts[:16]


def _rise(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _interval(value: float | None, margin: float) -> list[float] | None:
    return None if value is None else [max(0.0, value - margin), value + margin]
