"""A safetensors file: its header, and tensors by ranges of bytes.

A file begins with the length of its header (8 bytes, little-endian) and the header itself, a JSON
object from each tensor's name to its dtype, shape and place in the rest of the file. Headers come
from strangers: nothing in one is believed before it is checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinktrack.archive.storage.files import Files, parse_json
from sinktrack.archive.storage.slices import DTYPES, Index, Slice
from sinktrack.errors import ArchiveError

_LARGEST_HEADER = 100 * 10**6
_MOST_DIMENSIONS = 32
_SMALL = re.compile(r"[FIU][1-8](?:_[A-Z0-9_]{1,16})?")
"""Dtypes of so few bits that only quantized weights have them."""


@dataclass(frozen=True)
class Place:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Its first byte, from the start of the file."""


@dataclass(frozen=True)
class SafetensorsSlice:
    """One tensor of a file; indexing reads the bytes that are asked for."""

    files: Files
    file: str
    place: Place

    def get_shape(self) -> list[int]:
        """Its size in each dimension."""
        return list(self.place.shape)

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return self.place.dtype

    def span(self, first: int = 0, last: int | None = None) -> tuple[int, int]:
        """Where in the file its rows are, from the first to the one behind the last or to all."""
        rows, *rest = self.place.shape or (1,)
        width = math.prod(rest) * DTYPES[self.place.dtype].itemsize
        first, last, _ = slice(first, last).indices(rows)
        return self.place.start + first * width, self.place.start + max(first, last) * width

    def __getitem__(self, index: Index) -> Tensor:
        """A part of the tensor, or with ``...`` all of it.

        Whole numbers, then one slice of step 1, on the leading dimensions are read as one range of
        bytes; what other indices ask for is cut from that.
        """
        dtype, shape = DTYPES[self.place.dtype], list(self.place.shape)
        start, rest = self.place.start, list(index) if isinstance(index, tuple) else [index]
        done: list[int] = []
        while rest and shape:
            first = rest[0]
            if isinstance(first, int):
                if not -shape[0] <= first < shape[0]:
                    raise IndexError(f"index {first} of a dimension of size {shape[0]}")
                low, count = first % shape[0], 1
            elif isinstance(first, slice) and first.step in (None, 1):
                low, high, _ = first.indices(shape[0])
                count = max(high - low, 0)
            else:
                break
            start += low * math.prod(shape[1:]) * dtype.itemsize
            rest.pop(0)
            if isinstance(first, slice):
                shape[0] = count
                rest.insert(0, slice(None))
                break
            done.append(shape.pop(0))
        size = math.prod(shape) * dtype.itemsize
        data = self.files.read(self.file, start, start + size)
        if size == 0:
            return torch.empty(shape, dtype=dtype)[tuple(rest)]
        return torch.frombuffer(data, dtype=dtype).reshape(shape)[tuple(rest)]


def announce(parts: Iterable[tuple[Slice, int, int | None]]) -> None:
    """Say what will be read soon; of other formats nothing is done about it.

    Args:
        parts: tensors, with the first row and the one behind the last, or None for all from there.

    Raises:
        ArchiveError: a local file is missing or not to be read.
    """
    spans: dict[tuple[int, str], tuple[Files, list[tuple[int, int]]]] = {}
    for stored, first, last in parts:
        if isinstance(stored, SafetensorsSlice):
            _, own = spans.setdefault((id(stored.files), stored.file), (stored.files, []))
            own.append(stored.span(first, last))
    for (_, file), (files, own) in spans.items():
        files.announce(file, own)


def read_header(files: Files, name: str) -> dict[str, Place]:
    """The tensors of a file.

    Raises:
        ArchiveError: the file is missing, truncated, or its header is false.
    """
    return read_described(files, name)[0]


def read_described(files: Files, name: str) -> tuple[dict[str, Place], dict[str, str]]:
    """The tensors of a file, and what its writer noted beside them.

    Raises:
        ArchiveError: the file is missing, truncated, or its header is false.
    """
    size = files.size(name)
    try:
        if size < 8:
            raise _Damage(f"{size} bytes, not even the length of a header")
        length = int.from_bytes(files.read(name, 0, 8), "little")
        if length > min(_LARGEST_HEADER, size - 8):
            raise _Damage(f"a header of {length} bytes in a file of {size}")
        return _parsed(bytes(files.read(name, 8, 8 + length)), size - 8 - length)
    except _Damage as error:
        raise ArchiveError(
            f"{files.path(name)} is truncated or damaged ({error}); copy the checkpoint again"
        ) from error


class _Damage(ValueError):
    """Why a header is not believed."""


def parse_header(header: bytes, room: int) -> dict[str, Place]:
    """The tensors that a header describes.

    Args:
        header: the JSON text, which begins at byte 8 of the file.
        room: bytes of data behind it.

    Raises:
        ArchiveError: a tensor is stored in a dtype of quantized weights that torch lacks.
        ValueError: not JSON, a dtype that is not known, a shape that does not fit its bytes, a name
            twice, or tensors that do not fill the data exactly, one behind the other.
    """
    return _parsed(header, room)[0]


def _parsed(header: bytes, room: int) -> tuple[dict[str, Place], dict[str, str]]:
    if not header.startswith(b"{"):
        raise _Damage("no header in JSON")
    try:
        entries = parse_json(header, _distinct)
    except ValueError as error:
        raise _Damage(f"header: {error}") from error
    notes = entries.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise _Damage("__metadata__ is not text by name")
    base = 8 + len(header)
    places, spans = {}, []
    for name, entry in entries.items():
        place, stop = _place(name, entry, base)
        places[name] = place
        spans.append((place.start - base, stop, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise _Damage(f"{name!r} begins at byte {start} of the data, expected {end}")
        end = stop
    if end != room:
        raise _Damage(f"tensors of {end} bytes, {room} bytes of data")
    return places, notes


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise _Damage("a name stands there twice")
    return entries


def _place(name: str, entry: Any, base: int) -> tuple[Place, int]:
    """A tensor, and where its data end."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Damage(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and _SMALL.fullmatch(dtype) and dtype not in DTYPES:
        raise ArchiveError(
            f"quantized weights are not supported: {name!r} is stored as {dtype}; scan the model "
            "before quantization"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Damage(f"{name!r} has dtype {str(dtype)[:20]!r}, which is not known")
    if not _counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise _Damage(f"{name!r} has shape {str(shape)[:80]}")
    if not _counts(offsets) or len(offsets) != 2:
        raise _Damage(f"{name!r} has offsets {str(offsets)[:80]}")
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _Damage(f"{name!r} has {stop - start} bytes for {dtype} {str(shape)[:80]}")
    return Place(dtype, tuple(shape), base + start), stop


def _counts(values: Any) -> bool:
    """Whether these are integers that a file of this world could hold."""
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )
