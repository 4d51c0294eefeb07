"""``sinktrack scan``: an archive of checkpoints into a run."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sinktrack.cli.common import ERR, AsJson
from sinktrack.errors import AnotherModel, ArchiveError, RecordError, SinktrackError

if TYPE_CHECKING:
    from sinktrack.archive.source import Checkpoint
    from sinktrack.probe import Probe
    from sinktrack.scan import Checkpoints, Job


def command(
    archives: Annotated[
        list[str],
        typer.Argument(
            metavar="ARCHIVE...",
            help="Directories of checkpoints, or URLs of them: s3, gs, az, hf, https.",
        ),
    ],
    run: Annotated[Path, typer.Option(help="The run directory that takes the records.")],
    probe: Annotated[
        Path | None,
        typer.Option(help="A probe file; by default the run's own, else one is made."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
    blocks: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Measure the first K blocks only.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences at a time; by default the whole probe.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="What to compute in; by default what the weights are stored in."),
    ] = None,
    hf_config: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Where the model's config.json is, if not in the checkpoints."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that adapters were trained on: a directory, or hf://organization/name.",
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Whole paths of checkpoints below the archive, with a group (?P<step>[0-9]+) and "
            "maybe (?P<tokens>[0-9.]+[KMBT]?).",
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"] | None,
        typer.Option(help="Worker processes here, or tasks of a Ray cluster."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many; by default what cores and memory allow.")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Wait for new checkpoints until interrupted."),
    ] = False,
    poll: Annotated[float, typer.Option(min=0, help="Seconds between looks of --follow.")] = 30,
    causal: Annotated[
        bool,
        typer.Option("--causal", help="Run the causal tests too; tens of passes each."),
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Of an array job: every Nth checkpoint, from the Ith on, counted from 0.",
        ),
    ] = None,
    card: Annotated[
        bool,
        typer.Option(
            "--card", help="Make the position card too: sink rates of other first tokens."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure every checkpoint that the run does not hold yet.

    Of a directory of several archives, such as a sweep's, each is scanned into a run of its own
    below the one that is given.
    """
    from sinktrack.archive.discover import NoCheckpoint, archives_below, discover
    from sinktrack.scan import Checkpoints, Job, check_device, quiet

    if causal and blocks is not None:
        raise typer.BadParameter("the causal tests need all blocks: give --causal or --blocks")
    if card and blocks is not None:
        raise typer.BadParameter("the position card needs all blocks: give --card or --blocks")
    check_device(device, engine)
    quiet()
    if follow and len(archives) > 1:
        raise ArchiveError("--follow takes one archive; start a scan for each")

    share = _part(part)

    def job(batch: Probe) -> Job:
        return Job(batch, device, batch_size, blocks, causal, dtype, card)

    one = _One(job, probe, engine, workers, as_json, follow, blocks)
    try:
        checkpoints = Checkpoints(
            archives, pattern, hf_config, poll if follow else None, share, base
        )
    except NoCheckpoint:
        below = archives_below(archives[0], pattern, hf_config, base) if len(archives) == 1 else {}
        if len(below) < 2:
            raise
        ERR.print(f"{archives[0]} holds {len(below)} archives, a run for each in {run}")
        failed = 0
        for name, archive in below.items():
            ERR.print(f"{name}:", markup=False)
            adapted = any(one.format == "adapters" for one in discover(archive, pattern, hf_config))
            own = base if adapted else None
            inner = Checkpoints([archive], pattern, hf_config, part=share, base=own)
            failed += one.scan(inner, run / name)
        raise typer.Exit(1 if failed else 0) from None
    if follow:
        there = "://" in archives[0] or Path(archives[0]).is_dir()
        said = f"following {archives[0]}, {'' if there else 'which is not there yet, '}"
        ERR.print(f"{said}a look every {poll:g} s (Ctrl-C ends it)", markup=False)
    raise typer.Exit(1 if one.scan(checkpoints, run) else 0)


