"""``sinktrack practice``: what a run's last record means for eviction, quantization and pruning."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sinktrack.cli.common import OUT, RunDirectory


def command(
    run: RunDirectory,
    least: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Attention to P0 from which other keys are few."),
    ] = 0.9,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, with the map of keys, on stdout.")
    ] = False,
) -> None:
    """For who evicts keys, quantizes or prunes: what the last record says, none of it tested.

    Which key heads are candidates for P0 and recent keys alone, whether [BOS] is needed, outliers,
    and experts to leave alone.
    """
    from rich.text import Text

    from sinktrack.errors import RecordError
    from sinktrack.records.run import Run
    from sinktrack.signal.practice import practice

    records = Run.read(run).records
    if not records:
        raise RecordError(f"{run} holds no records yet: train with a callback, or scan an archive")
    advice = practice(records[-1], least)
    if as_json:
        print(json.dumps(advice.to_json()))
        return
    OUT.print(Text(f"Step {advice.step:,}, as measured on its probe; none of it is tested"))
    for line in advice.lines():
        OUT.print(Text(f"  {line}"))
