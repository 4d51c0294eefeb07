"""From an archive of checkpoints to records."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, tee, zip_longest
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal

import torch

from sinktrack.archive.discover import base_model, discover, in_order
from sinktrack.archive.follow import poll
from sinktrack.archive.names import Pattern
from sinktrack.archive.source import Checkpoint, Source, as_stored, open
from sinktrack.errors import (
    AnotherModel,
    ArchiveError,
    MeasurementError,
    SinktrackError,
    one_line,
    require,
)
from sinktrack.measure import measure, measure_together
from sinktrack.measurement import Measurement
from sinktrack.probe import Probe
from sinktrack.prose import passages
from sinktrack.records import twins
from sinktrack.records.run import Run, to_json, versions
from sinktrack.scan.engines import Outcome, attempt, local, not_measured
from sinktrack.scan.engines import ray_tasks as ray
from sinktrack.text import printable

if TYPE_CHECKING:  # transformers is slow to import
    from sinktrack.interventions.card import Start

_log = logging.getLogger("sinktrack")
Engine = Literal["local", "ray"]
Dtype = Literal["float32", "bfloat16", "float16"]
Notify = Callable[[Checkpoint, dict[str, Any] | SinktrackError], None]


def scan(
    archive: str | Path,
    *,
    probe: Probe | None = None,
    run: str | Path | Run,
    device: str = "cpu",
    blocks: int | None = None,
    batch_size: int | None = None,
    dtype: Dtype | None = None,
    hf_config: str | Path | None = None,
    base: str | Path | None = None,
    pattern: str | None = None,
    engine: Engine | None = None,
    workers: int | None = None,
    follow: float | None = None,
    causal: bool = False,
    part: tuple[int, int] | None = None,
    card: bool = False,
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
        dtype: compute in this one; by default in the one that the weights are stored in.
        hf_config: see `discover`.
        base: see `discover`.
        pattern: how checkpoints are named, where `discover` does not know.
        engine: ``local``, worker processes of this machine; ``ray``, tasks of a Ray cluster; by
            default this process does all the work, in step order.
        workers: processes or tasks at a time; by default as many as cores and memory allow.
        follow: wait for new checkpoints without end, looking every so many seconds.
        causal: run the causal tests too.
        part: measure every so manyth checkpoint alone, as (which, of how many) counted from 0: the
            scans of all parts may run at once, on several machines, into one run.
        card: make the position card too, as `sinktrack.position_card` does.
        notify: called after each checkpoint with its record or its error; without it, failures
            are raised together at the end.

    Yields:
        The records as they are written.

    Raises:
        ArchiveError: no checkpoint found; or, after all others were measured, some failed, each
            named with its reason.
        RecordError: the run directory cannot be written, holds another probe, or is being scanned.
        MeasurementError: there is no such device.
    """
    if causal and blocks is not None:
        raise ValueError("causal tests need all blocks; leave out blocks or causal")
    if card and blocks is not None:
        raise ValueError("the position card needs all blocks; leave out blocks or card")
    check_device(device, engine)
    if not isinstance(run, Run):
        run = Run.open(run, probe)
    if run.probe is None:
        raise ArchiveError(f"{run.directory} holds no probe yet; give one")
    job = Job(run.probe, device, batch_size, blocks, causal, dtype, card)
    checkpoints = Checkpoints([archive], pattern, hf_config, follow, part, base)
    failed = []

    def told(checkpoint: Checkpoint, outcome: Outcome) -> None:
        if isinstance(outcome, SinktrackError):
            failed.append(f"{checkpoint.name}: {outcome}")

    yield from Scan(checkpoints, run, job, engine, workers).records(notify or told)
    if failed:
        raise ArchiveError(f"{len(failed)} checkpoints failed\n" + "\n".join(failed))


