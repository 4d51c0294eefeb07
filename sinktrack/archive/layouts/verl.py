"""verl's checkpoints of FSDP: ``actor/model_world_size_W_rank_R.pt`` beside ``huggingface/``.

Each process writes its part of every weight as a distributed tensor (FSDP 2). The parts lie side
by side in the dimension that the tensor's own description names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.layouts import own_names
from sinktrack.archive.layouts.pieces import PieceSource, Stored
from sinktrack.archive.source import Checkpoint
from sinktrack.archive.storage import pickles, torch_file
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.joined import Joined
from sinktrack.archive.storage.torch_file import Saved
from sinktrack.errors import ArchiveError

_FILE = re.compile(r"model_world_size_([0-9]+)_rank_([0-9]+)\.pt")


def find(files: Files) -> list[Checkpoint]:
    """The directory itself or, of ``global_stepN``, the actor in it."""
    for place in (files, files.at("actor")):
        if place is not files and not files.exists("actor"):
            continue
        if any(_FILE.fullmatch(entry.name) for entry in place.entries()):
            made = checkpoint_at(files, "verl")
            beside = place.at("huggingface")
            config = beside if place.exists("huggingface/config.json") else None
            return [Checkpoint(place, made.step, made.tokens, "verl", made.name, config)]
    return []


def open(checkpoint: Checkpoint) -> PieceSource:
    """A checkpoint's weights.

    Raises:
        ArchiveError: a process's file is missing or damaged, or a tensor is not cut along one
            dimension.
    """
    files = checkpoint.files
    by_name = {
        int(match[2]): (entry.name, int(match[1]))
        for entry in files.entries()
        if (match := _FILE.fullmatch(entry.name))
    }
    count = max((count for _, count in by_name.values()), default=0)
    if sorted(by_name) != list(range(count)):
        raise ArchiveError(
            f"{files.location} was written by {count} processes, {len(by_name)} of whose files "
            "are here; copy all of them"
        )
    trees = [torch_file.read(files, by_name[rank][0]) for rank in range(count)]
    if not all(isinstance(tree, Mapping) and set(tree) == set(trees[0]) for tree in trees):
        raise ArchiveError(f"{files.location}: its files do not hold the same tensors")
    stored = {
        str(name): _whole(files, str(name), [tree[name] for tree in trees]) for name in trees[0]
    }
    return own_names.source(checkpoint, stored)


def _whole(files: Files, name: str, parts: list[Any]) -> Stored:
    """Of all processes' parts of a tensor the tensor."""
    if isinstance(parts[0], Saved):
        return parts[0]
    local = [_of(part, "_local_tensor") for part in parts]
    spec = _of(parts[0], "_spec")
    placements = _of(spec, "placements")
    dims = [_dim(placement) for placement in placements or ()]
    cut = [dim for dim in dims if dim is not None]
    if not all(isinstance(part, Saved) for part in local) or len(dims) != 1:
        raise ArchiveError(
            f"{files.location}: {name} is cut along a mesh of processes that is not read; write "
            "it with verl's `python -m verl.model_merger merge`"
        )
    if not cut:
        whole: Saved = local[0]
        return whole
    return Joined(tuple(part for part in local if part.shape[cut[0]]), cut[0])


def _of(part: Any, key: str) -> Any:
    """What a pickled object keeps under a name: in its state, its slots or its arguments."""
    inner = [getattr(part, "state", None), *getattr(part, "arguments", ())]
    inner += [value for pair in inner if isinstance(pair, tuple) for value in pair]
    return next((value[key] for value in inner if isinstance(value, dict) and key in value), None)


def _dim(placement: Any) -> int | None:
    """Which dimension it cuts; None where all processes hold all."""
    if not isinstance(placement, pickles.Record):
        return None
    dim = _of(placement, "dim")
    if dim is None:
        dim = next((value for value in placement.arguments if type(value) is int), None)
    return dim if "Shard" in repr(placement) and type(dim) is int else None
