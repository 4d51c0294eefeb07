"""A W&B workspace view that shows the curves as they are meant to be read."""

from __future__ import annotations

from typing import Any

from sinktrack.errors import RecordError, require
from sinktrack.loggers.curves import blockwise, scalars
from sinktrack.loggers.weights_and_biases import Sent
from sinktrack.records.run import Run

_AXIS = "sinktrack/step"


def save(run: Run) -> str:
    """Save a view in the project that the run was published to.

    Returns:
        Its address.

    Raises:
        RecordError: the run was not published to W&B, or W&B cannot be reached.
        MissingExtra: wandb-workspaces is not installed.
    """
    sent = Sent(run)
    known = sent.of(sent.last())
    if not known["project"]:
        raise RecordError(f"{run.directory} was not published to W&B yet")
    if not known["entity"]:
        raise RecordError(
            "a workspace needs W&B online: this run was published without a connection"
        )
    try:
        return str(view(known["entity"], known["project"]).save().url)
    except Exception as error:  # wandb-workspaces lets those of requests and of wandb through
        raise RecordError(f"W&B did not take the workspace: {error}") from error


def view(entity: str, project: str) -> Any:
    """A ``wandb_workspaces`` Workspace, not saved yet.

    Raises:
        MissingExtra: wandb-workspaces is not installed.
    """
    spaces = require("wandb_workspaces.workspaces", "wandb")
    plots = require("wandb_workspaces.reports.v2", "wandb")

    headline = [
        plots.LinePlot(
            title=field.title, x=_AXIS, y=[f"sinktrack/{field.name}"], log_y=field.scale == "log"
        )
        for field in scalars()
    ]
    blocks = [
        plots.LinePlot(
            title=f"{field.title} by block",
            x=_AXIS,
            metric_regex=rf"sinktrack/{field.name}/block_\d+",
            log_y=field.scale == "log",
        )
        for field in blockwise()
    ]
    pictures = [
        plots.MediaBrowser(title=title, media_keys=[f"sinktrack/{key}"])
        for key, title in (("blocks", "Block by step"), ("heads", "Block by head"))
    ]
    return spaces.Workspace(
        name="P0 sink",
        entity=entity,
        project=project,
        sections=[
            spaces.Section(name="P0 sink", panels=headline, is_open=True),
            spaces.Section(name="P0 sink by block", panels=blocks, is_open=True),
            spaces.Section(name="P0 sink in pictures", panels=pictures, is_open=True),
        ],
    )
