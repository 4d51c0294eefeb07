"""For OLMo-core: ``config.with_callback("sinktrack", SinkTrackOLMoCore(probe, run))``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from olmo_core.train.callbacks import Callback

from sinktrack.callbacks.loop import SinkTracker
from sinktrack.callbacks.options import OptionArguments
from sinktrack.probe import Probe


class SinkTrackOLMoCore(Callback):  # type: ignore[misc]
    """Probes every ``every`` steps, at each save and at the end of training.

    Tokens are those that OLMo-core counts over all processes. A model in pipeline stages is refused
    by name.

    Arguments and errors are those of `sinktrack.callbacks.loop.SinkTracker`.
    """

    def __init__(
        self,
        probe: Probe | str | Path,
        run: str | Path,
        every: int = 100,
        **options: Unpack[OptionArguments],
    ) -> None:
        self.tracker = SinkTracker(probe, run, every, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> SinkTrackOLMoCore:
        """The same: a configuration is copied with its callbacks, and a run is recorded once."""
        return self

    def pre_train(self) -> None:
        """Before the first step, or the first after a resume: probe if the step is due."""
        self._probe(self.tracker.due(self.step))

    def pre_step(self, batch: dict[str, Any]) -> None:
        """Before the next step's logs: end the W&B row of the last step's record."""
        self.tracker.settle()

    def post_step(self) -> None:
        """After a complete step, its evaluations and checkpoints: probe if the step is due."""
        self._probe(self.tracker.due(self.step))

    def post_checkpoint_saved(self, path: Any) -> None:
        """After a checkpoint is written: probe the same weights, if they still are the model's."""
        self._probe(Path(path).name == f"step{self.step}")

    def post_train(self) -> None:
        """After the last step."""
        self._probe(True)
        self.tracker.finish()

    def _probe(self, wanted: bool) -> None:
        module, step = self.trainer.train_module, self.step
        model: Any = getattr(module, "model", None) or getattr(module, "model_parts", None)
        if wanted and self.tracker.measured != step:
            self.tracker.probe_now(step, model, self.trainer.global_train_tokens_seen)
        elif not wanted:
            self.tracker.try_once(step, model)
