"""What of a record becomes a curve, by the key that every dashboard uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCALARS = ("sink_rate", "first_two_share", "first_two_gain", "reference_block", "depth")
BY_BLOCK = ("concentration", "norm_ratio")


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's curves by key, ``sinktrack/...``; what was not measured is left out."""
    found: dict[str, float] = {"sinktrack/step": record["step"]}
    if record["tokens"] is not None:
        found["sinktrack/tokens"] = record["tokens"]
    for name in SCALARS:
        found[f"sinktrack/{name}"] = record[name]
    for name in BY_BLOCK:
        for block, value in enumerate(record[name][: record["model"]["blocks"]]):
            found[f"sinktrack/{name}/block_{block:02d}"] = value
    return {key: value for key, value in found.items() if value is not None}


def components(record: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The largest parts of the P0 state: column names, and a row for each part."""
    columns = ["kind", "block", "index", "share", "gate"]
    return columns, [[part.get(name) for name in columns] for part in record["top_components"]]
