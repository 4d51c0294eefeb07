"""What interventions change during one pass: rows of a write or of the stream, and sight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


def part(write: Write, term: Term) -> Tensor | None:
    """``[b, T, D]``: what a term writes at every position; None where it cannot be told exactly.

    That is a part of a write that goes through an output norm on its way.
    """
    if term.kind == write.sublayer:
        return write.added
    if write.raw is not None and write.raw is not write.added:
        return None
    if term.kind == "head" and write.projection is not None and term.index is not None:
        of = write.projection
        mixed = of.mixed.unflatten(-1, (of.heads, -1))[:, :, term.index]
        weight = of.weight.unflatten(1, (of.heads, -1))[:, term.index]
        written: Tensor = mixed.to(weight.dtype) @ weight.T * of.factor
        return written
    if write.routed is not None and term.kind == "expert" and term.index is not None:
        return write.routed.of(term.index) * write.routed.factor
    if write.routed is not None and term.kind == "shared_expert":
        return write.added - write.routed.total * write.routed.factor
    return None


@dataclass
class Change(Edit):
    """Put other rows at one position of each sequence, in the place of some terms' own."""

    terms: Sequence[Term]
    at: Tensor
    """``[B]``: the position."""
    source: Literal["mean", "zero"] | Tensor
    """What comes there: the term's mean over the other positions, nothing, or its row at these
    positions ``[B]``."""
    aside: torch.Generator | None = None
    """With it, the change keeps its norm and goes in a random direction, another per sequence."""

    def __post_init__(self) -> None:
        self.start = min(term.block for term in self.terms)

    def state(self, block: int, stream: Tensor, rows: Tensor) -> Tensor | None:
        """Change the state, where that is a term."""
        found = [term for term in self.terms if term.kind == "state" and term.block == block]
        return self._changed(stream, [stream for _ in found], rows)

    def write(self, block: int, write: Write, rows: Tensor) -> Tensor | None:
        """Change the terms of this write."""
        found = []
        for term in self.terms:
            if term.block == block and term.sublayer == write.sublayer:
                value = part(write, term)
                if value is not None:
                    found.append(value)
        return self._changed(write.added, found, rows)

    def _changed(self, whole: Tensor, found: Sequence[Tensor], rows: Tensor) -> Tensor | None:
        if not found:
            return None
        sequences, at = torch.arange(len(whole)), self.at[rows]
        row = whole[sequences, at].float()
        for value in found:
            own = value[sequences, at].float()
            change = self._incoming(value, own, at, rows) - own
            if self.aside is not None:
                size = change.norm(dim=-1, keepdim=True)
                change = torch.randn(change.shape, generator=self.aside).to(change)
                change = change * (size / change.norm(dim=-1, keepdim=True))
            row = row + change
        result = whole.clone()
        result[sequences, at] = row.to(whole.dtype)
        return result

    def _incoming(self, value: Tensor, own: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        if isinstance(self.source, Tensor):
            return value[torch.arange(len(value)), self.source[rows]].float()
        if self.source == "zero":
            return torch.zeros_like(own)
        return (value.sum(1, dtype=torch.float32) - own) / (value.shape[1] - 1)


Sees = Callable[[int, int], Tensor]
"""Of a position and the sequence's length: ``[T]`` bool, the keys that it sees."""


@dataclass
class Sight(Edit):
    """One position of each sequence sees other keys in the first blocks."""

    at: Tensor
    """``[B]``: the position."""
    until: int
    """The first block where sight is as it was."""
    sees: Sees | None
    """None changes nothing, for a pass that only notes."""
    noted: dict[int, Tensor] = field(default_factory=dict)
    """Filled by the pass: what attention wrote at the position ``[B, D]``, by block."""

    def sight(self, block: int, seen: Tensor, rows: Tensor) -> Tensor | None:
        """Change the position's row of the mask."""
        if self.sees is None or block >= self.until:
            return None
        changed = seen.expand(len(rows), -1, -1, -1).clone()
        for row, at in enumerate(self.at[rows].tolist()):
            changed[row, :, at] = self.sees(at, seen.shape[-1]).to(seen.device)
        return changed

    def write(self, block: int, write: Write, rows: Tensor) -> Tensor | None:
        """Note what attention writes at the position."""
        if block < self.until and write.sublayer == "attention":
            row = write.added[torch.arange(len(rows)), self.at[rows]].float().cpu()
            kept = self.noted.setdefault(block, torch.zeros(len(self.at), row.shape[-1]))
            kept[rows] = row
        return None


@dataclass
class Nudge(Edit):
    """Attention's writes at one position are moved in random directions by given lengths."""

    at: Tensor
    """``[B]``: the position."""
    norms: dict[int, Tensor]
    """``[B]`` by block."""
    generator: torch.Generator

    def write(self, block: int, write: Write, rows: Tensor) -> Tensor | None:
        """Move the write at the position."""
        if block not in self.norms or write.sublayer != "attention":
            return None
        result = write.added.clone()
        aside = torch.randn(len(rows), result.shape[-1], generator=self.generator)
        aside *= self.norms[block][rows][:, None] / aside.norm(dim=-1, keepdim=True)
        sequences, at = torch.arange(len(rows)), self.at[rows]
        moved = result[sequences, at].float() + aside.to(result.device)
        result[sequences, at] = moved.to(result.dtype)
        return result
