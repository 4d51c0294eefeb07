"""All benchmarks in a short form: their ratios go to the history, and its table into the docs.

A ratio of counts is the same on every machine and compared with the kept one by a test; one of time
or memory is of small models, for a few seconds, on whatever machine: it shows a trend, no more.
What the costs really are is in ``docs/costs.md``, from the benchmarks as they are without --short.

    python scripts/bench.py [NAME...] [--history FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent
DOCS = SCRIPTS.parent / "docs"
HISTORY = DOCS / "benchmarks.jsonl"
BEGIN, END = "<!-- benchmarks: written by scripts/bench.py -->", "<!-- end of benchmarks -->"
LIMIT = 900
"""Seconds for one benchmark."""
_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = 20


def measured(script: Path) -> list[dict[str, Any]]:
    """The ratios of one benchmark.

    Raises:
        OSError, subprocess.SubprocessError: it failed.
    """
    done = subprocess.run(
        [sys.executable, str(script), "--short"],
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise subprocess.SubprocessError(said[-1])
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    about = {"versions": versions(), "cores": os.cpu_count()}
    return [row | about for row in rows]


def versions() -> dict[str, str]:
    """What the ratios are of."""
    names = ("sinktrack", "torch", "transformers")
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


def table(rows: list[dict[str, Any]]) -> str:
    """Per ratio the first, least and last value, and bars of the last runs; as Markdown."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    lines = ["| ratio | of | first | least | last | runs | |", "|---|---|---|---|---|---|---|"]
    for name, found in sorted(by_name.items()):
        values = [row["ratio"] for row in found]
        cells = [f"{value:.4g}" for value in (values[0], min(values), values[-1])]
        cells = [name, found[-1]["kind"], *cells, str(len(values)), bars(values[-_SHOWN:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bars(values: list[float]) -> str:
    """A bar for each, from nothing to the largest."""
    most = max(values) or 1.0
    return "".join(_BARS[min(int(value / most * len(_BARS)), len(_BARS) - 1)] for value in values)


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with the table between its two marks.

    Raises:
        ValueError: it lacks one.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}"


def read(history: Path) -> list[dict[str, Any]]:
    """The ratios of all runs, in their order."""
    if not history.exists():
        return []
    return [json.loads(line) for line in history.read_text().splitlines()]


def main() -> None:
    known = {path.stem.removeprefix("bench_"): path for path in sorted(SCRIPTS.glob("bench_*.py"))}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--history", type=Path, help="append here, and leave the docs as they are")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - known.keys():
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    history = arguments.history or HISTORY
    failed = False
    for name in arguments.names or known:
        try:
            rows = measured(known[name])
        except (OSError, subprocess.SubprocessError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
            continue
        with history.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            print(f"{row['ratio']:10.4f}  {row['kind']:6}  {row['name']}", flush=True)
    if not arguments.history:
        page = DOCS / "costs.md"
        page.write_text(with_table(page.read_text(), read(history)))
    if failed:
        raise SystemExit("some benchmarks failed; the others are in the history")


if __name__ == "__main__":
    main()
