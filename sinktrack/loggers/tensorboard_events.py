"""Records as TensorBoard events."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sinktrack import text
from sinktrack.errors import RecordError, require
from sinktrack.loggers import picture
from sinktrack.loggers.curves import COMPONENT, components, metrics
from sinktrack.records.run import Run
from sinktrack.signal.stages import living

_ALWAYS = "sinktrack/norm_ratio/block_00"
"""A curve that every record has."""


def log(record: Mapping[str, Any], writer: Any) -> None:
    """Write a record's curves, bounds, heads and largest parts at its step.

    Args:
        record: as written to the run directory.
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
    """
    step = record["step"]
    for key, value in metrics(record).items():
        if key != "sinktrack/step":
            writer.add_scalar(key, value, step)
    for name in _bounded(record):
        for bound, value in zip(("low", "high"), record["intervals"][name], strict=True):
            writer.add_scalar(f"sinktrack/{name}/{bound}", value, step)
    writer.add_image("sinktrack/heads", picture.heads(record), step, dataformats="HWC")
    writer.add_text("sinktrack/top_components", _table(record), step)


def publish(run: Run, directory: Path) -> int:
    """Write those of the run's records that the event files below ``directory`` do not hold yet.

    Args:
        run: the run.
        directory: TensorBoard's log directory.

    Returns:
        The number of records written.

    Raises:
        RecordError: the run holds no records, or the directory cannot be written.
        MissingExtra: tensorboard is not installed.
    """
    records = living(run.written)
    if not records:
        raise RecordError(f"{run.directory} holds no records yet")
    require("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    text.refuse_unencodable(directory, "TensorBoard")
    try:
        done = _steps(directory)
        todo = [record for record in records if record["step"] not in done]
        if todo:
            with SummaryWriter(str(directory)) as writer:
                writer.add_custom_scalars(layout(records[-1]))
                for record in todo:
                    log(record, writer)
    except OSError as error:
        raise RecordError(f"cannot write to {directory}: {error.strerror}") from error
    return len(todo)


def layout(record: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """Charts for the tab "custom scalars": all blocks in one, and curves with their intervals."""
    margins = {
        name: ["Margin", [f"sinktrack/{name}{bound}" for bound in ("", "/low", "/high")]]
        for name in _bounded(record)
    }
    blocks = {
        name: ["Multiline", [rf"sinktrack/{name}/block_\d+"]]
        for name in ("concentration", "norm_ratio")
    }
    return {"sinktrack": margins | blocks}


def _bounded(record: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name in ("sink_rate", "first_two_share", "first_two_gain", "depth")
        if record["intervals"].get(name) is not None
    ]


def _steps(directory: Path) -> set[int]:
    """Steps that are there already."""
    if not directory.exists():
        return set()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    found.Reload()
    if _ALWAYS not in found.Tags()["scalars"]:
        return set()
    return {event.step for event in found.Scalars(_ALWAYS)}


def _table(record: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [list(COMPONENT), ["---"] * len(COMPONENT)]
    for row in components(record):
        lines.append([_cell(value) for value in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
