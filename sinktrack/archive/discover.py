"""Find the checkpoints of an archive and their steps."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

from sinktrack.archive.files import Files
from sinktrack.archive.source import FORMATS, Checkpoint
from sinktrack.errors import ArchiveError, require

_NAME = re.compile(
    r"(?P<stage>(?:stage\d+-)?(?:ingredient\d+-)?)(?:checkpoint-|global_step|iter_|step[-_]?)"
    r"(?P<step>\d{1,18})(?:-tokens(?P<tokens>\d{1,15}[KMBT]?))?(?:-hf|-unsharded)?"
)
_STEP_IN_NAME = re.compile(r"(?:checkpoint|step|iter)[-_]?(\d{1,18})")
_COMMIT = re.compile(r"[0-9a-f]{6,64}")
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_DEEPEST = 3
_MOST_CHECKPOINTS = 100_000


def discover(
    archive: str | Path, pattern: str | None = None, hf_config: str | Path | None = None
) -> list[Checkpoint]:
    """The checkpoints of an archive in step order.

    Args:
        archive: a directory of checkpoints, a model's directory in a Hugging Face cache, a
            repository with its revisions (``hf://organization/name``), or one checkpoint; local or
            a URL.
        pattern: a regular expression for the path of a checkpoint below the archive, or for the
            name of a revision, with a group ``step`` and, if you like, ``tokens``; in place of the
            names that are known.
        hf_config: a directory with the ``config.json`` that describes the models, where the
            checkpoints do not say it.

    Raises:
        ArchiveError: there is none, two have the same step, steps begin anew in each of several
            stages, or the pattern is no regular expression with a group ``step``.
    """
    files = Files(archive)
    names = _compile(pattern) if pattern is not None else _NAME
    found: list[Checkpoint] = []
    passed: list[str] = []
    stages: dict[str, str] = {}
    for label, place in _places(files, _DEEPEST if pattern is not None else 1):
        named = names.fullmatch(label)
        if named is None:
            passed.append(label)
            continue
        for checkpoint in _known(place):
            found.append(_named(checkpoint, label, named))
        if len(found) > _MOST_CHECKPOINTS:
            raise ArchiveError(f"{files.location} holds more than {_MOST_CHECKPOINTS} checkpoints")
        if pattern is None and found and found[-1].files == place:
            stages[named["stage"]] = label
    if len(stages) > 1:
        raise _several_stages(files, stages)
    if not found and pattern is None:
        found = _known(_snapshot(files))
    if not found:
        wanted = (
            f"looked for paths that {pattern} matches from beginning to end"
            if pattern is not None
            else "looked for directories like checkpoint-N, stepN or iter_N, and for a config.json "
            "with model.safetensors; --pattern finds other names"
        )
        seen = f" (there are {', '.join(passed[:3])}, ...)" if passed else ""
        raise ArchiveError(f"no checkpoint in {files.location}: {wanted}{seen}")
    if hf_config is not None:
        found = [replace(checkpoint, config=Files(hf_config)) for checkpoint in found]
    return in_order(found)


def in_order(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """By step.

    Raises:
        ArchiveError: two have the same step.
    """
    found = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    for one, other in pairwise(found):
        if one.step == other.step:
            raise ArchiveError(
                f"{one.files.location} and {other.files.location} are both of step {one.step}; "
                "choose with --pattern, scan each into a run of its own, or move one of them"
            )
    return found


def checkpoint_at(files: Files, format: str) -> Checkpoint:
    """The checkpoint that a directory is; step and tokens from its name or trainer_state.json."""
    try:
        state = files.read_json("trainer_state.json") if files.exists("trainer_state.json") else {}
    except ArchiveError:  # weights do not depend on it
        state = {}
    step, tokens = state.get("global_step"), state.get("num_input_tokens_seen")
    if inside := _STEP_IN_NAME.search(files.name):
        step = int(inside[1])
    return Checkpoint(
        files,
        step if type(step) is int and step >= 0 else 0,
        tokens if type(tokens) is int and tokens > 0 else None,
        format,
        files.name,
    )


def _known(files: Files) -> list[Checkpoint]:
    """What the first format that knows a directory finds there."""
    for name in FORMATS:
        found: list[Checkpoint] = importlib.import_module(f"sinktrack.archive.{name}").find(files)
        if found:
            return found
    if files.exists("config.json"):  # weights to come, or lost: opening it says so
        return [checkpoint_at(files, FORMATS[0])]
    return []


def _places(files: Files, depth: int) -> Iterator[tuple[str, Files]]:
    """Where checkpoints may be: revisions under their names, else directories below ``files``."""
    if _is_repository(files):
        for branch in _branches(files):
            yield branch, Files(f"{files.location}@{quote(branch, safe='')}")
        return
    names = {entry.name for entry in files.entries() if entry.directory}
    if {"refs", "snapshots"} <= names:
        for label, commit in _references(files):
            yield label, files.at(f"snapshots/{commit}")
        return
    yield from _below(files, "", names, depth)


def _below(files: Files, path: str, names: set[str], depth: int) -> Iterator[tuple[str, Files]]:
    for name in sorted(names):
        place = files.at(name)
        yield path + name, place
        if depth > 1:
            inner = {entry.name for entry in place.entries() if entry.directory}
            yield from _below(place, f"{path}{name}/", inner, depth - 1)


def _references(files: Files, path: str = "refs", depth: int = 3) -> Iterator[tuple[str, str]]:
    """Revisions that a cache holds, and the commit of each."""
    for entry in files.at(path).entries():
        below = f"{path}/{entry.name}"
        if entry.directory and depth > 1:
            yield from _references(files, below, depth - 1)
        elif not entry.directory and files.size(below) <= 64:
            commit = files.whole(below, 64).decode("ascii", "replace")
            if _COMMIT.fullmatch(commit.strip()):
                yield below.removeprefix("refs/"), commit.strip()


def _snapshot(files: Files) -> Files:
    """Of a cache whose revisions have no steps in their names: the main one."""
    if not files.local or not files.exists("refs/main"):
        return files
    commits = dict(_references(files))
    return files.at(f"snapshots/{commits['main']}") if "main" in commits else files


def _is_repository(files: Files) -> bool:
    return re.fullmatch(r"hf://[^/@]+/[^/@]+", files.location) is not None


def _branches(files: Files) -> list[str]:
    api = require("huggingface_hub", "remote").HfApi()
    try:
        refs = api.list_repo_refs(files.location.removeprefix("hf://"))
    except Exception as error:
        raise ArchiveError(f"cannot read {files.location}: {error}") from error
    return [str(ref.name) for ref in [*refs.branches, *refs.tags]]


def _named(checkpoint: Checkpoint, label: str, named: re.Match[str]) -> Checkpoint:
    """With the step, and where they are told the tokens, that a name gives."""
    groups = named.groupdict()
    checkpoint = replace(checkpoint, step=int(named["step"]), name=label)
    if not groups.get("tokens"):
        return checkpoint
    number, unit = groups["tokens"].rstrip("KMBT"), groups["tokens"][-1]
    return replace(checkpoint, tokens=int(number) * _UNITS.get(unit, 1))


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ArchiveError(f"--pattern {pattern} is no regular expression: {error}") from error
    if "step" not in compiled.groupindex:
        raise ArchiveError(
            f"--pattern {pattern} has no group named step; write the number as (?P<step>\\d+)"
        )
    return compiled


def _several_stages(files: Files, stages: dict[str, str]) -> ArchiveError:
    example = next(iter(stages))
    tokens = r"-tokens(?P<tokens>\d+[KMBT])" if "-tokens" in stages[example] else ""
    return ArchiveError(
        f"{files.location} holds several stages ({', '.join(sorted(stages.values()))}), whose "
        "steps begin anew; scan each into a run of its own, for example with --pattern "
        f"'{example}step(?P<step>\\d+){tokens}'"
    )
