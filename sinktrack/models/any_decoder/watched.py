"""One watched forward pass: what is known of it by now, and the layout of its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sinktrack.errors import MeasurementError
from sinktrack.events import Editor, Observer, Routed, Uneditable
from sinktrack.models.any_decoder.decoder import Decoder, Found, class_of
from sinktrack.models.any_decoder.experts import Expert
from sinktrack.models.any_decoder.stream import Restart, Stream, Term
from sinktrack.models.tracer import mark_of

if TYPE_CHECKING:
    from sinktrack.models.any_decoder.flow import Flow


class Watched:
    """State of a pass, which the parts of `Tap` share."""

    flow: Flow
    """Of the functions that the pass calls."""
    went_as_attention = ""
    """What looked like attention in the block, and why it was taken for none."""

    def __init__(
        self,
        decoder: Decoder,
        found: Found,
        observer: Observer,
        tokens: Tensor,
        parts: Literal["p0", "all"] | None,
        editor: Editor | None = None,
        start: Restart | None = None,
    ) -> None:
        self.decoder, self.found, self.observer, self.tokens = decoder, found, observer, tokens
        self.parts, self.editor, self.restart = parts, editor, start
        self.started = 0 if start is None else start.block
        self.batch, self.length = tokens.shape
        self.width = 0 if start is None else start.stream.shape[-1]
        self.time_first = start is not None and start.time_first
        """Do positions stand before sequences where both are one dimension, or equally many?"""
        self.block = self.started - 1
        self.inside = False
        self.masked = False
        """Has the editor changed who sees what in this block?"""
        self.changes: list[tuple[Tensor, Tensor, float]] = []
        """Of the sum that is under way: an operand, ``[B, T, D]`` that enters the stream in its
        place, and the factor with which the operand does."""
        self.lost: str | None = None
        self.notes: list[str] = []
        self.dims = 0
        """Of the model's own tensor of the stream."""
        self.terms: dict[Term, Tensor] = {}
        """float64 ``[B, D]``, P0's rows."""
        self.size = torch.zeros(0)
        self.went: list[str] = []
        """Functions that took the stream and gave no stream, the last ones."""
        self.first: Tensor | None = None
        self.attended = self.written = self.places = 0
        self.unmixed = False
        """Do the probabilities of a softmax still wait for their values?"""
        self.heads: Tensor | None = None
        """float32 ``[B, H * Dv]``: what P0's heads yield, gates included."""
        self.beside: list[Tensor] = []
        """What stood beside the stream at the block's input, and was no write of the last block."""
        self.settling: tuple[Tensor, list[Tensor]] | None = None
        """A stream at a block's input whose last write may stand beside it, and what may be it."""
        self.handed: list[Tensor] = []
        """What the last block returned of the stream's size."""
        self.direct = True
        """Was every block handed just what the one before returned?"""
        self.carries = False
        self.deciding = False
        """Does the pass end with block 0?"""
        self.yielded: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        """By block P0's rows ``[B, D]`` at its input, what its heads yield there ``[B, H * Dv]``,
        and how large that is at any position."""
        self.experts: list[Expert] = []
        self.routed: tuple[Tensor, Routed] | None = None

    # Names and layouts

    def name(self) -> str:
        """Of the present block."""
        if self.block < 0:
            return "before block 0"
        return f"block {self.block} ({class_of(self.found.blocks[self.block])})"

    def refuse(self, reason: str) -> MeasurementError:
        """The error that says where."""
        return MeasurementError(f"{self.name()}: {reason}")

    def uneditable(self, reason: str) -> Uneditable:
        """The same where only an editor fails."""
        return Uneditable(f"{self.name()}: {reason}, so it cannot be changed there")

    def lose(self, reason: str) -> None:
        """Who writes the P0 state cannot be told; the rest stands."""
        self._untold(f"{self.name()}: {reason}")

    def _untold(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
            self.observer.untold(max(self.block, 0), reason)

    def rows(self, value: Any, width: int | None = None, turned: bool = False) -> Tensor | None:
        """``[B, T, width]`` of a tensor of that size in a known order, or None.

        Args:
            value: anything.
            width: of the stream by default.
            turned: read it in the other order where its shape leaves that open.
        """
        width = self.width if width is None else width
        time_first = self._is_time_first(value, width, turned)
        if time_first is None:
            return None
        rows: Tensor = value.reshape(*self._shape(time_first), width)
        return rows.transpose(0, 1) if time_first else rows

    def _shape(self, time_first: bool) -> tuple[int, int]:
        return (self.length, self.batch) if time_first else (self.batch, self.length)

    def _is_time_first(self, value: Any, width: int, turned: bool = False) -> bool | None:
        """The order of a tensor's positions and sequences; None where it has not both."""
        total = self.batch * self.length
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
            return None
        if value.shape[-1] != width or value.numel() != total * width:
            return None
        lead = tuple(size for size in value.shape[:-1] if size != 1)
        both, other = self._shape(False), self._shape(True)
        if both != other and lead in (both, other):
            return lead == other
        if lead in (both, (total,)) or (1 in both and lead == (max(both),)):
            return self.time_first != turned
        return None

    def like(self, rows: Tensor, value: Tensor) -> Tensor:
        """``[B, T, D]`` in the shape and order of a tensor of the stream's size."""
        turned = self._is_time_first(value, rows.shape[-1])
        return (rows.transpose(0, 1) if turned else rows).reshape(value.shape)

    def wrote_last(self, value: Tensor) -> bool:
        """Is a write of the present block in a stream?"""
        known = mark_of(value)
        return isinstance(known, Stream) and any(term[0] == self.block for term in known.form)

    def p0(self, value: Tensor, width: int | None = None) -> Tensor:
        """P0's rows of a tensor of that size."""
        rows = self.rows(value, width)
        assert rows is not None
        return rows[:, 0].detach()
