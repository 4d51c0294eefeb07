"""What interventions ask of a model: passes that are watched and edited, from any block on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from sinktrack.events import Editor, Observer
from sinktrack.probe import Probe

LOGITS = 2**28
"""Bytes of float32 logits held at a time, from which the sequences per pass follow."""


class Enough(Exception):
    """All that is wanted of a pass has been seen; raised by who is shown it."""


class Pass:
    """A forward pass that waits for its turn.

    Args:
        tokens: as of `Editable.run`, like ``observer``, ``editor``, ``start`` and ``logits``.
        observer: see there.
        editor: see there.
        start: see there.
        last: the last block that is wanted; all by default.
        logits: see there.
    """

    def __init__(
        self,
        tokens: Tensor,
        observer: Observer | None = None,
        editor: Editor | None = None,
        *,
        start: int = 0,
        last: int | None = None,
        logits: bool = False,
    ) -> None:
        self.tokens, self.observer, self.editor = tokens, observer, editor
        self.start, self.last, self.logits = start, last, logits

    @property
    def wanted(self) -> bool:
        """Is it, still?"""
        return True

    def stream(self) -> Tensor | None:
        """``[B, T, D]`` at the input of block ``start``, when the pass begins; None for 0."""
        return None

    def head(self, rows: slice, logits: Tensor) -> None:
        """Logits ``[b, T, V]`` of some sequences, where they are wanted and shown; then `done`."""

    def done(self) -> None:
        """The pass is over."""

    def failed(self, error: Exception) -> None:
        """The pass, `head` or `done`, has raised."""
        raise error


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

    def run_together(self, passes: Sequence[Pass]) -> None:
        """Run several passes, none of which needs what a later one in the list shows.

        What a pass needs of an earlier one it finds where it asks for it: the earlier one has been
        through each block before.
        """

    def restarts(self, block: int) -> bool:
        """Did a whole pass show how one that starts in a block can run?

        If it then computes the same is for the caller to try.
        """


class InMemory:
    """What every `Editable` does alike whose model is in memory: passes run one after another."""

    def run_together(self: Editable, passes: Sequence[Pass]) -> None:
        """As of `Editable`."""
        for each in passes:
            if not each.wanted:
                continue
            try:
                logits = None
                with suppress(Enough):
                    logits = self.run(
                        each.tokens,
                        each.observer,
                        each.editor,
                        start=each.start,
                        stream=each.stream(),
                        logits=each.logits,
                    )
                if logits is not None:
                    each.head(slice(0, len(logits)), logits)
                each.done()
            except Exception as error:  # whose it is decides
                each.failed(error)


def at_once(vocabulary: int, probe: Probe, batch_size: int | None) -> int:
    """Sequences per pass: as many as logits of 256 MiB allow, and no more than asked for."""
    fits = max(1, LOGITS // (4 * probe.length * vocabulary))
    return min(fits, batch_size or fits)
