"""What one process holds of a model that several hold together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which heads and positions a process holds.

    Context parallelism cuts a sequence in ``2 * cp`` chunks, of which rank ``r`` holds the ``r``-th
    from the front and from the back; sequence parallelism cuts what a rank holds once more, for
    the residual stream alone.
    """

    tp: int = 0
    tp_size: int = 1
    cp: int = 0
    cp_size: int = 1
    sequence_parallel: bool = False
    dense: bool = True
    """Of all replicas, is this the one that reports attention, states and dense parts?"""
    experts: bool = True
    """The same for the routed experts that this process holds."""
    shortest: int = 1
    """Sequences must be so long at least, as for kernels that take one token for decoding."""

    @property
    def multiple(self) -> int:
        """Sequences must be a multiple of this long; what is added at their end is left out."""
        chunks = 2 * self.cp_size if self.cp_size > 1 else 1
        return chunks * (self.tp_size if self.sequence_parallel else 1)

    def length(self, tokens: int) -> int:
        """Of a sequence of so many tokens with what is added."""
        least = max(tokens, self.shortest)
        return least + -least % self.multiple

    def padded(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, T]`` lengthened by token 0, which no earlier position sees."""
        own = tokens.shape[1]
        return torch.nn.functional.pad(tokens, (0, self.length(own) - own))

    def queries(self, padded: int) -> Tensor:
        """int64 ``[t]``: the positions of this process' queries, ascending within a chunk."""
        if self.cp_size == 1:
            return torch.arange(padded)
        chunks = torch.arange(padded).chunk(2 * self.cp_size)
        return torch.cat([chunks[self.cp], chunks[-1 - self.cp]])

    def stream(self, padded: int) -> Tensor:
        """int64 ``[t]``: the positions of this process' part of the residual stream."""
        held = self.queries(padded)
        return held.chunk(self.tp_size)[self.tp] if self.sequence_parallel else held

    @property
    def holds_p0(self) -> bool:
        """Is position 0 of the residual stream here, first of the positions held?"""
        return self.cp == 0 and (self.tp == 0 or not self.sequence_parallel)

    @property
    def reports_stream(self) -> bool:
        """Does this process report its part of the residual stream, which others may hold too?"""
        return self.dense and (self.tp == 0 or self.sequence_parallel)


@dataclass
class Routing:
    """P0 on its way into routed experts, still on the model's device."""

    inputs: Tensor
    """float32 ``[B, D]``; zeros where another process holds P0."""
    gates: Tensor
    """float32 ``[B, E]``, 0 for experts that are not chosen."""
