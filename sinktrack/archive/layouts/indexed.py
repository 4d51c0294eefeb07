"""Weights in one file, or in several that an index lists.

Which of the files of a directory are the model is decided as transformers decides it: a single file
before an index, safetensors before pickles, and of an index all that its files hold.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import PurePosixPath
from threading import Lock
from typing import ClassVar, Generic, TypeVar

from sinktrack.archive.foreign import count, some
from sinktrack.archive.huggingface import base_prefix, config, is_text
from sinktrack.archive.source import Checkpoint, unwrapped
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.slices import Slice
from sinktrack.errors import ArchiveError

_log = logging.getLogger("sinktrack")
_ADAPTER = "adapter_config.json"
T = TypeVar("T")


class Indexed(ABC, Generic[T]):
    """Tensors by name; files are looked into when a name is asked for.

    Args:
        checkpoint: the directory.
        name: the file with the weights, or the index; by default as transformers chooses.

    Raises:
        ArchiveError: ``config.json`` or the index is missing, damaged or unknown, or transformers
            would load an adapter too.
    """

    WEIGHTS: ClassVar[str]
    """The file, where there is but one."""
    INDEX: ClassVar[str]
    SUFFIX: ClassVar[str]
    """Of every file with weights."""

    def __init__(self, checkpoint: Checkpoint, name: str | None = None) -> None:
        self.files = files = checkpoint.files
        self.config = config(checkpoint.config or files)
        self._lock = Lock()
        self._inside: dict[str, dict[str, T]] = {}
        explicit = getattr(self.config, "transformers_weights", None)
        if files.exists(_ADAPTER):
            raise ArchiveError(
                f"{files.path(_ADAPTER)} is of an adapter, which transformers adds to the weights "
                "beside it: merge it into them and save the model, or move it away"
            )
        if explicit is not None:
            name = _inside(files, "config.json", explicit, (".safetensors", _JSON))
        elif name is None:
            alone = files.exists(self.WEIGHTS) or not files.exists(self.INDEX)
            name = self.WEIGHTS if alone else self.INDEX
        self.name = name
        """The file with the weights, or the index."""
        self._map: dict[str, str] = {}
        if name.endswith(_JSON):
            self._map = weight_map(files, name, self.SUFFIX)
            self._shards = sorted(set(self._map.values()))
        else:
            self._shards = [name]

    @cached_property
    def _files(self) -> dict[str, str]:
        """The file of each tensor: of several the last, which transformers takes."""
        shard_of = {name: shard for shard in self._shards for name in self._in(shard)}
        if self._map and (wrong := [n for n, f in shard_of.items() if self._map.get(n) != f]):
            _log.warning(
                "%s does not list %s as the files hold them (%s); they are read as transformers "
                "reads them",
                self.files.path(self.name),
                count(len(wrong), "tensor"),
                some(wrong),
            )
        return self._map | shard_of

    @cached_property
    def _stored(self) -> dict[str, str]:
        return unwrapped(self._files, base_prefix(self.config) if is_text(self.config) else "")

    def names(self) -> list[str]:
        """Of all tensors, as the bare model calls them."""
        return list(self._stored)

    def slice(self, name: str) -> Slice:
        """One tensor; its data are read when it is indexed.

        Raises:
            ArchiveError: there is no such tensor, or its file is missing or damaged.
        """
        stored = self._stored.get(name, name)
        file = self._files.get(stored)
        tensor = self._in(file).get(stored) if file is not None else None
        if file is None or tensor is None:
            raise ArchiveError(f"{self.files.path(file or self.name)} holds no tensor {stored!r}")
        return self._slice(file, tensor)

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


_JSON = ".index.json"


def weight_map(files: Files, index: str, suffix: str) -> dict[str, str]:
    """The file of each tensor, by a sharded checkpoint's index.

    Raises:
        ArchiveError: the index is damaged, or names what is not a file of its directory.
    """
    mapped = files.read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise ArchiveError(f"{files.path(index)} has no weight_map; the checkpoint is damaged")
    for shard in set(map(str, mapped.values())):
        _inside(files, index, shard, (suffix,))
    return {str(name): str(shard) for name, shard in mapped.items()}


def _inside(files: Files, by: str, name: object, suffixes: tuple[str, ...]) -> str:
    """A file that another one names, if it is one of the same directory."""
    text = str(name)
    if PurePosixPath(text).name != text or "\0" in text or not text.endswith(suffixes):
        raise ArchiveError(
            f"{files.path(by)} names {text[:200]!r}, which is not a file of its directory"
        )
    return text
