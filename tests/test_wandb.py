"""A real offline W&B run, read back with wandb's own messages."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
import wandb
from sinktrack.callbacks.huggingface import SinkTrackCallback
from sinktrack.callbacks.loop import SinkTracker
from test_callbacks import PROBE, run_trainer
from wandb.proto import wandb_internal_pb2

from sinktrack import Run


def read_back(directory: Path) -> tuple[list[dict], list]:
    """History rows and metric definitions of the one offline run below ``directory``."""
    rows, definitions = [], []
    for record in finished(directory):
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
        if record.WhichOneof("record_type") == "metric":
            definitions.append(record.metric)
    return rows, definitions


def finished(directory: Path) -> list[wandb_internal_pb2.Record]:
    """All records of the run; ``finish()`` may return before the last reach the disk."""
    (file,) = directory.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        records = []
        for data in leveldb_records(file.read_bytes()):
            records.append(wandb_internal_pb2.Record())
            records[-1].ParseFromString(data)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.05)
    raise AssertionError(f"{file} never ended with the record of its exit")


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The file is a LevelDB log behind 7 bytes; wandb has no public reader of it any more."""
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_the_trainer_loses_no_row_and_ours_have_their_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = wandb.init(project="test", mode="offline", dir=tmp_path)
    callback = SinkTrackCallback(PROBE, tmp_path / "run", every=3, on_error="raise")
    run_trainer(
        models.mixtral().train(), tmp_path / "out", [callback],
        max_steps=10, logging_steps=1, report_to=["wandb"],
    )  # fmt: skip
    run.finish()
    rows, definitions = read_back(tmp_path)
    losses = [row for row in rows if "train/loss" in row]
    assert [row["train/global_step"] for row in losses] == list(range(1, 11))
    ours = [row for row in rows if "sinktrack/sink_rate" in row]
    records = Run.read(tmp_path / "run").records
    assert [row["sinktrack/step"] for row in ours] == [0, 3, 6, 9, 10]
    assert [row["train/global_step"] for row in ours] == [0, 3, 6, 9, 10]
    for row, record in zip(ours, records, strict=True):
        for name in ("sink_rate", "first_two_share", "first_two_gain", "reference_block", "depth"):
            if record[name] is None:
                assert f"sinktrack/{name}" not in row
            else:
                assert math.isclose(row[f"sinktrack/{name}"], record[name], rel_tol=1e-6)
        for block in range(4):
            key = f"block_{block:02d}"
            assert row[f"sinktrack/concentration/{key}"] == record["concentration"][block]
            assert row[f"sinktrack/norm_ratio/{key}"] == record["norm_ratio"][block]
        assert row["sinktrack/top_components/_type"] == "table-file"
    steps = {d.name: d.step_metric for d in definitions} | {
        d.glob_name: d.step_metric for d in definitions if d.glob_name
    }
    axes = [axis for name, axis in steps.items() if name.startswith("sinktrack/") and axis]
    assert axes and set(axes) == {"sinktrack/step"}


def test_without_an_active_run_none_is_opened(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert wandb.run is None
    SinkTracker(PROBE, tmp_path / "run", every=1, on_error="raise").step(0, models.llama())
    assert wandb.run is None and not (tmp_path / "wandb").exists()


def test_a_trainers_own_steps_are_kept(tmp_path: Path, monkeypatch) -> None:
    """A loop that logs with ``step=`` loses no row to ours."""
    monkeypatch.chdir(tmp_path)
    run = wandb.init(project="test", mode="offline", dir=tmp_path)
    tracker = SinkTracker(PROBE, tmp_path / "run", every=2, on_error="raise")
    model = models.llama()
    for step in range(6):
        run.log({"loss": torch.rand(()).item()}, step=step)
        tracker.step(step, model)
    run.finish()
    rows, _ = read_back(tmp_path)
    assert sum("loss" in row for row in rows) == 6
    assert sorted(row["sinktrack/step"] for row in rows if "sinktrack/step" in row) == [0, 2, 4]
