"""What can go wrong, by who can mend it."""

from __future__ import annotations

import importlib
from types import ModuleType

_LONGEST = 2000
"""Characters of what another library says."""


class SinktrackError(Exception):
    """Base of all errors raised on purpose; the message says what was found and what to do."""


class ProbeError(SinktrackError):
    """The probe cannot be measured, or does not fit the model."""


class MeasurementError(SinktrackError):
    """The model cannot be measured exactly."""


class RecordError(SinktrackError):
    """The run directory cannot be read, or refuses a record."""


class ArchiveError(SinktrackError):
    """A checkpoint, or a directory of them, cannot be read."""


class MissingExtra(SinktrackError, ImportError):
    """An optional dependency is not installed."""


def first_line(error: BaseException) -> str:
    """What an error says, in short; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """All that an error says, its lines joined; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines) or type(error).__name__
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Raises:
        MissingExtra: naming the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtra(
            f"{module} is not installed; run: pip install 'sinktrack[{extra}]'"
        ) from error
