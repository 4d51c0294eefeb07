"""``sinktrack publish``: records to a dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sinktrack.cli.common import ERR, RunDirectory


def command(
    run: RunDirectory,
    to: Annotated[Literal["wandb", "tensorboard"], typer.Option(help="Which dashboard.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="TensorBoard's directory; by default RUN/tensorboard."),
    ] = None,
    project: Annotated[str | None, typer.Option(help="W&B's project.")] = None,
    entity: Annotated[str | None, typer.Option(help="W&B's entity.")] = None,
    run_id: Annotated[
        str | None,
        typer.Option("--id", help="An existing W&B run; its own metrics stay as they are."),
    ] = None,
    workspace: Annotated[
        bool,
        typer.Option("--workspace", help="Save a W&B workspace view of the curves, too."),
    ] = False,
) -> None:
    """Send a run's records to a dashboard; what is there already is not sent again."""
    from sinktrack.records.run import Run

    opened = Run.read(run)
    given = {"--project": project, "--entity": entity, "--id": run_id, "--workspace": workspace}
    foreign = {"--out": out} if to == "wandb" else given
    if wrong := [name for name, value in foreign.items() if value]:
        raise typer.BadParameter(f"--to {to} takes no {', '.join(wrong)}")
    if to == "tensorboard":
        from sinktrack.loggers import tensorboard_events as tensorboard

        directory = out or run / "tensorboard"
        count = tensorboard.publish(opened, directory)
        ERR.print(f"{count} records -> {directory}", markup=False)
        return
    from sinktrack.loggers import weights_and_biases as wandb

    target, count = wandb.publish(opened, project, entity, run_id)
    ERR.print(f"{count} records -> W&B run {target}", markup=False)
    if workspace:
        from sinktrack.loggers.workspace import save

        ERR.print(f"workspace: {save(opened)}", markup=False)
