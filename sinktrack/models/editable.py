"""What interventions ask of a model: passes that are watched and edited, from any block on."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sinktrack.events import Editor, Observer
from sinktrack.probe import Probe

LOGITS = 2**28
"""Bytes of float32 logits held at a time, from which the sequences per pass follow."""


class Editable(Protocol):
    """A model that runs batches under an observer and an editor; every backend has its own.

    It is entered once, by `sinktrack.models.base.Model.editable`, and leaves no trace afterwards.
    """

    @property
    def blocks(self) -> int:
        """L."""

    @property
    def width(self) -> int:
        """Of the residual stream."""

    @property
    def vocabulary(self) -> int:
        """Logits of a position."""

    @property
    def routes(self) -> bool:
        """May what else is in a batch make a difference, as where experts have a capacity?"""

    @property
    def device(self) -> torch.device:
        """Where tokens are wanted, and the stream is."""

    def run(
        self,
        tokens: Tensor,
        observer: Observer | None = None,
        editor: Editor | None = None,
        *,
        start: int = 0,
        stream: Tensor | None = None,
        logits: bool = False,
    ) -> Tensor | None:
        """One forward pass.

        Args:
            tokens: int64 ``[B, T]``. A single token may be shown as several of its kind.
            observer: who is shown it, from block ``start`` on.
            editor: who may change it there.
            start: the first block that runs; see `restarts`.
            stream: ``[B, T, D]`` at its input, unless it is 0.
            logits: are they wanted?

        Returns:
            ``[B, T, V]`` where wanted; None where they are not, or the model does not show them.

        Raises:
            MeasurementError: a block cannot be shown, which is named.
            Uneditable: or not be changed as the editor wants it.
        """

    def restarts(self, block: int) -> bool:
        """Did a whole pass show how one that starts in a block can run?

        If it then computes the same is for the caller to try.
        """


def at_once(vocabulary: int, probe: Probe, batch_size: int | None) -> int:
    """Sequences per pass: as many as logits of 256 MiB allow, and no more than asked for."""
    fits = max(1, LOGITS // (4 * probe.length * vocabulary))
    return min(fits, batch_size or fits)
