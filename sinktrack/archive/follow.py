"""Checkpoints of a run in progress: taken once they are complete and no longer change."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sinktrack.archive.files import Files
from sinktrack.archive.source import Checkpoint, open
from sinktrack.errors import ArchiveError

_log = logging.getLogger("sinktrack")


class Watch:
    """Looks at an archive again and again."""

    def __init__(self, archive: str | Path, find: Callable[[], list[Checkpoint]]) -> None:
        self._files, self._find = Files(archive), find
        self._seen: dict[Files, dict[str, tuple[Any, ...]]] = {}
        self._given: dict[Files, dict[str, tuple[Any, ...]]] = {}
        self._awaited: dict[Files, dict[str, tuple[Any, ...]]] = {}

    def look(self) -> list[Checkpoint]:
        """Checkpoints that are complete and look as they did at the last look, in step order.

        One that was given before is given again only after its files changed. One that is not
        complete though its files stand still is told of in the log.
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
            if seen[files] != self._seen.get(files) or seen[files] == self._given.get(files):
                continue
            if (reason := lack(checkpoint)) is None:
                self._given[files] = seen[files]
                ready.append(checkpoint)
            elif seen[files] != self._awaited.get(files):
                self._awaited[files] = seen[files]
                _log.warning("waiting for %s, which is not complete: %s", checkpoint.name, reason)
        self._seen = seen
        return ready


def lack(checkpoint: Checkpoint) -> str | None:
    """Why not all that a checkpoint names is there, each file as long as its header says."""
    try:
        source = open(checkpoint)
        for name in source.names():
            source.slice(name)
    except ArchiveError as error:
        return str(error)
    return None


def looks(
    archive: str | Path, find: Callable[[], list[Checkpoint]], seconds: float
) -> Iterator[list[Checkpoint]]:
    """What each look gives, without end, every so many seconds."""
    watch = Watch(archive, find)
    while True:
        yield watch.look()
        time.sleep(seconds)
