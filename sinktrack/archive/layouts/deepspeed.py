"""DeepSpeed's checkpoints of ZeRO 1 to 3: ``global_stepN/`` with a file for each process.

To stage 2 ``mp_rank_00_model_states.pt`` holds the weights whole, as the forward pass reads them.
In stage 3 the float32 weights lie among the optimizer's state: each is cut into as many parts as
there were processes, which lie in flat rows one behind the other. They are read by byte range.
Names are the model's own; the ``config.json`` is beside, or in ``--hf-config DIR``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sinktrack.archive import names
from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.layouts import own_names
from sinktrack.archive.layouts.pieces import PieceSource, Stored
from sinktrack.archive.source import Checkpoint
from sinktrack.archive.storage import pickles, torch_file
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.joined import Flat
from sinktrack.errors import ArchiveError

_MODEL = re.compile(r"(?:zero_pp_rank_([0-9]+)_)?mp_rank_([0-9]+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt")
_LAYERS = re.compile(r"layer_[0-9]+-model_.*states\.pt")
_TAG = re.compile(r"global_step[0-9]+|checkpoint")
"""Directories within a trainer's checkpoint; the second is Lightning's."""


def find(files: Files) -> list[Checkpoint]:
    """The directory itself, or a trainer's with DeepSpeed's within."""
    if (place := _place(files)) is None:
        return []
    made, tag = checkpoint_at(files, "deepspeed"), names.known(place.name)
    return [replace(made, step=tag.step) if not made.step and tag else made]


def open(checkpoint: Checkpoint) -> PieceSource:
    """A checkpoint's weights.

    Raises:
        ArchiveError: it is of a tensor- or pipeline-parallel model, a process's file is missing or
            damaged, or the configuration is missing or unknown.
    """
    files = _place(checkpoint.files)
    if files is None:
        raise ArchiveError(f"{checkpoint.files.location} holds no state of DeepSpeed any more")
    there = [entry.name for entry in files.entries()]
    models = sorted(filter(_MODEL.fullmatch, there))
    ranks = {_MODEL.fullmatch(name)[2] for name in models}  # type: ignore[index]
    if len(ranks) > 1 or any(map(_LAYERS.fullmatch, there)):
        raise ArchiveError(
            f"{files.location} is of a model that DeepSpeed split into tensor- or pipeline-"
            "parallel parts, whose order only its program knows; write it with that one's "
            "converter as a Hugging Face model"
        )
    whole = next((name for name in models if name.startswith("mp_rank_")), None)
    first = torch_file.read(files, whole or models[0])
    if not isinstance(first, Mapping):
        raise ArchiveError(f"{files.location} holds no state of DeepSpeed")
    stored: dict[str, Stored] = {}
    if whole is not None:
        stored |= torch_file.tensors(first.get("module"))
    if not stored:
        stored = dict(_partitioned(files, first, models, there))
    return own_names.source(checkpoint, stored, files)


def _place(files: Files) -> Files | None:
    """Where DeepSpeed's own files are: here, or in the directory that ``latest`` names."""
    there = {entry.name: entry.directory for entry in files.entries()}
    if any(map(_MODEL.fullmatch, there)):
        return files
    below = sorted((n for n, inner in there.items() if inner and _TAG.fullmatch(n)), key=_number)
    if "latest" in there and len(below) > 1:
        tag = files.whole("latest", 4096).decode("utf-8", "replace").strip()
        below = [name for name in below if name == tag] or below
    if len(below) != 1 or {"model.safetensors", "pytorch_model.bin"} & set(there):
        return None  # several are an archive of them
    inner = files.at(below[0])
    return inner if any(_MODEL.fullmatch(entry.name) for entry in inner.entries()) else None


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name) or 0)


def _partitioned(
    files: Files, first: Mapping[Any, Any], models: list[str], there: list[str]
) -> Iterator[tuple[str, Stored]]:
    """Stage 3: a part of every weight in each process's flat rows."""
    where = files.location
    ranks = {int(m[1]): name for name in there if (m := _OPTIMIZER.fullmatch(name))}
    states = [_optimizer(files, ranks[rank]) for rank in sorted(ranks)]
    if not states or states[0].get("zero_stage") != 3:
        raise ArchiveError(
            f"{where} holds neither whole weights nor the optimizer's state of ZeRO stage 3 "
            "(zero_pp_rank_*_optim_states.pt), which has them"
        )
    count = states[0].get("partition_count")
    if count != len(states) or sorted(ranks) != list(range(len(ranks))):
        raise ArchiveError(
            f"{where} was written by {count} processes, {len(states)} of whose files "
            "(zero_pp_rank_*_optim_states.pt) are here; copy all of them"
        )
    rows = [row for state in states if isinstance(row := state.get("fp32_flat_groups"), list)]
    if len(rows) != len(states) or len({len(row) for row in rows}) != 1:
        raise ArchiveError(f"{where}: the optimizer's state has no fp32_flat_groups")
    shapes = first.get("param_shapes")
    groups = [one for one in (shapes if isinstance(shapes, list) else [shapes]) if one]
    flat = _Rows(rows)
    for group in groups:
        for name, shape in group.items():
            yield str(name), flat.take(tuple(shape))
    parts = [torch_file.read(files, name) for name in models if name.startswith("zero_pp_rank_")]
    frozen = first.get("frozen_param_shapes") or {}
    for name, shape in frozen.items():
        own = [part["frozen_param_fragments"][name] for part in parts]
        yield str(name), Flat(tuple((row, 0, row.shape[0]) for row in own), tuple(shape))
    buffers = set(first.get("buffer_names") or ())
    for name, tensor in torch_file.tensors(first.get("module")).items():
        if name in buffers:
            yield name, tensor


class _Rows:
    """The flat rows of all processes, taken from the beginning on.

    A process may hold several rows; a weight may begin in one and end in the next.
    """

    def __init__(self, rows: list[list[Any]]) -> None:
        self._rows, self._done = rows, 0

    def take(self, shape: tuple[int, ...]) -> Flat:
        """The next weight: of each process as many values, the last of them padding."""
        share = math.ceil(math.prod(shape) / len(self._rows))
        parts = []
        for rows in self._rows:
            begin, left = self._done, share
            for row in rows:
                size = row.shape[0]
                if begin < size and left:
                    count = min(left, size - begin)
                    parts.append((row, begin, count))
                    left, begin = left - count, 0
                else:
                    begin = max(0, begin - size)
        self._done += share
        return Flat(tuple(parts), shape)


def _optimizer(files: Files, name: str) -> Mapping[Any, Any]:
    tree = torch_file.read(files, name)
    state = tree.get("optimizer_state_dict") if isinstance(tree, Mapping) else None
    if not isinstance(state, Mapping):
        raise ArchiveError(f"{files.path(name)} holds no optimizer_state_dict")
    stage = state.get("zero_stage")
    if isinstance(stage, pickles.Record):  # an enumeration's member, by its value
        stage = next(iter(stage.arguments), None)
    return {**state, "zero_stage": stage}
