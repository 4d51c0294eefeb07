"""Records as TensorBoard events."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sinktrack import text
from sinktrack.errors import RecordError, require
from sinktrack.loggers import picture
from sinktrack.loggers.curves import COMPONENT, blockwise, components, metrics, scalars
from sinktrack.records.lacking import filled
from sinktrack.records.run import Run

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


class TensorBoard:
    """A log directory as a logger: event files that TensorBoard shows while training goes on.

    Where training began anew at an earlier step, what the directory held from there on is dropped.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._writer: Any = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Write a record's curves and pictures, and flush them.

        Raises:
            MissingExtra: tensorboard is not installed.
            RecordError: the directory has a name that TensorBoard cannot write.
        """
        if self._writer is None:
            require("tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            text.refuse_unencodable(self.directory, "TensorBoard")
            self._writer = SummaryWriter(str(self.directory), purge_step=record["step"])
            self._writer.add_custom_scalars(layout(record))
        log(record, self._writer)
        self._writer.flush()

    def alert(self, title: str, text: str) -> None:
        """As text, beside the curves."""
        if self._writer is not None:
            self._writer.add_text(title, text)
            self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


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
    records = [filled(record) for record in run.records]
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
    """Charts for the tab "custom scalars": headline curves first, then all blocks in one chart."""
    bounded = _bounded(record)
    headline = {
        field.name: ["Margin", [f"sinktrack/{field.name}{end}" for end in ("", "/low", "/high")]]
        if field.name in bounded
        else ["Multiline", [f"^sinktrack/{field.name}$"]]
        for field in scalars()
    }
    blocks = {
        field.name: ["Multiline", [rf"sinktrack/{field.name}/block_\d+"]] for field in blockwise()
    }
    return {"P0 sink": headline, "P0 sink by block": blocks}


def _bounded(record: Mapping[str, Any]) -> list[str]:
    return [field.name for field in scalars() if record["intervals"].get(field.name) is not None]


def _steps(directory: Path) -> set[int]:
    """Steps that are there already."""
    if not directory.exists():
        return set()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    if _ALWAYS not in events.Tags()["scalars"]:
        return set()
    return {event.step for event in events.Scalars(_ALWAYS)}


def _table(record: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [list(COMPONENT), ["---"] * len(COMPONENT)]
    for row in components(record):
        lines.append([_cell(value) for value in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
