"""What of a record every dashboard shows, by the same keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sinktrack.metrics import FIELDS
from sinktrack.metrics.axes import by_block, is_by_block
from sinktrack.metrics.base import Field
from sinktrack.records.names import name as spelled

COMPONENT = ("kind", "block", "index", "share", "gate")
CAUSAL = ("test", "kind", "block", "index", "share", "effect", "low", "high", "name", "verdict")
"""``name`` spells out what was changed, where several components were all of them."""
TESTS = ("necessity", "sufficiency", "position")


def scalars() -> list[Field]:
    """Those of one number a record that every dashboard draws."""
    return [field for field in FIELDS.values() if field.curve and not field.axes]


def blockwise() -> list[Field]:
    """Those that every dashboard draws with a curve for each block."""
    return [field for field in FIELDS.values() if field.curve and is_by_block(field)]


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's curves by key, ``sinktrack/...``; what was not measured is left out."""
    curves: dict[str, Any] = {
        f"sinktrack/{name}": record.get(name)
        for name in ("step", "tokens", *(field.name for field in scalars()))
    }
    for field in blockwise():
        inputs = by_block(record, field)[: record["model"]["blocks"]]  # of boundaries too
        for block, value in enumerate(inputs):
            curves[f"sinktrack/{field.name}/block_{block:02d}"] = value
    for test in TESTS:
        for row in record.get("causal", {}).get(test, ()):
            if row["index"] is None and "components" not in row:  # those go into the table
                where = "" if row["block"] is None else f"_{row['block']:02d}"
                curves[f"sinktrack/causal/{test}/{row['kind']}{where}"] = row["effect"]
    return {key: value for key, value in curves.items() if value is not None}


def components(record: Mapping[str, Any]) -> list[list[Any]]:
    """The largest parts of the P0 state, a row for each; the columns are `COMPONENT`."""
    return [[part.get(name) for name in COMPONENT] for part in record["top_components"] or ()]


def causal(record: Mapping[str, Any]) -> list[list[Any]]:
    """The causal tests, a row for each; the columns are `CAUSAL`."""
    rows = []
    for test in TESTS:
        for row in record.get("causal", {}).get(test, ()):
            low, high = row["interval"]
            shown = {**row, "test": test, "low": low, "high": high, "name": spelled(row)}
            rows.append([shown.get(column) for column in CAUSAL])
    return rows


def gone(records: Sequence[Mapping[str, Any]]) -> dict[str, None]:
    """Curves that the last record has no value of, for a summary that would keep an earlier one."""
    return dict.fromkeys({key for one in records for key in metrics(one)} - {*metrics(records[-1])})


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run comes to so far, by key: its last curves, and when its sink formed."""
    last = records[-1]
    told: dict[str, Any] = metrics(last)
    told["sinktrack/probes"] = len(records)
    told["sinktrack/formed"] = last["formed"]
    told["sinktrack/first_formed_at_step"] = next(
        (record["step"] for record in records if record["formed"]), None
    )
    for top in (last["top_components"] or ())[:1]:
        where = [f"block {top['block']}"] if top["block"] is not None else []
        index = [str(top["index"])] if top["index"] is not None else []
        told["sinktrack/largest_component"] = " ".join([*where, top["kind"], *index])
    return {key: value for key, value in told.items() if value is not None}
