"""For Megatron-Core: its own loop, Megatron Bridge and Megatron-LM, none of which is imported."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any, Unpack

import torch.distributed as dist

from sinktrack.callbacks.loop import SinkTracker
from sinktrack.callbacks.options import OptionArguments
from sinktrack.errors import MeasurementError
from sinktrack.loggers import weights_and_biases as wandb
from sinktrack.measurement import Measurement
from sinktrack.models.megatron.processes import processes
from sinktrack.probe import Probe
from sinktrack.records.run import Run


class SinkTrackMegatron:
    """Probes every ``every`` iterations, where Megatron saves, and at the end.

    Call `step` in a loop of your own, or register the object as a callback: of Megatron Bridge, or
    of Megatron-LM where it has callbacks. In an older Megatron-LM give `non_loss_data_func` to
    ``pretrain``. Every process must do so alike; process 0 writes, and the process that has the W&B
    run, which is Megatron's last, logs.

    Arguments and errors are those of `sinktrack.callbacks.loop.SinkTracker`.
    """

    def __init__(
        self,
        probe: Probe | str | Path,
        run: str | Path,
        every: int = 100,
        **options: Unpack[OptionArguments],
    ) -> None:
        self.tracker = _Tracker(probe, run, every, **options)
        self._iteration = 0
        self._model: Any = None
        self._before: int | None = None
        self._begun: int | None = None

    def step(self, iteration: int, model: Any, tokens: int | None = None) -> Measurement | None:
        """Probe if ``iteration`` is due. Call it on every process, after the optimizer's step.

        Args:
            iteration: optimizer steps done.
            model: what ``get_model`` returns: a list of chunks; or one model.
            tokens: tokens seen so far, for the record.
        """
        self._iteration, self._model = iteration, model
        measured: Measurement | None = self.tracker.step(iteration, model, tokens)
        return measured

    def on_train_start(self, context: Any) -> None:
        """Before the first iteration, or the first after a resume: probe if it is due."""
        state = _state(context)
        self._iteration = int(state.step if state else getattr(_arguments(), "iteration", 0) or 0)
        self._model = context.model
        self._before = _samples(context)
        self._begun = _begun_saves(context)
        self._probe(context, self.tracker.due(self._iteration), _samples(context))

    def on_train_step_start(self, context: Any) -> None:
        """Before an iteration: note the samples seen."""
        self._before = _samples(context)

    def on_train_step_end(self, context: Any) -> None:
        """After an iteration, which is counted only later: probe if it is due or will be saved."""
        self._iteration = _begun(context, self._iteration) + 1
        self._model = context.model
        self._begun = _begun_saves(context)
        samples = _samples(context)
        if samples is not None and samples == self._before:  # not counted yet, either
            batch = _batch()
            samples = None if batch is None else samples + batch
        self._before = samples
        due = self.tracker.due(self._iteration) or _is_saved(context, self._iteration, samples)
        self._probe(context, due, samples)

    def on_log(self, context: Any) -> None:
        """Megatron-LM writes its line: the last record's sink rate goes into it, once."""
        if self.tracker.line and context.log_fragments is not None:
            context.log_fragments.append(self.tracker.line)
            self.tracker.line = ""

    def on_checkpoint_save(self, context: Any) -> None:
        """Megatron Bridge has saved: probe these weights, if they are those of now.

        An asynchronous save is announced when it is done, at a later iteration, unless training
        waits for it to exit. Then, whichever is announced, one has begun since the last iteration
        ended, and it saves these weights.
        """
        state, configuration = _state(context), _configuration(context)
        later = getattr(getattr(configuration, "checkpoint", None), "async_save", False)
        if later:
            begun = _begun_saves(context)
            later = begun is None or self._begun is None or begun <= self._begun
        if self._model is not None and not later:
            self._iteration = int(state.step) if state else self._iteration
            self._probe(context, True, _samples(context))

    def on_train_end(self, context: Any) -> None:
        """After the last iteration, those at the end that Megatron-LM skipped included."""
        state = _state(context)
        self._iteration = int(state.step) if state else _skipped(self._iteration)
        self._probe(context, True, _samples(context))
        self.tracker.finish()

    def non_loss_data_func(self, model: Any) -> None:
        """For ``pretrain(non_loss_data_func=...)``: probe at each evaluation.

        Raises:
            RuntimeError: Megatron-LM's arguments, which hold the iteration, cannot be found.
        """
        arguments = _arguments()
        if arguments is None:
            raise RuntimeError("non_loss_data_func is for megatron.training, which is not loaded")
        self._iteration, self._model = self._evaluated(arguments), model
        self._probe(None, True, _samples(None))

    def _evaluated(self, arguments: Any) -> int:
        """Iterations done at an evaluation: of the training in this process, or of a checkpoint."""
        loaded = int(arguments.iteration or 0)
        begun = getattr(arguments, "curr_iteration", None)
        trained = not getattr(arguments, "skip_train", False) and _samples(None) != 0
        if begun is None or begun < loaded or not trained:
            return loaded
        done = int(begun) + 1
        last = _skipped(done)
        interval = getattr(arguments, "eval_interval", None)
        inside = interval and done % interval == 0 and self.tracker.measured not in (done, last)
        return done if inside else last  # inside the loop, or after it

    def _probe(self, context: Any, wanted: bool, samples: int | None) -> None:
        if wanted and self.tracker.measured != self._iteration:
            length = _length(context)
            tokens = None if samples is None or length is None else samples * length
            self.tracker.probe_now(self._iteration, self._model, tokens)


