"""Find the checkpoints of an archive and their steps."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path

from sinktrack.archive.files import Files
from sinktrack.archive.source import FORMATS, Checkpoint
from sinktrack.errors import ArchiveError

_NAME = re.compile(
    r"(?:checkpoint-|global_step|step[-_]?)(?P<step>\d+)"
    r"(?:-tokens(?P<tokens>\d+)(?P<unit>[KMBT]))?(?:-hf|-unsharded)?"
)
_STEP_IN_NAME = re.compile(r"(?:checkpoint|step|iter)[-_]?(\d{1,18})")
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_MOST_CHECKPOINTS = 100_000


def discover(archive: str | Path) -> list[Checkpoint]:
    """The checkpoints of an archive in step order.

    Args:
        archive: a directory of checkpoints or one checkpoint, local or a URL.

    Raises:
        ArchiveError: there is none.
    """
    files = Files(archive)
    found: dict[Files, Checkpoint] = {}
    for name in FORMATS:
        for checkpoint in importlib.import_module(f"sinktrack.archive.{name}").find(files):
            found.setdefault(checkpoint.files, checkpoint)
    if not found:
        raise ArchiveError(
            f"no checkpoint in {files.location}: looked for directories checkpoint-N or stepN, and "
            "for a config.json with model.safetensors or model.safetensors.index.json"
        )
    return sorted(found.values(), key=lambda checkpoint: checkpoint.step)


def directories(files: Files, format: str, marks: Iterable[str]) -> list[Checkpoint]:
    """The directories with a step in their name that hold one of the marks; else ``files`` itself.

    A step is read from the name, else from ``trainer_state.json``; tokens likewise.

    Raises:
        ArchiveError: there are too many.
    """
    marks = tuple(marks)
    found: list[Checkpoint] = []
    for entry in files.entries():
        named = _NAME.fullmatch(entry.name) if entry.directory else None
        if named is None or not any(files.at(entry.name).exists(mark) for mark in marks):
            continue
        if len(found) == _MOST_CHECKPOINTS:
            raise ArchiveError(f"{files.location} holds more than {len(found)} checkpoints")
        found.append(_checkpoint(files.at(entry.name), format, named))
    if not found and any(files.exists(mark) for mark in marks):
        found.append(_checkpoint(files, format, _NAME.fullmatch(files.name)))
    return found


def _checkpoint(files: Files, format: str, named: re.Match[str] | None) -> Checkpoint:
    try:
        state = files.read_json("trainer_state.json")
    except ArchiveError:  # weights do not depend on it
        state = {}
    step, tokens = state.get("global_step"), state.get("num_input_tokens_seen")
    if named is not None:
        step = int(named["step"][:18])
        if named["tokens"]:
            tokens = int(named["tokens"][:18]) * _UNITS[named["unit"]]
    elif inside := _STEP_IN_NAME.search(files.name):
        step = int(inside[1])
    return Checkpoint(
        files,
        step if type(step) is int and step >= 0 else 0,
        tokens if type(tokens) is int and tokens > 0 else None,
        format,
        files.name,
    )
