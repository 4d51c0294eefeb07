"""Records as W&B curves on their own step axis, during training or afterwards."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from sinktrack import atomic, text
from sinktrack.errors import RecordError, require
from sinktrack.loggers import picture
from sinktrack.loggers.curves import (
    CAUSAL,
    COMPONENT,
    blockwise,
    causal,
    components,
    gone,
    metrics,
    summary,
)
from sinktrack.metrics.axes import by_block
from sinktrack.records.lacking import filled
from sinktrack.records.lineage import current
from sinktrack.records.run import Run
from sinktrack.records.thinned import evenly
from sinktrack.signal import analyze

_ROOM = 16 * 2**20
"""Bytes left on a disk, below which what W&B keeps there does not count as kept."""
_DRAWN_OF_ALL = ("step", "source", "formed", "concentration")
_MOST_POINTS = 10_000
"""What W&B draws of a table in a chart."""


_open: dict[str, int] = {}
"""By W&B run: the step of its row that was left open with a record of ours in it."""


_described: dict[str, Mapping[str, Any]] = {}
"""By W&B run: what its config says of us."""

_AXIS = "sinktrack/step"
_defined: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
"""By W&B run, as it was opened: the names that have their axis."""


class Past(list[Mapping[str, Any]]):
    """Records as they were written, of which all but the last two hold what is drawn of all.

    A training keeps it in memory, so it must not grow with heads and components.
    """

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the next."""
        super().append(record)
        if len(self) > 2:
            self[-3] = {name: self[-3].get(name) for name in _DRAWN_OF_ALL}

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> Past:
        """Of records in the order in which they were written."""
        past = cls()
        for record in records:
            past.append(record)
        return past


def log(
    record: Mapping[str, Any], axes: Mapping[str, int], run: Run, past: Past | None = None
) -> None:
    """Log a record to the active W&B run; without one, or with a disabled one, do nothing.

    The record joins the row that W&B has open and leaves it open: the run's own step does not move,
    so that of a later row with ``step=`` is not behind it. Only where a
    record is in that row already does this one go into the next. The axis is the key
    ``sinktrack/step``. Values that were not measured are left out.

    Args:
        record: as written to the run directory.
        axes: further axes to put beside, such as ``train/global_step``; see `settle`.
        run: the run that holds the record.
        past: all records, this one the last; read from the run unless given.
    """
    if not is_active():
        return
    target = show(record, axes, run.history if past is None else past)
    if target is not None:
        Sent(run).add(target, record["step"], whole=True)


def show(
    record: Mapping[str, Any], axes: Mapping[str, int], written: Sequence[Mapping[str, Any]]
) -> Target | None:
    """As `log`, of a run whose directory may be on another machine, and is there to be noted.

    Args:
        record: the last that was written.
        axes: as of `log`.
        written: all records in the order in which they were written.

    Returns:
        Where it was logged; None where there is no active W&B run.

    Raises:
        RecordError: W&B has no room left to keep it.
    """
    active = _active()
    if active is None:
        return None
    wandb = sys.modules["wandb"]
    records = current(written)
    row = {**metrics(record), **_pictures(wandb, record, records), **_tables(wandb, [record])}
    _define(active, row)
    settle()
    shared = active.settings.mode == "shared"  # by several processes, so without a step of its own
    active.log({**row, **axes}, commit=shared)
    if not shared:
        _open[active.id] = active.step
    active.summary.update(gone(records[-2:]) | summary(records))
    return Target.of(active, record["step"])


class WeightsAndBiases:
    """The active W&B run as a logger; without one, or with a disabled one, nothing is done.

    It is the default of the callbacks, which also put the trainer's own axis beside a record, and
    find the process that has the run.
    """

    def __init__(self) -> None:
        self._written = Past()

    def log(self, record: Mapping[str, Any]) -> None:
        """As `show`, with the records that came before through this object."""
        self._written.append(record)
        show(record, {}, self._written)

    def alert(self, title: str, text: str) -> None:
        """As the function `alert`."""
        alert(title, text)

    def close(self) -> None:
        """Do nothing: the run and its open row are the training's."""


def is_active() -> bool:
    """Has this process a W&B run that keeps what it is given?"""
    return _active() is not None


def is_run(other: Any) -> bool:
    """Is this the process's W&B run, which the callbacks log to by themselves?"""
    return other is not None and other is _active()


def settle() -> None:
    """End the active W&B run's row if a record of ours is in it and it is still open.

    Before a trainer logs another value of an axis that stands beside the record.
    """
    active = _active()
    if active is not None and active.id in _open and _open.pop(active.id) == active.step:
        active.log({}, commit=True)


def alert(title: str, words: str) -> None:
    """Raise an alert in the active W&B run; without one, do nothing."""
    active = _active()
    if active is not None:
        active.alert(title=title, text=text.printable(words), level="WARN", wait_duration=0)


def stage(name: str | None) -> None:
    """Put the run's stage into the summary of the active W&B run; without one, do nothing."""
    active = _active()
    if active is not None and name is not None:
        active.summary["sinktrack/stage"] = name


