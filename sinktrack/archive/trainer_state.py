"""Step and tokens in ``trainer_state.json``, which the Trainer writes beside a checkpoint."""

from __future__ import annotations

import re
from typing import Any

from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

FILE = "trainer_state.json"
_WINDOW = 64 * 2**10
_FIELD = re.compile(rb'^  "(global_step|num_input_tokens_seen)": ([0-9]{1,18}),?$', re.MULTILINE)
_LOG_BEGINS, _LOG_ENDS = b'\n  "log_history": [\n', b"\n  ],\n"


def read(files: Files) -> tuple[int | None, int | None]:
    """The optimizer steps and the tokens seen, each None where it is not told.

    A state that is missing or damaged tells nothing: weights do not depend on it. The file is read
    when it has changed since the last time, and of a long one the log in its middle is not.

    Raises:
        ArchiveError: a remote place cannot be asked.
    """
    return files.once(_read, FILE)


def _read(files: Files) -> tuple[int | None, int | None]:
    try:
        if not files.exists(FILE):
            return None, None
        state = _around_the_log(files, files.size(FILE)) or files.read_json(FILE)
    except ArchiveError:
        return None, None
    step, tokens = state.get("global_step"), state.get("num_input_tokens_seen")
    return (
        step if type(step) is int and step >= 0 else None,
        tokens if type(tokens) is int and tokens > 0 else None,
    )


def _around_the_log(files: Files, size: int) -> dict[str, Any]:
    """Fields of a file as the Trainer lays it out: one a line, behind two spaces, the log between.

    Empty where it is short, or laid out otherwise.
    """
    if size <= 2 * _WINDOW:
        return {}
    head = bytes(files.read(FILE, 0, _WINDOW))
    tail = bytes(files.read(FILE, size - _WINDOW, size))
    first, log, _ = head.partition(_LOG_BEGINS)
    _, end, last = tail.partition(_LOG_ENDS)
    if not (head.startswith(b'{\n  "') and log and end and last.rstrip().endswith(b"\n}")):
        return {}
    fields = _FIELD.findall(first + b"\n") + _FIELD.findall(last)
    return {name.decode(): int(number) for name, number in fields}
