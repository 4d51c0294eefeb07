"""A lock says who has it, and is free when its file is closed."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sinktrack import RecordError, Run
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.records import locks
from tests.helpers import models
from tests.helpers.records import record
from tests.helpers.trainings import PROBE, warnings


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
    asked, asking = os.pipe()
    keeper = os.fork()
    if not keeper:
        nobody = locks.keep(path)
        if not os.fork():  # a data loader's worker, which outlives its trainer
            mine = locks.keep(path)
            os.write(asking, b"x")
            os.read(reading, 1)
            os._exit(mine is not None)
        os.read(asked, 1)  # else the worker may come when there is no trainer, and take it
        os._exit(nobody is not None)
    assert os.waitpid(keeper, 0)[1] == 0
    free, nobody = locks.take(path)
    os.write(writing, b"x")
    assert nobody is None
    for descriptor in (free, reading, writing, asked, asking):
        os.close(descriptor)


def refuse(number: int) -> Any:
    """A call that the file system does not know."""

    def call(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lustre answers so: records are kept, it is told once, and a scanner may work too."""
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    tracker = SinkTracker(PROBE, tmp_path / "run", every=1, on_error="raise")
    model = models.llama(num_hidden_layers=2)
    for step in (1, 2):
        assert tracker.step(step, model) is not None
    with Run.open(tmp_path / "run").claimed():
        pass
    assert Run.read(tmp_path / "run").steps == [1, 2]
    (told,) = warnings(caplog)
    assert "has no locks: records are appended without; let one process" in told


def test_another_answer_to_a_lock_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(RecordError, match="cannot write to the run directory .* give another"):
        Run.open(tmp_path / "run")


@pytest.mark.parametrize("name", ["ftruncate", "fsync"])
def test_what_appending_needs_is_tried_at_the_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(tmp_path / "run")
    run.append(record(1))
    monkeypatch.setattr(os, name, refuse(errno.EIO))
    with pytest.raises(RecordError, match="cannot write to the run directory .*output error; give"):
        Run.open(tmp_path / "run")
    assert Run.read(tmp_path / "run").steps == [1]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_fsync_or_modes(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(number))
    monkeypatch.setattr(os, "chmod", refuse(errno.EPERM))
    run = Run.open(tmp_path / "run", PROBE)
    run.append(record(1, probe=PROBE.digest))
    assert Run.read(tmp_path / "run").steps == [1] and Run.read(tmp_path / "run").probe == PROBE


def test_a_system_without_locks_or_forks(tmp_path: Path) -> None:
    """As Windows is: the package is imported, and records are kept."""
    code = """
        import asyncio, os, sys, torch
        sys.modules["fcntl"] = None
        for name in ("register_at_fork", "pread", "pwrite"):
            delattr(os, name)
        import sinktrack
        run = sinktrack.Run.open(sys.argv[1])
        run.append({"schema": 2, "step": 5})
        with run.claimed():
            assert sinktrack.Run.open(sys.argv[1]).steps == [5]
        assert run.also_recorded_by() is None
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("has no locks") == 1
