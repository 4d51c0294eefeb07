"""NeMo Automodel's checkpoints: ``epoch_E_step_N/model`` beside ``optim``.

The model is in ``model/consolidated`` as Hugging Face's, or an adapter in ``model``; both are read
as what they are. Parts of processes are not.
"""

from __future__ import annotations

import re
from dataclasses import replace

from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.layouts import adapters, safetensors_files
from sinktrack.archive.source import Checkpoint
from sinktrack.archive.storage.files import Files

_PART = re.compile(r"shard-[0-9]+-model-[0-9]+-of-[0-9]+\.safetensors|.+\.distcp|\.hf_metadata")


def find(files: Files) -> list[Checkpoint]:
    """What is in the directory's ``model``; of parts of processes alone, why they are not read."""
    around = {entry.name for entry in files.entries() if entry.directory}
    if "model" not in around:
        return []
    model = files.at("model")
    there = {entry.name: entry.directory for entry in model.entries()}
    if "optim" not in around and not there.get("consolidated"):
        return []
    made = checkpoint_at(files, "safetensors_files")
    found = safetensors_files.find(model.at("consolidated")) if there.get("consolidated") else []
    for inner in found or adapters.find(model):
        return [replace(inner, step=made.step, tokens=made.tokens, name=made.name)]
    if parts := sorted(filter(_PART.fullmatch, there)):
        script = "run its model/consolidate.sh, or " if "consolidate.sh" in there else ""
        said = (
            f"{files.location} holds each process's part of a model, as NeMo Automodel saves it "
            f"(model/{parts[-1]}): {script}train with checkpoint.model_save_format safetensors and "
            "checkpoint.save_consolidated every"
        )
        return [replace(made, reason=said)]
    return []
