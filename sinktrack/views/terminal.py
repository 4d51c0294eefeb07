"""A run in the terminal: its last record, one row a block, with the curves so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from sinktrack.errors import RecordError
from sinktrack.metrics import FIELDS
from sinktrack.metrics.attention import EPSILON, uniform
from sinktrack.metrics.axes import by_block, is_by_block
from sinktrack.records.lacking import filled
from sinktrack.records.names import name as spelled
from sinktrack.records.thinned import evenly
from sinktrack.records.twins import equal_weights, told
from sinktrack.signal import Analysis, Comparison, timeline
from sinktrack.text import interval
from sinktrack.views.story import CARD, story

_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = ".:-=+*%#"
"""Where the output's encoding has no such bars, as in the logs of a scheduler."""
_LONGEST = 24
_SHORTEST = 4
_TOP = 5
_DISPENSABLE = ("norms", "gain", "kind", "attention", "over run", "mlp", "norm ratio")
"""Columns of the table of blocks that a narrow terminal does without, in this order."""
_SPARED = ("first\nsink", "depth per\n1k steps", "first\ntwo", "stage", "depth")
"""Columns of compared runs that a narrow terminal does without, in this order."""
_NAMES = ("run", "setting")
_NAME = 14
"""Characters of a run's name that stay on one line."""
_OF_A_SINK = ("first_two_share", "depth", "reference_block", "position_share")
"""Headline numbers that speak of no sink before one has formed."""
_IN_THE_TABLE = ("concentration", "norm_ratio")


def show(
    records: Sequence[Mapping[str, Any]], signal: Analysis, title: str, console: Console
) -> None:
    """Print the story, headline numbers, the signal, a table of blocks, the largest components.

    Args:
        records: of one run, in step order, without those that training left behind.
        signal: what they say together.
        title: the run's name.
        console: where to print.

    Raises:
        RecordError: there are no records.
    """
    if not records:
        raise RecordError(
            f"{title} holds no records yet: train with a callback, or scan an archive"
        )
    records = [filled(record) for record in records]
    last = records[-1]
    console.print(Text(title, style="bold"))
    for sentence in story(records, signal):
        console.print(Text(sentence))
    console.print()
    console.print(_summary(records))
    for steps in equal_weights(records):
        console.print(Text(told(steps).capitalize() + "."))
    console.print()
    if len(records) > 1:
        _signal(records, signal, console)
        console.print()
    console.print(_blocks(records, console))
    if evenly := _evenly(last):
        console.print(Text(f"Attention spread evenly would give P0 {evenly}.", style="dim"))
    for line in _more(last):
        console.print(Text(line))
    console.print()
    if last["top_components"]:
        console.print(Text("Largest parts of the P0 state, weighted by the blocks that read it:"))
    for part in (last["top_components"] or ())[:_TOP]:
        gate = "" if part.get("gate") is None else f", gate {part['gate']:.2f}"
        console.print(Text(f"  {_percent(part['share']):>8}  {spelled(part)}{gate}"))
    if why := (last.get("missing") or {}).get("parts"):
        console.print(Text(f"Parts not told apart: {why}", style="dim"))
    tested = next((record for record in reversed(records) if record.get("causal")), None)
    if tested is not None:
        console.print()
        _causal(tested, console)
    carded = next((record for record in reversed(records) if record.get("position_card")), None)
    if carded is not None:
        console.print()
        show_card(carded, console)


