"""Fields along the blocks and heads of a record, as every chart draws them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sinktrack.metrics.attention import EPSILON
from sinktrack.metrics.base import Field


def is_by_block(field: Field) -> bool:
    """Has it a number for each block, or a mean over the block's heads?"""
    axes = field.axes[1:] if field.axes[:1] == ("level",) else field.axes
    return axes[:1] in (("block",), ("boundary",)) and (field.rows is None or bool(field.chart))


def is_by_head(field: Field) -> bool:
    """Has it a number for each head, or KV head, of a block?"""
    return field.axes in (("block", "head"), ("block", "kv_head")) and field.rows is None


def by_block(record: Mapping[str, Any], field: Field) -> list[float | None]:
    """A field's number of each block or boundary; empty where the record lacks it.

    Of a field by head the mean over the heads, of one by level that at `EPSILON`, or the
    only one that is there.
    """
    value: Any = record.get(field.name)
    if nothing(value):
        return []
    if field.rows is not None:
        return [row["value"] for row in field.rows(value) if row.get("metric") == field.chart]
    if field.axes[0] == "level":
        value = value.get(str(EPSILON), next(iter(value.values()), []))
    return [_mean(row) if isinstance(row, list) else row for row in value]


def nothing(value: Any) -> bool:
    """Is it null, or nulls alone?"""
    return value is None or (isinstance(value, list) and all(one is None for one in value))


def _mean(row: list[float | None]) -> float | None:
    known = [number for number in row if number is not None]
    return sum(known) / len(known) if known else None
