"""Which process works on a run: locks of the kernel, which end with their process.

A lock's file says who has it, for those who find it taken.
"""

from __future__ import annotations

import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path

_kept: dict[Path, int] = {}
"""Locks that this process holds until it ends; the processes that it forks do not."""
_parents: set[Path] = set()
"""Those of the process that this one was forked from, which may record in its place."""


def take(path: Path) -> tuple[int, str | None]:
    """The file's descriptor, locked as long as it is open; or, not locked, and who has the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        here = f"process {os.getpid()} on {os.uname().nodename} since {now}\n"
        os.pwrite(descriptor, here.encode(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        return descriptor, holder or "another process"
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, None


def keep(path: Path) -> str | None:
    """Take a lock until this process ends; who has it, if another process does.

    None also where the file system knows no locks.
    """
    if path in _kept or path in _parents:
        return None
    try:
        descriptor, holder = take(path)
    except OSError:
        return None
    if holder is None:
        _kept[path] = descriptor
        return None
    os.close(descriptor)
    return holder


def let_go() -> None:
    """Give up what this process keeps; a forked child does, and leaves it to its parent."""
    while _kept:
        path, descriptor = _kept.popitem()
        os.close(descriptor)
        _parents.add(path)


os.register_at_fork(after_in_child=let_go)
