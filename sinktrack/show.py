"""A run in the terminal: its last record, one row a block, with the curves so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sinktrack.errors import RecordError

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 12


def show(records: Sequence[Mapping[str, Any]], title: str, console: Console) -> None:
    """Print headline numbers and a table of blocks.

    Args:
        records: of one run, in step order.
        title: the run's name.
        console: where to print.

    Raises:
        RecordError: there are no records.
    """
    if not records:
        raise RecordError(f"{title} holds no records yet: train with a callback, or scan an archive")
    last = records[-1]
    console.print(Text(title, style="bold"))
    for line in headline(records):
        console.print(line, markup=False, highlight=False)
    console.print(_table(records))
    console.print("Largest parts of the P0 state at the reference block:")
    for part in last["top_components"][:5]:
        gate = "" if part.get("gate") is None else f", gate {part['gate']:.2f}"
        console.print(f"  {name_of(part)}: {part['share']:+.1%}{gate}", highlight=False)
    console.print(
        "A sink is a candidate signal of convergence: a high rate alone says little of progress.",
        style="dim",
    )


def headline(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last record's numbers in a few lines."""
    last = records[-1]
    tokens = "" if last["tokens"] is None else f", {last['tokens']:,} tokens"
    bounds = last["intervals"]
    reference = last["reference_block"]
    lines = [
        f"step {last['step']:,}{tokens} ({len(records)} records)",
        f"sink rate {_with(last['sink_rate'], bounds['sink_rate'])}",
    ]
    if not last["formed"]:
        lines.append(f"no sink has formed; localized at block {reference}, of the highest norm")
    elif reference == 0:
        lines.append("the sink stands in block 0: it precedes any write")
    else:
        lines.append(f"the sink starts in block {reference}")
    if last["first_two_share"] is not None:
        lines.append(
            f"first-two share {_with(last['first_two_share'], bounds['first_two_share'])}, "
            f"depth {_with(last['depth'], bounds['depth'])}"
        )
    if last["first_two_gain"] is not None:
        lines.append(f"first-two gain {_with(last['first_two_gain'], bounds['first_two_gain'])}")
    return lines


def name_of(part: Mapping[str, Any]) -> str:
    """A component in words: ``block 0 expert 5``."""
    where = "" if part["block"] is None else f"block {part['block']} "
    number = "" if part["index"] is None else f" {part['index']}"
    return f"{where}{part['kind'].replace('_', ' ')}{number}"


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
    """Bars for values between ``low`` and ``high``; a space where there is none."""
    if len(values) > _WIDTH:
        places = [round(i * (len(values) - 1) / (_WIDTH - 1)) for i in range(_WIDTH)]
        values = [values[place] for place in places]
    bars = []
    for value in values:
        if value is None:
            bars.append(" ")
            continue
        level = (value - low) / (high - low) if high > low else 0.0
        bars.append(_BARS[min(len(_BARS) - 1, max(0, int(level * len(_BARS))))])
    return "".join(bars)


def _table(records: Sequence[Mapping[str, Any]]) -> Table:
    last = records[-1]
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("block", justify="right")
    table.add_column("kind")
    table.add_column("to P0", justify="right")
    table.add_column("0 to 1", no_wrap=True)
    table.add_column("rate", justify="right")
    table.add_column("norm", justify="right")
    table.add_column("log", no_wrap=True)
    table.add_column("attn", justify="right")
    table.add_column("mlp", justify="right")
    table.add_column("gain", justify="right")
    logs = [
        [None if value is None else math.log(value) for value in record["norm_ratio"]]
        for record in records
    ]
    known = [value for row in logs for value in row if value is not None]
    low, high = min(known), max(known)
    shares = {(part["kind"], part["block"]): part["share"] for part in last["shares"]}
    for block, kind in enumerate(last["block_kinds"]):
        table.add_row(
            str(block),
            kind,
            _number(last["concentration"][block], ".2f"),
            sparkline([record["concentration"][block] for record in records], 0, 1),
            _number(last["sink_rate_by_block"]["0.3"][block], ".2f"),
            _number(last["norm_ratio"][block], ".1f"),
            sparkline([row[block] for row in logs], low, high),
            _number(shares.get(("attention", block)), "+.0%"),
            _number(shares.get(("mlp", block)), "+.0%"),
            _number(last["gain"][block], "+.2f"),
        )
    return table


def _with(value: float, interval: Sequence[float] | None) -> str:
    bounds = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{value:.2f}{bounds}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
