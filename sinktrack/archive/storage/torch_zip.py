"""The zip archives that torch.save writes, over bytes that come from anywhere."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import NamedTuple

from sinktrack.errors import ArchiveError


class Seekable(io.RawIOBase):
    """A file for reading alone.

    Args:
        size: of the whole, in bytes.
        fetch: the bytes from one place up to another.
    """

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size, self._fetch, self._place = size, fetch, 0

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The place that is read next."""
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place."""
        self._place = max(0, (0, self._place, self._size)[whence] + offset)
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Up to so many bytes; all that are left by default."""
        start = self._place
        stop = self._size if size < 0 else min(self._size, start + size)
        if stop <= start:
            return b""
        data = self._fetch(start, stop)
        self._place += len(data)
        return data


class Directory(NamedTuple):
    """What an archive says of itself."""

    entries: dict[str, zipfile.ZipInfo]
    """By their names without the archive's own."""
    pickled: bytes
    """``data.pkl``."""
    little: bool
    """Are values stored in this machine's byte order?"""


def directory(file: Seekable, what: str, largest: int) -> Directory:
    """Read an archive's directory and its pickle, which is not opened here.

    Args:
        file: the archive.
        what: its name, for messages.
        largest: bytes that the pickle may have.

    Raises:
        ArchiveError: it is compressed, or the pickle is larger.
        Exception: any, where the archive is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(info.compress_type for info in entries.values()):
            raise ArchiveError(f"{what} is compressed, which torch.save never does")
        if entries["data.pkl"].file_size > largest:
            raise ArchiveError(f"{what} has a description of unreasonable size")
        order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
        return Directory(entries, archive.read(entries["data.pkl"]), order == b"little")
