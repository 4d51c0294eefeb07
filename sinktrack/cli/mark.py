"""``sinktrack mark``: note when something but the model changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinktrack.cli.common import ERR, RunDirectory


def command(
    run: RunDirectory,
    step: Annotated[int | None, typer.Argument(min=0, help="From which on it holds.")] = None,
    what: Annotated[str | None, typer.Argument(help="What changed, in a few words.")] = None,
    table: Annotated[
        Path | None, typer.Option("--from", help="A CSV with the columns step and what.")
    ] = None,
) -> None:
    """Note a decay of the learning rate, other data, a longer context: a line on every curve.

    Trends and plateaus are judged from the last mark on.
    """
    from sinktrack.records.marks import of_file
    from sinktrack.records.run import Run

    if (table is None) == (step is None or what is None):
        raise typer.BadParameter("give STEP and WHAT, or --from a table")
    opened = Run.read(run)
    for mark in of_file(table) if table else [(step, what)]:
        opened.mark(*mark)  # type: ignore[arg-type]
    for mark in opened.marks:
        ERR.print(f"step {mark.step:,}: {mark.what}", markup=False)
