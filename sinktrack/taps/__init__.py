"""Where a framework shows attention, states and writes.

A tap knows a framework and calls an `Observer`; what is computed from the events is none of its
business.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sinktrack.attention import Attended


class Observer:
    """Receives what a forward pass shows. Tensors are live: copy what must outlast the call."""

    def state(self, block: int, stream: Tensor) -> None:
        """Before block ``block`` runs: the residual stream ``[B, T, D]`` at its input.

        After the last block, once more with ``block`` equal to the number of blocks.
        """

    def attention(self, block: int, attended: Attended) -> None:
        """Once for every softmax attention of the block."""

    def heads(self, block: int, mixed: Tensor, heads: int, weight: Tensor, factor: float) -> None:
        """When the attention's output projection has run.

        ``mixed`` ``[B, T, H * Dv]`` is the projection's input, ``weight`` ``[D, H * Dv]`` its
        matrix, and ``factor`` what the product is multiplied with before it is added.
        """

    def write(self, block: int, sublayer: str, added: Tensor) -> None:
        """Before ``added`` ``[B, T, D]`` is added to the stream by ``attention`` or ``mlp``."""

    def experts(
        self, block: int, index: Tensor, gate: Tensor, outputs: Callable[[int], Tensor]
    ) -> None:
        """When the routed experts have run.

        ``index`` and ``gate`` are ``[B, T, K]``; ``outputs(position)`` recomputes the gated
        outputs ``[B, K, D]`` of the chosen experts at one position.
        """
