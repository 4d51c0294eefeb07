"""Bytes of known length that come from elsewhere, as the file that `zipfile` wants."""

from __future__ import annotations

import io
from collections.abc import Callable


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
