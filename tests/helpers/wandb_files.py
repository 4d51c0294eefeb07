"""W&B's offline files, read back with wandb's own messages."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def read_back(directory: Path) -> tuple[list[dict[str, Any]], list[Any]]:
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


def read_summary(directory: Path) -> dict[str, Any]:
    """What the run's summary comes to."""
    found = {}
    for record in finished(directory):
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found


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
        if position + 7 + size > len(data):  # still being written
            return
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
