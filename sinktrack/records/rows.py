"""Records in long form, one number a row: what export writes and reports draw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sinktrack.metrics import FIELDS
from sinktrack.metrics.axes import nothing
from sinktrack.metrics.base import Axis, Row
from sinktrack.records.names import name as spelled

COLUMNS = ("step", "tokens", "metric", "block", "kind", "index", "level", "value", "low", "high")
_CAUSAL = ("necessity", "sufficiency", "position")


def rows(record: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of one record, by `COLUMNS`; what was not measured has none."""
    start = dict.fromkeys(COLUMNS) | {"step": record["step"], "tokens": record["tokens"]}
    for row in _measured(record):
        if row["value"] is not None:
            yield start | row | {"value": float(row["value"])}


def _measured(record: Mapping[str, Any]) -> Iterator[Row]:
    yield {"metric": "seconds", "value": record.get("seconds")}
    for name, field in FIELDS.items():
        value = record.get(name)
        if nothing(value):
            continue
        rows = field.rows(value) if field.rows else _along(field.axes, value, {})
        bounds = record["intervals"].get(name)
        for row in rows:
            low_high = bounds[row["block"]] if bounds and "block" in row else bounds
            low, high = low_high or (None, None)
            yield row | {"metric": name + row.get("metric", ""), "low": low, "high": high}
    for name, rates in (record.get("position_card") or {}).items():
        for field, bounds in rates["intervals"].items() if _is_card(rates) else ():
            low, high = bounds or (None, None)
            value = {"value": rates[field], "low": low, "high": high}
            yield {"metric": f"position_card.{field}", "kind": name} | value
    for test in _CAUSAL:
        for row in record.get("causal", {}).get(test, ()):
            low, high = row["interval"]
            place = {name: row[name] for name in ("kind", "block", "index")}
            if "components" in row:
                place = {"kind": f"{spelled(row)}, together"}
            effect = {"metric": f"causal_{test}", "value": row["effect"], "low": low, "high": high}
            yield place | effect


def _is_card(rates: Any) -> bool:
    """Is it one of the variants of a position card?"""
    return isinstance(rates, Mapping) and "intervals" in rates


def _along(axes: tuple[Axis, ...], value: Any, place: Row) -> Iterable[Row]:
    """The numbers of a nested value, each with its place on the axes."""
    if not axes:
        yield place | {"value": value}
    elif axes[0] == "level":
        for level, inner in value.items():
            yield from _along(axes[1:], inner, place | {"level": float(level)})
    elif axes[0] in ("block", "boundary"):
        for block, inner in enumerate(value):
            yield from _along(axes[1:], inner, place | {"block": block})
    elif axes[0] in ("head", "kv_head"):
        for index, inner in enumerate(value or ()):
            yield from _along(axes[1:], inner, place | {"kind": axes[0], "index": index})
