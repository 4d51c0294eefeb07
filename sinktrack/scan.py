"""From an archive of checkpoints to records."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sinktrack import cluster, processes
from sinktrack.archive.discover import discover
from sinktrack.archive.follow import looks
from sinktrack.archive.source import Checkpoint
from sinktrack.errors import ArchiveError, SinktrackError
from sinktrack.measure import measure, measure_streamed
from sinktrack.measurement import Measurement
from sinktrack.probe import Probe
from sinktrack.processes import Outcome, Work, attempt
from sinktrack.prose import passages
from sinktrack.record import Run, to_json, versions

_log = logging.getLogger("sinktrack")
Engine = Literal["local", "ray"]
Notify = Callable[[Checkpoint, dict[str, Any] | SinktrackError], None]


def scan(
    archive: str | Path,
    *,
    probe: Probe | None = None,
    run: str | Path | Run,
    device: str = "cpu",
    blocks: int | None = None,
    batch_size: int | None = None,
    hf_config: str | Path | None = None,
    pattern: str | None = None,
    engine: Engine | None = None,
    workers: int | None = None,
    follow: float | None = None,
    causal: bool = False,
    notify: Notify | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure every checkpoint of an archive that the run does not hold yet, in step order.

    Args:
        archive: a directory of checkpoints or one checkpoint, local or a URL; see `discover`.
        probe: the fixed batch; the run's own by default.
        run: the run directory.
        device: where to compute.
        blocks: measure the first blocks only; see `Measurement.measured_blocks`.
        batch_size: sequences per forward pass of a block; all at once by default.
        hf_config: see `discover`.
        pattern: how checkpoints are named, where `discover` does not know.
        engine: ``local``, worker processes of this machine; ``ray``, tasks of a Ray cluster; by
            default this process does all the work, in step order.
        workers: processes or tasks at a time; by default as many as cores and memory allow.
        follow: wait for new checkpoints without end, looking every so many seconds.
        causal: run the causal tests too, with the whole checkpoint in memory.
        notify: called after each checkpoint with its record or its error; without it, failures
            are raised together at the end.

    Yields:
        The records as they are written.

    Raises:
        ArchiveError: no checkpoint found; or, after all others were measured, some failed, each
            named with its reason.
        RecordError: the run directory cannot be written, holds another probe, or is being scanned.
    """
    if causal and blocks is not None:
        raise ValueError("causal tests need all blocks; leave out blocks or causal")
    if not isinstance(run, Run):
        run = Run.open(run, probe)
    if run.probe is None:
        raise ArchiveError(f"{run.directory} holds no probe yet; give one")
    common: dict[str, Any] = {"probe": run.probe, "device": device, "batch_size": batch_size}
    work: Work = (
        partial(_examine, **common) if causal else partial(_measure, **common, blocks=blocks)
    )
    failed = []
    find = partial(discover, archive, pattern, hf_config)
    with run.claimed():
        rounds = _rounds(archive, run, blocks, causal, follow, find)
        for checkpoint, outcome in _outcomes(rounds, work, engine, workers, device):
            if isinstance(outcome, dict):
                run.append(outcome)
            else:
                failed.append(f"{checkpoint.name}: {outcome}")
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
    pattern: str | None = None,
    hf_config: str | Path | None = None,
    causal: bool = False,
) -> list[Checkpoint]:
    """The archive's checkpoints that the run does not hold yet, in step order.

    Nor those of which it holds fewer blocks, or no causal tests where they are wanted.
    """
    return _lacking(discover(archive, pattern, hf_config), run, blocks, causal)


def _lacking(
    checkpoints: list[Checkpoint], run: Run, blocks: int | None, causal: bool
) -> list[Checkpoint]:
    def holds(record: Mapping[str, Any]) -> bool:
        if causal:
            return "causal" in record
        if "measured_blocks" not in record:
            return True
        return blocks is not None and bool(record["measured_blocks"] >= blocks)

    done = {record["step"] for record in run.records if holds(record)}
    return [checkpoint for checkpoint in checkpoints if checkpoint.step not in done]


def _rounds(
    archive: str | Path,
    run: Run,
    blocks: int | None,
    causal: bool,
    follow: float | None,
    find: Callable[[], list[Checkpoint]],
) -> Iterator[list[Checkpoint]]:
    """What there is to measure now or, if followed, as it comes."""
    if follow is None:
        yield _lacking(find(), run, blocks, causal)
        return
    for found in looks(archive, find, follow):
        yield _lacking(found, run, blocks, causal)


def _outcomes(
    rounds: Iterator[list[Checkpoint]],
    work: Work,
    engine: Engine | None,
    workers: int | None,
    device: str,
) -> Iterator[tuple[Checkpoint, Outcome]]:
    for checkpoints in rounds:
        if engine == "ray":
            gpus = int(device.startswith("cuda"))
            yield from cluster.spread(work, checkpoints, workers, gpus)
        elif engine == "local" or workers is not None:
            yield from processes.spread(work, checkpoints, workers)
        else:
            for checkpoint in checkpoints:
                yield checkpoint, attempt(work, checkpoint)


def _measure(
    checkpoint: Checkpoint, probe: Probe, device: str, batch_size: int | None, blocks: int | None
) -> dict[str, Any]:
    from sinktrack.archive.huggingface import load
    from sinktrack.archive.source import open
    from sinktrack.archive.stream import Streamed
    from sinktrack.taps.walk import CannotWalk

    try:
        streamed = Streamed(open(checkpoint), device)
        measured = measure_streamed(streamed, probe, blocks=blocks, batch_size=batch_size)
    except CannotWalk as error:
        if blocks is not None:
            raise ArchiveError(f"{error}; scan all of it, without --blocks") from error
        _log.warning("%s: %s; loading it whole", checkpoint.name, error)
        measured = measure(load(checkpoint, device), probe, batch_size=batch_size)
    return _recorded(checkpoint, measured)


def _examine(
    checkpoint: Checkpoint, probe: Probe, device: str, batch_size: int | None
) -> dict[str, Any]:
    from sinktrack.archive.huggingface import load
    from sinktrack.interventions import examine

    model = load(checkpoint, device)
    measured = measure(model, probe, batch_size=batch_size)
    found = examine(model, probe, measured, batch_size=batch_size)
    tested: dict[str, Any] = to_json({"causal": found})
    return _recorded(checkpoint, measured) | tested


def _recorded(checkpoint: Checkpoint, measured: Measurement) -> dict[str, Any]:
    record: dict[str, Any] = to_json(
        measured.to_record(checkpoint.step, checkpoint.name, versions(), checkpoint.tokens)
    )
    return record


def choose_probe(
    example: Callable[[], Checkpoint], run: Run, file: Path | None
) -> tuple[Probe, str | None]:
    """The probe to scan with, and a line that says so where it had to be made.

    From ``file``; else the run's own; else, from the checkpoint that ``example`` gives, a little
    prose through the tokenizer beside it, or seeded random tokens of its vocabulary.

    Raises:
        ProbeError: the file holds no probe.
        ArchiveError: the checkpoint's files cannot be read.
    """
    from sinktrack.archive.huggingface import tokenizer, vocabulary

    if file is not None:
        return Probe.load(file), None
    if run.probe is not None:
        return run.probe, None
    checkpoint = example()
    found = tokenizer(checkpoint.files)
    if found is not None:
        made = Probe.from_texts(found, passages())
        return made, f"no probe given: {made} from built-in prose and the checkpoint's tokenizer"
    made = Probe.random(vocabulary(checkpoint))
    return made, f"no probe given and no tokenizer found: {made} of seeded random tokens"
