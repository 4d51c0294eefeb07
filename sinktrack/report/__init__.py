"""The local report: one HTML file that opens without a network."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sinktrack.circuit import EPSILON
from sinktrack.errors import RecordError, require

_FIELDS = (
    "step", "tokens", "concentration", "sink_rate", "norm_ratio", "formed", "reference_block",
    "shares", "share_sum", "first_two_share", "depth", "first_two_gain", "top_components",
)  # fmt: skip
_INTERVALS = ("sink_rate", "first_two_share", "depth", "first_two_gain")


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
        raise RecordError(
            f"{title} holds no records yet: train with a callback, or scan an archive"
        )
    require("plotly", "report")
    from plotly.offline import get_plotlyjs

    last = records[-1]
    data = {
        "title": title,
        "epsilon": EPSILON,
        "model": last["model"],
        "probe": last["probe"],
        "versions": last["versions"],
        "records": [_drawn(record) for record in records],
    }
    parts = {
        "title": html.escape(title),
        "style": _asset("report.css"),
        "plotly": get_plotlyjs(),
        "data": _embedded(data),
        "script": _asset("report.js"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("template.html"))
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror}") from error


def _drawn(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page draws of a record."""
    intervals = {name: record["intervals"][name] for name in _INTERVALS}
    drawn = {name: record[name] for name in _FIELDS} | {"intervals": intervals}
    return {name: _rounded(value) for name, value in drawn.items()}


def _rounded(value: Any) -> Any:
    """Six significant digits; null for what is no number."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _embedded(data: Any) -> str:
    """JSON that no HTML parser takes for markup."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