@contextmanager
def _terminable() -> Iterator[None]:
    """A scheduler's SIGTERM ends as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class _One:
    """Scans archives, each into a run."""

    job: Callable[[Probe], Job]
    probe: Path | None
    engine: Literal["local", "ray"] | None
    workers: int | None
    as_json: bool
    follow: bool
    blocks: int | None

    def scan(self, checkpoints: Checkpoints, run: Path) -> int:
        """How many checkpoints failed."""
        from sinktrack.records.run import Run
        from sinktrack.scan import NoExample, Scan, choose_probe, renamed

        for listed in checkpoints.by_archive:
            if [checkpoint.step for checkpoint in listed] == [0] and listed[0].reason is None:
                said = "is recorded as step 0; nothing that is known tells another"
                ERR.print(f"{listed[0].name} {said}", markup=False)
        opened = Run.open(run)
        try:
            batch, note = choose_probe(checkpoints.examples(), opened, self.probe)
        except NoExample as error:
            told = _ScanReporter(self.as_json, self.follow, len(error.failures), self.blocks)
            for checkpoint, failure in error.failures:
                told(checkpoint, failure)
            told.summary(0, run)
            return told.failed
        if note:
            ERR.print(note, markup=False)
        opened.adopt(batch)
        job = self.job(batch)
        todo = len(job.pending(checkpoints.found, opened))
        recorded = len(checkpoints.found) - todo
        if others := renamed(checkpoints.found, opened):
            ERR.print(
                f"recorded already, from others than are here: {', '.join(others)}; if these are "
                "of another training, use another run directory",
                markup=False,
            )
        told = _ScanReporter(self.as_json, self.follow, todo, self.blocks)
        try:
            with _terminable(), told.progress:
                scan = Scan(checkpoints, opened, job, self.engine, self.workers)
                for _ in scan.records(told):
                    pass
        except (KeyboardInterrupt, RecordError, OSError) as error:
            told.summary(recorded, run)
            if (left := todo - told.measured - told.failed) > 0 and not isinstance(
                error, AnotherModel
            ):
                said = "interrupted" if isinstance(error, KeyboardInterrupt) else "ended"
                ERR.print(f"{said}, {left} left: the same command goes on with them")
            raise
        told.summary(recorded, run)
        return told.failed


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    which, _, of = text.partition("/")
    if not (which.isdecimal() and of.isdecimal() and int(which) < int(of)):
        raise typer.BadParameter(f"--part {text}: wanted is I/N with I from 0 to N - 1, as 3/16")
    return int(which), int(of)


class _ScanReporter:
    """What a scan says while it works."""

    def __init__(self, as_json: bool, follow: bool, total: int, blocks: int | None) -> None:
        self.measured = self.failed = 0
        self._as_json, self._follow, self._blocks = as_json, follow, blocks
        self._total, self._began = total, time.monotonic()
        self._lines = not follow and not sys.stderr.isatty()
        self._partial, self._failure = False, ""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=ERR,
            disable=follow or not sys.stderr.isatty(),
        )
        self._task = self.progress.add_task("scan", total=total)

    def __call__(self, checkpoint: Checkpoint, outcome: dict[str, Any] | SinktrackError) -> None:
        if isinstance(outcome, SinktrackError):
            self.failed += 1
            reason = "for the same reason" if str(outcome) == self._failure else str(outcome)
            self._failure = str(outcome)
            ERR.print(f"failed: {checkpoint.name}: {reason}", markup=False)
        else:
            self.measured += 1
            if self._follow or self._lines:
                ERR.print(f"measured: {checkpoint.name}{self._left()}", markup=False)
            if self._blocks and "measured_blocks" not in outcome and not self._partial:
                self._partial = True
                held = outcome["model"]["blocks"]
                ERR.print(
                    f"--blocks {self._blocks}: the model has {held}, all of them are measured"
                )
            if "measured_blocks" in outcome and not self._partial:
                self._partial = True
                ERR.print(
                    f"the first {outcome['measured_blocks']} blocks only: leaves out sink rate, "
                    "peak block, first-two gain and the digest of the weights, and the circuit "
                    "where no sink forms in them"
                )
            if self._as_json:
                print(json.dumps(outcome), flush=True)
        self.progress.update(self._task, advance=1, description=checkpoint.name)

    def _left(self) -> str:
        """How far the scan is, and how long it will go on at this pace."""
        if self._follow:
            return ""
        done = self.measured + self.failed
        seconds = int((time.monotonic() - self._began) / done * (self._total - done))
        return f" ({done} of {self._total}, {timedelta(seconds=seconds)} left)"

    def summary(self, recorded: int, run: Path) -> None:
        ERR.print(
            f"{self.measured} measured, {recorded} already recorded, {self.failed} failed -> {run}",
            markup=False,
        )
