"""A directory of files, on this machine or behind a URL, read by byte ranges."""

from __future__ import annotations

import asyncio
import difflib
import json
import os
import re
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch

from sinktrack.archive.storage.ahead import Ahead
from sinktrack.errors import ArchiveError, SinktrackError, one_line, require

_LARGEST_JSON = 64 * 2**20
_MOST_JSON_VALUES = 4_000_000
_MOST_REMOTE_ENTRIES = 1_000_000
_MOST_STAMPS = 10_000
_AHEAD = 64 * 2**10
"""Small remote reads take blocks of this many bytes, so that neighbouring ones cost one request."""
_ADVISED = 128 * 2**10
"""Bytes of a local file announced at a time: of more Linux reads the beginning, unless told to."""
_LATELY = 60
"""Seconds for which it is believed that a remote file is not there."""
_KEPT = 8
"""Blocks that are kept of a file, and files of which some are."""
_BETWEEN = 64 * 2**10
"""Bytes between two announced places that are read with them: less than a request costs."""
_PART = 16 * 2**20
"""A larger remote read is split into parts of this size, a few in flight at a time."""
_IN_FLIGHT = 4
_ATTEMPTS = 4
_POINTER = b"version https://git-lfs.github.com/spec/"
_SHORTEST_POINTER, _LONGEST_POINTER = 80, 1024
"""Bytes of what Git LFS leaves in the place of a file."""
_READ: dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]] = {}
"""What `Files.once` keeps, by what was read and where."""
_MOST_READ = 100_000
_STORES = {"s3", "gs", "gcs", "az", "abfs"}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_SHOWN = 3
"""Names that stand beside a place where there is nothing, in a message."""
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist")
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """What a directory holds under one name."""

    name: str
    directory: bool
    dangling: bool = False
    """Whether it is a link to what is not there."""


