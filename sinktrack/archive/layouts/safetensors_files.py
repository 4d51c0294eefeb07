"""Hugging Face model directories: ``config.json`` and safetensors, sharded or not."""

from __future__ import annotations

from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.layouts.indexed import Indexed
from sinktrack.archive.source import Checkpoint
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.safetensors_file import Place, SafetensorsSlice, read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def find(files: Files) -> list[Checkpoint]:
    """The directory itself, if it holds such weights."""
    if any(files.exists(name) for name in (WEIGHTS, INDEX)):
        return [checkpoint_at(files, "safetensors_files")]
    return []


def open(checkpoint: Checkpoint) -> SafetensorsSource:
    """A checkpoint's weights.

    Raises:
        ArchiveError: ``config.json`` or the weights' index is missing, damaged or unknown.
    """
    return SafetensorsSource(checkpoint)


class SafetensorsSource(Indexed[Place]):
    """Tensors by name, by the headers of their files."""

    WEIGHTS, INDEX, SUFFIX = WEIGHTS, INDEX, ".safetensors"

    def _look(self, file: str) -> dict[str, Place]:
        return read_header(self.files, file)

    def _slice(self, file: str, found: Place) -> SafetensorsSlice:
        return SafetensorsSlice(self.files, file, found)
