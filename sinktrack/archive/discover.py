"""Find the checkpoints of an archive and their steps."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from urllib.parse import quote

from sinktrack.archive import names, remains, trainer_state
from sinktrack.archive.source import FORMATS, Checkpoint
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError, require

_COMMIT = re.compile(r"[0-9a-f]{6,64}")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:[kKmMbBtT](?![A-Za-z]))?")
_DEEPEST = 3
_MOST_CHECKPOINTS = 100_000
_LOOKED_INTO = 100
_FINAL = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip
_WEIGHTS = re.compile(
    r"(?P<stem>.+?)(?:\.(?:pt|pth|ckpt|bin|safetensors|gguf|tar(?:\.\w+)?|tgz|zip|7z))?"
)
"""A file that may hold weights, by its name."""
_log = logging.getLogger("sinktrack")
_told: set[str] = set()
"""What was passed over and has been told of."""


class NoCheckpoint(ArchiveError):
    """An archive holds none, or none yet."""


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint may be."""

    label: str
    files: Files
    lost: str | None = None
    """Why there is nothing, where that is known."""


def discover(
    archive: str | Path,
    pattern: str | None = None,
    hf_config: str | Path | None = None,
    base: str | Path | None = None,
) -> list[Checkpoint]:
    """The checkpoints of an archive in step order.

    A directory or revision whose name says that it is one, but of which nothing can be read, is
    among them: its ``reason`` says why, and to open it raises that.

    Args:
        archive: a directory of checkpoints, a model's directory in a Hugging Face cache, a
            repository with its revisions (``hf://organization/name``), or one checkpoint; local or
            a URL.
        pattern: a regular expression for the path of a checkpoint below the archive, or for the
            name of a revision, with a group ``step`` and, if you like, ``tokens``; in place of the
            names that are known.
        hf_config: a directory with the ``config.json`` that describes the models, where the
            checkpoints do not say it.
        base: the model that adapters were trained on, into which they are merged.

    Raises:
        NoCheckpoint: there is none.
        ArchiveError: two have the same step, steps begin anew in each of several stages, the names
            of several revisions tell no step, or the pattern is no regular expression with a group
            ``step``, or finds there what is no number.
    """
    files = Files(archive)
    if files.local and not os.path.lexists(files.location):
        raise ArchiveError(f"there is nothing at {files.location}{_meant(str(archive), files)}")
    if files.local and os.path.isfile(files.location) and pattern is None:
        checkpoints = _in_file(files.location)
        if not checkpoints:
            raise NoCheckpoint(
                f"{files.location} is a file that holds no weights by name; name the directory of "
                "a checkpoint, or of several"
            )
    elif pattern is not None:
        checkpoints = _matching(files, names.Pattern(pattern))
    else:
        checkpoints = _known_by_name(files)
    if hf_config is not None:
        checkpoints = [replace(checkpoint, config=Files(hf_config)) for checkpoint in checkpoints]
    if base is not None:
        model = base_model(base)
        if all(one.format != "adapters" and one.reason is None for one in checkpoints):
            raise ArchiveError(f"{files.location} holds no adapters: leave out --base (base)")
        checkpoints = [
            replace(one, base=model, reason=None) if one.format == "adapters" else one
            for one in checkpoints
        ]
    return in_order(checkpoints)


def base_model(location: str | Path) -> Checkpoint:
    """The one model that adapters were trained on.

    Raises:
        ArchiveError: it is not there, or several.
    """
    files = Files(location)
    if files.local and not os.path.lexists(files.location):
        said = f"--base {location}: there is nothing at {files.location}"
        raise ArchiveError(f"{said}{_meant(str(location), files)}")
    if files.local and not os.path.isdir(files.location):
        raise ArchiveError(f"--base {location} is not a directory; name that of the model")
    place = _main(files)
    checkpoints = [] if place.lost else _read_by_a_format(place.files)
    if (
        len(checkpoints) != 1
        or checkpoints[0].reason is not None
        or checkpoints[0].format == "adapters"
    ):
        said = (
            place.lost
            or (checkpoints and checkpoints[0].reason)
            or "name the directory of one model"
        )
        raise ArchiveError(f"--base {location} is no model that is read: {said}")
    return checkpoints[0]


