"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a file system answers that has no fsync, or none of directories."""


def write(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file's content.

    Args:
        path: the file.
        data: what it will hold.
        durable: be on disk before this returns.

    Raises:
        OSError: it cannot be written; what was there before is still there, and nothing else.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                flush(descriptor)
        with suppress(OSError):  # some file systems have no modes
            os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    if durable:
        sync(path.parent)


def sync(directory: Path) -> None:
    """Flush the names in a directory to disk."""
    if os.name == "nt":  # where a directory cannot be opened
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    """Flush to disk, where the file system knows how to."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
