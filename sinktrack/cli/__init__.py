"""The ``sinktrack`` command, a module for each of its commands.

Exit codes: 0 done, 1 some checkpoints failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Any

from sinktrack.errors import MissingExtra, SinktrackError, require

if TYPE_CHECKING:
    from sinktrack.cli.commands import app

__all__ = ["app", "main"]


def __getattr__(name: str) -> Any:
    if name == "app":
        from sinktrack.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # else torch's products keep a thousand kernels, one for each number of tokens an expert had
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    for stream in (sys.stdout, sys.stderr):  # names that it cannot write are no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        for package in ("typer", "rich"):
            require(package, "cli")
    except MissingExtra as error:
        print(f"sinktrack: {error}", file=sys.stderr)
        sys.exit(2)
    from sinktrack.cli.commands import app
    from sinktrack.cli.common import ERR

    try:
        app()
    except SinktrackError as error:
        ERR.print(f"sinktrack: {error}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
