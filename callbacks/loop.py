"""For a hand-written PyTorch loop: ``tracker.step(step, model)`` after each optimizer step."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch.distributed as dist
from torch import nn

from sinktrack import text
from sinktrack.callbacks.options import OptionArguments, Options, directory_of, probe_of
from sinktrack.errors import MeasurementError
from sinktrack.interventions import examine
from sinktrack.loggers import weights_and_biases as wandb
from sinktrack.loggers.base import Logger
from sinktrack.measure import measure
from sinktrack.measurement import Measurement
from sinktrack.models.any_decoder.decoder import Decoder
from sinktrack.models.base import Model as Adapted
from sinktrack.models.base import adapt
from sinktrack.probe import Probe
from sinktrack.records import twins
from sinktrack.records.run import SCHEMA, Run, to_json, versions
from sinktrack.signal import Stages, alarm

_log = logging.getLogger("sinktrack")
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables of the environment by which a process may be one of several, or be told nothing."""
_RESUMED = {"float64": 1e-3, "float32": 1e-3, "float16": 0.02, "bfloat16": 0.05}
"""By how much a step may be measured otherwise when a training goes on from it, by dtype: other
kernels and other machines round otherwise."""
_FELL = "sinktrack: the P0 sink fell back"
Model = nn.Module | list[nn.Module] | Decoder
"""A model, the chunks of one, or a decoder that holds its model."""