def show_comparison(found: Comparison, console: Console) -> None:
    """Print several runs below each other, then what they say together.

    Where it is too narrow for all columns some go, the least important first; long names of runs
    and settings are folded, never cut.
    """
    columns = found.columns()

    def needs(title: str) -> int:
        widest = max(map(len, (*title.split("\n"), *columns[title])))
        return min(widest, _NAME) if title in _NAMES else widest

    for dropped in _SPARED:
        if sum(needs(title) + 2 for title in columns) - 2 <= console.width:
            break
        columns.pop(dropped, None)
    table = Table(box=None, header_style="dim", pad_edge=False, show_edge=False)
    for title in columns:
        table.add_column(
            title if "\n" in title else f"\n{title}",
            justify="left" if title in (*_NAMES, "stage") else "right",
            no_wrap=title not in _NAMES, overflow="fold", min_width=needs(title),
        )  # fmt: skip
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))
    console.print(Text(found.verdict()[0], style="bold"))
    console.print()
    console.print(table)
    console.print()
    for line in [*found.lines(), *(f"not said: {why}" for why in found.missing)]:
        console.print(Text(line))


def _summary(records: Sequence[Mapping[str, Any]]) -> Table:
    last = records[-1]
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column()

    def add(name: str, value: str) -> None:
        grid.add_row(Text(name, style="dim"), Text(value))

    def measured(name: str) -> None:
        field, value, bounds = FIELDS[name], last.get(name), last["intervals"].get(name)
        if value is not None:
            add(field.title, format(value, field.form) + _bounds(bounds, field.form))

    tokens = "" if last["tokens"] is None else f", {last['tokens']:,} tokens"
    count = f"{len(records)} record" + ("s" if len(records) > 1 else "")
    add("last step", f"{last['step']:,}{tokens} ({count})")
    drawn = [name for name, field in FIELDS.items() if field.curve and not field.axes]
    for name in drawn:
        if last["formed"] or name not in _OF_A_SINK:
            measured(name)
    return grid


def _bounds(bounds: Sequence[float] | None, form: str) -> str:
    """Behind a number its interval; nothing where it has none."""
    return "" if bounds is None else f"  ({interval(bounds, form)})"


def _signal(records: Sequence[Mapping[str, Any]], signal: Analysis, console: Console) -> None:
    console.print(Text("Signal: a candidate for the state of convergence, not an established one"))
    lives = timeline(records)
    for line in [*signal.lines(), *([str(lives)] if len(lives.moments) > 1 else [])]:
        console.print(Padding(Text(line), (0, 0, 0, 2)))
    if signal.sensitivity is not None and signal.sensitivity.steps:
        for line in ["Onset by definition (step)", *signal.sensitivity.table()]:
            console.print(Padding(Text(line, style="dim"), (0, 0, 0, 2)))
    if signal.missing:
        console.print(Text("Not claimed yet", style="dim"))
        for line in signal.missing:
            console.print(Padding(Text(line, style="dim"), (0, 0, 0, 2)))


_TESTS = {"necessity": "from another position", "sufficiency": "of P0, put elsewhere"}


def _causal(record: Mapping[str, Any], console: Console) -> None:
    """What became of the sink under each intervention that had an effect, or a verdict."""
    tests = record["causal"]
    where = f"step {record['step']:,}, {tests['forwards']:.0f} forward passes"
    phases = tests.get("phases") or [tests]
    if not any(phase["position"] for phase in phases):
        why = "the sink precedes any write" if tests["formed"] else "no sink to test"
        console.print(Text(f"Causal tests (step {record['step']:,}): {why}"))
        return
    console.print(Text(f"Causal tests ({where}): change of the attention to P0, 95 % interval"))
    for phase in phases:
        if "first_block" in phase:
            span = f"blocks {phase['first_block']} to {phase['last_block']}"
            console.print(Text(f"  Sink in {span}"))
        for test in ("necessity", "sufficiency", "position"):
            for row in phase[test]:
                if row["verdict"] or row["interval"][1] >= tests["least_effect"]:
                    console.print(Text(_tested(test, row)))
    if tests["meaning"] is not None:
        _meaning(tests, console)


