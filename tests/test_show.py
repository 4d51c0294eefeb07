from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from synthetic import restarted_records, synthetic_records
from typer.testing import CliRunner

from sinktrack import Run
from sinktrack.cli import app
from sinktrack.errors import RecordError
from sinktrack.signal import analyze
from sinktrack.views.terminal import show


def shown(records: list[dict[str, Any]], title: str = "run", width: int = 80) -> str:
    console = Console(width=width, color_system=None, file=io.StringIO())
    show(records, analyze(records), title, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, block: int) -> str:
    return next(line for line in text.splitlines() if line.split()[:1] == [str(block)])


def test_headline_and_blocks() -> None:
    records = synthetic_records()
    last = records[-1]
    text = shown(records)
    assert "1,900, 3,891,200 tokens (20 records)" in text
    low, high = last["intervals"]["sink_rate"]
    assert f"{last['sink_rate']:.1%}  (95 %: {low:.1%} to {high:.1%})" in text
    assert "starts in block 2" in text
    assert "candidate" in text
    for block in range(4):
        cells = row(text, block).split()
        assert cells[1:3] == ["full", f"{last['concentration'][block]:.2f}"]
    assert f"{last['shares'][2]['share']:.0%}" in row(text, 0)
    rate = f"{last['sink_rate_by_block']['0.3'][2]:.0%}"
    assert re.findall(r"\d+%", row(text, 2)) == [rate], "from the reference on there is no share"
    uniform = sum(1 / (i + 1) for i in range(1, 64)) / 63
    assert f"evenly would give P0 {uniform:.2f}" in text
    assert "block 0 expert 5, gate 0.80" in text


@pytest.mark.parametrize("blocks", [1, 4, 48])
def test_fits_80_columns(blocks: int) -> None:
    text = shown(synthetic_records(blocks, steps=range(0, 100_000, 500)))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert all(row(text, block) for block in range(blocks))


def test_sparklines_have_a_fixed_scale_and_at_most_24_columns() -> None:
    records = synthetic_records(steps=range(1000))
    for index, record in enumerate(records):
        record["concentration"][0] = 1.0 if index == 0 else 0.5 if index == 999 else 0.0
    bars = row(shown(records, width=200), 0).split()[3]
    assert bars == "█" + "▁" * 22 + "▅"


def test_records_that_training_left_behind_are_left_out(tmp_path: Path) -> None:
    run = Run.open(tmp_path)
    for record in restarted_records():
        run.append(record)
    text = CliRunner().invoke(app, ["show", str(tmp_path)]).output
    assert "last step        1,400" in text and "(15 records)" in text
    assert "left out: 15 records up to step 2,900" in text


def test_shares_of_no_sink_are_no_headline() -> None:
    text = shown(synthetic_records(formed=False))
    assert "first-two share" not in text and "depth (blocks)" not in text


def test_windows_have_no_even_attention() -> None:
    records = synthetic_records()
    records[-1]["visible_queries"] = [63, 7, 63, 7]
    assert "evenly" not in shown(records)
    records[-1]["visible_queries"] = [None, 2, None, 2]
    assert f"evenly would give P0 {(1 / 2 + 1 / 3) / 2:.2f}" in shown(records)


def test_gaps_are_blank() -> None:
    records = synthetic_records(steps=[0, 1, 2])
    for record in records:
        record["concentration"][0] = 0.0
    records[1]["concentration"][0] = None
    assert "▁ ▁" in row(shown(records), 0)


def test_linear_blocks_are_blank() -> None:
    records = synthetic_records()
    for record in records:
        record["block_kinds"][1] = "linear"
        record["concentration"][1] = record["sink_rate_by_block"]["0.3"][1] = None
    assert row(shown(records), 1).split()[:2] == ["1", "linear"]


def test_no_sink_is_said() -> None:
    text = shown(synthetic_records(formed=False))
    assert "no block has formed a sink" in text
    assert "starts in" not in text


def test_a_sink_before_any_write_is_said() -> None:
    records = synthetic_records(steps=[10])
    records[0] |= {"reference_block": 0, "first_two_share": None, "depth": None}
    records[0]["shares"] = records[0]["shares"][:1]
    text = shown(records)
    assert "precedes any write" in text
    assert "first-two share" not in text
    assert "(1 record)" in text


def test_titles_are_not_markup() -> None:
    assert "[bold]run[/x]" in shown(synthetic_records(), "[bold]run[/x]")


def test_no_records() -> None:
    with pytest.raises(RecordError, match="train with a callback, or scan"):
        shown([])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "C", "utf-8"])
def test_any_encoding_of_the_output(encoding: str, tmp_path: Path) -> None:
    """As in the logs of a scheduler: bars of ASCII where there are no others."""
    run = Run.open(tmp_path / "caf\xe9 \u2581")
    for record in synthetic_records():
        run.append(record)
    own = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | (own if encoding == "C" else {"PYTHONIOENCODING": encoding})
    done = subprocess.run(
        [sys.executable, "-c", "from sinktrack.cli import main; main()", "show",
         str(run.directory)],
        capture_output=True, env=environment | {"COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode("utf-8" if encoding == "utf-8" else "latin-1")
    name = {"utf-8": "\u2581", "C": "\\udce2"}.get(encoding, "\\u2581")
    assert name in text.splitlines()[0]
    assert row(text, 0).split()[3].startswith("\u2581" if encoding == "utf-8" else ".")


def test_plain_bars_rise_and_gaps_are_blank(tmp_path: Path) -> None:
    records = synthetic_records(steps=range(9))
    for record, value in zip(records, (None, *(i / 8 for i in range(8))), strict=True):
        record["concentration"][0] = value
    with (tmp_path / "out").open("w+", encoding="ascii") as file:
        show(records, analyze(records), "run", Console(width=100, color_system=None, file=file))
        file.seek(0)
        assert " .:-=+*%#" in row(file.read(), 0)
