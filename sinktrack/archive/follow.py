"""Checkpoints of a run in progress: taken once they are complete and no longer change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sinktrack.archive.files import Files
from sinktrack.archive.source import Checkpoint, open
from sinktrack.errors import ArchiveError


class Watch:
    """Looks at an archive again and again."""

    def __init__(self, archive: str | Path, find: Callable[[], list[Checkpoint]]) -> None:
        self._files, self._find = Files(archive), find
        self._seen: dict[Files, dict[str, tuple[Any, ...]]] = {}
        self._given: dict[Files, dict[str, tuple[Any, ...]]] = {}

    def look(self) -> list[Checkpoint]:
        """Checkpoints that are complete and look as they did at the last look, in step order.

        One that was given before is given again only after its files changed.
        """
        self._files.refresh()
        try:
            found = self._find()
        except ArchiveError:  # nothing there yet, or not for the moment
            found = []
        ready, seen = [], {}
        for checkpoint in found:
            files = checkpoint.files
            try:
                seen[files] = files.stamps()
            except ArchiveError:  # deleted meanwhile
                continue
            stable = seen[files] == self._seen.get(files)
            if stable and seen[files] != self._given.get(files) and is_complete(checkpoint):
                self._given[files] = seen[files]
                ready.append(checkpoint)
        self._seen = seen
        return ready


def is_complete(checkpoint: Checkpoint) -> bool:
    """Whether all that a checkpoint names is there, each file as long as its header says."""
    try:
        source = open(checkpoint)
        for name in source.names():
            source.slice(name)
    except ArchiveError:
        return False
    return True


def looks(
    archive: str | Path, find: Callable[[], list[Checkpoint]], seconds: float
) -> Iterator[list[Checkpoint]]:
    """What each look gives, without end, every so many seconds."""
    watch = Watch(archive, find)
    while True:
        yield watch.look()
        time.sleep(seconds)
