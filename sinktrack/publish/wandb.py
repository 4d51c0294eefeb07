"""Records as W&B curves, on their own step axis."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from sinktrack.publish.curves import components, metrics


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
    columns, rows = components(record)
    table = wandb.Table(columns=columns, data=rows)
    run.log({**metrics(record), **axes, "sinktrack/top_components": table})


def alert(title: str, text: str) -> None:
    """Raise an alert in the active W&B run; without one, do nothing."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        run.alert(title=title, text=text, level="WARN")