def describe(entry: Mapping[str, Any]) -> None:
    """Note under ``sinktrack`` in the active W&B run's config what is measured, once.

    All else there stays as it is; of a resumed run the entry is that of now. Without a run, do
    nothing.
    """
    active = _active()
    if active is not None and _described.get(active.id) != entry:
        active.config.update({"sinktrack": dict(entry)}, allow_val_change=True)
        _described[active.id] = entry


def status(recorded: int, failed: int) -> None:
    """Put into the summary of the active W&B run that probes run, and how many failed."""
    active = _active()
    if active is not None:
        active.summary["sinktrack/probes_failed"] = failed
        if not recorded:  # later it is the number of records, also over restarts
            active.summary["sinktrack/probes"] = 0


def _active() -> Any:
    """This process's W&B run, if it keeps what it is given; else None."""
    active = getattr(sys.modules.get("wandb"), "run", None)
    return None if active is None or active.disabled else active


def publish(
    run: Run,
    project: str | None = None,
    entity: str | None = None,
    run_id: str | None = None,
) -> tuple[str, int]:
    """Log those of the run's records that W&B has not been given yet, in step order.

    Only keys below ``sinktrack/`` are written: a W&B run of the training itself keeps its own
    metrics, configuration and system statistics. What was given is noted in ``RUN/wandb.json``, so
    that a second call goes on where the first ended.

    Args:
        run: the run.
        project: W&B's own default, or that of an earlier call.
        entity: likewise.
        run_id: an existing W&B run to write to. By default the one written to last, if it is in
            ``project`` and ``entity``; else a new one.

    Returns:
        The W&B run's id, and the number of records logged.

    Raises:
        RecordError: the run holds no records, W&B is disabled or cannot keep what it is given, or
            there is no W&B run of that id.
        MissingExtra: wandb is not installed.
    """
    records = [filled(record) for record in run.records]
    if not records:
        raise RecordError(f"{run.directory} holds no records yet")
    wandb = require("wandb", "wandb")
    sent = Sent(run)
    target = run_id or sent.last(project, entity)
    known = sent.of(target)
    todo = [record for record in records if record["step"] not in known["steps"]]
    if target is not None and not todo and known["whole"] == records[-1]["step"]:
        return target, 0
    text.refuse_unencodable(run.directory.resolve(), "W&B")
    sent.check()
    quiet = {
        name: True
        for name in ("x_disable_stats", "x_disable_meta", "x_disable_machine_info", "disable_git",
                     "disable_code")
    }  # fmt: skip
    try:
        active = wandb.init(
            project=project or known["project"],
            entity=entity or known["entity"],
            id=target,
            name=None if target else run.directory.resolve().name,
            resume="must" if run_id else "allow",
            dir=run.directory,
            settings=wandb.Settings(console="off", **quiet),
        )
    except (wandb.errors.Error, OSError, ValueError) as error:  # of a setting that is none
        raise RecordError(f"W&B: {error}; nothing was sent") from error
    with active:
        _refuse_lost(active, run.directory)
        for record in todo:
            row = {**metrics(record), **_pictures(wandb, record, None)}
            _define(active, row)
            active.log(row)
            sent.add(Target.of(active, record["step"]), record["step"])
        row = {
            "sinktrack/step": records[-1]["step"],
            **_pictures(wandb, None, records),
            **_charts(wandb, records),
            **_tables(wandb, records),
        }
        _define(active, row)
        active.log(row)
        active.summary.update(gone(records) | summary(records) | _signal(run))
        sent.add(Target.of(active, records[-1]["step"]), records[-1]["step"], whole=True)
        return active.id, len(todo)


def _refuse_lost(active: Any, directory: Path) -> None:
    """Refuse a W&B run that keeps nothing, or keeps it where nobody looks.

    Raises:
        RecordError: it is disabled, or offline and not below ``directory``.
    """
    if active.disabled:
        raise RecordError(
            "W&B is disabled, so nothing was sent and nothing is noted as sent; set WANDB_MODE to "
            "online or offline, or run: wandb online"
        )
    kept = Path(active.settings.sync_dir).resolve()
    if active.offline and not kept.is_relative_to(directory.resolve()):
        raise RecordError(
            f"W&B is offline and cannot write below {directory / 'wandb'}: it would keep the "
            f"records in {kept}; nothing was sent. Make the directory writable"
        )


def _signal(run: Run) -> dict[str, Any]:
    """Stage and onset for the summary, where they can be told."""
    analysis = analyze(run)
    told: dict[str, Any] = {} if analysis.stage is None else {"sinktrack/stage": analysis.stage}
    if analysis.onset is not None:
        for name in ("value", "low", "high"):
            told[f"sinktrack/onset_step/{name}"] = getattr(analysis.onset, name)
    return told


