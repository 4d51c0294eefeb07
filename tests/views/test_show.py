from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sinktrack import Probe, Run, measure
from sinktrack.cli import app
from sinktrack.errors import RecordError
from sinktrack.loggers import curves
from sinktrack.records.names import name
from sinktrack.records.rows import rows
from sinktrack.records.run import to_json
from sinktrack.signal import analyze
from sinktrack.views.story import circuit, where
from sinktrack.views.terminal import show
from tests.helpers import models
from tests.helpers.paths import DATA
from tests.helpers.records import serial_record
from tests.helpers.synthetic import counts_alone, restarted_records, synthetic_records


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
    said = " ".join(text.split())
    assert "A sink has formed: blocks 2 to 3 rest on P0" in said
    assert "The P0 state of the sink is written by MLP 0 (52%)" in said
    assert "Position decides, whatever token stands first: 90% of 64" in said
    assert "candidate" in text
    for block in range(4):
        cells = row(text, block).split()
        assert cells[1:3] == ["full", f"{last['concentration'][block]:.2f}"]
    assert f"{last['shares'][2]['share']:.0%}" in row(text, 0)
    rate = f"{last['sink_rate_by_block']['0.3'][2]:.0%}"
    assert re.findall(r"\d+%", row(text, 2)) == [rate], "from the reference on there is no share"
    uniform = sum(1 / (i + 1) for i in range(1, 64)) / 63
    assert f"evenly would give P0 {uniform:.2f}" in text
    assert "expert 5 of block 0, gate 0.80" in text


@pytest.mark.parametrize("blocks", [1, 4, 48])
def test_fits_80_columns(blocks: int) -> None:
    text = shown(synthetic_records(blocks, steps=range(0, 100_000, 500)))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert all(row(text, block) for block in range(blocks))


@pytest.mark.parametrize("width", [40, 60, 72, 79])
def test_a_narrow_terminal_gets_fewer_columns(width: int) -> None:
    """Nothing is cut, and what stays is whole."""
    records = synthetic_records(48, steps=range(0, 10_000, 500))
    text = shown(records, width=width)
    assert "\u2026" not in text and max(map(len, text.splitlines())) <= width
    table = [row(text, block).split() for block in (3, 47)]
    assert all(f"{records[-1]['concentration'][b]:.2f}" in cells for b, cells in
               zip((3, 47), table, strict=True))  # fmt: skip


def test_a_comparison_in_ascii() -> None:
    data = DATA / "runs"
    code = "import sys; from sinktrack.cli import main; sys.argv[1:1] = ['compare']; main()"
    made = subprocess.run(
        [sys.executable, "-c", code, *sorted(data.glob("seed*"))], capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"},
    )  # fmt: skip
    text = made.stdout.decode("ascii")
    assert made.returncode == 0 and "seed2" in text and not re.search(r"\\[xu]", text)


def test_the_widest_numbers_fit_80_columns() -> None:
    records = synthetic_records(48, steps=range(0, 10_000, 500))
    for record in records:
        record["block_kinds"] = ["sliding"] * 48
        record["norm_ratio"] = [0.00123, *[1234.5] * 48]
        record["gain"] = [-10.23] * 48
        record["shares"] = [
            {"kind": kind, "block": block, "index": None, "share": -1.0}
            for kind in ("attention", "mlp") for block in range(48)
        ]  # fmt: skip
    text = shown(records)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    cells = row(text, 47).split()
    assert cells[1] == "sliding" and cells[-3:] == ["-100%", "-100%", "-10.23"]
    assert "1.23e+03" in cells and len(cells[3]) >= 4


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
    assert re.search(r"last step +1,400", text) and "(15 records)" in text
    assert "left out: 15 records up to step 2,900" in text


def test_shares_of_no_sink_are_no_headline() -> None:
    text = shown(synthetic_records(formed=False))
    assert "first-two share" not in text and "depth" not in text


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
    assert text.splitlines()[1].startswith("No sink has formed: no block rests on P0.")
    assert "A sink has formed" not in text


def test_one_record_gets_no_stage() -> None:
    """Of a finished model, say: a state without a course."""
    text = " ".join(shown(synthetic_records()[-1:]).split())
    assert "A sink has formed: blocks 2 to 3" in text
    assert "One record shows a state, not a course" in text
    for stage in ("absent", "emerging", "settled", "Signal", "Not claimed"):
        assert stage not in text


def test_sinks_in_series_are_told() -> None:
    text = " ".join(shown([serial_record()]).split())
    for sentence in (
        "Two sinks in series have formed. The main one: blocks 12 to 29 rest on P0 with 60%",
        "Weaker: blocks 3 to 9 (40%)",
        "The P0 state of the main sink is written by MLP 11 (93%). Erased by MLP 29.",
        "Small in share, large in effect: that state falls by 61% without MLP 0.",
        "of blocks 3 to 9 is written by MLP 2 (70%), MLP 1 (25%). Erased by MLP 8 and MLP 9.",
        "A token decides, not the position alone: 2% of 64 single first tokens make a P0 state of "
        "half that size or more.",
        "P0 has rivals at block 3: 3.0% of the other positions have at least half its norm.",
    ):
        assert sentence in text


