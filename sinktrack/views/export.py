"""Records in long form, one number a row, as Parquet or CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sinktrack.errors import RecordError, require
from sinktrack.records.rows import COLUMNS, rows


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
                long_rows = list(rows(record))
                writer.write_batch(arrow.RecordBatch.from_pylist(long_rows, schema=schema))
                count += len(long_rows)
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror or error}") from error
    return count


def _schema(arrow: Any) -> Any:
    whole, text, number = arrow.int64(), arrow.string(), arrow.float64()
    types = {"step": whole, "tokens": whole, "block": whole, "index": whole, "metric": text}
    types["kind"] = text
    return arrow.schema([(name, types.get(name, number)) for name in COLUMNS])


def _writer(file: Any, schema: Any, form: str) -> Any:
    if form == "csv":
        return require("pyarrow.csv", "export").CSVWriter(file, schema)
    return require("pyarrow.parquet", "export").ParquetWriter(file, schema, compression="zstd")