def _define(active: Any, names: Iterable[str]) -> None:
    """Give what is about to be logged its axis, each name once.

    By itself and not by a pattern: of a trainer's ``*`` and another one W&B 0.29 takes either.
    """
    if active not in _defined:
        active.define_metric(_AXIS, hidden=True)
        _defined[active] = {_AXIS}
    known = _defined[active]
    for name in [name for name in names if name not in known]:
        active.define_metric(name, step_metric=_AXIS)
        known.add(name)


def _tables(wandb: Any, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tables = {}
    for name, columns, of in (
        ("top_components", COMPONENT, components),
        ("causal_tests", CAUSAL, causal),
    ):
        rows = [[record["step"], *row] for record in records for row in of(record)]
        if rows:
            tables[f"sinktrack/{name}"] = wandb.Table(columns=["step", *columns], data=rows)
    return tables


def _pictures(
    wandb: Any, one: Mapping[str, Any] | None, several: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Heat maps: block by head of one record, block by step of several."""
    if importlib.util.find_spec("PIL") is None:  # wandb.Image needs it and does not bring it
        return {}
    pictures = {}
    if one is not None:
        pictures["sinktrack/heads"] = wandb.Image(picture.heads(one), caption="block by head")
    if several is not None:
        pictures["sinktrack/blocks"] = wandb.Image(
            picture.blocks(several),
            caption=f"block by record, steps {several[0]['step']} to {several[-1]['step']}",
        )
    return pictures


def _charts(wandb: Any, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All blocks in one chart; names of equal length, so that the legend sorts."""
    blocks = range(records[-1]["model"]["blocks"])
    drawn = [records[i] for i in evenly(len(records), max(2, _MOST_POINTS // len(blocks)))]
    charts = {}
    for field in blockwise():
        rows = [(record["step"], by_block(record, field)) for record in drawn]
        lines = [
            [(step, row[block]) for step, row in rows if row and row[block] is not None]
            for block in blocks
        ]
        charts[f"sinktrack/{field.name}_by_block"] = wandb.plot.line_series(
            xs=[[step for step, _ in line] for line in lines],
            ys=[[value for _, value in line] for line in lines],
            keys=[f"block {block:02d}" for block in blocks],
            title=f"{field.title} by block",
            xname="step",
        )
    return charts


@dataclass(frozen=True)
class Target:
    """A W&B run that was given a record, by what finds it again."""

    id: str
    project: str
    entity: str | None

    @classmethod
    def of(cls, active: Any, step: int) -> Target:
        """An active run that was given the record of a step.

        Raises:
            RecordError: it has no room left to keep it.
        """
        kept = active.settings.sync_dir
        try:
            # its process says nothing of a disk that is full, and writes a little behind
            if active.offline and shutil.disk_usage(kept).free < _ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), kept)
        except OSError as error:
            raise _not_noted(error, step) from error
        return cls(active.id, active.project, active.entity or None)


def _not_noted(error: OSError, step: int) -> RecordError:
    return RecordError(
        f"{error.filename}: {error.strerror}; step {step} is not noted as sent to W&B, and may be "
        "lost there; mend that, then publish again"
    )


class Sent:
    """Which steps each W&B run has been given: ``RUN/wandb.json``."""

    def __init__(self, run: Run) -> None:
        self._file: Path = run.directory / "wandb.json"
        try:
            self._runs: dict[str, dict[str, Any]] = json.loads(self._file.read_text())
        except FileNotFoundError:
            self._runs = {}
        except (OSError, ValueError) as error:
            raise RecordError(
                f"{self._file} is damaged; remove it to publish anew, or mend it"
            ) from error

    def last(self, project: str | None = None, entity: str | None = None) -> str | None:
        """The W&B run that was written to last, of those in a project and of an entity."""
        for target, known in reversed(self._runs.items()):
            places = ((project, known["project"]), (entity, known["entity"]))
            if all(wanted is None or of in (None, wanted) for wanted, of in places):
                return target
        return None

    def of(self, target: str | None) -> dict[str, Any]:
        """Project, entity and steps of a W&B run, and the step up to which its charts go."""
        nothing: dict[str, Any] = {"project": None, "entity": None, "steps": [], "whole": None}
        return self._runs.get(target or "", nothing)

    def check(self) -> None:
        """Try to write, before W&B is given anything that could not be noted.

        Raises:
            RecordError: it cannot be written.
        """
        try:
            tempfile.TemporaryFile(dir=self._file.parent).close()
        except OSError as error:
            raise RecordError(
                f"cannot note in {self._file} what W&B was given: {error.strerror}; nothing was "
                "sent"
            ) from error

    def add(self, target: Target, step: int, whole: bool = False) -> None:
        """Note a step, in the file before the next.

        Args:
            target: the W&B run.
            step: the record's.
            whole: were the charts over all records given, too?

        Raises:
            RecordError: it cannot be noted.
        """
        known = self._runs.pop(target.id, self.of(None))
        self._runs[target.id] = {
            "project": target.project,
            "entity": target.entity,
            "steps": sorted({*known["steps"], step}),
            "whole": step if whole else known["whole"],
        }
        try:
            atomic.write(self._file, json.dumps(self._runs).encode(), durable=False)
        except OSError as error:
            raise _not_noted(error, step) from error
