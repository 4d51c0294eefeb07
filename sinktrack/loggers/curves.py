"""What of a record every dashboard shows, by the same keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sinktrack.metrics import FIELDS
from sinktrack.metrics.base import Field

SCALARS = tuple(name for name, field in FIELDS.items() if field.curve and not field.axes)
BY_BLOCK = tuple(name for name, field in FIELDS.items() if field.curve and field.axes)
COMPONENT = ("kind", "block", "index", "share", "gate")
CAUSAL = ("test", "kind", "block", "index", "share", "effect", "low", "high", "verdict")
TESTS = ("necessity", "sufficiency", "position")


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's curves by key, ``sinktrack/...``; what was not measured is left out."""
    found: dict[str, Any] = {
        f"sinktrack/{name}": record.get(name) for name in ("step", "tokens", *SCALARS)
    }
    for name in BY_BLOCK:
        for block, value in enumerate(by_block(record, FIELDS[name])):
            found[f"sinktrack/{name}/block_{block:02d}"] = value
    for test in TESTS:
        for row in record.get("causal", {}).get(test, ()):
            if row["index"] is None:  # heads and experts go into the table
                where = "" if row["block"] is None else f"_{row['block']:02d}"
                found[f"sinktrack/causal/{test}/{row['kind']}{where}"] = row["effect"]
    return {key: value for key, value in found.items() if value is not None}


def by_block(record: Mapping[str, Any], field: Field) -> Iterator[float | None]:
    """A field's value of each block: of one by head the mean, of one at boundaries the inputs'."""
    for value in (record.get(field.name) or [])[: record["model"]["blocks"]]:
        if isinstance(value, list):
            known = [number for number in value if number is not None]
            yield sum(known) / len(known) if known else None
        else:
            yield value


def components(record: Mapping[str, Any]) -> list[list[Any]]:
    """The largest parts of the P0 state, a row for each; the columns are `COMPONENT`."""
    return [[part.get(name) for name in COMPONENT] for part in record["top_components"] or ()]


def causal(record: Mapping[str, Any]) -> list[list[Any]]:
    """The causal tests, a row for each; the columns are `CAUSAL`."""
    rows = []
    for test in TESTS:
        for row in record.get("causal", {}).get(test, ()):
            low, high = row["interval"]
            shown = {**row, "test": test, "low": low, "high": high}
            rows.append([shown.get(name) for name in CAUSAL])
    return rows


def gone(records: Sequence[Mapping[str, Any]]) -> dict[str, None]:
    """Curves that the last record has no value of, for a summary that would keep an earlier one."""
    return dict.fromkeys({key for one in records for key in metrics(one)} - {*metrics(records[-1])})


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run comes to so far, by key: its last curves, and when its sink formed."""
    last = records[-1]
    found: dict[str, Any] = metrics(last)
    found["sinktrack/formed"] = last["formed"]
    found["sinktrack/first_formed_at_step"] = next(
        (record["step"] for record in records if record["formed"]), None
    )
    for top in (last["top_components"] or ())[:1]:
        where = [f"block {top['block']}"] if top["block"] is not None else []
        index = [str(top["index"])] if top["index"] is not None else []
        found["sinktrack/largest_component"] = " ".join([*where, top["kind"], *index])
    return {key: value for key, value in found.items() if value is not None}
