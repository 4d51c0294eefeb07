"""A transformers model under its own names, somewhere in what a trainer saved.

Trainers put a prefix before all names (``model.``, the attribute of a LightningModule) and may keep
other modules beside the model, which no block of it reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from sinktrack.archive import huggingface
from sinktrack.archive.layouts.pieces import Piece, PieceSource, Stored
from sinktrack.archive.source import Checkpoint, unwrapped
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.slices import NAMES
from sinktrack.errors import ArchiveError

_BLOCK = re.compile(r"(.*?)(?:layers|h|blocks|block)\.\d+\.")


def source(
    checkpoint: Checkpoint,
    stored: Mapping[str, Stored],
    weights: Files | None = None,
    tokens: int | None = None,
) -> PieceSource:
    """The weights of the model among these tensors.

    Args:
        checkpoint: whose configuration describes the model.
        stored: by the trainer's names.
        weights: where the tensors' files are; in the checkpoint by default.
        tokens: that the model had seen, where the trainer says it.

    Raises:
        ArchiveError: the configuration is missing or not known, or there is no such model among
            the tensors, or several.
    """
    files = checkpoint.files
    config = huggingface.config_of(checkpoint)
    names = bare(stored, huggingface.base_prefix(config), files.location)
    for name in names.values():
        if stored[name].dtype not in NAMES:
            raise ArchiveError(f"{files.location}: {name} is stored as {stored[name].dtype}")
    pieces = {own: Piece(stored[name]) for own, name in names.items()}
    return PieceSource(files, config, weights or files, pieces, tokens)


def bare(names: Iterable[str], base: str, where: str) -> dict[str, str]:
    """By the names that the model gives its weights, those under which they are stored.

    Args:
        names: under which tensors are stored.
        base: what the family's models call their decoder, such as ``model`` or ``transformer``.
        where: the checkpoint, for errors.

    Raises:
        ArchiveError: no blocks are among them, or those of several models.
    """
    unwrapped_names = unwrapped(names)
    roots = {match[1] for name in unwrapped_names if (match := _BLOCK.match(name))}
    before = {_before(root, base) for root in roots}
    if len(before) != 1:
        said = "no blocks of a decoder are among its tensors" if not before else (
            f"it holds several models, under {', '.join(sorted(before))}: save the one to be "
            "measured by itself"
        )  # fmt: skip
        raise ArchiveError(f"{where}: {said}")
    (prefix,) = before
    return {
        name.removeprefix(prefix): own
        for name, own in unwrapped_names.items()
        if name.startswith(prefix)
    }


def _before(root: str, base: str) -> str:
    """What stands before the model's own names, by what stands before its blocks."""
    places = [place.start() for place in re.finditer(rf"(?<![^.]){re.escape(base)}\.", root)]
    return root[: places[-1]] if base and places else root