def _tested(test: str, row: Mapping[str, Any]) -> str:
    """One test of a phase: what changed, what was done to what, and the verdict."""
    lost = test == "necessity" or row["kind"] == "p0_mixed"
    sign = -1 if lost else 1
    low, high = sorted(sign * value for value in row["interval"])
    told = f"  {_percent(sign * row['effect']):>8}  ({low:+z.0%} to {high:+z.0%})  "
    told += _set_up(test, row) + (f": {row['verdict']}" if row["verdict"] else "")
    if row.get("outcome") in ("diluted", "both"):
        told += ", P0 shares it with others"
        told += f" ({row['diluted']:.0%} of it)" if row["outcome"] == "both" else ""
    if test == "position" and row.get("share_of_two") is not None:
        told += f" ({row['share_of_two']:.0%} of what both get)"
    return told


def _set_up(test: str, row: Mapping[str, Any]) -> str:
    if test == "position":
        first, last = row.get("blocks") or (None, None)
        where = "" if first is None else f" in blocks {first} to {last}"
        if row["kind"] == "p0_mixed":
            return f"P0, attending to all positions{where}"
        return f"another position, attending to itself alone{where}"
    if row["kind"] == "embedding":
        return "embedding of another token"
    return f"{spelled(row)} {_TESTS[test]}"


def show_card(record: Mapping[str, Any], console: Console) -> None:
    """Sink rates of the probe with other first tokens, or why there are none."""
    card = record["position_card"]
    start = card["start_token"]
    begun = "" if start is None else f", start token {start['id']} of the {start['of']}"
    where = f"step {record['step']:,}{begun}"
    console.print(Text(f"Position card ({where}): sink rate from block 0, from block 2"))
    for name, words in CARD.items():
        rates = card[name]
        if rates is None:
            told = f"not measured: {(card.get('missing') or {}).get(name, 'no reason recorded')}"
            console.print(Padding(Text(f"with {words}: {told}"), (0, 0, 0, 2)))
            continue
        cells = [_number(rates[rate], ".1%") or "-" for rate in ("sink_rate", "sink_rate_from_2")]
        bounds = _bounds(rates["intervals"]["sink_rate"], ".0%")
        text = f"{cells[0]:>8} {cells[1]:>8}  with {words}{bounds}"
        console.print(Text(text))


def _meaning(tests: Mapping[str, Any], console: Console) -> None:
    """The sink without its usual first tokens, and the experts of extreme output."""
    meaning = tests["meaning"]
    if all(meaning.get(name) for name in ("random_first", "as_is")):
        rates = [f"{meaning[name]['sink_rate']:.1%}" for name in ("random_first", "as_is")]
        text = f"  sink rate with random first tokens: {rates[0]} (as it is: {rates[1]})"
        console.print(Text(text))
    extreme = [f"block {row['block']} expert {row['index']}{', at P0' if row['p0_rate'] else ''}"
               for row in tests["experts"] if row["super_expert"]]  # fmt: skip
    if extreme:
        console.print(Text(f"  super experts by their largest output: {'; '.join(extreme)}"))


def _more(record: Mapping[str, Any]) -> list[str]:
    """A line for each further curve by block: its range, and where it is highest."""
    lines = []
    for field in FIELDS.values():
        if not (field.curve and is_by_block(field)) or field.name in _IN_THE_TABLE:
            continue
        known = [
            (value, block)
            for block, value in enumerate(by_block(record, field))
            if value is not None
        ]
        if known:
            (low, _), (high, block) = min(known), max(known)
            span = f"{low:{field.form}} to {high:{field.form}}"
            title = field.title[0].upper() + field.title[1:]
            lines.append(f"{title} by block: {span}, highest in block {block}")
    return lines


def _blocks(records: Sequence[Mapping[str, Any]], console: Console) -> Table:
    """A row a block; the curves so far take the room that the numbers leave.

    Where it is too narrow for all, columns go, the least important first.
    """
    bars = _bars(console.encoding)
    without: tuple[str, ...] = ()
    unbounded = console.options.update_width(1000)
    for drop in (None, *_DISPENSABLE):
        without += () if drop is None else (drop,)
        narrow = _table(records, _SHORTEST, bars, without)
        left = console.width - Measurement.get(console, unbounded, narrow).maximum
        if left >= 0:
            break
    curves = [c for c in narrow.columns if str(c.header).startswith(("over run", "log "))]
    if len(curves) < 2:
        room = left + sum(map(_header_width, curves))
        return _table(records, min(_LONGEST, max(_SHORTEST, room)), bars, without)
    first, second = map(_header_width, curves)
    room = first + second + left
    both = room // 2 if room >= 2 * second else max(_SHORTEST, room - second)
    return _table(records, min(_LONGEST, max(_SHORTEST, both)), bars, without)


