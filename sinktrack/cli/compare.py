"""``sinktrack compare``: several runs side by side, with what seeds explain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from sinktrack.cli.common import OUT, AsJson, named


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    table: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns run, and setting (what it is a seed of) or score (a final "
            "loss, or of a downstream task) or both; runs by the names that are printed."
        ),
    ] = None,
    loss: Annotated[
        list[Path] | None,
        typer.Option(help="trainer_state.json, or a CSV of step and loss; one for each run."),
    ] = None,
    by: Annotated[
        Literal["step", "tokens", "loss"], typer.Option(help="On what the runs are aligned.")
    ] = "step",
    as_json: AsJson = False,
) -> None:
    """Onset, sink rate and circuit of each run, their spread over seeds, and what they foretell.

    Settings are told apart from five runs of each on, outcomes held against the sink from ten on.
    """
    from sinktrack.records.run import Run
    from sinktrack.signal.compare import compare, read_table
    from sinktrack.signal.loss import read_losses
    from sinktrack.views.terminal import show_comparison

    paths = named(runs)
    if loss and len(loss) != len(paths):
        raise typer.BadParameter(f"--loss {len(loss)} times for {len(paths)} runs")
    settings, scores = read_table(table) if table else ({}, {})
    comparison = compare(
        {name: Run.read(path) for name, path in paths.items()},
        settings=settings,
        scores=scores,
        losses=dict(zip(paths, map(read_losses, loss or []), strict=False)),
        axis=by,
    )
    if as_json:
        print(json.dumps(comparison.to_json()))
    else:
        show_comparison(comparison, OUT)