def test_a_sink_before_any_write_is_said() -> None:
    records = synthetic_records(steps=[10])
    first = {"first_block": 0, "last_block": 3, "mass": 2.0, "peak_block": 0}
    nothing = {"reference_block": 0, "first_two_share": None, "depth": None}
    records[0] |= nothing | {"formed": True, "sinks": [first]}
    records[0]["shares"] = records[0]["shares"][:1]
    text = shown(records)
    assert "stands from block 0 on, before anything is written" in text
    assert "first-two share" not in text
    assert "(1 record)" in text


def test_counts_of_sink_heads_alone() -> None:
    text = " ".join(shown(counts_alone()).split())
    assert "Which blocks rest on P0 was not measured. The first block with a sink head is" in text


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
    assert name in "".join(text.splitlines()[:4])  # a long path is wrapped
    assert row(text, 0).split()[3].startswith("\u2581" if encoding == "utf-8" else ".")


def test_plain_bars_rise_and_gaps_are_blank(tmp_path: Path) -> None:
    records = synthetic_records(steps=range(9))
    for record, value in zip(records, (None, *(i / 8 for i in range(8))), strict=True):
        record["concentration"][0] = value
    with (tmp_path / "out").open("w+", encoding="ascii") as file:
        show(records, analyze(records), "run", Console(width=100, color_system=None, file=file))
        file.seek(0)
        assert " .:-=+*%#" in row(file.read(), 0)


def test_components_that_were_changed_together_are_spelled_out() -> None:
    heads = [{"kind": "head", "block": 0, "index": index} for index in (1, 6)]
    writers = [{"kind": kind, "block": 2, "index": None} for kind in ("mlp", "attention")]
    assert name({"kind": "joint", "block": 0, "index": 1, "components": heads}) == (
        "head 1 of block 0 and head 6 of block 0"
    )
    three = [*writers, *heads[:1]]
    row = {"kind": "joint", "block": 0, "index": None, "components": three}
    assert name(row) == "MLP 2, attention 2 and head 1 of block 0"
    assert name({"kind": "state", "block": 3, "index": None}) == "P0's whole state at block 3"
    tested = {"necessity": [row | {"interval": [0.5, 0.7], "effect": 0.6, "verdict": "necessary"}]}
    record = synthetic_records()[-1] | {"causal": tested}
    assert curves.causal(record)[0][-2] == name(row)
    assert not any("joint" in key for key in curves.metrics(record))
    (long,) = [one for one in rows(record) if one["metric"] == "causal_necessity"]
    assert long["kind"] == f"{name(row)}, together" and long["block"] is None


def test_what_was_not_measured_is_no_negative() -> None:
    """Null tells neither that there is a sink nor that there is none."""
    record = synthetic_records(formed=False)[-1]
    untold = record | {"formed": None, "sinks": None, "reference_block": None}
    said = " ".join(shown([untold]).split())
    assert "Which blocks rest on P0 was not measured." in said
    assert "The reason: the record does not say whether a sink has formed." in said
    reason = untold | {"missing": {"sinks": "its blocks run apart"}}
    assert where(reason).endswith("The reason: its blocks run apart.")
    assert "No sink has" not in where(reason) and "no block" not in " ".join(signal_shows(reason))
    alone = record | {"concentration": [0.1, None, 0.1, 0.1]}
    assert "no block whose attention could be measured (not 1) rests on P0" in where(alone)
    linear = alone | {"block_kinds": ["full", "linear", "full", "full"]}
    assert "no block rests on P0" in where(linear)
    heads = record | {"sink_heads": {"0.3": [None] * 4}, "first_sink_block": None}
    assert not any("sink head" in line for line in signal_shows(heads))
    assert any("no sink head" in line for line in signal_shows(record))


def test_a_sink_after_records_that_do_not_say() -> None:
    first, *later = synthetic_records(steps=range(0, 400, 100))
    first |= {"formed": None, "sinks": None}
    formed = synthetic_records()[-1]
    later = [formed | {"step": record["step"]} for record in later]
    said = " ".join(shown([first, *later]).split())
    assert "It is there since step 100 at the latest: the record before does not say." in said


def test_a_share_that_is_missing_is_not_small() -> None:
    record = synthetic_records()[-1]
    (sink,) = record["sinks"]
    effects = [{"kind": "mlp", "block": 0, "index": None, "effect": 0.9}]
    hidden = record | {"sinks": [sink | {"writers": [], "total_effects": effects}]}
    assert not any("Small in share" in line for line in circuit(hidden))


def signal_shows(record: dict[str, Any]) -> tuple[str, ...]:
    return analyze([record]).shows


def test_a_probe_of_one_token_is_minded_again() -> None:
    """The sink rate of equal tokens says nothing of a model that tells P0 by its unmixed value."""
    model = models.llama()
    alike = Probe.from_tokens(torch.full((4, 16), 5))
    record = to_json(measure(model, alike).to_record(0, "callback", {}))
    said = " ".join(shown([record]).split())
    assert "Mind the probe: every sequence of the probe repeats one token" in said
    other = measure(model, Probe.random(models.VOCABULARY, sequences=4, length=16))
    assert "probe" not in other.missing
