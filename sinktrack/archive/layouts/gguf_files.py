"""GGUF of a finished model: one file, read by transformers' own reader and the package gguf.

All weights are made float32 at once, in memory: a model of that format is one that fits there. What
the file rounds stays rounded; its numbers are exactly what transformers computes with.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from sinktrack.archive.discover import checkpoint_at, file_checkpoint
from sinktrack.archive.huggingface import built, config_of
from sinktrack.archive.source import Checkpoint
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.mapped_torch_file import TensorSlice
from sinktrack.errors import ArchiveError, one_line, require

_PART = re.compile(r".*-[0-9]+-of-[0-9]+\.gguf")
_MAGIC = b"GGUF"


def find(files: Files) -> list[Checkpoint]:
    """The one file of that format in a directory; of several one must be named."""
    there = [entry.name for entry in files.entries() if entry.name.endswith(".gguf")]
    return [checkpoint for name in there if len(there) == 1 and (checkpoint := alone(files, name))]


def alone(files: Files, name: str) -> Checkpoint | None:
    """The checkpoint that one file is, or None."""
    if not name.endswith(".gguf") or files.stamp(name) is None or not files.size(name):
        return None
    at = checkpoint_at(files, "gguf_files")
    return file_checkpoint(files, "gguf_files", name, at.step, at.tokens)


def open(checkpoint: Checkpoint) -> GGUFSource:
    """A checkpoint's weights.

    Raises:
        ArchiveError: the file is remote, one of several parts, damaged, or of a family that
            transformers' reader does not know.
        MissingExtra: gguf is not installed.
    """
    return GGUFSource(checkpoint)


class GGUFSource:
    """Tensors by the names that transformers' model has for them; read whole when one is wanted."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        require("gguf", "gguf")
        self.files, name = checkpoint.files, checkpoint.file or ""
        where = self.files.path(name)
        if _PART.fullmatch(name):
            raise ArchiveError(f"{where} is one of several parts; join them with llama-gguf-split")
        if not self.files.local:
            raise ArchiveError(f"{where} is read from a disk alone; copy it to this machine")
        if bytes(self.files.read(name, 0, min(4, self.files.size(name)))) != _MAGIC:
            raise ArchiveError(f"{where} does not begin as GGUF does; copy it again")
        self._path = self.files.real_path(name)
        self.quantized = "gguf"
        """What the weights are stored as, for the record."""
        if checkpoint.config is not None or self.files.exists("config.json"):
            self.config = config_of(checkpoint)
        else:
            folder, _, file = self._path.rpartition("/")
            self.config = self._read(
                lambda: AutoConfig.from_pretrained(folder, gguf_file=file, local_files_only=True)
            )

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def slice(self, name: str) -> TensorSlice:
        """One tensor.

        Raises:
            ArchiveError: there is no such tensor.
        """
        if name not in self._tensors:
            raise ArchiveError(f"{self._path} holds nothing for {name!r}")
        return TensorSlice(self._tensors[name])

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        model = built(self.config, torch.float32)
        read = self._read(
            lambda: load_gguf_checkpoint(self._path, return_tensors=True, model_to_load=model)
        )
        return dict(read["tensors"])

    def _read(self, read: Any) -> Any:
        try:
            return read()
        except Exception as error:  # a damaged file can fail in any way
            raise ArchiveError(
                f"{self._path} cannot be read by transformers: {one_line(error)}"
            ) from error
