"""The local report: one HTML file that opens without a network."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from sinktrack.errors import RecordError, require
from sinktrack.records.marks import Mark
from sinktrack.signal.loss import Losses
from sinktrack.text import natural
from sinktrack.views.report.data import Records, embedded

_SCRIPTS = ("common.js", "curves.js", "record.js", "tables.js", "report.js")


def write_report(
    runs: Mapping[str, Records],
    path: Path,
    losses: Mapping[str, Losses] | None = None,
    marks: Mapping[str, Sequence[Mark]] | None = None,
    settings: Mapping[str, str] | None = None,
) -> None:
    """Draw runs side by side.

    Args:
        runs: records in the order in which they were written, by the run's name.
        path: the file to write.
        losses: by the run's name, the training loss by step.
        marks: by the run's name, where something but the model changed.
        settings: by the run's name, what it is a seed of.

    Raises:
        RecordError: a run holds no records, or the file cannot be written.
        MissingExtra: plotly is not installed.
    """
    text = page(runs, losses, marks, settings=settings)
    try:
        path.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror}") from error


def page(
    runs: Mapping[str, Records],
    losses: Mapping[str, Losses] | None = None,
    marks: Mapping[str, Sequence[Mark]] | None = None,
    live: bool = False,
    settings: Mapping[str, str] | None = None,
) -> str:
    """The page as text.

    Args:
        runs: records in the order in which they were written, by the run's name.
        losses: by the run's name, the training loss by step.
        marks: by the run's name, where something but the model changed.
        live: ask the server that sent the page for new records.
        settings: by the run's name, what it is a seed of.

    Raises:
        RecordError: a run holds no records.
        MissingExtra: plotly is not installed.
    """
    data = embedded(runs, losses, marks, live, settings)
    require("plotly", "report")
    from plotly.offline import get_plotlyjs

    parts = {
        "title": html.escape(_title(list(runs))),
        "connect": "'self'" if live else "'none'",
        "style": _asset("report.css"),
        "plotly": get_plotlyjs(),
        "data": data,
        "script": "".join(map(_asset, _SCRIPTS)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("template.html"))


def _title(names: Sequence[str]) -> str:
    """All names, of many their number."""
    joined = ", ".join(sorted(names, key=natural))
    return joined if len(names) <= 3 else f"{len(names)} runs"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
