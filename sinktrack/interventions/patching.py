"""Ablation and patching: other rows in the place of a component's write, or of the state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sinktrack.events import Write
from sinktrack.interventions.replay import Edit

_SUBLAYER = {"head": "attention", "expert": "mlp", "shared_expert": "mlp"}


@dataclass(frozen=True)
class Term:
    """A part of the residual stream that can be changed."""

    kind: str
    """``attention``, ``mixer``, ``mlp``, ``head``, ``expert``, ``shared_expert``; ``state`` for the
    whole stream at the input of the block."""
    block: int
    index: int | None = None

    @property
    def sublayer(self) -> str:
        """Whose write it is a part of."""
        return _SUBLAYER.get(self.kind, self.kind)

    def within(self, sublayer: Term) -> bool:
        """Is it a part of this sublayer's write?"""
        return (self.block, self.sublayer) == (sublayer.block, sublayer.kind)


@dataclass
class Patch(Edit):
    """Other rows at one position of each sequence, in the place of some terms' own."""

    terms: Sequence[Term]
    at: Tensor
    """``[B]``: the position."""
    source: Literal["mean", "zero"] | Tensor | Mapping[Term, Tensor]
    """What comes there: the term's mean over the other positions, nothing, its row at these
    positions ``[B]``, or these rows ``[B, D]``, of all terms or by term."""
    aside: int | None = None
    """A seed. With it, the change keeps its norm and goes in a random direction, another per
    sequence."""

    def __post_init__(self) -> None:
        self.start = min(term.block for term in self.terms)
        self._met: set[Term] = set()
        self._aside: dict[int, Tensor] = {}

    def state(self, block: int, stream: Tensor, rows: Tensor) -> Tensor | None:
        """Patch the state, where that is a term."""
        replaced = {
            place: stream
            for place, term in enumerate(self.terms)
            if term.kind == "state" and term.block == block
        }
        return self._patched(stream, replaced, rows)

    def unmet(self, last: int) -> str | None:
        """A term that no pass has shown."""
        for term in self.terms:
            if term not in self._met and term.block <= last:
                name = term.kind if term.index is None else f"{term.kind} {term.index}"
                return f"block {term.block}: what its {name} writes cannot be told by itself"
        return None

    def write(self, block: int, write: Write, rows: Tensor) -> Tensor | None:
        """Patch the terms of this write."""
        replaced = {}
        for place, term in enumerate(self.terms):
            if term.block == block and term.sublayer == write.sublayer:
                value = write.part(term.kind, term.index)
                if value is not None:
                    replaced[place] = value
        return self._patched(write.added, replaced, rows)

    def _patched(self, whole: Tensor, found: dict[int, Tensor], rows: Tensor) -> Tensor | None:
        if not found:
            return None
        sequences, at = torch.arange(len(whole)), self.at[rows]
        row = whole[sequences, at].float()
        self._met |= {self.terms[place] for place in found}
        for place, value in found.items():
            own = value[sequences, at].float()
            change = self._incoming(self.terms[place], value, own, rows) - own
            if self.aside is not None:
                size = change.norm(dim=-1, keepdim=True)
                change = self._direction(place, change.shape[-1])[rows].to(change) * size
            row = row + change
        result = whole.clone()
        result[sequences, at] = row.to(whole.dtype)
        return result

    def _incoming(self, term: Term, value: Tensor, own: Tensor, rows: Tensor) -> Tensor:
        if isinstance(self.source, Mapping):
            return self.source[term][rows].to(own)
        if isinstance(self.source, Tensor):
            if self.source.ndim == 2:
                return self.source[rows].to(own)
            return value[torch.arange(len(value)), self.source[rows]].float()
        if self.source == "zero":
            return torch.zeros_like(own)
        return (value.sum(1, dtype=torch.float32) - own) / (value.shape[1] - 1)

    def _direction(self, place: int, width: int) -> Tensor:
        """``[B, D]`` unit vectors, the same however the sequences are batched."""
        assert self.aside is not None
        if place not in self._aside:
            self._aside[place] = unit_vectors(len(self.at), width, self.aside + place)
        return self._aside[place]


def unit_vectors(count: int, width: int, seed: int) -> Tensor:
    """``[count, width]`` in random directions."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = drawn / drawn.norm(dim=-1, keepdim=True)
    return unit