def archives_below(
    directory: str | Path,
    pattern: str | None = None,
    hf_config: str | Path | None = None,
    base: str | Path | None = None,
) -> dict[str, str]:
    """The archives in a directory of several, as a sweep leaves them, by its children's names.

    Each is a child, or a directory not far below it that holds its checkpoints.
    """
    files = Files(directory)
    archives: dict[str, str] = {}
    if not files.local or not os.path.isdir(files.location):
        return archives
    for name, dangling in sorted(_directories(files).items()):
        child = files.at(name)
        if dangling:
            continue
        below = next((label for label, told, _ in _kinds_below(child) if told is None), None)
        for place in [child.location, below and child.path(below)]:
            with suppress(ArchiveError):
                inner = discover(place, pattern, hf_config) if place else []
                adapted = base is not None and any(one.format == "adapters" for one in inner)
                saved = (
                    inner and inner[0].files == child and (names.alike(name) or name.isdecimal())
                )
                if place and not saved and (adapted or any(one.reason is None for one in inner)):
                    archives[name] = place
                    break
    return archives


def in_order(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """By step.

    Raises:
        ArchiveError: two that can be measured have the same step.
    """
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    for one, other in pairwise([one for one in ordered if one.reason is None]):
        if one.step == other.step:
            raise ArchiveError(
                f"{one.where} and {other.where} are both of step {one.step}; "
                "choose with --pattern, scan each into a run of its own, or move one of them"
            )
    return ordered


def checkpoint_at(files: Files, format: str, reason: str | None = None) -> Checkpoint:
    """The checkpoint that a directory is, with step and tokens.

    Its name counts where all of it is known, such as ``checkpoint-500``; then
    ``trainer_state.json``; then the end of the name.
    """
    whole, end = names.known(files.name), names.at_end(files.name)
    step, tokens = (whole.step, whole.tokens) if whole else (None, None)
    if step is None or tokens is None:
        state = trainer_state.read(files)
        step = state[0] if step is None else step
        tokens = state[1] if tokens is None else tokens
    if step is None and end is not None:
        step, tokens = end.step, end.tokens if tokens is None else tokens
    return Checkpoint(files, step or 0, tokens, format, files.name, reason=reason)


def file_checkpoint(
    files: Files,
    format: str,
    file: str,
    step: int,
    tokens: int | None = None,
    reason: str | None = None,
) -> Checkpoint:
    """The checkpoint that one file of a directory is."""
    return Checkpoint(files, step, tokens, format, file, reason=reason, file=file)


def _in_file(path: str) -> list[Checkpoint]:
    """The checkpoint that a file is, or whose weights it holds."""
    files = Files(os.path.dirname(os.path.abspath(path)))
    name = os.path.basename(path)
    checkpoints = _read_by_a_format(files)
    if own := [one for one in checkpoints if one.file == name]:
        return own
    for layout in ("gguf_files", "trainer_files"):
        module = importlib.import_module(f"sinktrack.archive.layouts.{layout}")
        if (alone := module.alone(files, name)) is not None:
            return [alone]
    return [one for one in checkpoints if one.file is None]


def _known_by_name(files: Files) -> list[Checkpoint]:
    """What the names that are known say, else the archive as one checkpoint."""
    if names.known(files.name) and (alone := _read_by_a_format(files)):
        return alone  # what lies in it, such as DeepSpeed's global_stepN, is a part of it
    revisions, places = _places(files, 1)
    checkpoints: list[Checkpoint] = []
    passed: list[str] = []
    stages: dict[str, str] = {}
    for place in places:
        named = names.known(place.label)
        if named is None:
            passed.append(place.label)
            continue
        checkpoints.extend(_at(place, named))
        _check_number(files, checkpoints)
        stages[named.stage] = place.label
    if len(stages) > 1:
        raise _several_stages(files, stages)
    own = names.known(files.name) is not None
    if all(
        (own and one.reason) or remains.of_deepspeed(one.files) for one in checkpoints
    ):  # or none
        if not checkpoints and revisions and (others := _others(passed)):
            raise _unknown_revisions(files, others)
        alone = _alone(files, passed, named=bool(checkpoints))
        if not checkpoints or (alone and alone[0].format != "deepspeed"):
            checkpoints = alone
    if not checkpoints:
        raise _none(
            files,
            "looked for directories like checkpoint-N, stepN or iter_N, for files of trainers "
            "like *.ckpt, and for a config.json with model.safetensors; --pattern finds other "
            "names",
            passed,
        )
    others = _others(passed)
    if not revisions:
        looked = set(others[:_LOOKED_INTO]) if checkpoints and checkpoints[0].files != files else ()
        others = [
            label for label in others
            if names.alike(label) or (label in looked and _holds_model(files.at(label)))
        ]  # fmt: skip
    _tell(files, others)
    if not revisions:
        _tell_of_files(files, checkpoints)
        checkpoints += _final(files, checkpoints)
    return list(_without_twins(checkpoints))


def _without_twins(found: Sequence[Checkpoint]) -> Iterator[Checkpoint]:
    """All but DeepSpeed's state of a step that stands there as a checkpoint, too."""
    saved = {one.step: one for one in found if one.reason is None and one.format != "deepspeed"}
    for one in found:
        if one.format == "deepspeed" and one.step in saved:
            _say_once(
                f"{one.where} is passed over: {saved[one.step].name} beside it is a checkpoint of "
                f"the same step {one.step}; to measure it, name it by itself"
            )
        else:
            yield one


def _final(files: Files, found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The last model, saved in the directory around the checkpoints, if its step is told."""
    if not any(files.exists(name) for name in _FINAL) or any(one.files == files for one in found):
        return []
    step = trainer_state.read(files)[0]
    if step is None:
        _say_once(
            f"{files.location}: the model in the directory itself is passed over, as no "
            "trainer_state.json beside it tells its step; most likely it is the last one again"
        )
        return []
    if step in {one.step for one in found}:
        return []
    return [one for one in _read_by_a_format(files) if one.file is None]


def _matching(files: Files, pattern: names.Pattern) -> list[Checkpoint]:
    """What a pattern says of paths or revisions."""
    checkpoints: list[Checkpoint] = []
    passed: list[str] = []
    for place in _places(files, _DEEPEST)[1]:
        if (named := pattern.read(place.label)) is None:
            passed.append(place.label)
            continue
        checkpoints.extend(_at(place, named))
        _check_number(files, checkpoints)
    measured = {checkpoint.name for checkpoint in checkpoints if checkpoint.reason is None}
    around = {path for name in measured for path in _above(name)}
    checkpoints = [
        checkpoint for checkpoint in checkpoints
        if checkpoint.reason is None
        or (checkpoint.name not in around and not measured.intersection(_above(checkpoint.name)))
    ]  # fmt: skip
    if not checkpoints:
        raise _none(files, f"looked for paths that {pattern} matches from beginning to end", passed)
    return checkpoints


def _above(path: str) -> list[str]:
    """The directories that a path leads through."""
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _at(place: _Place, named: names.Named) -> list[Checkpoint]:
    """What is at a place whose name gives the step: a checkpoint, or why there is none."""
    try:
        checkpoints = [] if place.lost else _read_by_a_format(place.files)
        if not checkpoints:
            reason = place.lost or remains.of(place.files)
            checkpoints = [Checkpoint(place.files, 0, None, FORMATS[0], "", reason=reason)]
    except ArchiveError as error:  # no permission, or damaged: the others go on
        checkpoints = [Checkpoint(place.files, 0, None, FORMATS[0], "", reason=str(error))]
    return [
        replace(
            checkpoint,
            step=named.step,
            tokens=checkpoint.tokens if named.tokens is None else named.tokens,
            name=place.label,
        )
        for checkpoint in checkpoints
    ]


def _read_by_a_format(files: Files) -> list[Checkpoint]:
    """What the first format that knows a directory finds there."""
    for name in FORMATS:
        checkpoints: list[Checkpoint] = importlib.import_module(
            f"sinktrack.archive.layouts.{name}"
        ).find(files)
        if checkpoints and name == "megatron" and remains.of_deepspeed(files):
            checkpoints = [
                replace(checkpoint, reason=remains.known(files)) for checkpoint in checkpoints
            ]
        if checkpoints:
            return checkpoints
    if files.exists("config.json"):  # weights to come, or lost: opening it says so
        reason = None if files.once(_names_its_weights, "config.json") else remains.known(files)
        return [checkpoint_at(files, FORMATS[0], reason)]
    return []


def _names_its_weights(files: Files) -> bool:
    """Whether the configuration says which file holds them, as transformers lets it."""
    try:
        return "transformers_weights" in files.read_json("config.json")
    except ArchiveError:
        return False


def _alone(files: Files, passed: Sequence[str], named: bool) -> list[Checkpoint]:
    """The archive as one checkpoint; empty where it is none.

    Args:
        files: the archive.
        passed: what lies in it under names that are not known.
        named: whether there is something under a name that is known.
    """
    place = _main(files)
    if place.lost:
        return [Checkpoint(place.files, 0, None, FORMATS[0], place.label, reason=place.lost)]
    files = place.files
    if checkpoints := _read_by_a_format(files):
        return checkpoints
    reason = None
    if names.known(files.name):
        reason = remains.of(files)
    elif not named and not any(map(names.alike, passed)):
        reason = remains.known(files)
    return [checkpoint_at(files, FORMATS[0], reason)] if reason else []


def _places(files: Files, depth: int) -> tuple[bool, Iterator[_Place]]:
    """Whether the archive has revisions; and these, else the directories below it."""
    if _is_repository(files):
        return True, (
            _Place(branch, Files(f"{files.location}@{quote(branch, safe='')}"))
            for branch in _branches(files)
        )
    below = _directories(files)
    if {"refs", "snapshots"} <= set(below):
        return True, _references(files)
    return False, _below(files, "", below, depth)


def _directories(files: Files) -> dict[str, bool]:
    """Names of directories, and whether each is a link to what is not there."""
    return {
        entry.name: entry.dangling
        for entry in files.entries()
        if entry.directory or (entry.dangling and names.alike(entry.name))
    }


def _below(files: Files, path: str, below: dict[str, bool], depth: int) -> Iterator[_Place]:
    for name, dangling in sorted(below.items()):
        place = files.at(name)
        lost = f"{place.location} is a link to what is not there" if dangling else None
        yield _Place(path + name, place, lost)
        if depth > 1 and not dangling:
            try:
                inner = _directories(place)
            except ArchiveError as error:
                _say_once(f"{error}; what lies there is passed over")
                continue
            yield from _below(place, f"{path}{name}/", inner, depth - 1)


def _references(files: Files, path: str = "refs", depth: int = 3) -> Iterator[_Place]:
    """Revisions whose names a cache holds, each with its snapshot."""
    for entry in files.at(path).entries():
        below = f"{path}/{entry.name}"
        if entry.directory and depth > 1:
            yield from _references(files, below, depth - 1)
        elif not entry.directory:
            yield _reference(files, below)


def _reference(files: Files, path: str) -> _Place:
    label, again = path.removeprefix("refs/"), "download this revision again"
    try:
        commit = files.whole(path, 64).decode("ascii", "replace").strip()
    except ArchiveError as error:
        return _Place(label, files.at(path), f"{error}; {again}")
    if not _COMMIT.fullmatch(commit):
        return _Place(label, files.at(path), f"{files.path(path)} names no commit; {again}")
    snapshot = f"snapshots/{commit}"
    lost = None if files.exists(snapshot) else f"{files.path(snapshot)} is missing; {again}"
    return _Place(label, files.at(snapshot), lost)


def _main(files: Files) -> _Place:
    """The archive itself; of a cache whose revisions tell no step, the main one or the only one."""
    itself = _Place(files.name, files)
    if not files.local or not files.exists("snapshots"):
        return itself
    if files.exists("refs/main"):
        return _reference(files, "refs/main")
    snapshots = [entry.name for entry in files.at("snapshots").entries() if entry.directory]
    if len(snapshots) == 1 and _COMMIT.fullmatch(snapshots[0]):
        return _Place(snapshots[0], files.at(f"snapshots/{snapshots[0]}"))
    return itself


def _is_repository(files: Files) -> bool:
    return re.fullmatch(r"hf://[^/@]+/[^/@]+", files.location) is not None


def _branches(files: Files) -> list[str]:
    api = require("huggingface_hub", "remote").HfApi()
    try:
        refs = api.list_repo_refs(files.location.removeprefix("hf://"))
    except Exception as error:
        raise ArchiveError(f"cannot read {files.location}: {error}") from error
    return list(dict.fromkeys(str(ref.name) for ref in [*refs.branches, *refs.tags]))


def _others(passed: Sequence[str]) -> list[str]:
    """Of names that are not known, those that may well be a checkpoint's."""
    usual = ("pr/", "refs/", "tmp-", ".")
    return [label for label in passed if label != "main" and not label.startswith(usual)]


def _tell(files: Files, passed: Sequence[str]) -> None:
    """Say once of each name that it was passed over."""
    fresh = [label for label in passed if files.path(label) not in _told]
    _told.update(map(files.path, fresh))
    if fresh:
        _log.warning(
            "%s: passed over %s: the names tell no step that is known; --pattern reads others",
            files.location, remains.few(fresh),
        )  # fmt: skip


def _tell_of_files(files: Files, found: Sequence[Checkpoint]) -> None:
    """Say once of files named like checkpoints that something else is read in their place."""
    read = {one.file for one in found if one.files == files}
    beside = sorted(
        entry.name for entry in files.entries()
        if not (entry.directory or entry.dangling or entry.name in read)
        and (whole := _WEIGHTS.fullmatch(entry.name)) and names.known(whole["stem"])
    )  # fmt: skip
    if beside:
        _say_once(
            f"{files.location}: passed over {remains.few(beside)}: these are files, and "
            f"{found[0].name} is read; name each by itself, or move them to a directory of theirs"
        )


def _holds_model(files: Files) -> bool:
    """Whether a directory on this machine holds weights as transformers saves them."""
    return files.local and any(files.exists(name) for name in _FINAL)


def _say_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        _log.warning("%s", text)


def _check_number(files: Files, found: Sequence[Checkpoint]) -> None:
    if len(found) > _MOST_CHECKPOINTS:
        raise ArchiveError(f"{files.location} holds more than {_MOST_CHECKPOINTS} checkpoints")


def _none(files: Files, wanted: str, passed: Sequence[str]) -> NoCheckpoint:
    there = list(passed) or remains.names(files)
    seen = f" (there is {remains.few(there)})" if there else " (there is nothing)"
    said = f"no checkpoint in {files.location}: {wanted}{seen}"
    where = "where that number counts steps; an epoch or a save is none, but keeps their order"
    below = _Below.of(files)
    numbered = [name for name in passed if names.alike(name)]
    saves = [name for name in below.checkpoints if re.search("[0-9]", name)]
    if not there:
        said += _meant("", files)
    elif numbered and (below.checkpoints or not below.others):
        said += f"; for example --pattern '{_example(numbered)}' {where}"
    elif len(saves) > 1 and not below.archives:
        said += f"; for example --pattern '{_example(saves)}' {where}"
    elif one := below.first:
        said += f"; checkpoints are in {files.path(one)}: name that"
    elif below.others:
        said += f"; {below.others[0]}"
    return NoCheckpoint(said)


@dataclass
class _Below:
    """What lies in the directories below one of this machine, as far as they are looked into."""

    archives: list[str]
    """Paths of those that hold checkpoints."""
    checkpoints: list[str]
    """Of those that are one."""
    others: list[str]
    """What is said of those that are of a kind that is known, and not read."""
    first: str | None = None
    """The first that holds a checkpoint, or is one."""

    @classmethod
    def of(cls, files: Files) -> _Below:
        """Two levels deep; a hub cache by its models."""
        below = cls([], [], [])
        for label, told, whole in _kinds_below(files):
            if told is not None:
                below.others.append(told)
                continue
            (below.checkpoints if whole else below.archives).append(label)
            below.first = below.first or label
        return below


def _kinds_below(files: Files) -> Iterator[tuple[str, str | None, bool]]:
    """Path, what is said of a kind that is not read, and whether it is a checkpoint itself.

    Of each directory below that holds something; none is looked into before it is asked for.
    """
    places = _below(files, "", _directories(files), 2) if files.local else iter(())
    for place in islice(places, _LOOKED_INTO):
        with suppress(ArchiveError):
            inner = _directories(place.files)
            held = _read_by_a_format(place.files)
            if {"refs", "snapshots"} <= set(inner) or any(map(names.known, inner)):
                yield place.label, None, False
            elif any(one.reason is None or one.format == "adapters" for one in held):
                yield place.label, None, True
            elif told := remains.known(place.files):
                yield place.label, told, False


def _meant(given: str, files: Files) -> str:
    """What else may have been meant by a place where there is nothing."""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", given) and not os.path.exists(
        os.path.dirname(given)
    ):
        return f"; for the repository of that name on the Hugging Face hub write hf://{given}"
    above, _, name = files.location.rpartition("/")
    if not above or above.endswith(":/"):
        return ""
    try:
        others = [entry.name for entry in Files(above).entries() if entry.name != name]
    except ArchiveError:
        return ""
    near = difflib.get_close_matches(name, others, n=1)
    return f"; there is {above}/{near[0]}" if near else ""


def _example(others: Sequence[str]) -> str:
    """A pattern for the names that most of some are like.

    The step is the number behind a word for it, else the one of which most are distinct.
    """
    cut = [(tuple(_NUMBER.split(name)), _NUMBER.findall(name)) for name in others]
    shapes = Counter(between for between, numbers in cut if numbers)
    if not shapes:
        return "...(?P<step>[0-9]+)"
    between = shapes.most_common(1)[0][0]
    columns = list(zip(*[numbers for other, numbers in cut if other == between], strict=True))

    def rank(place: int) -> tuple[bool, int, int]:
        said = re.search(r"(?i)(?:step|iter)[a-z]*[-_=:]*$", between[place]) is not None
        return said, len(set(columns[place])), place

    step = max(range(len(columns)), key=rank)
    pattern = _escaped(between[0])
    for place, column in enumerate(columns):
        plain = all(text.isdecimal() for text in column)
        count = "[0-9]+" if plain else "[0-9.]+[kKmMbBtT]?"
        tokens = re.search(r"(?i)tokens?[-_]*$", between[place]) and "tokens>" not in pattern
        group = "step" if place == step else "tokens" if tokens else None
        pattern += f"(?P<{group}>{count})" if group else count
        pattern += _escaped(between[place + 1])
    return pattern


def _escaped(text: str) -> str:
    return re.sub(r"([.+*?()|{}^$\[\]\\])", r"\\\1", text)


def _unknown_revisions(files: Files, others: Sequence[str]) -> ArchiveError:
    main = "snapshots/COMMIT" if files.local else "@main"
    cure = "give one revision as the archive"
    if any(re.search("[0-9]", name) for name in others):
        cure = (
            f"give --pattern, for example --pattern '{_example(others)}' where that number counts "
            "steps, or one revision as the archive"
        )
    return ArchiveError(
        f"{files.location} holds revisions whose names tell no step that is known: "
        f"{remains.few(others)}; {cure}: {files.location}{'/' if files.local else ''}{main}"
    )


def _several_stages(files: Files, stages: dict[str, str]) -> ArchiveError:
    example = next(iter(stages))
    tokens = r"(?:-tokens(?P<tokens>[0-9.]+[KMBT]?))?" if "-tokens" in stages[example] else ""
    return ArchiveError(
        f"{files.location} holds several stages ({', '.join(sorted(stages.values()))}), whose "
        "steps begin anew; scan each into a run of its own, for example with --pattern "
        f"'{example}step[-_]?(?P<step>[0-9]+){tokens}'"
    )