def _header_width(column: Column) -> int:
    return max(map(len, str(column.header).split("\n")))


def _table(
    records: Sequence[Mapping[str, Any]], room: int, bars: str, without: Sequence[str]
) -> Table:
    last = records[-1]
    norms = [[_log(value) for value in record["norm_ratio"]] for record in records]
    known = [value for row in norms for value in row if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    table = Table(box=None, header_style="dim", pad_edge=False, show_edge=False)
    titles = {
        "block": "\nblock", "kind": "\nkind", "to P0": "to\nP0", "over run": "over run\n0 to 1",
        "sink rate": "sink\nrate", "norm ratio": "norm\nratio",
        "norms": f"log {math.exp(low):.2g}\nto {math.exp(high):.2g}",
        "attention": "share\nattn", "mlp": "share\nmlp" if "attention" in without else "\nmlp",
        "gain": "\ngain", "sink heads": "sink\nheads",
    }  # fmt: skip
    shares = {(part["kind"], part["block"]): part["share"] for part in last["shares"] or ()}
    heads = last["sink_heads"] or {}
    counts = heads.get(str(EPSILON)) or next(iter(heads.values()), [None] * len(norms[-1]))
    rows = []
    for block, kind in enumerate(last["block_kinds"]):
        course = [record["concentration"][block] for record in records]
        cells = {
            "block": str(block),
            "kind": kind,
            "to P0": _number(last["concentration"][block], ".2f"),
            "over run": _sparkline(course, 0, 1, room, bars),
            "sink rate": _number(last["sink_rate_by_block"][str(EPSILON)][block], ".0%"),
            "norm ratio": _number(last["norm_ratio"][block], ".3g"),
            "norms": _sparkline([row[block] for row in norms], low, high, room, bars),
            "attention": _number(shares.get(("attention", block)), "z.0%"),
            "mlp": _number(shares.get(("mlp", block)), "z.0%"),
            "gain": _number(last["gain"][block], FIELDS["gain"].form),
            "sink heads": _number(counts[block], ".0f"),
        }
        rows.append(cells)
    kept = [
        name for name in titles if name not in without and any(row[name].strip() for row in rows)
    ]
    if "to P0" in kept:  # which says more
        kept.remove("sink heads")
    for name in kept:
        left = name in ("kind", "over run", "norms")
        table.add_column(titles[name], justify="left" if left else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*(cells[name] for name in kept))
    return table


def _evenly(record: Mapping[str, Any]) -> str:
    """What all blocks' attention to P0 would be if it were uniform; empty where they differ."""
    seen = {count for count in record["visible_queries"] if count is not None}
    if len(seen) != 1 or not float(count := seen.pop()).is_integer():
        return ""  # windows, or documents of several lengths
    return f"{uniform(int(count)):.2f}"


def _bars(encoding: str) -> str:
    try:
        _BARS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return _PLAIN_BARS
    return _BARS


def _sparkline(
    values: Sequence[float | None], low: float, high: float, width: int, bars: str
) -> str:
    """Bars between ``low`` and ``high``, at most ``width``; a space where there is no value."""
    values = [values[i] for i in evenly(len(values), width)]
    scale = len(bars) / (high - low) if high > low else 0.0
    return "".join(
        " " if value is None else bars[min(len(bars) - 1, max(0, int((value - low) * scale)))]
        for value in values
    )


def _log(value: float | None) -> float | None:
    return math.log(value) if value else None


def _percent(value: float) -> str:
    return f"{value:+z.1%}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