class SinkTracker:
    """Measures the model every ``every`` steps, writes a record and logs it to W&B.

    Of the processes of one training the first records, by torch.distributed or the framework; the
    others say so. A process that is in neither records for itself. What is known at construction
    may change until the first probe, as processes are often joined in between.

    Args:
        probe: the fixed batch, or the path of its file; it must be the same on every process.
        run: the run directory.
        every: steps between probes; step 0 counts.
        options: as the fields of `sinktrack.callbacks.options.Options` say.

    Raises:
        TypeError, ValueError: an argument or option that cannot be; says which.
        ProbeError: the probe's file cannot be read.
        RecordError: the run directory cannot be written, or holds another probe; by the first probe
            where the environment numbers this process and it cannot be known yet if it records.
    """

    def __init__(
        self,
        probe: Probe | str | Path,
        run: str | Path,
        every: int = 100,
        **options: Unpack[OptionArguments],
    ) -> None:
        self.options = Options(every=every, **options)
        self._directory: Path | None = self._named(run)
        self.probe = probe_of(probe)
        self.loggers = loggers_of(self.options.loggers)
        self._tried = False
        self.axes: dict[str, int] = {}
        """More axes to log beside ``sinktrack/step``, by W&B key."""
        self.measured: int | None = None
        """The last step that was measured."""
        self.recorded = self.failed = 0
        """Records written, and probes that failed."""
        self._main: bool | None = None
        self._run: Run | None = None
        self._silent = False
        self._reported: set[str | tuple[str, int]] = set()
        self._stages: Stages | None = None
        self._past: wandb.Past | None = None
        known = _joined() is not None or not any(_number(name) for name in _RANKS)
        if known and self._directory is not None:
            self._records()

    def _named(self, run: Any) -> Path | None:
        """The run directory; None where a framework's callback names one later."""
        directory: Path | None = directory_of(run)
        return directory

    def due(self, step: int) -> bool:
        """Is this one of the steps to probe?"""
        power_of_two = step > 0 and step & (step - 1) == 0
        every, early = self.options.every, self.options.early
        return step % every == 0 or (early and step < every and power_of_two)

    def step(self, step: int, model: Model, tokens: int | None = None) -> Measurement | None:
        """Probe if ``step`` is due. Call it on every process, after the optimizer's step.

        Args:
            step: optimizer steps done.
            model: the model in training, as it is wrapped.
            tokens: tokens seen so far, for the record.
        """
        records = self._decide(step)
        if self.due(step):
            return self.probe_now(step, model, tokens)
        self.try_once(step, model, records)
        return None

    def try_once(self, step: int, model: Model, records: bool = True) -> None:
        """Say at the first sight of a model if it cannot be measured, not at the first probe."""
        if self._tried:
            return
        self._tried = True
        try:
            adapted = adapt(model, self.options.decoder)
            if records or adapted.every_process:
                self._try(adapted)
        except Exception as error:
            self._failed("trial of the model", step, error)

    def _try(self, adapted: Adapted) -> None:
        said = adapted.tried(self.probe)
        if said is not None:
            _log.info("%s", said)

    def probe_now(self, step: int, model: Model, tokens: int | None = None) -> Measurement | None:
        """Probe whatever the step; None on a process that does not write, or after a failure."""
        first, self.measured, self._tried = not self._tried, step, True
        try:
            adapted = adapt(model, self.options.decoder)
        except Exception as error:
            self.failed += 1
            self._failed("probe", step, error)
            self.tell("W&B log", step, self._status)
            return None
        if not self._decide(step, again=True) and not adapted.every_process:
            self.failed += not self._silent
            return None
        try:
            if adapted.every_process and not adapted.agrees:
                _agree(self.probe)
            if first and adapted.backend == "torch":
                self._try(adapted)
            measurement = measure(
                adapted.model,
                self.probe,
                batch_size=self.options.probe_batch_size,
                in_training=not self._tests(step),  # which choose candidates by total effects too
            )
            tested = self._causal(step, adapted, measurement)
            if self._run is None:
                return None
            packages = versions(*adapted.packages)
            record = measurement.to_record(step, "callback", packages, tokens) | tested
            record = to_json(record)
            self._run.append(record)
            self.recorded += 1
        except Exception as error:
            self.failed += 1
            self._failed("probe", step, error, everywhere=adapted.agrees)
            self.tell("W&B log", step, self._status)
            return None
        for logger in self.loggers:
            self.tell(f"{_name(logger)} log", step, self._show, logger, record)
        self.tell("signal", step, self._judge, record)
        self.tell("W&B log", step, self._status)
        return measurement

    def mark(self, step: int, what: str) -> None:
        """Note that something but the model changes, as the data: a line on every curve.

        Call it on every process; trends are judged anew from there on.

        Args:
            step: from which on it holds.
            what: in a few words.
        """
        self.tell("mark", step, self._mark, step, what)

    def _mark(self, step: int, what: str) -> None:
        if not self._decide(step) or self._run is None:
            return
        self._run.mark(step, what)
        if self._stages is not None:
            self._stages.marks = tuple(mark.step for mark in self._run.marks)

    def finish(self) -> None:
        """At the end of training: say how many records were written and how many probes failed."""
        if self._silent:
            return
        self.close()
        said = _log.warning if self.failed else _log.info
        said(
            "%d records written to %s, %d probes failed",
            self.recorded, self._directory, self.failed,
        )  # fmt: skip

    def close(self) -> None:
        """At the end of training: let every logger send what it has."""
        for logger in self.loggers:
            self.tell(f"{_name(logger)} log", self.measured or 0, logger.close)

    def tell(self, what: str, step: int, tell: Callable[..., None], *of: Any) -> None:
        """Tell of a record that is on disk already, so that a failure loses nothing."""
        try:
            tell(*of)
        except Exception as error:
            self._failed(what, step, error)

    def _show(self, logger: Logger, record: dict[str, Any]) -> None:
        if isinstance(logger, wandb.WeightsAndBiases):
            self._log(record)
        else:
            logger.log(record)

    def tokens_at(self, step: int) -> int | None:
        """Those of the record of a step; None where this process has none, or cannot read it."""
        if self._run is None:
            return None
        try:
            records = Run.read(self._run.directory).records  # not kept: they grow with the model
        except Exception as error:
            self._failed("reading of earlier tokens", step, error)
            return None
        return next((one.get("tokens") for one in records if one["step"] == step), None)

    def counted(self, step: int, count: Callable[[], int]) -> int | None:
        """Tokens by a function of the user's; None where it fails."""
        try:
            return int(count())
        except Exception as error:
            self._failed("count of tokens", step, error)
            return None

    def _status(self) -> None:
        if any(isinstance(logger, wandb.WeightsAndBiases) for logger in self.loggers):
            wandb.status(self.recorded, self.failed)

    def settle(self) -> None:
        """End W&B's row of the last record, before a trainer logs a later step."""
        try:
            wandb.settle()
        except Exception as error:
            self._failed("W&B log", self.measured or 0, error)

    def by_framework(self, main: bool, step: int) -> None:
        """The framework that trains says whether this process is the one that records.

        torch.distributed, where it is set up, decides alone.
        """
        self._main = main
        self._decide(step)

    def _decide(self, step: int, again: bool = False) -> bool:
        """Does this process record? Once it is known, ask only ``again`` before a probe."""
        if not again and (self._run is not None or self._silent or self._reported):
            return self._run is not None
        try:
            return self._records()
        except Exception as error:
            self._failed("run directory", step, error)
            return False

    def _records(self) -> bool:
        """Does this process record? What it needs for that is opened; if it does not, it is said.

        Raises:
            RecordError: as for the tracker.
        """
        joined = _joined()
        first = self._main if joined is None else joined[0] == 0
        if first is False:
            self._run = None
            if not self._silent:
                self._silent = True
                which = "this process" if joined is None else f"process {joined[0]} of {joined[1]}"
                _log.info("%s records nothing into %s: process 0 does", which, self._directory)
            return False
        if self._run is None:
            assert self._directory is not None
            self._run = Run.open(self._directory, self.probe)
            if other := self._run.also_recorded_by():
                _log.warning(
                    "%s records into %s too: of two records of one step the last counts",
                    other, self._directory,
                )  # fmt: skip
        return True

    def _log(self, record: dict[str, Any]) -> None:
        assert self._run is not None
        if self._past is not None:
            self._past.append(record)
        if not wandb.is_active():
            return
        if self._past is None:  # not by our run, which would keep all of every record
            self._past = wandb.Past.of(Run.read(self._run.directory).history)
        wandb.log(record, self.axes, self._run, self._past)
        self._describe()

    def _describe(self) -> None:
        """Tell W&B's run what is measured, and when."""
        options = self.options
        wandb.describe(
            {
                "run": text.printable(str(self._directory)),
                "probe": self.probe.digest,
                "sequences": self.probe.tokens.shape[0],
                "length": self.probe.tokens.shape[1],
                "every": options.every,
                "early": options.early,
                "causal_every": options.causal_every,
                "version": versions().get("sinktrack"),
                "schema": SCHEMA,
            }
        )

    def _tests(self, step: int) -> bool:
        """Are causal tests due?"""
        every = self.options.causal_every
        return every is not None and step % (self.options.every * every) == 0

    def _causal(self, step: int, adapted: Adapted, measurement: Measurement) -> dict[str, Any]:
        """The record's causal tests, where they are due."""
        if not self._tests(step):
            return {}
        try:
            if adapted.no_causal_tests is not None:
                raise MeasurementError(adapted.no_causal_tests)
            tests = examine(
                adapted.model, self.probe, measurement, batch_size=self.options.probe_batch_size
            )
        except Exception as error:
            self._failed("causal tests", step, error)
            return {}
        return {"position_card": tests.pop("position_card"), "causal": tests}

    def _judge(self, record: dict[str, Any]) -> None:
        """Follow the signal; a fall of the sink is told in the log and as a W&B alert."""
        assert self._run is not None
        if self._stages is None:
            marks = [mark.step for mark in self._run.marks]
            read = Run.read(self._run.directory)  # not kept: records grow with the model
            self._stages = Stages.of(read.history[:-1], marks)
            self._resumed(record, read.history[:-1])
        before, abandoned = self._stages.stage, set(self._stages.abandoned)
        text = alarm(self._stages.add(record), before)
        if gone := self._stages.abandoned - abandoned:
            _log.warning(
                "%s holds records of later steps than %d, up to %d: training went on from before "
                "them, and they count no more", self._run.directory, record["step"], max(gone),
            )  # fmt: skip
        if text is not None:
            _log.warning("at step %d %s", record["step"], text)
        fall = text and f"{self._run.directory}: {text}"
        for logger in self.loggers:
            if isinstance(logger, wandb.WeightsAndBiases):
                self._announce(self._stages.stage, fall)
            elif fall is not None:
                self.tell(f"{_name(logger)} log", record["step"], logger.alert, _FELL, fall)

    def _resumed(self, record: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Warn where the step that a training goes on from was measured otherwise before."""
        before = [one for one in history if one["step"] == record["step"]]
        if not before or not twins.digests_agree(before[-1], record):
            return
        others = [one for one in history if one["step"] != record["step"]]
        blind = any(
            twins.digests_agree(one, record) and not twins.same(one, before[-1]) for one in others
        )
        if blind or not others:  # what is trained may be nothing that the digest sees
            return
        apart = twins.apart(before[-1], record)
        if apart > _RESUMED.get(record["dtype"], _RESUMED["bfloat16"]):  # of some in fewer bits
            _log.warning(
                "the model at step %d measures otherwise than when %s recorded that step (by up to "
                "%.2g of a number), though its norms, biases and embedding are the same: a part of "
                "its checkpoint, such as experts or adapters, was not loaded, or it is computed "
                "otherwise now. Look for missing keys in the log of the loading",
                record["step"], self._directory, apart,
            )  # fmt: skip

    def _announce(self, stage: str | None, fall: str | None) -> None:
        """Tell W&B the stage, and alert it of a fall."""
        wandb.stage(stage)
        if fall is not None:
            wandb.alert(_FELL, fall)

    def _failed(self, what: str, step: int, error: Exception, everywhere: bool = False) -> None:
        if self.options.on_error == "raise":
            raise error
        reason = f"{type(error).__name__}: {error}"
        if everywhere and self._run is None:  # process 0 says the same
            return
        if reason not in self._reported:
            if (what, step) not in self._reported:  # of several reasons the first
                _log.warning("the %s at step %d failed, training goes on: %s", what, step, reason)
            self._reported |= {reason, (what, step)}


class DirectoryLater(SinkTracker):
    """Takes a directory below the framework's where no run was named."""

    def __init__(
        self,
        probe: Probe | str | Path,
        run: str | Path | None = None,
        every: int = 100,
        **options: Unpack[OptionArguments],
    ) -> None:
        super().__init__(probe, run, every, **options)  # type: ignore[arg-type]  # see `_named`

    def _named(self, run: Any) -> Path | None:
        return None if run is None else super()._named(run)

    def below(self, directory: str) -> None:
        """The framework's directory is known."""
        if self._directory is None:
            self._directory = Path(directory) / "sinktrack"


def loggers_of(given: Any) -> list[Logger]:
    """The loggers, by default W&B of an active run.

    Raises:
        TypeError: one of them is no logger.
    """
    if given is None:
        return [wandb.WeightsAndBiases()]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"loggers={given!r}: wanted a list of loggers")
    loggers = list(given)
    for one in loggers:
        if isinstance(one, type) or not isinstance(one, Logger):
            raise TypeError(f"loggers: {one!r} has no log, alert and close")
    return loggers


def _name(logger: Logger) -> str:
    return "W&B" if isinstance(logger, wandb.WeightsAndBiases) else type(logger).__name__


def _joined() -> tuple[int, int] | None:
    """This process' number and how many train together; None if nothing but the environment says.

    Accelerate is asked too: it joins processes of some devices without torch.distributed.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
    shared = getattr(state, "_shared_state", None) or {}
    count = int(shared.get("num_processes", 1))
    return (int(shared["process_index"]), count) if count > 1 else None


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def _agree(probe: Probe) -> None:
    """Fail on every process or on none, before a forward pass in which all wait for each other.

    What fails later fails on all alike, since weights and probe are the same; but for a process
    that runs out of memory alone, for which the others wait until their process group times out.

    Raises:
        MeasurementError: the processes hold different probes.
    """
    if not dist.is_initialized():
        return
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, probe.digest)
    if len(set(digests)) > 1:
        raise MeasurementError(
            f"the processes hold different probes ({', '.join(sorted(set(digests)))}); a sharded "
            "model needs the same one on each"
        )
