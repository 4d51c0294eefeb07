"""Where a framework shows attention, states and writes.

A tap knows a framework and calls an `Observer`; what is computed from the events is none of its
business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sinktrack.attention import Attended


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
    gate: Tensor
    """``[B, T, K]``: their gate weights."""
    outputs: Callable[[int], Tensor]
    """Recomputes the gated outputs ``[B, K, D]`` of the chosen experts at one position."""
    factor: float
    """What their sum is multiplied with on its way into the stream."""


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


class Observer:
    """Receives what a forward pass shows. Tensors are live: copy what must outlast the call."""

    def state(self, block: int, stream: Tensor) -> None:
        """Before block ``block`` runs: the residual stream ``[B, T, D]`` at its input.

        After the last block, once more with ``block`` equal to the number of blocks.
        """

    def attention(self, block: int, attended: Attended) -> None:
        """Once for every softmax attention of the block."""

    def gate(self, block: int, gate: Tensor) -> None:
        """Where heads are gated: ``[B, T, H]`` float32, the mean over a head's channels."""

    def write(self, block: int, write: Write) -> None:
        """Before a sublayer's output is added to the stream."""
