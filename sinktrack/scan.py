"""From an archive of checkpoints to records."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sinktrack.archive.discover import discover
from sinktrack.archive.source import Checkpoint
from sinktrack.errors import ArchiveError, SinktrackError
from sinktrack.measure import measure, measure_streamed
from sinktrack.probe import Probe
from sinktrack.prose import passages
from sinktrack.record import Run, to_json, versions

_log = logging.getLogger("sinktrack")
Notify = Callable[[Checkpoint, dict[str, Any] | SinktrackError], None]


def scan(
    archive: str | Path,
    *,
    probe: Probe | None = None,
    run: str | Path | Run,
    device: str = "cpu",
    blocks: int | None = None,
    hf_config: str | Path | None = None,
    notify: Notify | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure every checkpoint of an archive that the run does not hold yet, in step order.

    Args:
        archive: a directory of checkpoints, or one model directory.
        probe: the fixed batch; the run's own by default.
        run: the run directory.
        device: where to compute.
        blocks: measure the first blocks only; see `Measurement.measured_blocks`.
        hf_config: see `discover`.
        notify: called after each checkpoint with its record or its error; without it, failures
            are raised together at the end.

    Yields:
        The records as they are written.

    Raises:
        ArchiveError: no checkpoint found; or, after all others were measured, some failed, each
            named with its reason.
        RecordError: the run directory cannot be written, or holds another probe.
    """
    if not isinstance(run, Run):
        run = Run.open(run, probe)
    if run.probe is None:
        raise ArchiveError(f"{run.directory} holds no probe yet; give one")
    failed = []
    for checkpoint in pending(archive, run, blocks, hf_config):
        try:
            record = _measure(checkpoint, run.probe, device, blocks)
        except SinktrackError as error:
            failed.append(f"{checkpoint.name}: {error}")
            outcome: dict[str, Any] | SinktrackError = error
        else:
            run.append(record)
            outcome = record
        if notify is not None:
            notify(checkpoint, outcome)
        if isinstance(outcome, dict):
            yield outcome
    if failed and notify is None:
        raise ArchiveError(f"{len(failed)} checkpoints failed\n" + "\n".join(failed))


def pending(
    archive: str | Path,
    run: Run,
    blocks: int | None = None,
    hf_config: str | Path | None = None,
) -> list[Checkpoint]:
    """The archive's checkpoints of which the run does not hold that many blocks, in step order."""
    done = {
        record["step"]
        for record in run.records
        if "measured_blocks" not in record
        or (blocks is not None and record["measured_blocks"] >= blocks)
    }
    found = discover(archive, hf_config=hf_config)
    return [checkpoint for checkpoint in found if checkpoint.step not in done]


def _measure(
    checkpoint: Checkpoint, probe: Probe, device: str, blocks: int | None
) -> dict[str, Any]:
    from sinktrack.archive.huggingface import load
    from sinktrack.archive.source import open
    from sinktrack.archive.stream import Streamed
    from sinktrack.taps.walk import CannotWalk

    try:
        streamed = Streamed(open(checkpoint), device)
        measured = measure_streamed(streamed, probe, blocks=blocks)
    except CannotWalk as error:
        if blocks is not None:
            raise ArchiveError(f"{error}; scan all of it, without --blocks") from error
        _log.warning("%s: %s; loading it whole", checkpoint.name, error)
        measured = measure(load(checkpoint, device), probe)
    record: dict[str, Any] = to_json(
        measured.to_record(checkpoint.step, checkpoint.name, versions(), checkpoint.tokens)
    )
    return record


def choose_probe(checkpoint: Checkpoint, run: Run, file: Path | None) -> tuple[Probe, str | None]:
    """The probe to scan with, and a line that says so where it had to be made.

    From ``file``; else the run's own; else a little prose through the tokenizer beside the
    checkpoint; else seeded random tokens of the model's vocabulary.

    Raises:
        ProbeError: the file holds no probe.
        ArchiveError: the checkpoint's files cannot be read.
    """
    from sinktrack.archive.huggingface import tokenizer, vocabulary

    if file is not None:
        return Probe.load(file), None
    if run.probe is not None:
        return run.probe, None
    found = tokenizer(checkpoint.files)
    if found is not None:
        made = Probe.from_texts(found, passages())
        return made, f"no probe given: {made} from built-in prose and the checkpoint's tokenizer"
    made = Probe.random(vocabulary(checkpoint))
    return made, f"no probe given and no tokenizer found: {made} of seeded random tokens"
