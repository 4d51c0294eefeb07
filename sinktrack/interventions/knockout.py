"""Attention knockout: one position of each sequence sees other keys in some blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sinktrack.events import Write
from sinktrack.interventions.patching import unit_vectors
from sinktrack.interventions.replay import Edit

Sees = Callable[[int, int, int], Tensor]
"""Of a sequence's number, a position and the sequence's length: ``[T]`` bool, the keys that it
sees."""


@dataclass
class AttentionKnockout(Edit):
    """One position of each sequence sees other keys in some blocks."""

    at: Tensor
    """``[B]``: the position."""
    blocks: tuple[int, int]
    """The first of them, and the first where the mask is as it was again."""
    sees: Sees
    noted: dict[int, Tensor] = field(default_factory=dict)
    """Filled by the pass: what attention wrote at the position ``[B, D]``, by block."""

    def __post_init__(self) -> None:
        self.start, self._until = self.blocks

    def edit_mask(self, block: int, seen: Tensor, rows: Tensor) -> Tensor | None:
        """Change the position's row of the mask."""
        if not self.start <= block < self._until:
            return None
        changed = seen.expand(len(rows), -1, -1, -1).clone()
        for place, row in enumerate(rows.tolist()):
            at = int(self.at[row])
            changed[place, :, at] = self.sees(row, at, seen.shape[-1]).to(seen.device)
        return changed

    def write(self, block: int, write: Write, rows: Tensor) -> Tensor | None:
        """Note what attention writes at the position."""
        if self.start <= block < self._until:
            note(self.noted, block, write, rows, self.at)
        return None


def note(noted: dict[int, Tensor], block: int, write: Write, rows: Tensor, at: Tensor) -> None:
    """Keep what attention writes at one position of each sequence."""
    if write.sublayer == "attention":
        row = write.added[torch.arange(len(rows)), at[rows]].float().cpu()
        kept = noted.setdefault(block, torch.zeros(len(at), row.shape[-1]))
        kept[rows] = row


@dataclass
class RandomDirectionControl(Edit):
    """Attention's writes at one position are moved in random directions by given lengths."""

    at: Tensor
    """``[B]``: the position."""
    norms: Mapping[int, Tensor]
    """``[B]`` by block."""
    seed: int

    def __post_init__(self) -> None:
        self.start = min(self.norms, default=0)

    def write(self, block: int, write: Write, rows: Tensor) -> Tensor | None:
        """Move the write at the position."""
        if block not in self.norms or write.sublayer != "attention":
            return None
        result = write.added.clone()
        aside = unit_vectors(len(self.at), result.shape[-1], self.seed + block)[rows]
        aside = aside * self.norms[block][rows][:, None]
        sequences, at = torch.arange(len(rows)), self.at[rows]
        moved = result[sequences, at].float() + aside.to(result.device)
        result[sequences, at] = moved.to(result.dtype)
        return result
