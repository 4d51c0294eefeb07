"""``sinktrack show``: a run in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sinktrack.cli.common import OUT, AsJson, RunDirectory


def command(
    run: RunDirectory,
    loss: Annotated[
        Path | None, typer.Option(help="trainer_state.json, or a CSV of step and loss.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The run's last record as a table, one row a block, with the curves and the signal so far.

    With --json, the last record also holds the signal.
    """
    from sinktrack.records.run import Run
    from sinktrack.signal import analyze
    from sinktrack.views.terminal import show as show_records

    opened = Run.read(run)
    records, signal = opened.records, analyze(opened, loss)
    if as_json:
        if records:
            records[-1] |= {"signal": signal.to_json()}
        for record in records:
            print(json.dumps(record))
    else:
        show_records(records, signal, str(run), OUT)
