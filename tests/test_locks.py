"""A lock says who has it, and is free when its file is closed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from sinktrack import locks


def test_a_lock_says_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text(500 * "of one that ended long ago ")
    held, nobody = locks.take(path)
    text = path.read_text()
    here = f"process {os.getpid()} on {re.escape(os.uname().nodename)}"
    assert nobody is None
    assert re.fullmatch(here + r" since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00\n", text)
    for content, told in (
        (text.encode(), text.strip()), (b"", "another process"), (b"pid \xff", "pid \ufffd"),
    ):  # fmt: skip
        path.write_bytes(content)
        refused, holder = locks.take(path)
        assert holder == told and path.read_bytes() == content
        os.close(refused)
    os.close(held)
    free, nobody = locks.take(path)
    assert nobody is None and path.read_text()[:40] == text[:40]
    os.close(free)


def test_a_lock_that_cannot_be_taken_leaves_nothing_open(tmp_path: Path) -> None:
    held, _ = locks.take(tmp_path / "run.lock")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        locks.take(tmp_path / "nowhere" / "run.lock")
    with pytest.raises(OSError, match="Invalid argument"):
        locks.take(Path("/dev/full"))  # opens, and cannot hold a word
    assert locks.keep(tmp_path / "nowhere" / "run.lock") is None
    assert (locks.keep(tmp_path / "run.lock") or "").startswith(f"process {os.getpid()} on ")
    assert os.listdir("/proc/self/fd") == before
    os.close(held)


def test_a_lock_ends_with_its_process_whoever_it_forked(tmp_path: Path) -> None:
    path = tmp_path / "train.lock"
    reading, writing = os.pipe()
    keeper = os.fork()
    if not keeper:
        nobody = locks.keep(path)
        if not os.fork():  # a data loader's worker, which outlives its trainer
            mine = locks.keep(path)
            os.read(reading, 1)
            os._exit(mine is not None)
        os._exit(nobody is not None)
    assert os.waitpid(keeper, 0)[1] == 0
    free, nobody = locks.take(path)
    os.write(writing, b"x")
    assert nobody is None
    for descriptor in (free, reading, writing):
        os.close(descriptor)
