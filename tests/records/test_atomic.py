"""A file is replaced once its content is on disk, or stays as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sinktrack import atomic


def test_content_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"old")
    synced: list[tuple[Path, bytes, bytes]] = []
    flush = os.fsync

    def watch(descriptor: int) -> None:
        flush(descriptor)
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((file, b"" if file.is_dir() else file.read_bytes(), path.read_bytes()))

    monkeypatch.setattr(os, "fsync", watch)
    atomic.write(path, b"newer")
    (file, written, there), (directory, _, named) = synced
    assert file.parent == tmp_path and file.name.startswith(".run.json.")
    assert (written, there) == (b"newer", b"old")
    assert (directory, named) == (tmp_path, b"newer")
    assert path.stat().st_mode & 0o777 == 0o644
    atomic.write(path, b"quick", durable=False)
    assert path.read_bytes() == b"quick" and len(synced) == 2


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(IsADirectoryError):
        atomic.write(tmp_path / "taken", b"x")
    with pytest.raises(FileNotFoundError):
        atomic.write(tmp_path / "nowhere" / "file", b"x")
    assert os.listdir(tmp_path) == ["taken"] and os.listdir("/proc/self/fd") == before
