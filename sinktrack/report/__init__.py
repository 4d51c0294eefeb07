"""The local report: one HTML file that opens without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sinktrack.circuit import EPSILON
from sinktrack.errors import RecordError, require

_FIELDS = (
    "step", "tokens", "source", "block_kinds", "concentration", "sink_rate", "norm_ratio", "formed",
    "reference_block", "shares", "share_sum", "first_two_share", "depth", "first_two_gain",
    "top_components", "gain", "peak_block", "intervals",
)  # fmt: skip


def write_report(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw a run.

    Args:
        records: of one run, in step order.
        path: the file to write.
        title: the run's name.

    Raises:
        RecordError: there are no records, or the file cannot be written.
        MissingExtra: plotly is not installed.
    """
    if not records:
        raise RecordError(f"{title} holds no records yet: train with a callback, or scan an archive")
    plotly = require("plotly.offline", "report")
    last = records[-1]
    data = {
        "title": title,
        "epsilon": EPSILON,
        "model": last["model"],
        "probe": last["probe"],
        "versions": last["versions"],
        "records": [_rounded({name: record[name] for name in _FIELDS}) for record in records],
    }
    parts = {
        "title": html.escape(title),
        "style": _asset("report.css"),
        "plotly": plotly.get_plotlyjs(),
        "data": _embedded(data),
        "script": _asset("report.js"),
    }
    page = _asset("template.html")
    for name, part in parts.items():
        before, after = page.split("{{" + name + "}}", 1)
        page = before + part + after
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror}") from error


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """JSON that no HTML parser takes for markup."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
