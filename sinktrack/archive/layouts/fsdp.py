"""Sharded checkpoints of FSDP, as the Trainer and Accelerate write them: ``pytorch_model_fsdp_0/``.

A ``torch.distributed.checkpoint`` (see ``dcp``) of a transformers model under its own names, saved
with ``SHARDED_STATE_DICT`` by any number of processes.
"""

from __future__ import annotations

from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.huggingface import config_of
from sinktrack.archive.layouts.pieces import Piece, PieceSource, metadata
from sinktrack.archive.source import Checkpoint, unwrapped
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.slices import NAMES
from sinktrack.errors import ArchiveError

FOLDER = "pytorch_model_fsdp_0"
_MODEL = "model."
"""The model's part of what is saved."""


def find(files: Files) -> list[Checkpoint]:
    """The directory itself; it counts once ``.metadata``, which is written last, is there."""
    return [checkpoint_at(files, "fsdp")] if files.exists(f"{FOLDER}/.metadata") else []


def open(checkpoint: Checkpoint) -> PieceSource:
    """A checkpoint's weights.

    Raises:
        ArchiveError: ``.metadata`` or ``config.json`` is missing, damaged or unknown.
    """
    config, weights = config_of(checkpoint), checkpoint.files.at(FOLDER)
    stored = metadata(weights, _MODEL)
    for name, tensor in stored.items():
        if tensor.dtype not in NAMES:
            raise ArchiveError(f"{weights.location}: {name} is stored as {tensor.dtype}")
    pieces = {own: Piece(stored[name]) for own, name in unwrapped(stored).items()}
    return PieceSource(checkpoint.files, config, weights, pieces)
