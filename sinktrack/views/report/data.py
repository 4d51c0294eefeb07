"""What the page draws of records: rounded, packed, and thinned where there are too many."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sinktrack.errors import RecordError
from sinktrack.loggers.curves import causal
from sinktrack.metrics.attention import EPSILON
from sinktrack.records.twins import equal_weights, told
from sinktrack.signal import analyze
from sinktrack.signal.loss import Losses
from sinktrack.signal.stages import living

BUDGET = 9_700_000
"""Bytes that all records together may take; the page's code takes 5 MB."""
_FIELDS = (
    "step", "tokens", "source", "seconds", "concentration", "sink_rate", "norm_ratio", "formed",
    "reference_block", "share_sum", "first_two_share", "depth", "first_two_gain", "peak_block",
)  # fmt: skip
_INTERVALS = ("sink_rate", "first_two_share", "depth", "first_two_gain")

Records = Sequence[Mapping[str, Any]]


def embedded(
    runs: Mapping[str, Records], losses: Mapping[str, Losses] | None = None, live: bool = False
) -> str:
    """The page's data as JSON that no HTML parser takes for markup.

    Where the records would take more than `BUDGET`, each run is thinned evenly, its last record
    kept; the page says so.

    Args:
        runs: records in the order in which they were written, by the run's name.
        losses: by the run's name, the training loss by step.
        live: does the page ask its server for more?

    Raises:
        RecordError: there is no run, or one that holds no records.
    """
    if not runs:
        raise RecordError("no run to draw")
    for name, records in runs.items():
        if not records:
            raise RecordError(
                f"{name} holds no records yet: train with a callback, or scan an archive"
            )
    losses = losses or {}
    largest = {name: max(_sample(records), key=_size) for name, records in runs.items()}
    expected = sum(_size(largest[name]) * len(records) for name, records in runs.items())
    stride = math.ceil(expected / BUDGET)
    drawn = [_run(name, runs[name], losses.get(name), stride) for name in runs]
    return _escaped({"epsilon": EPSILON, "live": live, "runs": drawn})


def _run(name: str, written: Records, losses: Losses | None, stride: int) -> dict[str, Any]:
    found = analyze(written, losses)
    stages = dict(zip(found.steps, found.stages, strict=True))
    records = living(written)
    last = records[-1]
    kept = range((len(records) - 1) % stride, len(records), stride)
    loss = _loss_at([record["step"] for record in records], losses)
    onset = {"step": found.onset, "tokens": found.onset_tokens}
    return {
        "name": name,
        "model": last["model"],
        "block_kinds": last["block_kinds"],
        "measured_blocks": last.get("measured_blocks"),
        "probe": last["probe"],
        "versions": last["versions"],
        "total": len(records),
        "same_weights": [told(steps) for steps in equal_weights(records)],
        "signal": found.lines(),
        "missing": found.missing,
        "onset": {axis: at and _rounded([at.value, at.low, at.high]) for axis, at in onset.items()},
        "records": [
            _drawn(records[i])
            | {"loss": _rounded(loss[i]), "stage": stages.get(records[i]["step"])}
            for i in kept
        ],
    }


def _drawn(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page draws of a record."""
    drawn = {name: record.get(name) for name in _FIELDS} | {
        "intervals": {name: record["intervals"].get(name) for name in _INTERVALS},
        "sink_rate_by_block": record["sink_rate_by_block"][str(EPSILON)],
        "shares": [[part["kind"], part["block"], part["share"]] for part in record["shares"] or ()],
        "top_components": [
            [part["kind"], part["block"], part["index"], part["share"], part.get("gate")]
            for part in record["top_components"] or ()
        ],
    }
    quantiles = record["first_token"]["norm_ratio"]
    drawn["first_tokens"] = [_rounded(quantiles[name], 4) for name in ("5", "50", "95")]
    if tests := causal(record):
        drawn["causal"] = tests
    return {name: _rounded(value) for name, value in drawn.items()} | {
        "heads": _packed(record["p0_attention"])
    }


def _packed(attention: Sequence[Sequence[float | None]]) -> str:
    """``[L, H]`` probabilities as base64 of little-endian uint16, 65534 for 1, 65535 for none."""
    values = np.array(attention, dtype=float)
    packed = np.where(np.isnan(values), 65535, np.nan_to_num(values) * 65534).round()
    return base64.b64encode(packed.astype("<u2").tobytes()).decode()


def _loss_at(steps: Sequence[int], losses: Losses | None) -> list[float | None]:
    """The loss at each step: between two logged steps on the line, outside of them None."""
    if not losses:
        return [None] * len(steps)
    logged = sorted(losses)
    found = np.interp(steps, logged, [losses[step] for step in logged], math.nan, math.nan)
    return [None if math.isnan(value) else value for value in found.tolist()]


def _sample(records: Records) -> Records:
    return [records[0], records[len(records) // 2], records[-1]]


def _size(record: Mapping[str, Any]) -> int:
    return len(_compact(_drawn(record)))


def _rounded(value: Any, digits: int = 6) -> Any:
    """To some significant digits; null for what is no number."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item, digits) for item in value]
    return value


def _compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _escaped(data: Any) -> str:
    text = _compact(data)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
