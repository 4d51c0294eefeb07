"""Tensors of a ``torch.distributed.checkpoint`` by byte range, without process groups.

``.metadata`` says in which file and at which bytes each chunk of each tensor lies. A chunk is what
``torch.save`` writes: a zip archive of a small pickle and the values, uncompressed, so that the
rows that are wanted have a byte range of their own. Nothing is unpickled but as plain data.
"""

from __future__ import annotations

import math
import reprlib
import struct
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sinktrack.archive.storage import pickles, torch_zip
from sinktrack.errors import ArchiveError

Fetch = Callable[[str, int, int], bytes | memoryview]
"""The bytes of a file of the checkpoint: name, first byte, number of bytes."""

Span = tuple[int, int]
"""From the first index to before the last."""

_EDGE = 4096  # a chunk's pickle lies within its first bytes, its zip directory in its last
_LARGEST_PICKLE = 2**20
LARGEST_METADATA = 2**30
"""Bytes of ``.metadata`` that are worth reading."""
_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_OLMO_CORE = "olmo_core.distributed.checkpoint.filesystem"  # has a writer of its own
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
}


def _dropped(*_: Any) -> None:
    """For what the writer notes for itself: how it planned the save."""


_ADMITTED: dict[str, pickles.Build | None] = pickles.dtypes() | {
    f"{_METADATA}.Metadata": None,
    f"{_METADATA}.TensorStorageMetadata": None,
    f"{_METADATA}.BytesStorageMetadata": None,
    f"{_METADATA}.TensorProperties": None,
    f"{_METADATA}.ChunkStorageMetadata": None,
    f"{_METADATA}.MetadataIndex": None,
    f"{_METADATA}.StorageMeta": _dropped,
    f"{_METADATA}._MEM_FORMAT_ENCODING": _dropped,
    f"{_FILESYSTEM}._StorageInfo": None,
    f"{_FILESYSTEM}._StoragePrefix": _dropped,
    f"{_OLMO_CORE}._StorageInfo": None,
    f"{_OLMO_CORE}._StoragePrefix": _dropped,
    f"{_PLANNER}.SavePlan": _dropped,
    f"{_PLANNER}.WriteItem": _dropped,
    f"{_PLANNER}.WriteItemType": _dropped,
    f"{_PLANNER}.TensorWriteData": _dropped,
    f"{_PLANNER}.BytesIOWriteData": _dropped,
    "torch.Size": lambda sizes: tuple(sizes),
    "torch.serialization._get_layout": _dropped,
    "pathlib.PosixPath": _dropped,
    "pathlib.Path": _dropped,
    "collections.OrderedDict": lambda *_: {},
}
_CHUNK_ADMITTED: dict[str, pickles.Build | None] = dict.fromkeys(_STORAGES) | {
    "torch._utils._rebuild_tensor_v2": None,
    "collections.OrderedDict": lambda *_: {},
}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @cached_property
    def _by_lead(self) -> dict[tuple[int, ...], list[Chunk]]:
        """Chunks of one block, or of one expert of a block, by that index; the others under ()."""
        by_lead: dict[tuple[int, ...], list[Chunk]] = {}
        for chunk in self.chunks:
            ones = 0
            while ones < len(chunk.sizes) and chunk.sizes[ones] == 1 and ones < 2:
                ones += 1
            by_lead.setdefault(chunk.offsets[:ones], []).append(chunk)
        return by_lead

    def ends(self, lead: tuple[int, ...]) -> Iterator[tuple[str, int]]:
        """The files with parts below a leading index, and how long each must be."""
        for chunk in self.near(lead):
            yield chunk.file, chunk.start + chunk.length

    def read(self, fetch: Fetch, lead: tuple[int, ...] = (), rows: Sequence[Span] = ()) -> Tensor:
        """Rows below a leading index; see `read`."""
        return read(self, fetch, lead, rows)

    def near(self, lead: tuple[int, ...]) -> list[Chunk]:
        """The chunks that may hold something below the leading index ``lead``."""
        keys = {lead[:count] for count in range(len(lead) + 1)}
        near = [chunk for key in keys for chunk in self._by_lead.get(key, ())]
        if len(lead) < 2:
            near += [
                chunk
                for key, chunks in self._by_lead.items()
                if len(key) > len(lead) and key[: len(lead)] == lead
                for chunk in chunks
            ]
        return near


@dataclass(frozen=True)
class Contents:
    """What a ``.metadata`` file lists, by name."""

    tensors: dict[str, Stored]
    objects: dict[str, Chunk]
    """What the writer pickled, whole: no box of anything."""


def read_metadata(data: bytes, what: str) -> dict[str, Stored]:
    """The tensors that a ``.metadata`` file lists, by name.

    Raises:
        ArchiveError: the file is damaged, imports what it has no need of, or contradicts itself.
    """
    return read_contents(data, what).tensors


