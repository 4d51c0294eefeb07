"""What a logger is: where the records of a run are sent while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Logger(Protocol):
    """Takes records one by one. It is asked on the one process that records, after the record is
    on disk; what it raises is reported once, and training goes on.

    `sinktrack.loggers.curves.metrics` gives a record's curves by key, those of new metrics too.
    """

    def log(self, record: Mapping[str, Any]) -> None:
        """Show a record, as it was written to the run directory."""

    def alert(self, title: str, text: str) -> None:
        """Tell that the sink fell back, or what else calls for attention."""

    def close(self) -> None:
        """Send what is not sent yet; called once, at the end of training."""
