"""For Lightning: ``Trainer(callbacks=[SinkTrackLightning(probe, run)])``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from sinktrack.callbacks.loop import DirectoryLater
from sinktrack.callbacks.options import OptionArguments, tokens_of
from sinktrack.loggers import tensorboard_events
from sinktrack.loggers import weights_and_biases as wandb
from sinktrack.loggers.curves import metrics
from sinktrack.probe import Probe


class SinkTrackLightning(Callback):
    """Probes every ``every`` optimizer steps and at the end of training.

    The model is the one transformers model that the module holds, or what ``decoder`` finds in the
    module, whose ``forward`` it then runs. Where a callback of Lightning
    puts averaged weights into it at the end, the last step is probed only if it is due or the
    trainer's ``max_steps``.

    Records go to the active W&B run and to the trainer's other loggers, unless ``loggers`` says
    where.

    Args:
        run: the run directory; ``sinktrack`` below the trainer's ``default_root_dir`` by default.
        tokens: of one optimizer step over all processes; or a function of the module that says how
            many were seen over all, on process 0. Lightning itself counts none.

    The other arguments, and errors, are those of `sinktrack.callbacks.loop.SinkTracker`.

    With ``on_error="raise"`` training ends at its start where the module holds no such model, or
    several.
    """

    def __init__(
        self,
        probe: Probe | str | Path,
        run: str | Path | None = None,
        every: int = 100,
        *,
        tokens: int | Callable[[LightningModule], int] | None = None,
        **options: Unpack[OptionArguments],
    ) -> None:
        self._tokens = tokens_of(tokens)
        self.tracker = _Tracker(probe, run, every, **options)
        self._loggers: Loggers | None = None
        if self.tracker.options.loggers is None:
            self._loggers = Loggers()
            self.tracker.loggers.append(self._loggers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first step, or the first after a resume: probe if the step is due."""
        self.tracker.below(trainer.default_root_dir)
        if self._loggers is not None:
            self._loggers.begin(trainer.loggers)
        self._module = pl_module
        self._model: nn.Module = pl_module  # what stands around the model in it is looked at
        wrapped = trainer.strategy.model
        if isinstance(wrapped, FullyShardedDataParallel):  # its outermost unit holds parameters
            self._model = wrapped
        due = self.tracker.due(trainer.global_step)
        self._probe(trainer, due)
        if not due:
            self.tracker.try_once(trainer.global_step, self._model)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Lightning has logged the batch before: now the record made after it."""
        self.tracker.settle()
        self.tracker.catch_up()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """After a batch: probe if it made a step that is due; accumulated batches make none."""
        step = trainer.global_step
        if step > (self.tracker.measured or 0) + 1:  # of several optimizers Lightning counts one
            self.tracker.settle()
        self._probe(trainer, self.tracker.due(step) or step == trainer.max_steps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last step, unless the model holds averaged weights by now."""
        averaging = (StochasticWeightAveraging, WeightAveraging)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._probe(trainer, not any(isinstance(callback, averaging) for callback in callbacks))
        self.tracker.catch_up()
        self.tracker.finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """What is not in W&B yet."""
        self.tracker.catch_up()

    def _probe(self, trainer: Trainer, wanted: bool) -> None:
        step = trainer.global_step
        self.tracker.by_framework(trainer.is_global_zero, step)
        if wanted and self.tracker.measured != step:
            self.tracker.axes = {"trainer/global_step": step}
            self.tracker.probe_now(step, self._model, self._seen(step))

    def _seen(self, step: int) -> int | None:
        """Tokens, as the user says."""
        if callable(self._tokens):
            count = self._tokens
            counted: int | None = self.tracker.counted(step, lambda: count(self._module))
            return counted
        return None if self._tokens is None else self._tokens * step


class Loggers:
    """The trainer's loggers but W&B's active run, as one."""

    def __init__(self) -> None:
        self._of: list[Any] = []

    def begin(self, loggers: list[Any]) -> None:
        """A training begins that has these."""
        self._of = loggers

    def log(self, record: Mapping[str, Any]) -> None:
        """Show a record at its step, whatever ``log_every_n_steps``."""
        failures = []
        for logger in self._of:
            try:
                self._show(logger, record)
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _show(self, logger: Any, record: Mapping[str, Any]) -> None:
        if isinstance(logger, TensorBoardLogger):
            tensorboard_events.log(record, logger.experiment)
            logger.experiment.flush()
        elif not (isinstance(logger, WandbLogger) and wandb.is_run(logger.experiment)):
            curves = metrics(record)
            logger.log_metrics(curves, int(curves.pop("sinktrack/step")))

    def alert(self, title: str, text: str) -> None:
        """Do nothing: none of them has a place for it."""

    def close(self) -> None:
        """Do nothing: they are the trainer's."""


class _Tracker(DirectoryLater):
    """Logs a record to W&B once Lightning has logged the batch before it.

    Lightning counts that batch's step one lower, and would put its count over the record's.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._waiting: list[tuple[dict[str, Any], dict[str, int]]] = []

    def catch_up(self) -> None:
        """Log what waits."""
        while self._waiting:
            record, self.axes = self._waiting.pop(0)
            try:
                super()._log(record)
            except Exception as error:
                self._failed("W&B log", record["step"], error)

    def _log(self, record: dict[str, Any]) -> None:
        self._waiting.append((record, self.axes))
