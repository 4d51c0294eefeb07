"""One file a checkpoint, by ``torch.save``: Lightning, Composer, FSDP's full state, own loops.

What a file is, its contents say. Weights are under the model's own names, behind a prefix that all
of them carry; the ``config.json`` is beside the file or in ``--hf-config DIR``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sinktrack.archive import names
from sinktrack.archive.discover import checkpoint_at, file_checkpoint
from sinktrack.archive.layouts import own_names
from sinktrack.archive.layouts.pieces import PieceSource
from sinktrack.archive.source import Checkpoint
from sinktrack.archive.storage import torch_file
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

FORMAT = "trainer_files"
_FILE = re.compile(r".*\.(?:ckpt|pt|pth)|pytorch_model_fsdp\.bin")
_OTHER = re.compile(
    r"(?:optim|scheduler|rng|random|scaler|sampler|training_args|train_state|meta|consolidated|"
    r"lit_model|ckpt\.pt$|model_[0-9]+\.pt$|model_world_size|extra_state|mp_rank|(?:bf16_|fp16_)?"
    r"zero_pp_rank|layer_|common|loss|args|trainer).*|.*(?:optim|_rank[1-9][0-9]*|"
    r"(?:rank|shard)_?[1-9][0-9]*\.pt).*"
)
"""Of other formats, or no weights."""
_NEWEST = re.compile(r"(?:last|latest|best)(?:-v[0-9]+|-rank0)?\.(?:ckpt|pt|pth)")
"""Copies of others, or links to them."""
_WEIGHTS = (
    ("state_dict",), ("state", "model"), ("model_state_dict",), ("model",), ("module",),
    ("model_state",), (),
)  # fmt: skip
"""Where weights are, by keys one below the other."""
_STEPS = (
    ("global_step",), ("state", "timestamp", "Timestamp", "batch"), ("step",), ("iteration",),
    ("iter_num",), ("global_steps",), ("step_count",), ("training_step",),
)  # fmt: skip
_TOKENS = (("state", "timestamp", "Timestamp", "token"), ("tokens_seen",), ("tokens",))


def find(files: Files) -> list[Checkpoint]:
    """The files with weights in a directory; of copies the one whose name tells its step."""
    there = sorted(
        entry.name for entry in files.entries()
        if not entry.directory and _FILE.fullmatch(entry.name) and not _OTHER.match(entry.name)
    )  # fmt: skip
    made_of = {name: made for name in there if (made := alone(files, name)) is not None}
    steps = {made.step for name, made in made_of.items() if not _NEWEST.fullmatch(name)}
    return [
        made for name, made in made_of.items()
        if not (_NEWEST.fullmatch(name) and (made.step in steps or (made.reason and steps)))
    ]  # fmt: skip


def alone(files: Files, name: str) -> Checkpoint | None:
    """The checkpoint that one file is, or None."""
    stem = name.rpartition(".")[0]
    told = names.known(stem) or names.at_end(stem)
    try:
        step, tokens, weights = files.once(lambda files: _look(files, name), name)
    except ArchiveError as error:
        if told is None and not name.endswith((".ckpt", "_fsdp.bin")):
            return None
        step = told.step if told else checkpoint_at(files, FORMAT).step
        return file_checkpoint(files, FORMAT, name, step, reason=str(error))
    if not weights:
        return None
    if step is None and told is None:
        at = checkpoint_at(files, FORMAT)
        return file_checkpoint(files, FORMAT, name, at.step, at.tokens)
    return file_checkpoint(files, FORMAT, name, told.step if told else step or 0, tokens)


def _look(files: Files, name: str) -> tuple[int | None, int | None, bool]:
    """Step, tokens, and whether there are weights."""
    tree = torch_file.read(files, name)
    weights = torch_file.tensors(_weights(tree))
    return _count(tree, _STEPS), _count(tree, _TOKENS), len(weights) > 1


def open(checkpoint: Checkpoint) -> PieceSource:
    """A checkpoint's weights.

    Raises:
        ArchiveError: the file is damaged, ``config.json`` is missing or unknown, or no model is
            among the weights, or several.
    """
    tree = torch_file.read(checkpoint.files, checkpoint.file or "")
    return own_names.source(checkpoint, torch_file.tensors(_weights(tree)))


def _weights(tree: Any) -> Any:
    """The dictionary that holds them."""
    for path in _WEIGHTS:
        weights = _at(tree, path)
        if isinstance(weights, Mapping) and torch_file.tensors(weights):
            return weights
    return {}


def _count(tree: Any, paths: tuple[tuple[str, ...], ...]) -> int | None:
    for path in paths:
        count = _at(tree, path)
        if type(count) is int and 0 < count < 2**63:
            return count
    return None


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
