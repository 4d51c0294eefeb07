"""Records as W&B curves, on their own step axis."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

_SCALARS = ("sink_rate", "first_two_share", "first_two_gain", "reference_block", "depth")
_BY_BLOCK = ("concentration", "norm_ratio")


def log(record: Mapping[str, Any], axes: Mapping[str, int]) -> None:
    """Log a record to the active W&B run; without one, do nothing.

    No ``step=`` is passed, so neither this row nor any of the trainer's own is dropped; the axis is
    the key ``sinktrack/step``. Values that were not measured are left out.

    Args:
        record: as written to the run directory.
        axes: further axes to put beside, such as ``train/global_step``.
    """
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    if wandb is None or run is None:
        return
    run.define_metric("sinktrack/step", hidden=True)
    run.define_metric("sinktrack/*", step_metric="sinktrack/step")
    run.log({**metrics(record), **axes, "sinktrack/top_components": _table(wandb, record)})


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's curves by W&B key."""
    found: dict[str, float] = {"sinktrack/step": record["step"]}
    if record["tokens"] is not None:
        found["sinktrack/tokens"] = record["tokens"]
    for name in _SCALARS:
        found[f"sinktrack/{name}"] = record[name]
    for name in _BY_BLOCK:
        for block, value in enumerate(record[name][: record["model"]["blocks"]]):
            found[f"sinktrack/{name}/block_{block:02d}"] = value
    return {key: value for key, value in found.items() if value is not None}


def _table(wandb: Any, record: Mapping[str, Any]) -> Any:
    columns = ["kind", "block", "index", "share", "gate"]
    rows = [[part.get(name) for name in columns] for part in record["top_components"]]
    return wandb.Table(columns=columns, data=rows)
