"""For the Hugging Face Trainer: ``Trainer(..., callbacks=[SinkTrackCallback(probe, run)])``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sinktrack.callbacks.loop import SinkTracker
from sinktrack.callbacks.options import OptionArguments
from sinktrack.probe import Probe


class SinkTrackCallback(TrainerCallback):  # type: ignore[misc]
    """Probes every ``every`` steps, at each save and at the end of training.

    Where the Trainer loads the best checkpoint at the end, the model no longer is the last step's:
    that is then probed before, or not at all if an evaluation after it ended the training.

    Arguments and errors are those of `sinktrack.callbacks.loop.SinkTracker`; without ``run`` the
    records go to ``sinktrack`` below the Trainer's ``output_dir``.
    """

    def __init__(
        self,
        probe: Probe | str | Path,
        run: str | Path | None = None,
        every: int = 100,
        **options: Unpack[OptionArguments],  # type: ignore[misc]
    ) -> None:
        self.tracker = _Tracker(probe, run, every, **options)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step, or the first after a resume: probe if the step is due."""
        self.tracker.below(args.output_dir)
        self._probe(args, state, kwargs["model"], self.tracker.due(state.global_step))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the next step's logs: end the W&B row of the last step's record."""
        self.tracker.settle()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimizer's step, gradients cleared: probe if the step is due."""
        self._probe(args, state, kwargs["model"], self.tracker.due(state.global_step))

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
        replaced = args.load_best_model_at_end and state.best_model_checkpoint is not None
        self._probe(args, state, kwargs["model"], not replaced)
        self.tracker.finish()

    def _probe(
        self, args: TrainingArguments, state: TrainerState, model: Any, wanted: bool
    ) -> None:
        step = state.global_step
        self.tracker.by_framework(state.is_world_process_zero, step)
        if wanted and self.tracker.measured != step:
            self.tracker.axes = {"train/global_step": step}
            counted = args.include_num_input_tokens_seen != "no"
            self.tracker.probe_now(step, model, state.num_input_tokens_seen if counted else None)


class _Tracker(SinkTracker):  # type: ignore[misc]
    """Takes a directory below the Trainer's where no run was named."""

    def _named(self, run: Any) -> Path | None:
        found: Path | None = None if run is None else super()._named(run)
        return found

    def below(self, directory: str) -> None:
        """The Trainer's directory is known."""
        if self._directory is None:
            self._directory: Path | None = Path(directory) / "sinktrack"
