"""Exports read back by the libraries that people use."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sinktrack import Run
from sinktrack.cli import app
from sinktrack.errors import RecordError
from sinktrack.loggers.curves import metrics
from sinktrack.records.rows import COLUMNS
from sinktrack.views.export import export
from tests.helpers.synthetic import synthetic_records

pandas = pytest.importorskip("pandas")
polars = pytest.importorskip("polars")

NOT_MEASURED = {
    "schema", "step", "tokens", "source", "weights", "probe", "model", "versions", "block_kinds",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.open(tmp_path / "run")
    records = synthetic_records()
    records[0]["tokens"] = None
    records[3]["sink_rate"] = records[3]["intervals"]["sink_rate"] = None
    records[4]["p0_attention"][1] = [None] * 4
    records[5]["sink_logit_mass"] = [[0.25] * 4] * 4
    for record in records:
        run.append(record)
    return run


def numbers(value: Any) -> list[float]:
    """All numbers in a piece of a record; booleans count as 0 and 1, places do not."""
    if isinstance(value, dict):
        return [
            n
            for key, item in value.items()
            if key not in ("block", "index", "channel")
            for n in numbers(item)
        ]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [] if value is None or isinstance(value, str) else [float(value)]


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_every_number_is_there_once(run: Run, tmp_path: Path, form: str) -> None:
    path = tmp_path / f"out.{form}"
    result = CliRunner().invoke(
        app, ["export", str(run.directory), "--format", form, "-o", str(path)]
    )
    assert result.exit_code == 0, result.output
    read = {"parquet": pandas.read_parquet, "csv": pandas.read_csv}[form]
    frame = read(path)
    assert tuple(frame.columns) == COLUMNS
    for record in run.records:
        mine = frame[frame.step == record["step"]]
        expected = numbers(
            {k: v for k, v in record.items() if k not in NOT_MEASURED | {"intervals"}}
        )
        expected.remove(float(record["first_token"]["tokens"]))
        assert sorted(mine.value) == pytest.approx(sorted(expected), rel=1e-12)
        bounds = mine[["low", "high"]].to_numpy().ravel()
        bounds = bounds[~pandas.isna(bounds)]
        assert sorted(bounds) == pytest.approx(sorted(numbers(record["intervals"])), rel=1e-12)
    assert frame[frame.step == 0].tokens.isna().all()
    keys = ["step", "metric", "block", "kind", "index", "level"]
    assert not frame.duplicated(keys).any(), "a row is known by its keys"


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_polars_reads_the_same(run: Run, tmp_path: Path, form: str) -> None:
    path = tmp_path / f"out.{form}"
    count = export(run.records, path, form)  # type: ignore[arg-type]
    frame = {"parquet": polars.read_parquet, "csv": polars.read_csv}[form](
        path, **({"infer_schema_length": None} if form == "csv" else {})
    )
    assert len(frame) == count
    heads = frame.filter((polars.col("metric") == "p0_attention") & (polars.col("step") == 1900))
    by_block = heads.group_by("block").agg(polars.col("value").mean()).sort("block")
    last = run.records[-1]
    assert by_block["value"].to_list() == pytest.approx(last["concentration"])
    gates = frame.filter(polars.col("metric") == "top_components.gate")
    assert set(gates["kind"]) == {"expert"} and set(gates["index"]) == {5}
    rate = frame.filter((polars.col("metric") == "sink_rate") & (polars.col("step") == 1900))
    assert rate.row(0, named=True) | {"level": None} == {
        "step": 1900, "tokens": last["tokens"], "metric": "sink_rate", "block": None, "kind": None,
        "index": None, "level": None, "value": last["sink_rate"],
        "low": last["intervals"]["sink_rate"][0], "high": last["intervals"]["sink_rate"][1],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["depth", "peak_block", "gain", "norm_ratio", "p0_norm"])
def test_a_field_that_older_runs_lack_is_a_gap(name: str, tmp_path: Path) -> None:
    records = synthetic_records()
    for record in records[:-1]:
        del record[name]
        record["intervals"].pop(name, None)
    count = export(records, tmp_path / "out.parquet", "parquet")
    frame = pandas.read_parquet(tmp_path / "out.parquet")
    assert len(frame) == count
    steps = set(frame[frame.metric == name].step)
    assert steps == ({records[-1]["step"]} if records[-1][name] is not None else set())
    assert not any(f"sinktrack/{name}" in key for key in metrics(records[0]))


def test_a_real_record(demo: Any, tmp_path: Path) -> None:
    records = Run.read(demo[0] / "run").records
    export(records, tmp_path / "demo.parquet", "parquet")
    frame = pandas.read_parquet(tmp_path / "demo.parquet")
    shares = frame[frame.metric == "shares"].groupby("step").value.sum()
    for step, total in shares.items():
        assert math.isclose(total, 1, abs_tol=1e-3), step
    assert json.loads(frame.metric.value_counts().to_json())["sink_rate"] == len(records)


def test_no_records_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no records"):
        export([], tmp_path / "out.csv", "csv")
    with pytest.raises(RecordError, match="cannot write"):
        export(synthetic_records(), tmp_path / "missing" / "out.csv", "csv")
