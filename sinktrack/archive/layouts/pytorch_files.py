"""Old model directories: ``pytorch_model.bin``, a pickle, read by weights-only loading alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.layouts.indexed import Indexed
from sinktrack.archive.layouts.safetensors_files import SafetensorsSource
from sinktrack.archive.source import Checkpoint, Source
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.mapped_torch_file import TensorSlice, load_tensors

WEIGHTS, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PART = 64 * 2**20


def find(files: Files) -> list[Checkpoint]:
    """The directory itself, if it holds such weights."""
    if any(files.exists(name) for name in (WEIGHTS, INDEX)):
        return [checkpoint_at(files, "pytorch_files")]
    return []


def open(checkpoint: Checkpoint) -> Source:
    """A checkpoint's weights.

    Raises:
        ArchiveError: ``config.json`` or the weights are missing, damaged or unknown, or hold
            anything but tensors.
    """
    if "transformers_weights" in (checkpoint.config or checkpoint.files).read_json("config.json"):
        return SafetensorsSource(checkpoint)  # names the file, always of that kind
    return PytorchSource(checkpoint)


class PytorchSource(Indexed[Tensor]):
    """Tensors by name, mapped from their files; a remote file is copied to this machine whole."""

    WEIGHTS, INDEX, SUFFIX = WEIGHTS, INDEX, ".bin"

    def __init__(self, checkpoint: Checkpoint, name: str | None = None) -> None:
        local = checkpoint.files.local
        self._copies = None if local else tempfile.TemporaryDirectory()
        super().__init__(checkpoint, name)

    def _look(self, file: str) -> dict[str, Tensor]:
        return load_tensors(self.files, file, self._local(file))

    def _slice(self, file: str, found: Tensor) -> TensorSlice:
        return TensorSlice(found)

    def _local(self, file: str) -> str:
        size = self.files.size(file)
        if self._copies is None:
            return self.files.real_path(file)
        path = Path(self._copies.name) / file
        with path.open("wb") as copy:
            for start in range(0, size, _PART):
                copy.write(self.files.read(file, start, min(start + _PART, size)))
        return str(path)
