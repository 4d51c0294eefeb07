"""Tensors of another framework's checkpoint under the names that Hugging Face gives them.

Frameworks stack blocks or experts into one tensor, or several matrices: a Hugging Face tensor is a
piece of what is stored. A format says which (`Piece`); `PieceSource` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sinktrack.archive import foreign
from sinktrack.archive.storage import dcp
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.slices import NAMES, Index
from sinktrack.errors import ArchiveError


class Stored(Protocol):
    """A tensor as it lies in the files of a checkpoint."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size in each dimension."""

    def ends(self, lead: tuple[int, ...]) -> Iterable[tuple[str, int]]:
        """The files with parts below a leading index, and how long each must be."""

    def read(
        self, fetch: dcp.Fetch, lead: tuple[int, ...] = (), rows: Sequence[dcp.Span] = ()
    ) -> Tensor:
        """Rows below a leading index, the spans one after the other; all of them if none."""


@dataclass(frozen=True)
class Zeros:
    """A tensor that no file holds: what a model without it has in its place."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def ends(self, lead: tuple[int, ...]) -> Iterable[tuple[str, int]]:
        """Of no file."""
        return ()

    def read(
        self, fetch: dcp.Fetch, lead: tuple[int, ...] = (), rows: Sequence[dcp.Span] = ()
    ) -> Tensor:
        """As many zeros."""
        zeros = torch.zeros(self.shape, dtype=self.dtype)[lead]
        return torch.cat([zeros[a:b] for a, b in rows]) if rows else zeros


@dataclass(frozen=True)
class Piece:
    """A Hugging Face tensor: rows of a stored one below a leading index."""

    stored: Stored
    lead: tuple[int, ...] = ()
    rows: tuple[dcp.Span, ...] = ()
    """All of them if empty."""
    turned: Callable[[Tensor], Tensor] | None = None
    """What makes Hugging Face's layout of these rows; they are then read all at once."""

    @property
    def spans(self) -> list[dcp.Span]:
        """The rows, also where they are all."""
        return list(self.rows) or [(0, size) for size in self.stored.shape[len(self.lead) :][:1]]

    @property
    def shape(self) -> list[int]:
        """Of the Hugging Face tensor."""
        first = [sum(last - first for first, last in self.spans)] if self.spans else []
        shape = [*first, *self.stored.shape[len(self.lead) + 1 :]]
        return list(self.turned(torch.empty(shape, device="meta")).shape) if self.turned else shape


S = TypeVar("S", bound=Stored)


class Finder(Generic[S]):
    """Takes the tensors that a model needs out of a checkpoint, each once and of its shape.

    Args:
        stored: what the checkpoint holds, by its own names.
    """

    def __init__(self, stored: Mapping[str, S]) -> None:
        self._stored, self._taken = stored, set[str]()

    def take(self, *names: str, shape: Sequence[int]) -> S:
        """The first of these tensors that is there.

        Raises:
            ArchiveError: there is none, or it is of another shape.
        """
        name = next((name for name in names if name in self._stored), None)
        if name is None:
            raise ArchiveError(f"the checkpoint has no {' nor '.join(names)}")
        tensor = self._stored[name]
        if tensor.shape != tuple(shape):
            raise ArchiveError(
                f"{name} has shape {list(tensor.shape)}, the configuration says {list(shape)}"
            )
        self._taken.add(name)
        return tensor

    def renamed(self, name: str, own: str, *shape: int) -> tuple[str, Piece]:
        """A weight that is the same tensor for Hugging Face, whose module of this name has it."""
        return f"{name}.weight", Piece(self.take(f"{own}.weight", shape=shape))

    def gated(self, name: str, own: str, hidden: int, width: int) -> Iterator[tuple[str, Piece]]:
        """An MLP of gate, up and down projection, in the order in which Llama numbered them."""
        yield self.renamed(f"{name}.gate_proj", f"{own}.w1", width, hidden)
        yield self.renamed(f"{name}.up_proj", f"{own}.w3", width, hidden)
        yield self.renamed(f"{name}.down_proj", f"{own}.w2", hidden, width)

    def nothing_left(self, family: str, *others: str) -> None:
        """Raise an ArchiveError if a tensor was not taken whose name begins with none of others."""
        left = set(self._stored) - self._taken
        foreign.refuse({name for name in left if not name.startswith(others)}, family)


