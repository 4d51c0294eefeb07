"""Marks of a run: steps at which something but the model changed, such as the data or the schedule.

They stand in ``marks.jsonl`` beside the records, a line each: ``{"step": 5000, "what": "..."}``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sinktrack import text
from sinktrack.errors import RecordError

NAME = "marks.jsonl"


class Mark(NamedTuple):
    """From this step on something is another."""

    step: int
    what: str


def read(directory: Path) -> tuple[Mark, ...]:
    """A run's marks by step, each once.

    Raises:
        RecordError: a line that is no mark; names it.
    """
    path = directory / NAME
    try:
        lines = text.read(path).split("\n")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read {path}: {error}") from error
    marks = []
    for number, line in enumerate(lines, 1):
        if line:
            try:
                held = json.loads(line)
                marks.append(checked(held["step"], held["what"]))
            except (ValueError, KeyError, TypeError) as error:
                raise RecordError(f"{path}, line {number} is no mark: {error}") from error
    return tuple(sorted(set(marks)))


def append(directory: Path, marks: Iterable[Mark]) -> None:
    """Add marks that the run does not have.

    Raises:
        RecordError: the file cannot be written.
    """
    known = set(read(directory))
    lines = [json.dumps(mark._asdict()) + "\n" for mark in marks if mark not in known]
    try:
        with (directory / NAME).open("a", encoding="utf-8") as file:
            file.write("".join(lines))
    except OSError as error:
        raise RecordError(f"cannot write to {directory / NAME}: {error.strerror}") from error


def of_file(path: Path) -> list[Mark]:
    """Marks of a CSV with the columns step and what.

    Raises:
        RecordError: it cannot be read, lacks a column, or holds a step that is none.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(text.read(path), newline="")))
        return [checked(int(row["step"]), row["what"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise RecordError(
            f"cannot read marks from {path}, which wants the columns step and what: {error}"
        ) from error


def checked(step: object, what: object) -> Mark:
    """A mark of these.

    Raises:
        ValueError: a step below 0 or no whole number, or nothing that is said.
    """
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"a step of {step!r}; wanted is a whole number of 0 or more")
    if not isinstance(what, str) or not what.strip():
        raise ValueError(f"{what!r} says nothing of what changed")
    return Mark(step, " ".join(what.split()))
