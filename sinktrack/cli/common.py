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