class Files:
    """A directory and what lies below it.

    Nothing outside ``boundary`` is read, whatever names or symbolic links say. May be pickled, and
    read by several threads.
    """

    def __init__(self, location: str | Path, boundary: str | None = None) -> None:
        text = str(location)
        self.local = "://" not in text
        self.location = (
            os.path.abspath(os.path.expanduser(text)) if self.local else text.rstrip("/")
        )
        """An absolute path, or a URL without a slash at its end."""
        self.boundary = boundary or (_boundary(self.location) if self.local else self.location)
        self._meter = _Meter()
        self._blocks: OrderedDict[str, Any] = OrderedDict()
        self._infos: dict[str, dict[str, Any]] = {}
        self._missed: dict[str, float] = {}
        """Remote files that were not there, and when."""
        self._listing: tuple[float, dict[str, dict[str, Any]] | None] | None = None
        """When a remote directory was listed, and what it held, if that was told."""
        self._listing_lock = Lock()
        self._lock = Lock()
        self._ahead = Ahead(self._in_parts, _BETWEEN)

    def __reduce__(self) -> tuple[Any, ...]:
        return Files, (self.location, self.boundary)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Files) and self.location == other.location

    def __hash__(self) -> int:
        return hash(self.location)

    def __repr__(self) -> str:
        return f"Files({self.location!r})"

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.location.rsplit("/", 1)[-1]

    @property
    def bytes_read(self) -> int:
        """So far, here and in directories reached with :meth:`at`, read-ahead included."""
        return self._meter.total

    def at(self, name: str) -> Files:
        """The directory ``name`` below this one."""
        below = Files(self.path(name), self.boundary)
        below._meter = self._meter
        return below

    def path(self, name: str) -> str:
        """The full path or URL of a file; for messages, too."""
        return f"{self.location}/{name}"

    def entries(self) -> Iterator[Entry]:
        """What is here, in no order.

        Raises:
            ArchiveError: it is not a directory, or cannot be read.
        """
        if not self.local:
            for info in self._listed():
                yield Entry(_own_name(info), info.get("type") == "directory")
            return
        try:
            with os.scandir(self.location) as scanned:
                for entry in scanned:
                    dangling = entry.is_symlink() and not os.path.exists(entry.path)
                    yield Entry(entry.name, not dangling and entry.is_dir(), dangling)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ArchiveError(f"{self.location} is not a directory") from error
        except OSError as error:
            raise ArchiveError(f"cannot read {self.location}: {error.strerror}") from error

    def exists(self, name: str) -> bool:
        """Whether there is something of that name; reading it may still be refused.

        Raises:
            ArchiveError: a remote place cannot be asked.
        """
        if self.local:
            return os.path.exists(self.path(name))
        try:
            self._info(name)
        except _Missing:
            return False
        return True

    def size(self, name: str) -> int:
        """Bytes in a file.

        Raises:
            ArchiveError: missing, no ordinary file, not to be read, or a Git LFS pointer.
        """
        size = self._size(name)
        if (
            _SHORTEST_POINTER <= size <= _LONGEST_POINTER
            and self.read(name, 0, len(_POINTER)) == _POINTER
        ):
            raise ArchiveError(
                f"{self.path(name)} is a Git LFS pointer, not the file itself: run `git lfs pull` "
                "in its repository"
            )
        return size

    def _size(self, name: str) -> int:
        if self.local:
            with self._opened(name) as descriptor:
                return os.fstat(descriptor.number).st_size
        info = self._info(name)
        size = info.get("size")
        if info.get("type") != "file" or not isinstance(size, int):
            raise ArchiveError(f"{self.path(name)} is not a file of known size")
        return size

    def stamp(self, name: str) -> tuple[Any, ...] | None:
        """What changes when a file does: its size, and when or as what it was written.

        None where there is no such file.

        Raises:
            ArchiveError: a remote place cannot be asked.
        """
        if self.local:
            try:
                return _stamp(os.stat(self.path(name)))
            except (OSError, ValueError):
                return None
        try:
            return _remote_stamp(self._info(name))
        except _Missing:
            return None

    def once(self, read: Callable[[Files], T], *names: str) -> T:
        """What ``read`` makes of this directory; kept until one of these files changes."""
        stamps = tuple(map(self.stamp, names))
        key = read.__module__, read.__qualname__, self.location, names
        kept = _READ.get(key)
        if kept is None or kept[0] != stamps:
            _READ[key] = kept = stamps, read(self)
            while len(_READ) > _MOST_READ:
                _READ.pop(next(iter(_READ)), None)
        value: T = kept[1]
        return value

    def stamps(self) -> dict[str, tuple[Any, ...]]:
        """Of each file here, what changes when it does: size, and when or as what it was written.

        Raises:
            ArchiveError: it is not a directory, cannot be read, or holds too much.
        """
        if self.local:
            stamps: dict[str, tuple[Any, ...]] = {}
            for entry in self.entries():
                if not entry.directory and len(stamps) < _MOST_STAMPS:
                    with suppress(OSError):  # deleted meanwhile
                        stamps[entry.name] = _stamp(os.stat(self.path(entry.name)))
            return stamps
        return {str(info["name"]): _remote_stamp(info) for info in self._listed()}

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Exactly the bytes ``start`` to ``stop`` of a file, in memory of their own.

        Raises:
            ArchiveError: the file is missing, shorter, or not to be read.
        """
        if not self.local and stop > start:
            announced = self._ahead.take(name, start, stop)
            return self._read_remote(name, start, stop) if announced is None else announced
        buffer = self._room(name, stop - start)
        if stop > start:
            self._read_local(name, start, buffer)
        return buffer

    def _room(self, name: str, size: int) -> memoryview:
        try:
            room: memoryview = torch.empty(size, dtype=torch.uint8).numpy().data
        except RuntimeError as error:
            raise ArchiveError(f"no memory for {size} bytes of {self.path(name)}") from error
        return room

    def announce(self, name: str, spans: Iterable[tuple[int, int]]) -> None:
        """Have bytes of a file read that will be asked for soon, as far as memory allows.

        Of a local file the system reads them into its own cache; of a remote one they are on their
        way, and wait for `read`.

        Args:
            name: of the file.
            spans: first byte and the one behind the last; each will be read once and as a whole.

        Raises:
            ArchiveError: a local file is missing or not to be read.
        """
        if not self.local:
            self._ahead.announce(name, spans)
        elif hasattr(os, "posix_fadvise"):  # elsewhere than on macOS and Windows
            with self._opened(name) as descriptor, suppress(OSError):
                for start, stop in spans:
                    for place in range(start, stop, _ADVISED):
                        size = min(_ADVISED, stop - place)
                        os.posix_fadvise(descriptor.number, place, size, os.POSIX_FADV_WILLNEED)

    def forget_announced(self) -> None:
        """Let go of remote bytes that were announced and never read."""
        self._ahead.forget()

    def whole(self, name: str, largest: int) -> bytes:
        """All of a small file.

        Raises:
            ArchiveError: it is missing, larger than ``largest`` bytes, or not to be read.
        """
        size = self.size(name)
        if size > largest:
            raise ArchiveError(f"{self.path(name)} has {size} bytes, more than {largest}")
        return bytes(self.read(name, 0, size))

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object from a file of bounded size.

        Raises:
            ArchiveError: missing, too large, or not a JSON object.
        """
        data = self.whole(name, _LARGEST_JSON)
        try:
            parsed = parse_json(data)
        except ValueError as error:
            raise ArchiveError(
                f"{self.path(name)} is not valid JSON ({error}); the checkpoint is damaged"
            ) from error
        if not isinstance(parsed, dict):
            raise ArchiveError(
                f"{self.path(name)} does not hold a JSON object; the checkpoint is damaged"
            )
        return parsed

    def refresh(self) -> None:
        """Forget what a remote directory was seen to hold."""
        if not self.local:
            _filesystem(self.location).invalidate_cache()
            self._blocks.clear()
            self._infos.clear()
            self._missed.clear()
            self._listing = None

    def real_path(self, name: str) -> str:
        """Where a local file is once links are followed.

        Raises:
            ArchiveError: outside the boundary.
        """
        path = self.path(name)
        real = os.path.realpath(path)
        if os.path.commonpath([self.boundary, real]) != self.boundary:
            raise ArchiveError(f"{path} leads out of {self.boundary}, to {real}; it is not read")
        return real

    def _opened(self, name: str) -> _Descriptor:
        path, real = self.path(name), self.real_path(name)
        try:
            number = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _missing(path) from error
        except OSError as error:
            raise ArchiveError(f"cannot read {path}: {error.strerror}") from error
        descriptor = _Descriptor(number)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            descriptor.__exit__()
            raise ArchiveError(f"{path} is not an ordinary file")
        return descriptor

    def _read_local(self, name: str, start: int, buffer: memoryview) -> None:
        done = 0
        with self._opened(name) as descriptor:
            while done < len(buffer):
                try:
                    count = os.preadv(descriptor.number, [buffer[done:]], start + done)
                except OSError as error:
                    raise ArchiveError(
                        f"cannot read {self.path(name)}: {error.strerror}"
                    ) from error
                if count == 0:
                    raise self._truncated(name)
                done += count
        self._meter.add(done)

    def _read_remote(self, name: str, start: int, stop: int) -> memoryview:
        if stop - start >= _AHEAD:
            return self._in_parts(name, start, stop)
        data = self._from_blocks(name, start, stop)
        if len(data) != stop - start:
            raise self._truncated(name)
        buffer = self._room(name, stop - start)
        buffer[:] = data
        return buffer

    def _in_parts(self, name: str, start: int, stop: int) -> memoryview:
        """Exactly these bytes of a remote file, of many a few parts at a time."""
        length = stop - start
        buffer = self._room(name, length)

        def fetch(offset: int) -> None:
            size = min(_PART, length - offset)
            data = self._fetch(name, start + offset, start + offset + size)
            if len(data) != size:
                raise self._truncated(name)
            buffer[offset : offset + size] = data

        if length <= _PART:
            fetch(0)
            return buffer
        with ThreadPoolExecutor(_IN_FLIGHT) as pool:
            list(pool.map(fetch, range(0, length, _PART)))
        return buffer

    def _info(self, name: str) -> dict[str, Any]:
        """What a remote file system says of a file; asked once.

        A store's directory is listed: one request for all of its files, those that are not there
        among them.
        """
        if name not in self._infos:
            alone = "/" in name or self.location.startswith("http")  # a page may list but a part
            listed = None if alone else self._listed_lately()
            if listed is None:
                self._infos[name] = self._asked(name)
            elif name in listed:
                self._infos[name] = listed[name]
            else:
                raise _missing(self.path(name))
        return self._infos[name]

    def _asked(self, name: str) -> dict[str, Any]:
        """What a remote file system says of one file."""
        path, now = self.path(name), time.monotonic()
        if now - self._missed.get(name, -_LATELY) < _LATELY:
            raise _missing(path)
        try:
            info: dict[str, Any] = self._retried(name, lambda: _filesystem(path).info(path))
        except _Missing:
            self._missed[name] = now
            raise
        return info

    def _listed_lately(self) -> dict[str, dict[str, Any]] | None:
        """What is here by name, nothing where there is no directory; None if that is not told."""
        with self._listing_lock:  # several threads ask for one list
            now = time.monotonic()
            if self._listing is None or now - self._listing[0] > _LATELY:
                listed: dict[str, dict[str, Any]] | None
                try:
                    listed = {_own_name(info): info for info in self._ls()}
                except _Missing:
                    listed = {}
                except ArchiveError:  # as where one may read, but not list
                    listed = None
                self._listing = now, listed
            return self._listing[1]

    def _from_blocks(self, name: str, start: int, stop: int) -> bytes:
        """A few bytes, from blocks that are kept or fetched now."""
        caching = require("fsspec.caching", "remote")
        with self._lock:
            if name not in self._blocks:
                size = self._size(name)
                self._blocks[name] = caching.BlockCache(
                    _AHEAD, lambda at, to: self._fetch(name, at, min(to, size)), size, _KEPT
                )
                if len(self._blocks) > _KEPT:
                    self._blocks.popitem(last=False)
            data: bytes = self._blocks[name]._fetch(start, stop)
            return data

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        path = self.path(name)
        # the hub's files read ahead by megabytes unless told not to
        options = {"cache_type": "none"} if path.startswith("hf://") else {}
        data: bytes = self._retried(
            name, lambda: _filesystem(path).cat_file(path, start=start, end=stop, **options)
        )
        self._meter.add(len(data))
        return data

    def _listed(self) -> list[dict[str, Any]]:
        try:
            return self._ls()
        except _Missing as error:
            raise _Missing(self._nothing_here()) from error

    def _ls(self) -> list[dict[str, Any]]:
        system = _filesystem(self.location)
        listed: list[dict[str, Any]] = self._retried(
            "", lambda: system.ls(self.location, detail=True)
        )
        if len(listed) > _MOST_REMOTE_ENTRIES:
            raise ArchiveError(f"{self.location} holds {len(listed)} entries; name a part of it")
        return listed

    def _nothing_here(self) -> str:
        """What is said of a remote directory that is not there: what stands beside it."""
        scheme, _, path = self.location.partition("://")
        parts = path.split("/")
        said = f"there is nothing at {self.location}"
        if scheme not in _STORES:
            return said
        for length in range(len(parts) - 1, 0, -1):
            above, name = f"{scheme}://{'/'.join(parts[:length])}", parts[length]
            try:
                listed = _filesystem(above).ls(above, detail=True)
            except FileNotFoundError:
                continue
            except Exception:  # the place that was asked for is told, whatever this one answers
                return said
            neighbours = {_own_name(one): one for one in listed}
            if name in neighbours and neighbours[name].get("type") == "file":
                return f"{above}/{name} is a file; name the directory that it is in: {above}"
            shown = ", ".join(sorted(neighbours)[:_SHOWN]) + (
                ", ..." if len(neighbours) > _SHOWN else ""
            )
            near = difflib.get_close_matches(name, neighbours, n=1)
            return f"{said}: {above} holds {shown}" + (
                f"; there is {above}/{near[0]}" if near else ""
            )
        return f"{said}: {scheme}://{parts[0]} is empty"

    def _retried(self, name: str, call: Callable[[], T]) -> T:
        """What a remote call answers; tried again where the network may be at fault."""
        path = self.path(name) if name else self.location
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return call()
            except SinktrackError:
                raise
            except (FileNotFoundError, NotADirectoryError) as error:
                raise _missing(path) from error
            except (PermissionError, ValueError, NotImplementedError) as error:
                raise ArchiveError(f"cannot read {path}: {_told(error)}") from error
            except (Exception, asyncio.CancelledError) as error:  # each store has its own
                if _NO_BUCKET.search(str(error)):
                    raise ArchiveError(_no_bucket(path)) from error
                if attempt == _ATTEMPTS or _refused(error):
                    raise ArchiveError(f"cannot read {path}: {_told(error)}") from error
                time.sleep(0.1 * 4**attempt)
        raise AssertionError

    def _truncated(self, name: str) -> ArchiveError:
        return ArchiveError(f"{self.path(name)} is truncated; copy the checkpoint again")


