"""Tensors that several processes wrote, each a part: side by side, a flat row, or rectangles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from sinktrack.archive.storage.dcp import Fetch, Span
from sinktrack.archive.storage.torch_file import Saved
from sinktrack.errors import ArchiveError

Rectangle = tuple[tuple[int, int | None], ...]
"""From where to where in each dimension; to the end where the last is None."""


@dataclass(frozen=True)
class Joined:
    """Parts that lie side by side in one dimension."""

    parts: tuple[Saved, ...]
    dim: int = 0

    def __post_init__(self) -> None:
        """Raise an ArchiveError where the parts do not fit together."""
        rest = {(*part.shape[: self.dim], *part.shape[self.dim + 1 :]) for part in self.parts}
        if len(rest) != 1 or len({part.dtype for part in self.parts}) != 1:
            shapes = [list(part.shape) for part in self.parts]
            raise ArchiveError(f"parts of one tensor do not fit together: shapes {shapes}")

    @property
    def dtype(self) -> torch.dtype:
        """Of every part."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        first, total = self.parts[0].shape, sum(part.shape[self.dim] for part in self.parts)
        return (*first[: self.dim], total, *first[self.dim + 1 :])

    def ends(self, lead: Sequence[int] = ()) -> Iterator[tuple[str, int]]:
        """The files, and how long each must be."""
        for part in self.parts:
            yield from part.ends()

    def read(self, fetch: Fetch, lead: Sequence[int] = (), rows: Sequence[Span] = ()) -> Tensor:
        """Rows below a leading index; see `dcp.read`."""
        if lead:
            return _below(self.read(fetch, (), [(lead[0], lead[0] + 1)]), lead, rows)
        spans = list(rows) or [(0, self.shape[0])]
        if self.dim:
            return torch.cat([part.read(fetch, (), spans) for part in self.parts], self.dim)
        parts, begin = [], 0
        for part in self.parts:
            end = begin + part.shape[0]
            parts.append([(max(a, begin) - begin, min(b, end) - begin) for a, b in spans])
            begin = end
        read = [
            part.read(fetch, (), [span])
            for number in range(len(spans))
            for part, own in zip(self.parts, parts, strict=True)
            for span in [own[number]]
            if span[0] < span[1]
        ]
        return torch.cat(read) if read else torch.empty(0, *self.shape[1:], dtype=self.dtype)


@dataclass(frozen=True)
class Flat:
    """A tensor whose values lie one after the other in flat rows of several files."""

    parts: tuple[tuple[Saved, int, int], ...]
    """Of each the flat row, the first value in it and how many."""
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise an ArchiveError where the values are not there."""
        for row, first, count in self.parts:
            if len(row.shape) != 1 or row.strides != (1,) or first + count > row.shape[0]:
                raise ArchiveError(f"{row.file} has fewer values than the parameters' shapes need")
        if sum(count for _, _, count in self.parts) < math.prod(self.shape):
            raise ArchiveError("the files have fewer values than the parameters' shapes need")

    @property
    def dtype(self) -> torch.dtype:
        """Of every part."""
        return self.parts[0][0].dtype

    def ends(self, lead: Sequence[int] = ()) -> Iterator[tuple[str, int]]:
        """The files, and how long each must be."""
        for row, _, _ in self.parts:
            yield from row.ends()

    def read(self, fetch: Fetch, lead: Sequence[int] = (), rows: Sequence[Span] = ()) -> Tensor:
        """Rows below a leading index; see `dcp.read`."""
        if lead:
            return _below(self.read(fetch, (), [(lead[0], lead[0] + 1)]), lead, rows)
        width = math.prod(self.shape[1:])
        spans = list(rows) or [(0, self.shape[0] if self.shape else 1)]
        parts = [self._values(fetch, first * width, last * width) for first, last in spans]
        count = sum(last - first for first, last in spans)
        return torch.cat(parts).view(count, *self.shape[1:]) if self.shape else parts[0].view(())

    def _values(self, fetch: Fetch, low: int, high: int) -> Tensor:
        parts, begin = [], 0
        for row, first, count in self.parts:
            a, b = max(low, begin) - begin, min(high, begin + count) - begin
            if a < b:
                parts.append(row.read(fetch, (), [(first + a, first + b)]))
            begin += count
        return torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype)


@dataclass(frozen=True)
class Patch:
    """A rectangle of a stored tensor, and which of the whole's it is."""

    saved: Saved
    local: Rectangle
    whole: Rectangle