class PieceSource:
    """The weights of one checkpoint.

    Args:
        files: the checkpoint.
        config: the model's configuration, of transformers.
        weights: where the files that the pieces name are.
        pieces: by Hugging Face's names.
        tokens: that the model had seen, where that is found with the weights.
    """

    def __init__(
        self,
        files: Files,
        config: Any,
        weights: Files,
        pieces: Mapping[str, Piece],
        tokens: int | None = None,
    ) -> None:
        self.files, self.config, self.tokens = files, config, tokens
        self._weights, self._pieces = weights, pieces
        self._sizes: dict[str, int] = {}

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._pieces)

    def slice(self, name: str) -> PieceSlice:
        """One tensor; nothing of its data is read yet.

        Raises:
            ArchiveError: there is no such tensor, or a file with a part of it is missing or short.
        """
        piece = self._pieces.get(name)
        if piece is None:
            raise ArchiveError(f"{self.files.location} holds nothing for {name!r}")
        for file, end in piece.stored.ends(piece.lead):
            if file not in self._sizes:
                self._sizes[file] = self._weights.size(file)
            if end > self._sizes[file]:
                raise ArchiveError(f"{self._weights.path(file)} is truncated; copy it again")
        return PieceSlice(self._weights, piece)


@dataclass(frozen=True)
class PieceSlice:
    """One tensor; indexing reads the bytes that are asked for."""

    files: Files
    piece: Piece

    def get_shape(self) -> list[int]:
        """Its size in each dimension."""
        return self.piece.shape

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return NAMES.get(self.piece.stored.dtype, str(self.piece.stored.dtype))

    def __getitem__(self, index: Index) -> Tensor:
        """A part of the tensor, or with ``...`` all of it.

        Only the rows of a leading slice of step 1 are read, if the piece need not be turned.
        """
        index = index if isinstance(index, tuple) else (index,)
        rows, first = self.piece.spans, index[0] if index else ...
        if isinstance(first, slice) and first.step in (None, 1) and self.piece.turned is None:
            low, high, _ = first.indices(self.get_shape()[0])
            rows, index = _cut(rows, low, high), (slice(None), *index[1:])
            if not rows:
                return torch.empty(0, *self.get_shape()[1:], dtype=self.piece.stored.dtype)[index]
        rows_read = self.piece.stored.read(self._fetch, self.piece.lead, rows)
        return (self.piece.turned(rows_read) if self.piece.turned else rows_read)[index]

    def _fetch(self, file: str, start: int, length: int) -> memoryview:
        return self.files.read(file, start, start + length)


def metadata(files: Files, prefix: str = "") -> dict[str, dcp.Stored]:
    """The tensors that a checkpoint's ``.metadata`` lists, by their names behind a prefix.

    Raises:
        ArchiveError: it is missing, damaged, or imports what it has no need of.
    """
    data = files.whole(".metadata", dcp.LARGEST_METADATA)
    tensors = dcp.read_metadata(data, files.path(".metadata"))
    return {
        name.removeprefix(prefix): stored
        for name, stored in tensors.items()
        if name.startswith(prefix)
    }


def _cut(rows: list[dcp.Span], low: int, high: int) -> list[dcp.Span]:
    """The spans that hold the rows ``low`` to ``high`` of what ``rows`` hold one after another."""
    spans, done = [], 0
    for first, last in rows:
        a, b = max(low - done, 0), min(high - done, last - first)
        if a < b:
            spans.append((first + a, first + b))
        done += last - first
    return spans
