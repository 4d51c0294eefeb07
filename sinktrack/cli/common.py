"""What the commands share: where they print, and arguments that several of them take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

OUT = Console()
ERR = Console(stderr=True, soft_wrap=True, highlight=False)

RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Records as JSON lines on stdout.")]


def named(runs: list[Path]) -> dict[str, Path]:
    """The runs by the shortest end of their paths that tells them apart."""
    from sinktrack.text import printable

    paths = [run.absolute() for run in dict.fromkeys(runs)]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = [printable("/".join(path.parts[-depth:])) for path in paths]
        if len(set(names)) == len(paths):
            break
    return dict(zip(names, paths, strict=True))
