"""Where a framework shows attention, states and writes.

A tap knows a framework. It shows a pass to an `Observer`, and lets an `Editor` change it; what is
computed from the events, or why they are changed, is none of its business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sinktrack.attention import Attended
from sinktrack.errors import MeasurementError


@dataclass(frozen=True)
class Projection:
    """The output projection of an attention, which mixes its heads into the stream."""

    mixed: Tensor
    """``[B, T, H * Dv]``: what the heads yield, gates included."""
    heads: int
    weight: Tensor
    """``[D, H * Dv]``."""
    bias: Tensor | None
    """``[D]``."""
    factor: float
    """What the product is multiplied with on its way into the stream."""


@dataclass(frozen=True)
class Routed:
    """The routed experts of a block."""

    index: Tensor
    """``[B, T, K]`` int: the chosen experts."""
    gate: Callable[[], Tensor]
    """Computes ``[B, T, K]``: their gate weights; nan where those are not shown."""
    outputs: Callable[[int], Tensor]
    """Recomputes the gated outputs ``[B, K, D]`` of the chosen experts at one position."""
    of: Callable[[int], Tensor]
    """Recomputes the gated output ``[B, T, D]`` of one expert: zero where it was not chosen."""
    total: Callable[[], Tensor]
    """Computes ``[B, T, D]``: the gated outputs of all experts, added up."""
    factor: float
    """What their sum is multiplied with on its way into the stream."""
    own: Callable[[int], Tensor] | None = None
    """Computes the output ``[B, T, D]`` of one expert before its gate, nan where that is not shown;
    None where output and gate tell it."""

    def gates_of(self, expert: int) -> Tensor:
        """float32 ``[B, T]``: its gate weights, 0 where it was not chosen."""
        return self.gate().where(self.index == expert, 0).sum(-1).float()

    def ungated(self, expert: int) -> Tensor:
        """float32 ``[B, T, D]``: its output before its gate, where it was chosen; else anything."""
        if self.own is not None:
            return self.own(expert).float()
        return self.of(expert).float() / self.gates_of(expert)[..., None]


@dataclass(frozen=True)
class Write:
    """What one sublayer adds to the residual stream."""

    sublayer: str
    """``attention``, ``mlp``, or ``mixer``: the token mixing of a block of linear attention."""
    added: Tensor
    """``[B, T, D]``: the write itself."""
    raw: Tensor | None = None
    """``[B, T, D]``: the sublayer's output before an output norm, where there is one."""
    projection: Projection | None = None
    routed: Routed | None = None

    def parts(self) -> list[tuple[str, int | None]]:
        """Kind and index of the parts that it is made of: heads, or the experts of any token."""
        parts: list[tuple[str, int | None]] = []
        if self.projection is not None:
            parts += [("head", head) for head in range(self.projection.heads)]
        if self.routed is not None:
            parts += [("expert", expert) for expert in self.routed.index.unique().tolist()]
            parts.append(("shared_expert", None))
        return parts

    def part(self, kind: str, index: int | None) -> Tensor | None:
        """``[B, T, D]``: what a component writes; None where it cannot be told exactly.

        That is a part of a write that goes through an output norm on its way.

        Args:
            kind: the sublayer itself, ``head``, ``expert`` or ``shared_expert``.
            index: of the head or expert.
        """
        if kind == self.sublayer:
            return self.added
        if self.raw is not None and self.raw is not self.added:
            return None
        if kind == "head" and self.projection is not None and index is not None:
            of = self.projection
            mixed = of.mixed.unflatten(-1, (of.heads, -1))[:, :, index]
            weight = of.weight.unflatten(1, (of.heads, -1))[:, index]
            written: Tensor = mixed.to(weight.dtype) @ weight.T * of.factor
            return written
        if self.routed is not None and kind == "expert" and index is not None:
            return self.routed.of(index) * self.routed.factor
        if self.routed is not None and kind == "shared_expert":
            return self.added - self.routed.total() * self.routed.factor
        return None


class Observer:
    """Receives what a forward pass shows. Tensors are live: copy what must outlast the call."""

    second_key: Tensor | None = None
    """``[B]`` int64: a position in each sequence, attention to which is shown beside P0's."""
    with_mixing = False
    """Will it ask every attention for `Attended.mixing`?"""

    def state(self, block: int, stream: Tensor) -> None:
        """Before block ``block`` runs: the residual stream ``[B, T, D]`` at its input.

        After the last block, once more with ``block`` equal to the number of blocks.
        """

    def factors(self, block: int, factors: Mapping[tuple[int, int], float]) -> None:
        """After `state`, where terms of the stream were multiplied with numbers on their way.

        Args:
            block: as in `state`.
            factors: of the n-th write of block k by ``(k, n)``, and of the stream at the input of
                block 0 by ``(-1, 0)``: what it stands in this stream with; none for 0.
        """

    def attention(self, block: int, attended: Attended) -> None:
        """Once for every softmax attention of the block."""

    def gate(self, block: int, gate: Tensor) -> None:
        """Where heads are gated: ``[B, T, H]`` float32, the mean over a head's channels."""

    def untold(self, block: int, reason: str) -> None:
        """What writes to the stream in a block cannot be told, and why.

        Raises:
            MeasurementError: by default, for observers that need all writes.
        """
        raise MeasurementError(reason)

    def write(self, block: int, write: Write) -> None:
        """Before a sublayer's output ``[B, T, D]`` is added to the stream."""


class Editor:
    """Changes a forward pass: ablation, patching and attention knockout are done here.

    What a method returns, if anything, takes the place of what it was given. The observer of the
    same pass is shown states and attention as they are changed, and writes as they are computed.
    """

    def state(self, block: int, stream: Tensor) -> Tensor | None:
        """Another residual stream ``[B, T, D]`` at the input of a block."""

    def mask(self, block: int, seen: Tensor) -> Tensor | None:
        """Other keys that each query sees: ``[B or 1, H or 1, T, T]`` bool."""

    def write(self, block: int, write: Write) -> Tensor | None:
        """Another ``[B, T, D]`` to be added to the stream."""


class Uneditable(MeasurementError):
    """A pass can be shown, but not changed as an editor wants it, and why."""
