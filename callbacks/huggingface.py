"""For the Hugging Face Trainer: ``Trainer(..., callbacks=[SinkTrackCallback(probe, run)])``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    DVCLiveCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from sinktrack.callbacks.loop import DirectoryLater
from sinktrack.callbacks.options import OptionArguments
from sinktrack.loggers import tensorboard_events
from sinktrack.loggers.curves import metrics
from sinktrack.probe import Probe


class SinkTrackCallback(TrainerCallback):  # type: ignore[misc]
    """Probes every ``every`` steps, at each save and at the end of training.

    Where the Trainer loads the best checkpoint at the end, the model no longer is the last step's:
    that is then probed before, or not at all if an evaluation after it ended the training.

    Records go to the active W&B run and to what else ``report_to`` names, unless ``loggers`` says
    where. Tokens are those that the Trainer counts (``include_num_input_tokens_seen``), or TRL's.

    Arguments and errors are those of `sinktrack.callbacks.loop.SinkTracker`; without ``run`` the
    records go to ``sinktrack`` below the Trainer's ``output_dir``.
    """

    def __init__(
        self,
        probe: Probe | str | Path,
        run: str | Path | None = None,
        every: int = 100,
        **options: Unpack[OptionArguments],
    ) -> None:
        self.tracker = DirectoryLater(probe, run, every, **options)
        self._reports: Reports | None = None
        if self.tracker.options.loggers is None:
            self._reports = Reports()
            self.tracker.loggers.append(self._reports)
        self._before: int | None = None
        """What to add to TRL's tokens, which are counted anew in each process."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step, or the first after a resume: probe if the step is due."""
        self.tracker.below(args.output_dir)
        if self._reports is not None:
            self._reports.begin(args, state, control)
        if (counted := _counted()) is not None:
            self.tracker.by_framework(state.is_world_process_zero, state.global_step)
            before = self.tracker.tokens_at(state.global_step) if state.global_step else 0
            self._before = None if before is None else before - counted
        self._probe(args, state, kwargs["model"], self.tracker.due(state.global_step))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the next step's logs: end the W&B row of the last step's record."""
        self.tracker.settle()
        self._catch_up(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimizer's step, gradients cleared: probe if the step is due."""
        self._probe(args, state, kwargs["model"], self.tracker.due(state.global_step))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At the last log what ``report_to`` names is open still, as it is not at the end."""
        if "total_flos" in kwargs["logs"] and control.should_training_stop:
            self._probe(args, state, kwargs["model"], not _replaced(args, state))
        self._catch_up(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last step, before other weights may be loaded."""
        self._probe(args, state, kwargs["model"], control.should_training_stop)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a checkpoint is written: probe the same weights."""
        self._probe(args, state, kwargs["model"], True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last step, unless the model holds the weights of the best one by now."""
        if self._reports is not None:
            self._reports.end()
        self._probe(args, state, kwargs["model"], not _replaced(args, state))
        self.tracker.finish()

    def _probe(
        self, args: TrainingArguments, state: TrainerState, model: Any, wanted: bool
    ) -> None:
        step = state.global_step
        self.tracker.by_framework(state.is_world_process_zero, step)
        if wanted and self.tracker.measured != step:
            self.tracker.axes = {"train/global_step": step}
            self.tracker.probe_now(step, model, self._tokens(args, state))

    def _catch_up(self, state: TrainerState) -> None:
        if self._reports is not None:
            self.tracker.tell("report_to", state.global_step, self._reports.catch_up)

    def _tokens(self, args: TrainingArguments, state: TrainerState) -> int | None:
        """Seen so far, as the Trainer or TRL counts them; None where nobody does."""
        if args.include_num_input_tokens_seen != "no" or state.num_input_tokens_seen:
            return int(state.num_input_tokens_seen)
        counted = _counted()
        return None if counted is None or self._before is None else counted + self._before


class Reports:
    """What the Trainer's ``report_to`` names but W&B, as a logger.

    Each is given a record's curves by its own ``on_log`` alone: ``Trainer.log`` would also tell all
    other callbacks, and TRL would put its own averages into that row. Where a row has a number of
    its own, a record joins the last row.
    """

    def __init__(self) -> None:
        self._given: tuple[Any, ...] = ()
        self._waiting: list[tuple[Any, Mapping[str, Any]]] = []

    def begin(self, *given: Any) -> None:
        """A training begins, of these arguments, state and control."""
        self._given = given

    def end(self) -> None:
        """It has ended: what is shown from now on would go into another run."""
        self._given = ()

    def log(self, record: Mapping[str, Any]) -> None:
        """Show a record wherever that is open."""
        if not self._given:
            return
        handler = getattr(_trainer(), "callback_handler", None)
        for report in getattr(handler, "callbacks", ()):
            if isinstance(report, _REPORTS) and not isinstance(report, WandbCallback):
                self._waiting.append((report, record))
        self.catch_up()

    def catch_up(self) -> None:
        """Show what waits for its report to be open."""
        waiting, self._waiting = self._waiting, []
        failures = []
        for report, record in waiting:
            try:
                if not self._show(report, record):
                    self._waiting.append((report, record))
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _show(self, report: Any, record: Mapping[str, Any]) -> bool:
        """Give one a record; False where it is not open yet."""
        arguments, state, control = self._given
        curves = metrics(record)
        step = curves.pop("sinktrack/step")
        if isinstance(report, TensorBoardCallback):
            if report.tb_writer is None:
                return False
            tensorboard_events.log(record, report.tb_writer)
            report.tb_writer.flush()
        elif not getattr(report, "_initialized", True):
            return False
        elif isinstance(report, TrackioCallback):
            row = report._trackio.context_vars.current_run.get()._next_step - 1
            if row < 0:
                return False
            report._trackio.log({**curves, "train/global_step": step}, step=row)
        elif isinstance(report, DVCLiveCallback):  # its on_log would end the row
            for key, value in curves.items():
                report.live.log_metric(key, value)
        else:
            then = copy.copy(state)
            then.global_step = step
            report.on_log(arguments, then, copy.copy(control), logs=curves)
        return True

    def alert(self, title: str, text: str) -> None:
        """Do nothing: none of them has a place for it."""

    def close(self) -> None:
        """Do nothing: they are the Trainer's."""


_REPORTS = tuple(INTEGRATION_TO_CALLBACK.values())


def _trainer() -> Any:
    """The Trainer whose event this is. It gives its callbacks all but itself and each other."""
    frame = inspect.currentframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer):
            return trainer
        frame = frame.f_back
    return None


def _counted() -> int | None:
    """Tokens that TRL's trainer has counted; None of another."""
    counted = getattr(_trainer(), "_total_train_tokens", None)
    return None if counted is None else int(counted)


def _replaced(args: TrainingArguments, state: TrainerState) -> bool:
    """At the end of training: does the model hold the best checkpoint's weights?"""
    return bool(args.load_best_model_at_end and state.best_model_checkpoint is not None)
