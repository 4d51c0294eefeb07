"""What a checkpoint is to the rest of sinktrack, whatever its format.

A format is a module of this package with two functions: ``find(files) -> list[Checkpoint]`` tells
whether a directory is a checkpoint, or holds several in a way of its own (then all of them), and
``open(checkpoint) -> Source`` gives access to one of them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from sinktrack.archive.foreign import WRAPPERS, is_head
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.slices import Slice
from sinktrack.errors import ArchiveError

FORMATS = (
    "safetensors_files", "pytorch_files", "adapters", "fsdp", "olmo_core", "deepspeed", "verl",
    "automodel", "litgpt", "nanogpt", "nanochat", "nanotron", "olmo", "gguf_files", "trainer_files",
    "torchtitan", "megatron",
)  # fmt: skip
"""Modules of this package; of two that know a directory the first counts."""

_SIZES = ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "vocab_size")
_LARGEST_SIZE = 2**26
"""Larger than any model's; what is built from these takes memory before a weight is read."""

_WITHIN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing put into names, at any depth."""


class Source(Protocol):
    """The weights of one checkpoint under the names that Hugging Face gives them on disk."""

    files: Files
    config: Any
    """The model's configuration, of transformers."""

    def names(self) -> list[str]:
        """Of all tensors."""

    def slice(self, name: str) -> Slice:
        """One tensor; nothing of its data is read yet.

        Raises:
            ArchiveError: there is no such tensor, or its file is missing or damaged.
        """


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights of a run."""

    files: Files
    step: int
    tokens: int | None
    format: str
    """The module of this package that reads it."""
    name: str
    config: Files | None = None
    """Where the ``config.json`` is that describes the model, if not in the checkpoint."""
    base: Checkpoint | None = None
    """The model that an adapter was trained on."""
    reason: str | None = None
    """Why it cannot be measured, where that was seen before it is opened."""
    file: str | None = None
    """The one file that it is, where a directory holds several checkpoints."""

    @property
    def where(self) -> str:
        """The full path or URL, for messages."""
        return self.files.path(self.file) if self.file else self.files.location


def open(checkpoint: Checkpoint) -> Source:
    """Access to a checkpoint's weights, as the numbers that they stand for.

    Raises:
        ArchiveError: what it needs is missing, damaged, or not known to transformers.
    """
    quantized = importlib.import_module("sinktrack.archive.quantized")
    applied: Source = quantized.applied(as_stored(checkpoint))
    return applied


def as_stored(checkpoint: Checkpoint) -> Source:
    """A checkpoint's configuration, and its weights as they are stored; none is looked at yet.

    Raises:
        ArchiveError: what it needs is missing, damaged, or not known to transformers.
    """
    if checkpoint.reason is not None:
        raise ArchiveError(checkpoint.reason)
    module = importlib.import_module(f"sinktrack.archive.layouts.{checkpoint.format}")
    source: Source = module.open(checkpoint)
    sizes = source.config.get_text_config(decoder=True).to_dict()
    for name in _SIZES:
        size = sizes.get(name)
        if isinstance(size, int) and not 0 <= size <= _LARGEST_SIZE:
            raise ArchiveError(f"{checkpoint.files.location}: config.json has {name} {size}")
    return source


def unwrapped(names: Iterable[str], base: str = "") -> dict[str, str]:
    """The names under which weights are stored, by those that the bare model gives them.

    A prefix that all names carry is a wrapper's, and so are certain words within. A value head
    may stand beside the wrapped model.

    Args:
        names: of all tensors.
        base: what the family's models call their decoder; before it any word that all names begin
            with is a wrapper's, such as ``policy.`` in ``policy.model.layers``.

    Raises:
        ArchiveError: two tensors would have one name.
    """
    bare = {
        name: ".".join(part for part in name.split(".") if part not in _WITHIN) for name in names
    }
    while prefix := _before_all(bare.values(), base):
        bare = {name: own.removeprefix(prefix) for name, own in bare.items()}
    renamed: dict[str, str] = {}
    for name, own in bare.items():
        if own in renamed:
            raise ArchiveError(f"{renamed[own]} and {name} are both {own} without their wrappers")
        renamed[own] = name
    return renamed


def _before_all(names: Iterable[str], base: str) -> str | None:
    """A wrapper's prefix that all names but a value head's begin with."""
    others = [name for name in names if not is_head(name)]
    if not others:
        return None
    own = others[0].partition(".")[0] + "."
    wraps = bool(base) and own != f"{base}." and any(f".{base}." in name for name in others)
    prefixes = (*WRAPPERS, own) if wraps else WRAPPERS
    return next((p for p in prefixes if all(name.startswith(p) for name in others)), None)


def fitting(source: Source, name: str, largest: int) -> Slice:
    """A tensor for a model whose largest weight has so many elements.

    Raises:
        ArchiveError: it is far larger, which is not worth the memory to find out by reading.
    """
    tensor = source.slice(name)
    shape = tensor.get_shape()
    if math.prod(shape) > 8 * largest:  # several weights of the model may be one on disk
        raise ArchiveError(
            f"{source.files.location}: {name} has shape {shape}, the model's largest weight "
            f"{largest} elements; the checkpoint does not fit its config.json"
        )
    return tensor