class Checkpoints:
    """The checkpoints of archives, looked for once; or, to follow one, again and again.

    Args:
        archives: as `scan`'s; several together must not hold a step twice.
        pattern: see `discover`.
        hf_config: see `discover`.
        follow: look every so many seconds, without end, at one archive.
        part: see `scan`.
        base: see `discover`.

    Raises:
        ArchiveError: as of `discover`, but for what is to be followed: that may come.
    """

    def __init__(
        self,
        archives: Sequence[str | Path],
        pattern: str | None = None,
        hf_config: str | Path | None = None,
        follow: float | None = None,
        part: tuple[int, int] | None = None,
        base: str | Path | None = None,
    ) -> None:
        if part is not None and not 0 <= part[0] < part[1]:
            raise ValueError(f"part {part[0]} of {part[1]}: they are counted from 0")
        self.part = part
        require("transformers", "scan")  # reads configurations, tokenizers and layouts
        if pattern is not None:
            Pattern(pattern)  # wrong use is said at once, also where a scan waits
        if base is not None:
            base_model(base)
        find = [partial(discover, archive, pattern, hf_config, base) for archive in archives]
        self.by_archive: list[list[Checkpoint]] = []
        """What is there now, in the order of the archives; empty where one is followed."""
        if follow is None:
            self.by_archive = [one() for one in find]
        self.found = self._own(in_order(chain.from_iterable(self.by_archive)))
        """The same by step."""
        self.following = follow is not None
        self.rounds: Iterator[list[Checkpoint]] = iter([self.found])
        """Of each look, what to measure if it is not in the run."""
        if follow is not None:
            self.rounds = map(self._own, poll(archives[0], find[0], follow))

    def _own(self, found: list[Checkpoint]) -> list[Checkpoint]:
        """Those of this part."""
        return found if self.part is None else found[self.part[0] :: self.part[1]]

    def examples(self) -> Iterator[Checkpoint]:
        """Of `rounds`, what comes first; it still stands there afterwards."""
        ahead, self.rounds = tee(self.rounds)
        return chain.from_iterable(ahead)


@dataclass(frozen=True)
class Scan:
    """A scan that is set up."""

    checkpoints: Checkpoints
    run: Run
    job: Job
    engine: Engine | None = None
    workers: int | None = None

    def records(self, notify: Notify) -> Iterator[dict[str, Any]]:
        """Measure what the run does not hold yet; records as they are written.

        Args:
            notify: called after each checkpoint with its record or its error.

        Raises:
            AnotherModel: of several checkpoints none is of the model that the run holds.
            RecordError: the run directory cannot be written, or is being scanned.
        """
        part, written = self.checkpoints.part, False
        with self.run.claimed(part and f"{part[0]}-of-{part[1]}"):
            rounds = (
                self.job.pending(checkpoints, self.run) for checkpoints in self.checkpoints.rounds
            )
            for checkpoint, outcome in _outcomes(rounds, self.job, self.engine, self.workers):
                if isinstance(outcome, dict):
                    try:
                        self.run.append(outcome)
                    except AnotherModel as error:  # mixed archives: named, and the others go on
                        notify(checkpoint, error)
                        if not written and self._all_alike(checkpoint):
                            raise AnotherModel(
                                f"all others here are as {checkpoint.name}, and none is of the "
                                f"model that {self.run.directory} holds; give another run directory"
                            ) from error
                        continue
                    written = True
                    if len(steps := twins.like(outcome, self.run.records)) > 1:
                        _log.warning("%s", twins.told(steps))
                notify(checkpoint, outcome)
                if isinstance(outcome, dict):
                    yield outcome

    def _all_alike(self, one: Checkpoint) -> bool:
        """Whether several are to be measured, and all are of the same configuration as this."""
        if self.checkpoints.following:
            return False
        others = [other for other in self.job.pending(self.checkpoints.found, self.run)
                  if other != one]  # fmt: skip
        wanted = _configuration(one)
        return bool(others) and all(_configuration(other) == wanted for other in others)


