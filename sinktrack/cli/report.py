"""``sinktrack report``: runs in one HTML file, or served while they go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinktrack.cli.common import ERR, named


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("report.html"),
    loss: Annotated[
        list[Path] | None,
        typer.Option(help="trainer_state.json, or a CSV of step and loss; one for each run."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns run and setting (what it is a seed of), as of compare."
        ),
    ] = None,
    live: Annotated[
        bool,
        typer.Option("--live", help="Serve it to this machine while the runs go on."),
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --live; 0 takes a free one.")] = 0,
) -> None:
    """One HTML file with the curves of one run or several; it opens without a network."""
    from sinktrack.records.run import Run
    from sinktrack.signal.compare import read_table
    from sinktrack.signal.loss import read_losses
    from sinktrack.views.report import write_report

    opened = {name: Run.read(path) for name, path in named(runs).items()}
    if loss and len(loss) != len(opened):
        raise typer.BadParameter(f"--loss {len(loss)} times for {len(opened)} runs")
    losses = dict(zip(opened, map(read_losses, loss or []), strict=False))
    if len({record["probe"] for one in opened.values() for record in one.records[-1:]}) > 1:
        ERR.print("these runs were measured with different probes; do not compare their numbers")
    settings = read_table(table)[0] if table else {}
    if live:
        from sinktrack.views.report.live import server

        with server(opened, port, losses, settings) as serving:
            ERR.print(f"http://127.0.0.1:{serving.server_port}/  (Ctrl-C ends it)", markup=False)
            serving.serve_forever()
    write_report(
        {name: run.written for name, run in opened.items()},
        out,
        losses,
        {name: run.marks for name, run in opened.items()},
        settings,
    )
    ERR.print(f"wrote {out}", markup=False)
