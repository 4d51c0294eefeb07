"""Which process works on a run: locks of the kernel, which end with their process.

A lock's file says who has it, for those who find it taken. Some file systems have no locks (Lustre
mounted without ``flock``), and Windows has none of this kind: there, nobody finds one taken.
"""

from __future__ import annotations

import errno
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_UNKNOWN = {
    errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOTTY,
}  # fmt: skip
"""What a file system without locks answers."""
_kept: dict[Path, int] = {}
"""Locks that this process holds until it ends; the processes that it forks do not."""
_parents: set[Path] = set()
"""Those of the process that this one was forked from, which may record in its place."""


def lock(descriptor: int, *, wait: bool = True) -> bool:
    """Lock an open file; False where its file system has no locks.

    Raises:
        BlockingIOError: another process has the lock, and ``wait`` is false.
        OSError: anything else.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _UNKNOWN:
            return False
        raise
    return True


def take(path: Path) -> tuple[int, str | None]:
    """The file's descriptor, locked as long as it is open; or, not locked, and who has the lock.

    Where the file system has no locks it is not locked, and nobody has the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock(descriptor, wait=False)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        here = f"process {os.getpid()} on {platform.node()} since {now}\n"
        os.write(descriptor, here.encode())
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        return descriptor, holder or "another process"
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, None


def keep(path: Path) -> str | None:
    """Take a lock until this process ends; who has it, if another process does.

    None also where the file system has no locks.
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


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=let_go)