@dataclass(frozen=True)
class Patchwork:
    """A tensor of one or two dimensions out of rectangles that cover it, each value once."""

    patches: tuple[tuple[Saved, tuple[Span, ...], tuple[Span, ...]], ...]
    """Of each where it lies in its file's tensor, and where in the whole."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, patches: Sequence[Patch], name: str) -> Patchwork:
        """The tensor that these make.

        Raises:
            ArchiveError: they do not fit together.
        """
        parts = []
        for patch in patches:
            sizes = patch.saved.shape
            if not (len(sizes) == len(patch.local) == len(patch.whole) and len(sizes) in (1, 2)):
                raise ArchiveError(f"{patch.saved.file} is no part of {name}: it has shape {sizes}")
            local, whole = (
                tuple(
                    (first, size if last is None else last)
                    for (first, last), size in zip(side, sizes, strict=True)
                )
                for side in (patch.local, patch.whole)
            )
            extents = [tuple(b - a for a, b in side) for side in (local, whole)]
            inside = all(0 <= a <= b <= n for (a, b), n in zip(local, sizes, strict=True))
            if extents[0] != extents[1] or not inside:
                raise ArchiveError(f"{patch.saved.file}: what it says of {name} does not fit it")
            parts.append((patch.saved, local, whole))
        shape = tuple(
            max(ends) for ends in zip(*[[b for _, b in w] for *_, w in parts], strict=True)
        )
        sides = [whole for *_, whole in parts]
        filled = sum(math.prod(b - a for a, b in side) for side in sides)
        twice = any(
            all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True))
            for one, other in combinations(sides, 2)
        )
        dtypes = {saved.dtype for saved, *_ in parts}
        if filled != math.prod(shape) or twice or len(dtypes) != 1:
            raise ArchiveError(f"the files of {name} do not make one tensor of shape {list(shape)}")
        return cls(tuple(parts), shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of every part."""
        return self.patches[0][0].dtype

    def ends(self, lead: Sequence[int] = ()) -> Iterator[tuple[str, int]]:
        """The files, and how long each must be."""
        for saved, _, _ in self.patches:
            yield from saved.ends()

    def read(self, fetch: Fetch, lead: Sequence[int] = (), rows: Sequence[Span] = ()) -> Tensor:
        """Rows below a leading index; see `dcp.read`."""
        if lead:
            return _below(self._rows(fetch, lead[0], lead[0] + 1), lead, rows)
        spans = list(rows) or [(0, self.shape[0])]
        parts = [self._rows(fetch, first, last) for first, last in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, fetch: Fetch, first: int, last: int) -> Tensor:
        made = torch.empty(last - first, *self.shape[1:], dtype=self.dtype)
        for saved, local, whole in self.patches:
            a, b = max(first, whole[0][0]), min(last, whole[0][1])
            if a < b:
                offset = local[0][0] - whole[0][0]
                part = saved.read(fetch, (), [(a + offset, b + offset)])
                within = tuple(slice(*span) for span in local[1:])
                place = (slice(a - first, b - first), *(slice(*span) for span in whole[1:]))
                made[place] = part[(slice(None), *within)]
        return made


def _below(first: Tensor, lead: Sequence[int], rows: Sequence[Span]) -> Tensor:
    """Of one row what lies below the rest of a leading index."""
    inner = first[(0, *lead[1:])]
    return torch.cat([inner[a:b] for a, b in rows]) if rows else inner
