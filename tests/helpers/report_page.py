"""What a page of the report has drawn."""

from __future__ import annotations

from typing import Any


def drawn(page: Any, chart: str) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = page.evaluate(
        """chart => document.getElementById(chart).data.map(
            ({type, name, meta, x, y, z, text}) => ({type, name, meta, x, y, z, text}))""",
        chart,
    )
    return traces


def curve(page: Any, chart: str, name: str = "run", meta: str | None = None) -> dict[str, Any]:
    return next(
        trace
        for trace in drawn(page, chart)
        if trace["name"] == name and (meta is None or trace.get("meta") == meta)
    )