def _configuration(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the model is; empty where it cannot be told."""
    try:
        said: dict[str, Any] = as_stored(checkpoint).config.to_dict()
    except Exception:  # it will be told when it is measured
        return {}
    written = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
    return {name: value for name, value in said.items() if name not in written}


def check_device(device: str, engine: Engine | None = None) -> None:
    """Refuse a device that is not here; a Ray cluster's are elsewhere.

    Raises:
        MeasurementError: there is no such device.
    """
    try:
        checked = torch.device(device)
    except RuntimeError as error:
        raise MeasurementError(f"device {device!r}: {one_line(error)}") from error
    if engine == "ray":
        return
    if checked.type == "mps" and not torch.backends.mps.is_available():
        raise MeasurementError(f"device {device!r} is not here: this torch computes without it")
    if checked.type != "cuda":
        if checked.type not in ("cpu", "mps") and not hasattr(torch, checked.type):
            raise MeasurementError(f"device {device!r} is not here: this torch knows none of it")
        return
    if (checked.index or 0) >= (count := torch.cuda.device_count()):
        raise MeasurementError(f"device {device!r} is not here: torch sees {count} CUDA devices")


@dataclass(frozen=True)
class Job:
    """What to measure of each checkpoint; calling it with one gives its record."""

    probe: Probe
    device: str = "cpu"
    batch_size: int | None = None
    blocks: int | None = None
    causal: bool = False
    dtype: Dtype | None = None
    card: bool = False

    def pending(self, checkpoints: Sequence[Checkpoint], run: Run) -> list[Checkpoint]:
        """Those that the run does not hold, or not with as many blocks, the dtype or the tests."""
        held = {record["step"]: record for record in run.history}
        done = {step for step, record in held.items() if self._is_in(record)}
        return [checkpoint for checkpoint in checkpoints if checkpoint.step not in done]

    def _is_in(self, record: Mapping[str, Any]) -> bool:
        held = str(record.get("dtype", self.dtype)).partition(" from ")[0]
        if self.dtype is not None and held != self.dtype:
            return False
        asked = [name for name, of in (("causal", self.causal), ("position_card", self.card)) if of]
        if asked:
            return all(name in record for name in asked)
        if "measured_blocks" not in record:
            return True
        return self.blocks is not None and bool(record["measured_blocks"] >= self.blocks)

    def __call__(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Measure one checkpoint.

        Raises:
            ArchiveError, ProbeError, MeasurementError: it cannot be measured.
        """
        from sinktrack.archive.beside import tell

        tell(checkpoint)
        source = open(checkpoint)
        try:
            measured, tests = self._tested(checkpoint, source)
        finally:
            _forget(checkpoint)
        tokens = checkpoint.tokens or getattr(source, "tokens", None)
        record: dict[str, Any] = to_json(
            measured.to_record(checkpoint.step, checkpoint.name, versions(), tokens) | tests
        )
        if stored := getattr(source, "quantized", None):
            record["dtype"] += f" from {stored}"
        return record

    def _start(self, checkpoint: Checkpoint, source: Source) -> Start | None:
        from sinktrack.archive.huggingface import tokenizer
        from sinktrack.interventions.card import start_of

        return start_of(self.probe, source.config, tokenizer(checkpoint.files))

    def _tested(self, checkpoint: Checkpoint, source: Source) -> tuple[Measurement, dict[str, Any]]:
        """The measurement and what else was asked for, with a block of the model in memory."""
        from sinktrack.archive.huggingface import load
        from sinktrack.interventions.card import beside, measured_beside
        from sinktrack.models.blockwise import BlockwiseUnsupported
        from sinktrack.models.streaming import Streamed

        asked = self.causal or self.card
        start = self._start(checkpoint, source) if asked else None
        others = beside(self.probe, start) if asked else None
        probes = [self.probe] if others is None else [self.probe, others]
        model: Any
        try:
            model = Streamed(source, self.device, self.dtype, head=self.causal)
            measured, *rest = measure_together(
                model, probes, blocks=self.blocks, batch_size=self.batch_size
            )
            return measured, self._tests(model, measured, start, *rest)
        except BlockwiseUnsupported as error:
            if self.blocks is not None:
                raise ArchiveError(f"{error}; scan all of it, without --blocks") from error
            _log.warning("%s: %s; loading it whole", checkpoint.name, error)
        model = load(checkpoint, self.device, self.dtype, head=self.causal)
        measured = measure(model, self.probe, batch_size=self.batch_size)
        seen = None
        if others is not None:
            seen = measured_beside(model, self.probe, start, self.batch_size)
        return measured, self._tests(model, measured, start, seen)

    def _tests(
        self,
        model: Any,
        measured: Measurement,
        start: Start | None,
        seen: Measurement | None = None,
    ) -> dict[str, Any]:
        """What was asked for beside the measurement."""
        if self.causal:
            from sinktrack.interventions import run_causal_tests

            tests = run_causal_tests(
                model,
                self.probe,
                measured,
                batch_size=self.batch_size,
                start=start,
                beside=seen,
            )
            return {"position_card": tests.pop("position_card"), "causal": tests}
        if self.card:
            from sinktrack.interventions.card import card

            return {"position_card": card(self.probe, measured, start, seen)}
        return {}


def _outcomes(
    rounds: Iterable[list[Checkpoint]], job: Job, engine: Engine | None, workers: int | None
) -> Iterator[tuple[Checkpoint, Outcome]]:
    for checkpoints in rounds:
        if engine == "ray":
            gpus = int(job.device.startswith("cuda"))
            yield from ray.distribute(job, checkpoints, workers, gpus)
        elif engine == "local" or workers is not None:
            yield from local.distribute(job, checkpoints, workers)
        else:
            yield from _one_by_one(checkpoints, job)


def _one_by_one(
    checkpoints: Sequence[Checkpoint], job: Job
) -> Iterator[tuple[Checkpoint, Outcome]]:
    """In this process; a remote checkpoint is begun while the one before is measured."""
    reader: Thread | None = None
    ended = Event()
    try:
        for checkpoint, following in zip_longest(checkpoints, checkpoints[1:]):
            if reader is not None:
                reader.join()
            if following is not None and not following.files.local:
                reader = Thread(target=_begin, args=(following, ended), daemon=True)
                reader.start()
            yield checkpoint, attempt(job, checkpoint)
    finally:
        ended.set()
        for checkpoint in checkpoints:
            _forget(checkpoint)


def _forget(checkpoint: Checkpoint) -> None:
    """Let go of what was announced of it and never read."""
    for one in (checkpoint, checkpoint.base):
        if one is not None:
            one.files.forget_announced()


def _begin(checkpoint: Checkpoint, ended: Event) -> None:
    """Have on its way what every measurement of a remote checkpoint begins with."""
    from sinktrack.models.streaming import begin

    with suppress(Exception):  # told when it is measured
        source = open(checkpoint)
        source.names()
        if not ended.is_set():
            begin(source)


def renamed(checkpoints: Sequence[Checkpoint], run: Run) -> list[str]:
    """Those whose steps the run holds by scans of other names, as ``name (source)``."""
    held = {record["step"]: record.get("source") for record in run.history}
    return [
        f"{checkpoint.name} ({held[checkpoint.step]})"
        for checkpoint in checkpoints
        if held.get(checkpoint.step) not in (None, "callback", printable(checkpoint.name))
    ]


def choose_probe(
    examples: Iterable[Checkpoint], run: Run, file: Path | None
) -> tuple[Probe, str | None]:
    """The probe to scan with, and a line that says so where it had to be made.

    From ``file``; else the run's own; else, from the first of ``examples`` that can be read, a
    little prose through the tokenizer beside it, or seeded random tokens of its vocabulary.

    Raises:
        ProbeError: the file holds no probe.
        NoExample: the files of none can be read.
    """
    if file is not None:
        return Probe.load(file), None
    if run.probe is not None:
        return run.probe, None
    failures: list[tuple[Checkpoint, SinktrackError]] = []
    for checkpoint in examples:
        try:
            return _probe_for(checkpoint)
        except SinktrackError as error:  # the scan says which, where another can be read
            failures.append((checkpoint, error))
        except Exception as error:  # a stranger's config can break transformers anywhere
            failures.append((checkpoint, not_measured(error)))
    raise NoExample(failures)


class NoExample(ArchiveError):
    """No checkpoint can be read to make a probe for; ``failures`` has the error of each."""

    def __init__(self, failures: list[tuple[Checkpoint, SinktrackError]]) -> None:
        self.failures = failures
        said = "".join(f"\n{checkpoint.name}: {error}" for checkpoint, error in failures)
        super().__init__(f"there is no checkpoint to make a probe for; give one{said}")


def _probe_for(checkpoint: Checkpoint) -> tuple[Probe, str]:
    from sinktrack.archive.huggingface import other_tokenizer, tokenizer, vocabulary

    if checkpoint.reason is not None:
        raise ArchiveError(checkpoint.reason)
    base = checkpoint.base.files if checkpoint.base else None
    places = [files for files in (checkpoint.files, checkpoint.config, base) if files is not None]
    encoder = next((one for files in places if (one := tokenizer(files)) is not None), None)
    if encoder is not None:
        made = Probe.from_texts(encoder, passages())
        return made, f"no probe given: {made} from built-in prose and the checkpoint's tokenizer"
    made = Probe.random(vocabulary(checkpoint))
    other = next(filter(None, map(other_tokenizer, places)), None)
    lacking = f"there is {other}" if other else "no tokenizer found"
    return made, (
        f"no probe given and {lacking}: {made} of seeded random tokens. A model that was "
        "trained with [BOS] may show no sink on it: `sinktrack probe` makes one that begins so"
    )


def quiet() -> None:
    """Keep transformers' own bars out of ours."""
    logging = require("transformers.utils.logging", "scan")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
