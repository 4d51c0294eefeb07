"""What ``torch.save`` wrote, read by byte range and as plain data.

Such a file is a zip archive of a small pickle and the values of each storage, uncompressed. The
pickle says what the file holds; no class that it names is imported (see ``pickles``). A tensor
becomes a `Saved`, which knows where its values lie; nothing of them is read before they are wanted,
and of a large file, here or behind a URL, no more than they take.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinktrack.archive.storage import pickles, torch_zip
from sinktrack.archive.storage.dcp import Fetch, Span
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

_LARGEST_PICKLE = 256 * 2**20
_LARGEST_DIRECTORY = 256 * 2**20
_DEEPEST = 8
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """One tensor of a file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    """Its first byte, from the start of the file."""

    def ends(self, lead: Sequence[int] = ()) -> Iterator[tuple[str, int]]:
        """The file, and how long it must be."""
        yield self.file, self.start + _extent(self.shape, self.strides) * self.dtype.itemsize

    def read(self, fetch: Fetch, lead: Sequence[int] = (), rows: Sequence[Span] = ()) -> Tensor:
        """Rows below a leading index; see `dcp.read`."""
        start, shape, strides = self.start, self.shape[len(lead) :], self.strides[len(lead) :]
        size = self.dtype.itemsize
        for index, stride in zip(lead, self.strides, strict=False):
            start += index * stride * size
        parts = []
        for first, last in rows or [(0, shape[0] if shape else 1)]:
            sizes = (last - first, *shape[1:]) if shape else ()
            begin = start + (first * strides[0] * size if strides else 0)
            length = _extent(sizes, strides) * size
            if not length:
                parts.append(torch.empty(sizes, dtype=self.dtype))
                continue
            flat = torch.frombuffer(_aligned(fetch(self.file, begin, length)), dtype=self.dtype)
            parts.append(flat.as_strided(sizes, strides))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def read(files: Files, name: str) -> Any:
    """What the file holds: containers, numbers and texts as they are, tensors as `Saved`.

    Objects of other classes are ``pickles.Record``; none of their code is run.

    Raises:
        ArchiveError: the file is missing, damaged, of PyTorch's format before 1.6, or holds a
            tensor that does not fit its storage.
    """
    path = files.path(name)
    size = files.size(name)
    if size < 4 or bytes(files.read(name, 0, 4)) != b"PK\3\4":
        raise ArchiveError(
            f"{path} is no zip archive, as torch.save writes them since PyTorch 1.6: it is "
            "damaged, of another program or older; load it where you trust it and save it again"
        )
    try:
        stored = torch_zip.directory(_ranged(files, name, size), path, _LARGEST_PICKLE)
    except ArchiveError:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        raise ArchiveError(
            f"{path} is truncated or damaged ({type(error).__name__}: {error}); copy the "
            "checkpoint again"
        ) from error
    if not stored.little:
        raise ArchiveError(f"{path} was written in another byte order than this machine's")
    places = _Places(files, name, stored.entries)
    return pickles.load(stored.pickled, places.admitted, path)


def tensors(tree: Any, depth: int = _DEEPEST) -> dict[str, Any]:
    """Of nested dictionaries all that is a `Saved`, by its keys with dots between."""
    by_name: dict[str, Any] = {}
    if isinstance(tree, Mapping) and depth:
        for key, value in tree.items():
            if isinstance(value, Saved):
                by_name[str(key)] = value
            elif isinstance(value, Mapping):
                inner = tensors(value, depth - 1)
                by_name |= {f"{key}.{below}": saved for below, saved in inner.items()}
    return by_name


class _Places:
    """Builds tensors of what the pickle says, once it fits the file."""

    def __init__(self, files: Files, name: str, entries: Mapping[str, zipfile.ZipInfo]) -> None:
        self._files, self._name, self._entries = files, name, entries
        self._begins: dict[str, int] = {}
        self.admitted: dict[str, pickles.Build | None] = pickles.dtypes() | {
            "*": None,
            "collections.OrderedDict": lambda pairs=(): dict(pairs),
            "collections.defaultdict": lambda *_: {},
            "torch.Size": lambda sizes=(): tuple(sizes),
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._typed,
            "torch._tensor._rebuild_from_type_v2": self._with_attributes,
            "torch._utils._rebuild_parameter": lambda value, *_: value,
            "torch._utils._rebuild_parameter_with_state": lambda value, *_: value,
        }

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Saved:
        return self._saved(storage, None, offset, shape, strides)

    def _with_attributes(self, made_by: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """A tensor that carries attributes, or of a class of its own, which stays a record."""
        build = self.admitted.get(getattr(made_by, "name", ""))
        if build is None:
            name = "torch._tensor._rebuild_from_type_v2"
            return pickles.Record(name, made_by, kind, arguments, state)
        return build(*arguments)

    def _typed(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any,
        dtype: Any, *_: Any,
    ) -> Saved:  # fmt: skip
        return self._saved(storage, dtype, offset, shape, strides)

    def _saved(self, storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any) -> Saved:
        path = self._files.path(self._name)
        _, kind, key, _, _ = storage.arguments[0]
        entry = self._entries.get(f"data/{key}")
        if dtype is None:
            dtype = _STORAGES.get(kind.name.rpartition(".")[2])
        if not isinstance(dtype, torch.dtype) or entry is None:
            raise ArchiveError(f"{path} holds a tensor whose values or dtype are not known")
        shape, strides = _counts(shape, path), _counts(strides, path)
        (offset,) = _counts((offset,), path)
        if len(shape) != len(strides):
            raise ArchiveError(f"{path} is damaged: a tensor of {shape} with strides {strides}")
        room = entry.file_size // dtype.itemsize
        if offset + _extent(shape, strides) > room or math.prod(shape) > room:
            raise ArchiveError(f"{path} is damaged: a tensor of {shape} has too few values")
        begin = self._begin(str(key), entry)
        return Saved(self._name, dtype, shape, strides, begin + offset * dtype.itemsize)

    def _begin(self, key: str, entry: zipfile.ZipInfo) -> int:
        """Where a storage's values begin: behind its own header, whose length varies."""
        if key not in self._begins:
            head = bytes(
                self._files.read(self._name, entry.header_offset, entry.header_offset + 30)
            )
            lengths = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            self._begins[key] = entry.header_offset + 30 + lengths
        return self._begins[key]


def _ranged(files: Files, name: str, size: int) -> torch_zip.Seekable:
    """A file read by byte range."""

    def fetch(start: int, stop: int) -> bytes:
        if stop - start > _LARGEST_DIRECTORY:
            raise zipfile.BadZipFile("a directory of unreasonable size")
        return bytes(files.read(name, start, stop))

    return torch_zip.Seekable(size, fetch)


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last, both counted."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _counts(values: Any, path: str) -> tuple[int, ...]:
    if type(values) is not tuple or not all(type(v) is int and 0 <= v < 2**63 for v in values):
        raise ArchiveError(f"{path} is damaged: sizes that are no counts")
    return values


def _aligned(data: bytes | memoryview) -> memoryview:
    view = memoryview(data)
    return memoryview(bytearray(view)) if view.readonly else view