class _Tracker(SinkTracker):
    """Tells W&B on the process that has its run, which need not be the one that writes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.line = ""
        """What Megatron's log says of the last record, on every process: the last one writes it."""
        self._told: list[tuple[str, tuple[Any, ...]]] = []
        """What W&B is to be told of the last record, where this process has no run of W&B."""
        self._lines: int | None = None
        """Records in the directory, where that is this process'; None until W&B is told."""

    def probe_now(self, step: int, model: Any, tokens: int | None = None) -> Measurement | None:
        """As `SinkTracker.probe_now`; what it tells W&B goes to the process that has the run."""
        self._told = []
        try:
            measured: Measurement | None = super().probe_now(step, model, tokens)
        except Exception:
            self._pass_on(step)  # the others wait for it
            raise
        if measured is not None and not math.isnan(rate := measured.sink_rate()):
            self.line = f" P0 sink rate at {step}: {rate:.4f} |"
        self._pass_on(step)
        return measured

    def _log(self, record: dict[str, Any]) -> None:
        if self._lines is not None:
            self._lines += 1
        if wandb.is_active():
            super()._log(record)
        else:
            self._told.append(("record", (record, dict(self.axes))))

    def _announce(self, stage: str | None, alarm: str | None) -> None:
        if wandb.is_active():
            super()._announce(stage, alarm)
        else:
            self._told.append(("stage", (stage, alarm)))

    def _status(self) -> None:
        if self._run is None:  # process 0 has the counts
            return
        if wandb.is_active():
            super()._status()
        else:
            self._told.append(("status", (self.recorded, self.failed)))

    def _pass_on(self, step: int) -> None:
        """Every process calls; the last with a run of W&B logs, if process 0 has none.

        All learn the line of Megatron's log.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        all_of = processes()
        known = 0 if self._past is None else len(self._past)
        replies = all_of.gather((wandb.is_active(), known, self.line))
        self.line = replies[0][2]
        chosen = max((rank for rank, (has, *_) in enumerate(replies) if has), default=0)
        if chosen == 0 or replies[0][0]:
            return
        news = unread = None
        if self._run is not None:
            try:
                news = self._news(replies[chosen][1])
            except Exception as error:  # told once the others do not wait
                unread = error
        news = all_of.from_first(news)
        result = self._tell(*news) if all_of.rank == chosen and news is not None else None
        result = all_of.gather(result)[chosen]
        if unread is not None:
            self._failed("W&B log", step, unread)
        elif self._run is not None and isinstance(result, Exception):
            self._failed("W&B log", step, result)
        elif self._run is not None and result is not None:
            wandb.Sent(self._run).add(result, step, whole=True)

    def _news(self, known: int) -> tuple[wandb.Past | None, list[tuple[str, tuple[Any, ...]]]]:
        """All records if not all before the last are known where W&B is, and what it is told."""
        assert self._run is not None
        new = sum(kind == "record" for kind, _ in self._told)
        if self._lines is not None and known == self._lines - new:
            return None, self._told
        past = wandb.Past.of(Run.read(self._run.directory).history)
        self._lines = len(past)
        return past, self._told

    def _tell(self, past: wandb.Past | None, told: list[tuple[str, tuple[Any, ...]]]) -> Any:
        """Log here; which run of W&B got a record, or what went wrong."""
        try:
            target = None
            if past is not None:
                self._past = past
            for kind, of in told:
                if kind == "record":
                    record, axes = of
                    if past is None and self._past is not None:
                        self._past.append(record)
                    target = wandb.show(record, axes, self._past or [record])
                    self._describe()
                elif kind == "stage":
                    super()._announce(*of)
                else:
                    wandb.status(*of)
        except Exception as error:
            return MeasurementError(f"{type(error).__name__}: {error}")  # one that can be sent
        return target


def _state(context: Any) -> Any:
    """Megatron Bridge's counts; None in Megatron-LM, whose context has none."""
    return getattr(getattr(context, "state", None), "train_state", None)


def _configuration(context: Any) -> Any:
    """Megatron Bridge's."""
    return getattr(getattr(context, "state", None), "cfg", None)


def _begun_saves(context: Any) -> int | None:
    """How many asynchronous saves Megatron Bridge has begun; None where it saves at once."""
    queue = getattr(getattr(context, "state", None), "async_calls_queue", None)
    begun = getattr(queue, "call_idx", None)
    return None if begun is None else int(begun) + 1


def _arguments() -> Any:
    """Megatron-LM's arguments; None where it is not what trains."""
    module = sys.modules.get("megatron.training.global_vars")
    try:
        return None if module is None else module.get_args()
    except AssertionError:  # loaded, not in use
        return None


def _begun(context: Any, counted: int) -> int:
    """The iteration that was under way, from 0: Bridge counts it later, Megatron-LM says it."""
    state = _state(context)
    begun = getattr(_arguments(), "curr_iteration", None) if state is None else state.step
    return counted if begun is None else int(begun)


def _skipped(done: int) -> int:
    """The last iteration, if Megatron-LM is to skip all from here on: it counts them as done."""
    arguments = _arguments()
    skip, last = (getattr(arguments, name, None) for name in ("iterations_to_skip", "train_iters"))
    rest = range(done + 1, (last or 0) + 1)
    return rest[-1] if skip and rest and all(number in skip for number in rest) else done


def _is_saved(context: Any, iteration: int, samples: int | None) -> bool:
    """Will the weights after this iteration, and after so many samples, be saved?"""
    configuration = _configuration(context)
    if configuration is None:
        checkpoint = training = _arguments()
    else:
        checkpoint = getattr(configuration, "checkpoint", None)
        training = getattr(configuration, "train", None)
    if not getattr(checkpoint, "save", None):
        return False
    intervals = [
        getattr(checkpoint, "save_interval", None),
        getattr(checkpoint, "non_persistent_save_interval", None),
        getattr(training, "exit_interval", None),
    ]
    if any(interval and iteration % interval == 0 for interval in intervals):
        return True
    return samples is not None and _grows(samples)


def _grows(samples: int) -> bool:
    """Does a batch have another number of microbatches from here on? Megatron saves before that."""
    from megatron.core import num_microbatches_calculator as calculator

    if calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None:
        return False
    ahead = copy.copy(calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR)
    now = ahead.get()
    ahead.update(samples, consistency_check=False)
    return bool(ahead.get() != now)


def _samples(context: Any) -> int | None:
    """Samples seen, as far as they are counted."""
    counts = _state(context) or _arguments()
    samples = getattr(counts, "consumed_train_samples", None)
    return None if samples is None else int(samples)


def _batch() -> int | None:
    """Samples of an iteration, where Megatron-Core knows them."""
    from megatron.core import num_microbatches_calculator as calculator

    if calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None:
        return None
    return int(calculator.get_current_running_global_batch_size())


def _length(context: Any) -> int | None:
    """Tokens of a sample."""
    configuration = _configuration(context)
    model = _arguments() if configuration is None else getattr(configuration, "model", None)
    length = getattr(model, "seq_length", None)
    return None if length is None else int(length)
