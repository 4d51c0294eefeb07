"""Weights that lie beside the ones that are read, and disagree with them."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from sinktrack.archive.foreign import count, some
from sinktrack.archive.layouts import pytorch_files as pytorch
from sinktrack.archive.layouts import safetensors_files as safetensors
from sinktrack.archive.layouts.indexed import Indexed
from sinktrack.archive.source import Checkpoint
from sinktrack.errors import ArchiveError

_log = logging.getLogger("sinktrack")
_FORMATS: tuple[type[Indexed[Any]], ...] = (safetensors.SafetensorsSource, pytorch.PytorchSource)
_COMPARED = 256
"""Tensors of which values are compared."""


def tell(checkpoint: Checkpoint) -> None:
    """Warn of every other set of weights in the directory that is not the same model.

    Names, shapes and dtypes are compared, and here on this machine the first row of some tensors.
    Remote pickles are not, as that would read all of them.

    Raises:
        ArchiveError: the weights that count are missing or damaged.
    """
    if checkpoint.format not in ("safetensors_files", "pytorch_files"):
        return
    present = [
        (kind, name)
        for kind in _FORMATS
        for name in (kind.WEIGHTS, kind.INDEX)
        if checkpoint.files.exists(name)
    ]
    if len(present) < 2:
        return
    (kind, name), *others = present
    chosen = kind(checkpoint, name)
    for kind, name in others:
        if differing := _differing(chosen, kind, checkpoint, name):
            _log.warning(
                "%s is read, as transformers does; %s beside it is not, and %s: remove the one "
                "that is out of date",
                chosen.files.path(chosen.name),
                name,
                differing,
            )


def _differing(
    chosen: Indexed[Any], kind: type[Indexed[Any]], checkpoint: Checkpoint, name: str
) -> str | None:
    if kind is pytorch.PytorchSource and not checkpoint.files.local:
        return None
    try:
        if _old(checkpoint, name):
            return "is of torch's format before 1.6, which is not compared"
        other = kind(checkpoint, name)
        return next(_differences(chosen, other), None)
    except ArchiveError as error:
        return f"cannot be read ({error})"


def _old(checkpoint: Checkpoint, name: str) -> bool:
    """Whether it is one pickle, which cannot be looked into without reading all of it."""
    path = checkpoint.files.real_path(name)
    return name.endswith(".bin") and not zipfile.is_zipfile(path)


def _differences(chosen: Indexed[Any], other: Indexed[Any]) -> Iterator[str]:
    ours, theirs = set(chosen.names()), set(other.names())
    shared = sorted(ours & theirs)
    step = max(1, len(shared) // _COMPARED)
    for number, name in enumerate(shared):
        one, two = chosen.slice(name), other.slice(name)
        if (shapes := (one.get_shape(), two.get_shape()))[0] != shapes[1]:
            yield f"has {name} of shape {shapes[1]}, not {shapes[0]}"
        if one.get_dtype() != two.get_dtype():
            yield f"has {name} as {two.get_dtype()}, not {one.get_dtype()}"
        if chosen.files.local and number % step == 0:
            index: Any = slice(0, 1) if len(shapes[0]) > 1 else ...
            if not torch.equal(one[index], two[index]):
                yield f"holds other values ({name})"
    if lacking := ours - theirs:
        yield f"lacks {count(len(lacking), 'tensor')} ({some(lacking)})"
    if more := theirs - ours:
        yield f"holds {count(len(more), 'more tensor')} ({some(more)})"