def read_contents(data: bytes, what: str, objects: Container[str] = ()) -> Contents:
    """The tensors that a ``.metadata`` file lists, and those of the named objects that are there.

    Raises:
        ArchiveError: the file is damaged, imports what it has no need of, or contradicts itself.
    """
    root = pickles.load(data, _ADMITTED, what)
    try:
        places, pickled = {}, {}
        for index, info in root.get("storage_data").items():
            name = str(index.get("fqn"))
            if index.get("offset") is not None:
                places[name, _sizes(index.get("offset"))] = info
            elif name in objects:
                pickled[name] = Chunk((), (), *_place(name, info))
        tensors = {
            name: _stored(name, entry, places)
            for name, entry in root.get("state_dict_metadata").items()
            if entry.name == f"{_METADATA}.TensorStorageMetadata"
        }
        return Contents(tensors, pickled)
    except ArchiveError as error:
        raise ArchiveError(f"{what}: {error}") from error
    except Exception as error:
        raise ArchiveError(
            f"{what} is not the metadata of a torch.distributed.checkpoint "
            f"({type(error).__name__}: {error})"
        ) from error


def _stored(name: str, entry: Any, places: dict[Any, Any]) -> Stored:
    dtype, shape = entry.get("properties").state[0], _sizes(entry.get("size"))
    if not isinstance(dtype, torch.dtype):
        raise ArchiveError(f"{name} has no dtype")
    chunks = []
    for part in entry.get("chunks"):
        offsets, sizes = _sizes(part.get("offsets")), _sizes(part.get("sizes"))
        file, start, length = _place(name, places[name, offsets])
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ArchiveError(f"{name} has chunks of another rank than its own")
        if any(o + s > full for o, s, full in zip(offsets, sizes, shape, strict=True)):
            raise ArchiveError(f"{name} has a chunk outside of its shape")
        if length < math.prod(sizes) * dtype.itemsize:
            raise ArchiveError(f"{name} has a chunk of fewer bytes than its values take")
        chunks.append(Chunk(offsets, sizes, file, start, length))
    return Stored(name, dtype, shape, tuple(chunks))


def _place(name: str, info: Any) -> tuple[str, int, int]:
    """File, first byte and number of bytes."""
    file, start, length = (info.get(key) for key in ("relative_path", "offset", "length"))
    if info.get("transform_descriptors"):
        raise ArchiveError(f"{name} is stored compressed; save without transforms")
    if type(file) is not str or "/" in file or "\\" in file or file in ("", ".", ".."):
        raise ArchiveError(
            f"{name} lies in {reprlib.repr(file)}, which is no file of the checkpoint"
        )
    _sizes((start, length))
    return file, start, length


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or not all(type(v) is int and 0 <= v < 2**63 for v in value):
        raise ArchiveError(f"{reprlib.repr(value)} where sizes were expected")
    return value


def read(
    stored: Stored, fetch: Fetch, lead: tuple[int, ...] = (), rows: Iterable[Span] = ()
) -> Tensor:
    """Rows of ``stored[lead]``: the spans of its first dimension one after the other.

    Args:
        stored: the tensor.
        fetch: reads bytes of the checkpoint's files.
        lead: leading indices, such as block and expert; those dimensions are dropped.
        rows: spans of the first dimension left; all of it by default.

    Raises:
        ArchiveError: a chunk is missing, damaged, or not what the metadata say.
    """
    k = len(lead)
    shape = stored.shape[k:]
    chunks = [
        chunk
        for chunk in stored.near(lead)
        if all(o <= i < o + s for i, o, s in zip(lead, chunk.offsets, chunk.sizes, strict=False))
    ]
    if not shape:  # one number
        if len(chunks) != 1:
            raise ArchiveError(f"{stored.name} is not whole: {len(chunks)} chunks of one number")
        inner = tuple(i - o for i, o in zip(lead, chunks[0].offsets, strict=True))
        return _part(stored, chunks[0], fetch, inner, (0, 1)).view(())
    spans = list(rows) or [(0, shape[0])]
    parts, total = [], 0
    for first, last in spans:
        boxes = []
        for chunk in chunks:
            low, high = max(first, chunk.offsets[k]), min(last, chunk.offsets[k] + chunk.sizes[k])
            if low < high:
                inner = (*(i - o for i, o in zip(lead, chunk.offsets, strict=False)),)
                here = (low - chunk.offsets[k], high - chunk.offsets[k])
                boxes.append((chunk, low - first, _part(stored, chunk, fetch, inner, here)))
        parts.append(_assembled(stored, boxes, (last - first, *shape[1:]), k))
        total += last - first
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _assembled(
    stored: Stored, boxes: list[tuple[Chunk, int, Tensor]], shape: Sequence[int], k: int
) -> Tensor:
    if len(boxes) == 1 and tuple(boxes[0][2].shape) == tuple(shape):
        return boxes[0][2]
    if sum(part.numel() for _, _, part in boxes) != math.prod(shape):
        raise ArchiveError(f"{stored.name} is not whole: the chunks do not fill its shape")
    out = torch.full(shape, math.nan, dtype=stored.dtype)  # an overlap leaves a hole: never read 0
    for chunk, row, part in boxes:
        index = [slice(row, row + part.shape[0])]
        index += [
            slice(o, o + s)
            for o, s in zip(chunk.offsets[k + 1 :], chunk.sizes[k + 1 :], strict=True)
        ]
        out[tuple(index)] = part
    return out


