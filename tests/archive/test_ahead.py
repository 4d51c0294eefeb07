"""Bytes that are announced are fetched once, together with their neighbours, and handed out."""

from __future__ import annotations

import threading
import time
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as some

from sinktrack import ArchiveError
from sinktrack.archive.storage import ahead
from sinktrack.archive.storage.ahead import Ahead

DATA = {name: Random(name).randbytes(5_000) for name in ("a", "b")}


class Server:
    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    def __call__(self, name: str, start: int, stop: int) -> memoryview:
        self.asked.append((name, start, stop))
        return memoryview(bytearray(DATA[name][start:stop]))


PLACES = some.lists(some.integers(0, 5_000), min_size=2, max_size=40, unique=True).map(sorted)


@given(places=PLACES, between=some.integers(0, 500), order=some.randoms(use_true_random=False))
def test_what_is_read_is_what_is_there(places: list[int], between: int, order: Random) -> None:
    spans = [
        (name, start, stop)
        for name in DATA
        for start, stop in zip(places[::2], places[1::2], strict=False)
    ]
    server = Server()
    coming = Ahead(server, between)
    for name in DATA:
        coming.announce(name, [(start, stop) for own, start, stop in spans if own == name])
        coming.announce(name, [(start, stop) for own, start, stop in spans if own == name])
    order.shuffle(spans)
    for name, start, stop in spans:
        found = coming.take(name, start, stop)
        assert found is not None and bytes(found) == DATA[name][start:stop]
    assert coming._bytes == 0 and not any(coming._coming.values())
    assert all(coming.take(*span) is None for span in spans)  # handed out once
    gaps = [after - before for before, after in zip(places[1::2], places[2::2], strict=False)]
    gaps = gaps[: len(places) // 2 - 1]
    assert len(server.asked) == 2 * (1 + sum(gap > between for gap in gaps))


def test_what_was_not_announced_is_not_there() -> None:
    coming = Ahead(Server(), 10)
    coming.announce("a", [(100, 200), (300, 300)])
    for name, start, stop in (("b", 100, 200), ("a", 99, 120), ("a", 150, 201), ("a", 300, 301)):
        assert coming.take(name, start, stop) is None
    assert coming.take("a", 100, 200) is not None


def test_no_more_than_some_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST", 250)
    coming, server = Ahead(Server(), 0), Server()
    coming._fetch = server
    coming.announce("a", [(place, place + 100) for place in (0, 200, 400, 600)])
    assert [coming.take("a", place, place + 100) is None for place in (400, 600)] == [True, True]
    assert coming.take("a", 0, 100) is not None
    coming.announce("a", [(400, 500)])  # there is room again
    assert coming.take("a", 400, 500) is not None
    coming.forget()
    assert coming.take("a", 200, 300) is None and coming._bytes == 0


def test_no_threads_are_left() -> None:
    """A scan holds all of its checkpoints."""
    before = threading.active_count()
    held = [Ahead(Server(), 0) for _ in range(20)]
    for coming in held:
        coming.announce("a", [(0, 10), (20, 30)])
        coming.take("a", 0, 10)
        coming.forget()
        coming.announce("a", [(0, 10)])  # may be read again
        assert coming.take("a", 0, 10) is not None
        coming.forget()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_large_neighbours_are_not_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_LARGEST", 1_000)
    server = Server()
    coming = Ahead(server, 0)
    coming.announce("a", [(0, 600), (600, 1_000), (1_000, 1_100), (1_100, 4_000)])
    for span in ((0, 600), (600, 1_000), (1_000, 1_100), (1_100, 4_000)):
        coming.take("a", *span)
    assert sorted(server.asked) == [("a", 0, 1_000), ("a", 1_000, 1_100), ("a", 1_100, 4_000)]


def test_many_threads_read_what_one_announced() -> None:
    server, found = Server(), {}
    coming = Ahead(server, 0)
    spans = [(place, place + 10) for place in range(0, 5_000, 10)]
    coming.announce("a", spans)

    def read(own: list[tuple[int, int]]) -> None:
        for span in own:
            data = coming.take("a", *span)
            assert data is not None
            found[span] = bytes(data)

    threads = [threading.Thread(target=read, args=(spans[at::8],)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {span: DATA["a"][slice(*span)] for span in spans} and len(server.asked) == 1


def test_what_cannot_be_fetched_is_told_where_it_is_read() -> None:
    def fetch(name: str, start: int, stop: int) -> memoryview:
        raise ArchiveError("no such file")

    coming = Ahead(fetch, 0)
    coming.announce("a", [(0, 10)])
    with pytest.raises(ArchiveError, match="no such file"):
        coming.take("a", 0, 10)
