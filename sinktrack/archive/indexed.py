"""Weights in one file, or in several that an index lists."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import PurePosixPath
from threading import Lock
from typing import ClassVar, Generic, TypeVar

from sinktrack.archive.files import Files
from sinktrack.archive.huggingface import config
from sinktrack.archive.source import Checkpoint, Slice
from sinktrack.errors import ArchiveError

T = TypeVar("T")


class Indexed(ABC, Generic[T]):
    """Tensors by name; each file is looked into when the first of its tensors is asked for."""

    WEIGHTS: ClassVar[str]
    """The file, where there is but one."""
    INDEX: ClassVar[str]
    SUFFIX: ClassVar[str]
    """Of every file with weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.files = files = checkpoint.files
        self.config = config(checkpoint.config or files)
        self._lock = Lock()
        self._inside: dict[str, dict[str, T]] = {}
        if files.exists(self.INDEX):
            self._files = weight_map(files, self.INDEX, self.SUFFIX)
        else:
            self._files = dict.fromkeys(self._in(self.WEIGHTS), self.WEIGHTS)

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._files)

    def slice(self, name: str) -> Slice:
        """One tensor; its data are read when it is indexed.

        Raises:
            ArchiveError: there is no such tensor, or its file is missing or damaged.
        """
        file = self._files.get(name)
        found = self._in(file).get(name) if file is not None else None
        if file is None or found is None:
            raise ArchiveError(f"{self.files.path(file or self.INDEX)} holds no tensor {name!r}")
        return self._slice(file, found)

    def _in(self, file: str) -> dict[str, T]:
        with self._lock:
            if file not in self._inside:
                self._inside[file] = self._look(file)
            return self._inside[file]

    @abstractmethod
    def _look(self, file: str) -> dict[str, T]:
        """What a file holds, by name."""

    @abstractmethod
    def _slice(self, file: str, found: T) -> Slice:
        """Access to what `_look` found."""


def weight_map(files: Files, index: str, suffix: str) -> dict[str, str]:
    """The file of each tensor, by a sharded checkpoint's index.

    Raises:
        ArchiveError: the index is damaged, or names what is not a file of its directory.
    """
    found = files.read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ArchiveError(f"{files.path(index)} has no weight_map; the checkpoint is damaged")
    for shard in set(map(str, found.values())):
        if PurePosixPath(shard).name != shard or "\0" in shard or not shard.endswith(suffix):
            raise ArchiveError(
                f"{files.path(index)} names {shard[:200]!r}, which is not a file of its directory"
            )
    return {str(name): str(shard) for name, shard in found.items()}
