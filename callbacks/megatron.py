"""For Megatron-Core: its own loop, Megatron Bridge and Megatron-LM, none of which is imported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sinktrack.callbacks.loop import SinkTracker
from sinktrack.measurement import Measurement
from sinktrack.probe import Probe


class SinkTrackMegatron:
    """Probes every ``every`` iterations, at each save that is announced and at the end.

    Call `step` in a loop of your own, or register the object as a callback: of Megatron Bridge, or
    of Megatron-LM where it has callbacks. In an older Megatron-LM give `non_loss_data_func` to
    ``pretrain``. Every process must do so alike; process 0 writes.

    Arguments and errors are those of `sinktrack.callbacks.loop.SinkTracker`.
    """

    def __init__(self, probe: Probe, run: str | Path, every: int = 100, **options: Any) -> None:
        self.tracker = SinkTracker(probe, run, every, **options)
        self._iteration = 0
        self._model: Any = None

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
        self._iteration = _iteration() if state is None else int(state.step)
        self._model = context.model
        self._probe(context, self.tracker.due(self._iteration))

    def on_train_step_end(self, context: Any) -> None:
        """After an iteration: Bridge counts it only after this event, Megatron-LM does not say."""
        state = _state(context)
        self._iteration = (self._iteration if state is None else int(state.step)) + 1
        self._model = context.model
        self._probe(context, self.tracker.due(self._iteration), counted=False)

    def on_checkpoint_save(self, context: Any) -> None:
        """After a save is announced, though it may still be under way: probe the same weights."""
        if self._model is not None:
            self._probe(context, True)

    def on_train_end(self, context: Any) -> None:
        """After the last iteration."""
        self._probe(context, True)

    def non_loss_data_func(self, model: Any) -> None:
        """For ``pretrain(non_loss_data_func=...)``: probe at each evaluation.

        Raises:
            RuntimeError: Megatron-LM's arguments, which hold the iteration, cannot be found.
        """
        from_arguments = _arguments()
        if from_arguments is None:
            raise RuntimeError("non_loss_data_func is for megatron.training, which is not loaded")
        self._iteration = int(getattr(from_arguments, "curr_iteration", from_arguments.iteration))
        if self.tracker.measured != self._iteration:
            self.tracker.probe_now(self._iteration, model)

    def _probe(self, context: Any, wanted: bool, counted: bool = True) -> None:
        if wanted and self.tracker.measured != self._iteration:
            tokens = _tokens(context, counted)
            self.tracker.probe_now(self._iteration, self._model, tokens)


def _tokens(context: Any, counted: bool) -> int | None:
    """Tokens seen, where Megatron Bridge counts samples; ``counted``: the last batch included?"""
    samples = getattr(_state(context), "consumed_train_samples", None)
    configuration = getattr(getattr(context, "state", None), "cfg", None)
    length = getattr(getattr(configuration, "model", None), "seq_length", None)
    if samples is None or length is None:
        return None
    if not counted:
        from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

        samples += get_current_running_global_batch_size()
    return int(samples) * int(length)


def _state(context: Any) -> Any:
    """Megatron Bridge's counts; None in Megatron-LM, whose context has none."""
    return getattr(getattr(context, "state", None), "train_state", None)


def _arguments() -> Any:
    """Megatron-LM's arguments; None where it is not what trains."""
    found = sys.modules.get("megatron.training.global_vars")
    return None if found is None else found.get_args()


def _iteration() -> int:
    """How many iterations Megatron-LM has behind it, as training starts."""
    return int(getattr(_arguments(), "iteration", 0) or 0)
