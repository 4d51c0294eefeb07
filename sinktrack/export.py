"""Records in long form, one number a row, as Parquet or CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sinktrack.errors import RecordError, require

COLUMNS = ("step", "tokens", "metric", "block", "kind", "index", "level", "value", "low", "high")
_SCALARS = (
    "sink_rate", "formed", "reference_block", "share_sum", "first_two_share", "depth",
    "effective_blocks", "first_two_gain", "peak_block", "seconds",
)  # fmt: skip
_BY_BLOCK = (
    "visible_queries", "concentration", "p0_norm", "norm_ratio", "direction_consistency", "gain",
)  # fmt: skip
_BY_HEAD = ("p0_attention", "sink_logit_mass", "attention_gate")

Row = dict[str, Any]


def export(
    records: Sequence[Mapping[str, Any]], path: Path, form: Literal["parquet", "csv"]
) -> int:
    """Write what the records measured; what was not measured has no row.

    Columns: ``step``, ``tokens`` (may be null), ``metric`` (a record's field), ``block``, ``kind``
    and ``index`` (head or expert, or a component of the P0 state), ``level`` (the threshold of a
    sink rate, the quantile of ``first_token.norm_ratio``), ``value``, ``low`` and ``high`` (95 %
    interval). Float64, but integers for ``step``, ``tokens``, ``block`` and ``index``.

    Args:
        records: of one run.
        path: the file to write.
        form: its format.

    Returns:
        The number of rows.

    Raises:
        RecordError: there are no records, or the file cannot be written.
        MissingExtra: pyarrow is not installed.
    """
    if not records:
        raise RecordError("there are no records to export")
    arrow = require("pyarrow", "export")
    schema = _schema(arrow)
    count = 0
    try:
        with path.open("wb") as file, _writer(file, schema, form) as writer:
            for record in records:
                found = list(rows(record))
                writer.write_batch(arrow.RecordBatch.from_pylist(found, schema=schema))
                count += len(found)
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror or error}") from error
    return count


def rows(record: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of one record."""
    start = dict.fromkeys(COLUMNS) | {"step": record["step"], "tokens": record["tokens"]}
    for row in _measured(record):
        if row["value"] is not None:
            yield start | row | {"value": float(row["value"])}


def _measured(record: Mapping[str, Any]) -> Iterator[Row]:
    intervals = record["intervals"]
    for name in _SCALARS:
        low, high = intervals.get(name) or (None, None)
        yield {"metric": name, "value": record.get(name), "low": low, "high": high}
    for name in _BY_BLOCK:
        bounds = intervals.get(name) or []
        for block, value in enumerate(record.get(name, [])):
            low, high = (bounds[block] if block < len(bounds) else None) or (None, None)
            yield {"metric": name, "block": block, "value": value, "low": low, "high": high}
    for test in ("necessity", "sufficiency", "position"):
        for row in record.get("causal", {}).get(test, ()):
            low, high = row["interval"]
            place = {name: row[name] for name in ("kind", "block", "index")}
            found = {"metric": f"causal_{test}", "value": row["effect"], "low": low, "high": high}
            yield place | found
    for eps, values in record["sink_rate_by_block"].items():
        yield from _blocks("sink_rate_by_block", values, level=float(eps))
    first = record["first_token"]
    for quantile, values in first["norm_ratio"].items():
        yield from _blocks("first_token.norm_ratio", values, level=int(quantile) / 100)
    yield from _blocks("first_token.direction_consistency", first["direction_consistency"])
    for name in _BY_HEAD:
        for block, heads in enumerate(record.get(name, [])):
            for head, value in enumerate(heads):
                yield {
                    "metric": name, "block": block, "kind": "head", "index": head, "value": value,
                }  # fmt: skip
    for name in ("shares", "top_components"):
        for part in record[name]:
            where = {key: part[key] for key in ("kind", "block", "index")}
            yield {"metric": name, **where, "value": part["share"]}
            yield {"metric": f"{name}.gate", **where, "value": part.get("gate")}


def _blocks(name: str, values: Sequence[float | None], level: float | None = None) -> Iterator[Row]:
    for block, value in enumerate(values):
        yield {"metric": name, "block": block, "level": level, "value": value}


def _schema(arrow: Any) -> Any:
    whole, text, number = arrow.int64(), arrow.string(), arrow.float64()
    types = {"step": whole, "tokens": whole, "block": whole, "index": whole, "metric": text}
    types["kind"] = text
    return arrow.schema([(name, types.get(name, number)) for name in COLUMNS])


def _writer(file: Any, schema: Any, form: str) -> Any:
    if form == "csv":
        return require("pyarrow.csv", "export").CSVWriter(file, schema)
    return require("pyarrow.parquet", "export").ParquetWriter(file, schema, compression="zstd")
