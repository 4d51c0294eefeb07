"""What can go wrong, by who can mend it."""

from __future__ import annotations

import importlib
from types import ModuleType

_HALF = 1000
"""Characters."""


class SinktrackError(Exception):
    """Base of all errors raised on purpose; the message says what was found and what to do."""


class ProbeError(SinktrackError):
    """The probe cannot be measured, or does not fit the model."""


class MeasurementError(SinktrackError):
    """The model cannot be measured exactly."""


class RecordError(SinktrackError):
    """The run directory cannot be read, or refuses a record."""


class AnotherModel(RecordError):
    """A record is of another model than the run holds."""


class ArchiveError(SinktrackError):
    """A checkpoint, or a directory of them, cannot be read."""


class MissingExtra(SinktrackError, ImportError):
    """An optional dependency is not installed."""


def one_line(error: BaseException) -> str:
    """All that an error says, in one line; its type where it says nothing.

    Of what is longer than a screen the middle is left out: what was found stands at the beginning,
    what to do mostly at the end.
    """
    said = " ".join(str(error).split())
    if len(said) > 2 * _HALF:
        said = f"{said[:_HALF]} [...] {said[-_HALF:]}"
    return said or type(error).__name__


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