def parse_json(data: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text, in bounded memory.

    Raises:
        ValueError: it is not valid, nested too deep, or of too many values.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > _MOST_JSON_VALUES:
        raise ValueError(f"it holds more than {_MOST_JSON_VALUES} values")
    try:
        return json.loads(data, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _stamp(status: os.stat_result) -> tuple[Any, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _own_name(info: dict[str, Any]) -> str:
    """Of a remote entry, without the directories that it is in."""
    return str(info["name"]).rstrip("/").rsplit("/", 1)[-1]


def _remote_stamp(info: dict[str, Any]) -> tuple[Any, ...]:
    keys = ("size", "e_tag", "ETag", "blob_id", "last_modified", "LastModified")
    return tuple(str(info.get(key)) for key in keys)


class _Missing(ArchiveError):
    """There is no such file."""


def _missing(path: str) -> _Missing:
    cure = "is the checkpoint still being written?"
    if path.endswith("/config.json"):
        cure += "; or give --hf-config (hf_config)"
    return _Missing(f"{path} is missing; {cure}")


class _Meter:
    """Counts bytes for several threads."""

    def __init__(self) -> None:
        self.total, self._lock = 0, Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.total += count


@dataclass(frozen=True)
class _Descriptor:
    """An open file, closed on leaving."""

    number: int

    def __enter__(self) -> _Descriptor:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.number)


def _boundary(path: str) -> str:
    """Of a local directory: itself, or the hub cache's model directory that a snapshot links to."""
    real = Path(os.path.realpath(path))
    for parent in (real, *real.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            return str(parent.parent.parent)
    return str(real)


def _filesystem(url: str) -> Any:
    """The file system of fsspec that a URL belongs to.

    Raises:
        MissingExtra: what it needs is not installed.
        ArchiveError: no file system is known for it.
    """
    protocol = url.partition("://")[0]
    fsspec = require("fsspec", "remote")
    if protocol in _STORES:
        require("obstore.fsspec", "remote").register(protocol)
    elif protocol in ("http", "https"):
        require("aiohttp", "remote")
    elif protocol == "hf":
        require("huggingface_hub", "remote")
    else:
        raise ArchiveError(f"{url}: wanted a directory, or a URL of s3, gs, az, hf or https")
    return fsspec.filesystem(protocol)


def _told(error: BaseException) -> str:
    """What a store says, out of the XML that some answer with, without its library's own state."""
    said = str(error).partition("Debug source:")[0].strip()
    code, text = (re.search(rf"<{tag}>(.*?)</{tag}>", said, re.S) for tag in ("Code", "Message"))
    if code or text:
        return ": ".join(" ".join(word[1].split()) for word in (code, text) if word)
    return one_line(Exception(said)) if said else one_line(error)


def _no_bucket(path: str) -> str:
    """What is said where a store knows no such bucket or container."""
    scheme, _, rest = path.partition("://")
    endpoint = next((name for name in _ENDPOINTS if scheme == "s3" and os.environ.get(name)), None)
    asked = f" at {os.environ[endpoint]} ({endpoint})" if endpoint else ""
    return (
        f"there is no bucket {rest.partition('/')[0]}{asked}, looked for {path}: are its name and "
        "the endpoint right?"
    )


def _refused(error: BaseException) -> bool:
    """Whether a server has decided, so that asking again is no use."""
    return type(error).__name__.startswith(("Permission", "Unauthenticated")) or bool(
        re.search(r"status code: 4(?!08|29)", str(error))
    )
