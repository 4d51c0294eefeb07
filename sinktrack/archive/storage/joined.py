"""Tensors that several processes wrote, each a part: side by side, or as one flat row of values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sinktrack.archive.storage.dcp import Fetch, Span
from sinktrack.archive.storage.torch_file import Saved
from sinktrack.errors import ArchiveError


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
        found, begin = [], 0
        for part in self.parts:
            end = begin + part.shape[0]
            found.append([(max(a, begin) - begin, min(b, end) - begin) for a, b in spans])
            begin = end
        read = [
            part.read(fetch, (), [span])
            for number in range(len(spans))
            for part, own in zip(self.parts, found, strict=True)
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
        found = [self._values(fetch, first * width, last * width) for first, last in spans]
        count = sum(last - first for first, last in spans)
        return torch.cat(found).view(count, *self.shape[1:]) if self.shape else found[0].view(())

    def _values(self, fetch: Fetch, low: int, high: int) -> Tensor:
        found, begin = [], 0
        for row, first, count in self.parts:
            a, b = max(low, begin) - begin, min(high, begin + count) - begin
            if a < b:
                found.append(row.read(fetch, (), [(first + a, first + b)]))
            begin += count
        return torch.cat(found) if found else torch.empty(0, dtype=self.dtype)


def _below(first: Tensor, lead: Sequence[int], rows: Sequence[Span]) -> Tensor:
    """Of one row what lies below the rest of a leading index."""
    found = first[(0, *lead[1:])]
    return torch.cat([found[a:b] for a, b in rows]) if rows else found
