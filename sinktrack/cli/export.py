"""``sinktrack export``: records in long form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sinktrack.cli.common import ERR, RunDirectory


def command(
    run: RunDirectory,
    form: Annotated[Literal["parquet", "csv"], typer.Option("--format", help="Of the file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; by default named after the run.")
    ] = None,
) -> None:
    """Everything that was measured in long form, one number a row."""
    from sinktrack.records.run import Run
    from sinktrack.views.export import export as export_records

    if out is not None and out.suffix in {".parquet", ".csv"} - {f".{form}"}:
        raise typer.BadParameter(f"{out} is named otherwise than --format {form} says")
    opened = Run.read(run)
    path = out or Path(f"{run.absolute().name}.{form}")
    count = export_records(opened.records, path, form)
    ERR.print(f"{count:,} rows -> {path}", markup=False)
