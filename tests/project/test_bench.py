"""Counts of what a scan, a probe and the causal tests do have not grown; the history is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import bench
import bench_counts
import pytest

from tests.helpers.paths import DOCS, SCRIPTS

KEEP = "python scripts/bench_counts.py --keep"


def grown(found: dict[str, float], kept: dict[str, float]) -> list[str]:
    """What is larger than what is kept, or of which nothing is kept."""
    return [
        f"{name}: {ratio:.5f}, kept {kept.get(name)}"
        for name, ratio in found.items()
        if name not in kept or ratio > kept[name] + 1e-4
    ]


@pytest.mark.filterwarnings("default:lower than kept")
def test_no_count_has_grown() -> None:
    found, kept = bench_counts.counts(), json.loads(bench_counts.KEPT.read_text())
    assert found.keys() == kept.keys(), KEEP
    worse = grown(found, kept)
    assert not worse, "\n".join([*worse, f"if that is meant: {KEEP}"])
    lower = [name for name, ratio in found.items() if ratio < kept[name] - 1e-4]
    if lower:
        warnings.warn(f"lower than kept: {'; '.join(lower)}; {KEEP}", stacklevel=1)


def test_what_has_grown_is_named() -> None:
    kept = {"bytes": 1.0, "opens": 3.0}
    assert grown({"bytes": 1.0, "opens": 2.0}, kept) == []
    assert grown({"bytes": 1.01, "opens": 3.0}, kept) == ["bytes: 1.01000, kept 1.0"]
    assert grown({"copies": 0.0}, kept) == ["copies: 0.00000, kept None"]


def test_the_counts_are_what_they_are_called() -> None:
    kept = json.loads(bench_counts.KEPT.read_text())
    assert 1 <= kept["scan: bytes of weights read / needed"] < 1.05  # rows between wanted ones
    # the probe's pass, one of first tokens, and two that tell whether the model is in training
    assert kept["probe in training: block forwards / blocks"] == 4


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("bench_*.py")), ids=lambda path: path.stem)
def test_every_benchmark_has_a_short_form(script: Path) -> None:
    assert '"--short"' in script.read_text()


def test_the_docs_show_the_history() -> None:
    page, rows = (DOCS / "costs.md").read_text(), bench.read(bench.HISTORY)
    assert bench.with_table(page, rows) == page
    assert {row["kind"] for row in rows} == {"count", "memory", "time"}
    for row in rows:
        assert row.keys() == {"name", "kind", "ratio", "versions", "cores"}


def test_a_run_is_appended(tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    history.write_text('{"name": "before"}\n')
    command = [sys.executable, str(SCRIPTS / "bench.py"), "start", "--history", str(history)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    first, *rows = bench.read(history)
    assert first == {"name": "before"}
    assert [(row["name"], row["kind"]) for row in rows] == [
        ("start: --version / bare Python", "time"),
        ("start: --help / bare Python", "time"),
    ]


def test_a_benchmark_that_fails_is_told_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench_bad.py").write_text("raise ValueError('no such device')")
    line = {"name": "a / b", "kind": "count", "ratio": 2.0}
    (tmp_path / "bench_good.py").write_text(f"print('{{not of ours')\nprint('{json.dumps(line)}')")
    monkeypatch.setattr(bench, "SCRIPTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--history", str(tmp_path / "history.jsonl")])
    with pytest.raises(SystemExit, match="some benchmarks failed"):
        bench.main()
    assert "bad: ValueError: no such device" in capsys.readouterr().err
    (row,) = bench.read(tmp_path / "history.jsonl")
    assert row["ratio"] == 2.0 and row["versions"].keys() >= {"torch", "python"}


def test_the_table_shows_first_least_last_and_a_bar_for_each_run() -> None:
    rows = [{"name": "a", "kind": "time", "ratio": ratio} for ratio in (4.0, 1.0, 2.0)]
    assert bench.table(rows).splitlines()[-1] == "| a | time | 4 | 1 | 2 | 3 | █▃▅ |"
