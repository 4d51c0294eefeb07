"""Checkpoints of a run in progress: taken once they are complete and no longer change."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sinktrack.archive.discover import NoCheckpoint
from sinktrack.archive.source import Checkpoint, open
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

_Key = tuple[Files, str]
_Stamps = dict[str, tuple[Any, ...]]
_log = logging.getLogger("sinktrack")


class Watch:
    """Looks at an archive again and again."""

    def __init__(self, archive: str | Path, find: Callable[[], list[Checkpoint]]) -> None:
        self._files, self._find = Files(archive), find
        self._seen: dict[_Key, _Stamps] = {}
        self._given: dict[_Key, _Stamps] = {}
        self._awaited: dict[_Key, _Stamps] = {}
        self._said = ""

    def look(self) -> list[Checkpoint]:
        """Checkpoints that are complete and look as they did at the last look, in step order.

        One that was given before is given again only after its files changed. One that is not
        complete though its files stand still is told of in the log, once, and so is why an archive
        cannot be read.
        """
        self._files.refresh()
        ready: list[Checkpoint] = []
        seen: dict[_Key, _Stamps] = {}
        for checkpoint in self._found():
            key = checkpoint.files, checkpoint.name  # several revisions may be one directory
            try:
                stamps = checkpoint.files.stamps()
                own = {name: stamp for name, stamp in stamps.items() if _is(name, checkpoint.file)}
                seen[key] = own
            except ArchiveError:
                if checkpoint.reason is None:  # deleted meanwhile
                    continue
                seen[key] = {}
            if seen[key] != self._seen.get(key) or seen[key] == self._given.get(key):
                continue
            if (reason := lack(checkpoint)) is None:
                self._given[key] = seen[key]
                ready.append(checkpoint)
            elif seen[key] != self._awaited.get(key):
                self._awaited[key] = seen[key]
                _log.warning("waiting for %s, which is not complete: %s", checkpoint.name, reason)
        self._seen = seen
        return ready

    def _found(self) -> list[Checkpoint]:
        try:
            return self._find()
        except NoCheckpoint:
            return []
        except ArchiveError as error:  # not there yet, not for the moment, or for the user to mend
            if str(error) != self._said:
                self._said = str(error)
                _log.warning("waiting: %s", error)
            return []


def _is(path: str, file: str | None) -> bool:
    """Whether a file is of a checkpoint: any of its directory, or the one that it is."""
    return file is None or path.rsplit("/", 1)[-1] == file


def lack(checkpoint: Checkpoint) -> str | None:
    """Why not all that a checkpoint names is there, each file as long as its header says."""
    try:
        source = open(checkpoint)
        for name in source.names():
            source.slice(name)
    except ArchiveError as error:
        return str(error)
    return None


def poll(
    archive: str | Path, find: Callable[[], list[Checkpoint]], seconds: float
) -> Iterator[list[Checkpoint]]:
    """What each look gives, without end, every so many seconds."""
    watch = Watch(archive, find)
    while True:
        yield watch.look()
        time.sleep(seconds)