def _part(stored: Stored, chunk: Chunk, fetch: Fetch, inner: tuple[int, ...], rows: Span) -> Tensor:
    """Rows of a chunk below its leading index ``inner``."""
    what = f"{chunk.file} (bytes {chunk.start} to {chunk.start + chunk.length}, {stored.name})"
    left = chunk.sizes[len(inner) :]
    row = math.prod(left[1:])
    first = rows[0] * row
    for position, index in enumerate(inner):
        first += index * math.prod(chunk.sizes[position + 1 :])
    count = (rows[1] - rows[0]) * row
    size = stored.dtype.itemsize
    if count * size * 2 > chunk.length or chunk.length <= 2 * _EDGE:
        whole = _fetched(fetch, chunk, 0, chunk.length, what)
        start = _values(stored, chunk, whole, 0, whole, what)
        data = whole[start + first * size :][: count * size]
    else:
        head = _fetched(fetch, chunk, 0, _EDGE, what)
        at = chunk.length - _EDGE
        start = _values(stored, chunk, head, at, _fetched(fetch, chunk, at, _EDGE, what), what)
        data = _fetched(fetch, chunk, start + first * size, count * size, what)
    if data.readonly or (start + first * size) % size:
        data = memoryview(bytearray(data))
    return torch.frombuffer(data, dtype=stored.dtype).view(rows[1] - rows[0], *left[1:])


def _fetched(fetch: Fetch, chunk: Chunk, start: int, length: int, what: str) -> memoryview:
    data = memoryview(fetch(chunk.file, chunk.start + start, length))
    if len(data) != length:
        raise ArchiveError(f"{what} is cut short; copy the checkpoint again")
    return data


def _of_ends(head: memoryview, at: int, tail: memoryview) -> torch_zip.Seekable:
    """A file of which only the first bytes, and the last from a place on, are at hand."""

    def fetch(start: int, stop: int) -> bytes:
        if start >= at:
            return bytes(tail[start - at : stop - at])
        if stop <= len(head):
            return bytes(head[start:stop])
        raise zipfile.BadZipFile("its pickle is not among its first bytes")

    return torch_zip.Seekable(at + len(tail), fetch)


def _values(
    stored: Stored, chunk: Chunk, head: memoryview, at: int, tail: memoryview, what: str
) -> int:
    """Where in a chunk its values begin, once its own description fits the metadata's."""
    try:
        saved = torch_zip.directory(_of_ends(head, at, tail), what, _LARGEST_PICKLE)
        tensor = pickles.load(saved.pickled, _CHUNK_ADMITTED, what)
        storage, offset, sizes, strides = tensor.arguments[:4]
        sizes, strides = _sizes(sizes), _sizes(strides)
        _, kind, key, _, _ = storage.arguments[0]
        holds = _STORAGES.get(kind.name)
        values = saved.entries[f"data/{key}"]
        name, extra = struct.unpack("<HH", head[values.header_offset + 26 :][:4])
    except ArchiveError:
        raise
    except Exception as error:
        raise ArchiveError(
            f"{what} is damaged ({type(error).__name__}: {error}); copy the checkpoint again"
        ) from error
    contiguous = tuple(math.prod(chunk.sizes[i + 1 :]) for i in range(len(chunk.sizes)))
    begin = values.header_offset + 30 + name + extra
    size = stored.dtype.itemsize
    if holds != stored.dtype or not saved.little:
        raise ArchiveError(f"{what} holds {holds}, its metadata say {stored.dtype}")
    if sizes != chunk.sizes or not _same(strides, contiguous, sizes) or type(offset) is not int:
        raise ArchiveError(f"{what} holds a tensor of shape {sizes}, wanted {chunk.sizes}")
    needed = (offset + math.prod(sizes)) * size
    if offset < 0 or needed > values.file_size or begin + values.file_size > chunk.length:
        raise ArchiveError(f"{what} has fewer values than its shape needs")
    return int(begin + offset * size)


def _same(strides: Any, wanted: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    """Strides of dimensions of one say nothing."""
    return len(strides) == len(wanted) and all(
        a == b or s == 1 for a, b, s in zip(strides, wanted, sizes, strict=True)
    )
