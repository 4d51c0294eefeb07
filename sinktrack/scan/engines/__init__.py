"""Who measures the checkpoints of a scan: processes of this machine, or a Ray cluster.

An engine is a module of this package with ``distribute(work, checkpoints, ...)``, which yields each
checkpoint with its `Outcome` as it is ready.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sinktrack.archive.source import Checkpoint
from sinktrack.errors import ArchiveError, SinktrackError, one_line

Outcome = dict[str, Any] | SinktrackError
Work = Callable[[Checkpoint], dict[str, Any]]
"""Measures one checkpoint; can be pickled."""
ATTEMPTS = 3
"""How often a checkpoint is tried whose process dies."""

_log = logging.getLogger("sinktrack")


def attempt(work: Work, checkpoint: Checkpoint) -> Outcome:
    """The record, or the error as a value, which can be sent from one process to another."""
    try:
        return work(checkpoint)
    except SinktrackError as error:
        return error
    except Exception as error:  # a stranger's config can break transformers anywhere
        _log.debug("%s", checkpoint.name, exc_info=True)
        return not_measured(error)


def not_measured(error: Exception) -> ArchiveError:
    """What came of a checkpoint for which nobody foresaw this error."""
    return ArchiveError(f"it cannot be measured: {type(error).__name__}: {one_line(error)}")


def died(times: int) -> ArchiveError:
    """Of a checkpoint whose process did not come back."""
    return ArchiveError(
        f"its process died {times} times, most likely for want of memory; give it more, or measure "
        "fewer at a time"
    )
