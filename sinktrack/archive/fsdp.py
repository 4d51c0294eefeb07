"""Sharded checkpoints of FSDP, as the Trainer and Accelerate write them: ``pytorch_model_fsdp_0/``.

A ``torch.distributed.checkpoint`` (see ``dcp``) of a transformers model under its own names, saved
with ``SHARDED_STATE_DICT`` by any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sinktrack.archive import dcp
from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.files import Files
from sinktrack.archive.huggingface import config
from sinktrack.archive.source import NAMES, Checkpoint, Index
from sinktrack.errors import ArchiveError

FOLDER = "pytorch_model_fsdp_0"
_MODEL = "model."
"""The model's part of what is saved."""


def find(files: Files) -> list[Checkpoint]:
    """The directory itself; it counts once ``.metadata``, which is written last, is there."""
    return [checkpoint_at(files, "fsdp")] if files.exists(f"{FOLDER}/.metadata") else []


def open(checkpoint: Checkpoint) -> FsdpSource:
    """A checkpoint's weights.

    Raises:
        ArchiveError: ``.metadata`` or ``config.json`` is missing, damaged or unknown.
    """
    return FsdpSource(checkpoint)


class FsdpSource:
    """Tensors by name."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.files = checkpoint.files
        if checkpoint.config is None and not self.files.exists("config.json"):
            raise ArchiveError(
                f"{self.files.location} holds no config.json, as sharded checkpoints do not; give "
                "the configuration of the model with --hf-config"
            )
        self.config = config(checkpoint.config or self.files)
        self._weights = self.files.at(FOLDER)
        metadata = self._weights.whole(".metadata", dcp.LARGEST_METADATA)
        self._stored = {
            name.removeprefix(_MODEL): stored
            for name, stored in dcp.read_metadata(metadata, self._weights.path(".metadata")).items()
            if name.startswith(_MODEL) and stored.dtype in NAMES
        }

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._stored)

    def slice(self, name: str) -> FsdpSlice:
        """One tensor; nothing of its data is read yet.

        Raises:
            ArchiveError: there is no such tensor.
        """
        if name not in self._stored:
            raise ArchiveError(f"{self._weights.location} holds no tensor {name!r}")
        return FsdpSlice(self._weights, self._stored[name])


@dataclass(frozen=True)
class FsdpSlice:
    """One tensor; indexing reads the bytes that are asked for."""

    files: Files
    stored: dcp.Stored

    def get_shape(self) -> list[int]:
        """Its size in each dimension."""
        return list(self.stored.shape)

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return NAMES[self.stored.dtype]

    def __getitem__(self, index: Index) -> Tensor:
        """A part of the tensor, or with ``...`` all; of a leading slice those rows are read."""
        index = index if isinstance(index, tuple) else (index,)
        rows: list[dcp.Span] = []
        if index and isinstance(index[0], slice) and index[0].step in (None, 1):
            low, high, _ = index[0].indices(self.stored.shape[0])
            rows, index = [(low, max(low, high))], (slice(None), *index[1:])

        def fetch(name: str, start: int, length: int) -> memoryview:
            return self.files.read(name, start, start + length)

        return dcp.read(self.stored, fetch, rows=rows)[index]
