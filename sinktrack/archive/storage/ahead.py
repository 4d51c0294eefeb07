"""Bytes of remote files that are on their way before they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import torch

_REQUESTS = 8
"""At a time: a server answers each after a while."""
_LARGEST = 16 * 2**20
"""Bytes of neighbours that are asked for together."""
MOST = 512 * 2**20
"""Bytes that may be on their way or wait to be read; of more nothing is asked for ahead."""


@dataclass
class _Coming:
    """One request, and how many bytes of it nobody has read yet."""

    start: int
    stop: int
    unread: int
    data: Future[memoryview]


class Ahead:
    """What was announced of remote files, fetched while others compute.

    Args:
        fetch: gives the bytes of a file between two places, in memory of their own.
        between: bytes between two spans that are read with them, as another request costs more.
    """

    def __init__(self, fetch: Callable[[str, int, int], memoryview], between: int) -> None:
        self._fetch, self._between = fetch, between
        self._lock = Lock()
        self._coming: dict[str, list[_Coming]] = {}
        self._bytes = 0
        self._pool: ThreadPoolExecutor | None = None

    def announce(self, name: str, spans: Iterable[tuple[int, int]]) -> None:
        """Ask for bytes of a file that will be read soon, neighbours together.

        Args:
            name: of the file.
            spans: first byte and the one behind the last; each is read once and as a whole.
        """
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(_REQUESTS)
            coming = self._coming.setdefault(name, [])
            new = {
                span for span in spans
                if span[0] < span[1] and not any(_holds(one, *span) for one in coming)
            }  # fmt: skip
            for start, stop, read in _together(sorted(new), self._between):
                if self._bytes + stop - start > MOST:
                    return
                self._bytes += stop - start
                data = self._pool.submit(self._fetch, name, start, stop)
                coming.append(_Coming(start, stop, read, data))

    def take(self, name: str, start: int, stop: int) -> memoryview | None:
        """Announced bytes once they are here, in memory of their own; None of others.

        Raises:
            ArchiveError: they cannot be fetched.
        """
        with self._lock:
            coming = self._coming.get(name, [])
            found = next((one for one in coming if _holds(one, start, stop)), None)
            if found is None:
                return None
            found.unread -= stop - start
            if found.unread <= 0:
                coming.remove(found)
                self._bytes -= found.stop - found.start
        data = found.data.result()
        if len(data) == stop - start:
            return data
        own: memoryview = torch.empty(stop - start, dtype=torch.uint8).numpy().data
        own[:] = data[start - found.start : stop - found.start]
        return own

    def forget(self) -> None:
        """Let go of what nobody has read, and of the threads that fetched."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._coming, self._bytes = {}, 0
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def _holds(one: _Coming, start: int, stop: int) -> bool:
    return one.start <= start and stop <= one.stop


def _together(spans: Iterable[tuple[int, int]], between: int) -> list[tuple[int, int, int]]:
    """Spans, ascending, that are fetched together: from where to where, and bytes of the spans."""
    groups: list[tuple[int, int, int]] = []
    for start, stop in spans:
        if groups:
            first, last, read = groups[-1]
            if start - last <= between and max(stop, last) - first <= _LARGEST:
                groups[-1] = first, max(stop, last), read + stop - start
                continue
        groups.append((start, stop, stop - start))
    return groups
