"""Several runs side by side: the spread over seeds, settings against each other, and outcomes.

Sources: Student (1908) for the interval between seeds; Welch (1947) for that of a difference;
Fisher (1935) for the permutation test; Holm (1979) for many tests; Bonett and Wright (2000) for the
interval of a rank correlation.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from sinktrack import text
from sinktrack.errors import RecordError
from sinktrack.records.lineage import current
from sinktrack.records.marks import Mark
from sinktrack.records.run import SCHEMA, Run
from sinktrack.records.twins import groups
from sinktrack.signal import robust
from sinktrack.signal.analysis import analyze
from sinktrack.signal.loss import Losses
from sinktrack.signal.quantiles import ranks
from sinktrack.signal.robust import Interval
from sinktrack.signal.stages import head_share

Axis = Literal["step", "tokens", "loss"]
QUANTITIES = {
    "onset": "onset",
    "sink_rate": "sink rate",
    "first_two_share": "first-two share",
    "depth": "depth",
}
"""What is compared, with its name: the onset on the axis, the rest where all runs have been."""
LEAST_SEEDS = 5
"""Runs of a setting from which an interval between seeds is given, and a difference is claimed."""
LEAST_RUNS = 10
"""Runs with an outcome from which a correlation with it is given."""
PARTS = (0.25, 0.5, 1.0)
"""Of the stretch that all runs share, where the sink rate is held against outcomes."""
_MOST = 20_000
"""Regroupings up to which all are counted; of more, so many are drawn."""


@dataclass(frozen=True)
class RunSummary:
    """One run in the numbers that are compared; None where it has none."""

    name: str
    setting: str
    stage: str | None
    reached: float | None
    """How far its records go on the axis."""
    onset: Interval | None
    """On the axis."""
    sink_rate: float | None
    probe: float | None
    """Half the 95 % interval of the sink rate over the probe's sequences."""
    first_two_share: float | None
    depth: float | None
    first_sink_block: int | None
    score: float | None
    migration: Interval | None
    """Of the depth in blocks per 1,000 steps since the onset, of the whole run."""
    stays: bool
    """Does the depth stay where it is, as far as its records can tell?"""

    def value(self, quantity: str) -> float | None:
        """One of `QUANTITIES`."""
        if quantity == "onset":
            return None if self.onset is None else self.onset.value
        value: float | None = getattr(self, quantity)
        return value


@dataclass(frozen=True)
class SeedSpread:
    """A quantity over the runs of one setting."""

    setting: str
    quantity: str
    runs: int
    """With a value."""
    without: int
    """Runs of the setting that have none."""
    mean: float
    low: float
    """The smallest."""
    high: float
    interval: Interval | None
    """Of the mean between seeds, by Student's t; None below `LEAST_SEEDS`."""
    probe: float | None
    """Of the sink rate: half the 95 % interval over the probe's sequences, the mean over runs."""


@dataclass(frozen=True)
class Difference:
    """A quantity of one setting less that of another."""

    quantity: str
    settings: tuple[str, str]
    value: Interval
    """Second less first, by Welch's t."""
    p: float
    """Of a permutation test, two-sided, adjusted by Holm's method for all that were made."""

    @property
    def claimed(self) -> bool:
        """Is it beyond chance at 5 %, over all tests that were made?"""
        return self.p <= 1 - robust.CONFIDENCE


@dataclass(frozen=True)
class Prediction:
    """Rank correlation of a quantity with the outcome over runs."""

    quantity: str
    at: float | None
    """Place on the axis; None of the onset."""
    runs: int
    correlation: Interval
    """Spearman's."""
    beyond_loss: Interval | None
    """The same, partial to the loss at that place; None without losses."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side. Every interval is one of 95 %."""

    axis: Axis
    at: float | None
    """The furthest place on the axis that all runs have reached."""
    runs: tuple[RunSummary, ...]
    spreads: tuple[SeedSpread, ...]
    differences: tuple[Difference, ...]
    predictions: tuple[Prediction, ...]
    missing: tuple[str, ...]
    """What is not said, and why."""
    notes: tuple[str, ...]
    """What to bear in mind of these runs, in words."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        for one, own in zip(plain["differences"], self.differences, strict=True):
            one["claimed"] = own.claimed
        return plain

    def __str__(self) -> str:
        titles = [tuple(title.split("\n")) for title in self.columns()]
        heads = [[title[0] if len(title) > 1 else "" for title in titles],
                 [title[-1] for title in titles]]  # fmt: skip
        rows = [*heads, *zip(*self.columns().values(), strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*table, *self.lines(), *(f"not said: {m}" for m in self.missing)])

    def columns(self) -> dict[str, list[str]]:
        """A table of one line a run, by title; a title may have two lines."""
        columns = {
            "run": [one.name for one in self.runs],
            "setting": [one.setting for one in self.runs],
            "stage": [one.stage or "-" for one in self.runs],
            f"onset\n({self.axis})": [
                "-" if one.onset is None else _axis(one.onset.value, self.axis) for one in self.runs
            ],
            "sink\nrate": [_number("sink_rate", one.sink_rate) for one in self.runs],
            "first\ntwo": [_number("first_two_share", one.first_two_share) for one in self.runs],
            "depth": [_number("depth", one.depth) for one in self.runs],
            "depth per\n1k steps": [_migrated(one) for one in self.runs],
            "first\nsink": [
                "-" if one.first_sink_block is None else str(one.first_sink_block)
                for one in self.runs
            ],
        }
        if len(set(columns["setting"])) < 2:
            del columns["setting"]
        return columns

    def verdict(self) -> list[str]:
        """What matters most: do settings differ, and when did the sink begin in each?"""
        settings = list(_by_setting(self.runs))
        runs = f"{len(self.runs)} run{'s' if len(self.runs) > 1 else ''}"
        told = f"{runs} of {len(settings)} setting{'s' if len(settings) > 1 else ''}"
        claimed = [one for one in self.differences if one.claimed]
        if claimed:
            what = "; ".join(
                f"{QUANTITIES[one.quantity]} ({one.settings[1]} less {one.settings[0]}: "
                f"{self._less(one.quantity, one.value.value)}, p = {one.p:.3f})"
                for one in claimed
            )
            first = f"{told}. Beyond what seeds explain: {what}."
        elif self.differences:
            tested = dict.fromkeys(QUANTITIES[one.quantity] for one in self.differences)
            first = f"{told}: no difference of {', '.join(tested)} beyond what seeds explain."
            if self._least_p() > 1 - robust.CONFIDENCE:
                first = (
                    f"{told}: {len(self.differences)} tests on so few runs cannot tell settings "
                    "apart."
                )
        elif len(settings) > 1:
            first = f"{told}: too few runs, or too little in common, to tell settings apart."
        else:
            first = f"{told}."
        return [first, *(self._spread(one) for one in self.spreads if one.quantity == "onset")]

    def _least_p(self) -> float:
        """The smallest p that these tests can come to, were the settings wholly apart."""
        counts = {name: len(runs) for name, runs in _by_setting(self.runs).items()}
        pairs = [tuple(counts[name] for name in one.settings) for one in self.differences]
        sides = [(1 + (a == b)) / math.comb(a + b, a) for a, b in pairs]
        return len(self.differences) * min(sides)

    def lines(self) -> list[str]:
        """What was found, in words."""
        lines = [f"Mind: {note}." for note in self.notes]
        if self.at is not None:
            lines.append(
                f"Numbers but onset and migration are at {self.axis} {_axis(self.at, self.axis)}, "
                f"the furthest that all runs have reached{self._held_back()}."
            )
        lines += [self._spread(one) for one in self.spreads]
        for one in self.differences:
            name = QUANTITIES[one.quantity]
            of = f"{one.settings[1]} less {one.settings[0]}"
            value, low, high = (self._less(one.quantity, bound) for bound in one.value)
            sure = f"95 %: {low} to {high}"
            if one.value.low == one.value.high:
                sure = "no spread within either"
            verdict = "beyond" if one.claimed else "within"
            lines.append(
                f"{name}, {of}: {value} ({sure}), {verdict} what seeds explain "
                f"(permutation test, p = {one.p:.3f} after Holm)"
            )
        for row in self.predictions:
            where = "" if row.at is None else f" at {self.axis} {_axis(row.at, self.axis)}"
            told = f"rank correlation of {QUANTITIES[row.quantity]}{where} with the outcome: "
            told += f"{_signed(row.correlation)}, {row.runs} runs"
            if row.beyond_loss is not None:
                told += f"; beyond the loss there {_signed(row.beyond_loss)}"
            lines.append(told)
        return lines

    def _held_back(self) -> str:
        """The run that ends long before the others, where there is one."""
        sign = -1 if self.axis == "loss" else 1
        ends = sorted(
            (sign * run.reached, run.name) for run in self.runs if run.reached is not None
        )
        if len(ends) < 2 or self.axis == "loss" or ends[1][0] < 2 * ends[0][0]:
            return ""
        at = _axis(ends[1][0], self.axis)
        return f" ({ends[0][1]} ends there, the next at {at}: leave it out to compare further on)"

    def _spread(self, one: SeedSpread) -> str:
        of = f"{one.setting}: " if one.setting else ""
        told = f"{of}{QUANTITIES[one.quantity]} {self._told(one.quantity, one.mean)}"
        low, high = self._told(one.quantity, one.low), self._told(one.quantity, one.high)
        if one.runs == 1:
            told += ", 1 run"
        elif one.low == one.high:
            told += f", the same in {one.runs} runs"
        else:
            if one.interval is not None:
                ends = [self._told(one.quantity, bound) for bound in one.interval[1:]]
                told += f" (95 % between seeds: {ends[0]} to {ends[1]})"
            told += f", {one.runs} runs from {low} to {high}"
        if one.probe is not None:
            told += f"; over one run's sequences +/-{100 * one.probe:.1f} points"
        return told + (f"; {one.without} without" if one.without else "")

    def _less(self, quantity: str, value: float) -> str:
        """A difference: of shares in points."""
        shares = quantity in ("sink_rate", "first_two_share")
        return f"{100 * value:+.1f} points" if shares else f"{self._told(quantity, value)}"

    def _told(self, quantity: str, value: float) -> str:
        if quantity == "onset":
            return _axis(value, self.axis)
        return _number(quantity, value)


def compare(
    runs: Mapping[str, Run | Iterable[Mapping[str, Any]]],
    *,
    settings: Mapping[str, str] | None = None,
    scores: Mapping[str, float] | None = None,
    losses: Mapping[str, Losses] | None = None,
    axis: Axis = "step",
) -> Comparison:
    """Put runs side by side, in the natural order of their names.

    Args:
        runs: by name, a run or its records in the order in which they were written.
        settings: by run, what it is a seed of; one for all unless given.
        scores: by run, its outcome: a final loss, or a score of a downstream task.
        losses: by run, the loss by step.
        axis: on what runs are aligned: ``step``, ``tokens`` of the records, or ``loss``.

    Raises:
        RecordError: runs of different probes; a name that is no run's; no losses for that axis.
    """
    runs = {name: runs[name] for name in sorted(runs, key=text.natural)}
    given = {name: list(run.written if isinstance(run, Run) else run) for name, run in runs.items()}
    _check(given, settings or {}, scores or {}, losses or {}, axis)
    now = {name: current(records) for name, records in given.items()}
    heads = not any(one.get("sink_rate") is not None for records in now.values() for one in records)
    lines = {name: _Line(records, (losses or {}).get(name), axis, heads)
             for name, records in now.items()}  # fmt: skip
    ends = [line.end for line in lines.values() if line.end is not None]
    at = None
    if ends:
        at = max(ends) if axis == "loss" else min(ends)
    schema = max((one.get("schema", SCHEMA) for line in lines.values() for one in line.records),
                 default=SCHEMA)  # fmt: skip
    summaries = tuple(
        _summary(name, given[name], run.marks if isinstance(run, Run) else (), lines[name], at,
                 settings.get(name, "no setting") if settings else "", (scores or {}).get(name),
                 schema)
        for name, run in runs.items()
    )  # fmt: skip
    missing = [f"{one.name}: {_placeless(now[one.name], axis)}"
               for one in summaries if one.reached is None]  # fmt: skip
    spreads = _spreads(summaries)
    differences = _differences(summaries, missing)
    predictions: tuple[Prediction, ...] = ()
    if scores:
        predictions = _predictions(summaries, lines, axis, at, missing)
    notes = _notes(now, heads, schema)
    return Comparison(axis, at, summaries, spreads, differences, predictions, tuple(missing), notes)


def _placeless(records: Sequence[Mapping[str, Any]], axis: Axis) -> str:
    """Why no record of a run has a place on the axis."""
    if not records:
        return "no records yet"
    if not any(record.get("sink_rate") is not None for record in records):
        return "no record has a sink rate"
    where = {"tokens": "count of tokens", "loss": "loss at its step", "step": "step"}[axis]
    return f"no record with a sink rate has a {where}"


def _notes(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], heads: bool, schema: int
) -> tuple[str, ...]:
    """What makes runs less comparable than they look."""
    lasts = {name: records[-1] for name, records in runs.items() if records}
    notes = []
    models: dict[str, list[str]] = {}
    for name, record in lasts.items():
        model = record.get("model") or {}
        size = [f"{model[what]} {what}" for what in ("blocks", "heads") if model.get(what)]
        models.setdefault(", ".join([str(model.get("type", "a model")), *size]), []).append(name)
    if len(models) > 1:
        kinds = "; ".join(f"{names[0]} is {model}" for model, names in models.items())
        notes.append(f"the runs are of different models, so a block is not the same place: {kinds}")
    notes += [
        f"{', '.join(names)} end on the same weights: one run, counted {len(names)} times"
        for names in groups(lasts, lambda name: lasts[name]["step"])
    ]
    if heads and lasts:
        notes.append("no record has a sink rate: stage and onset are of the share of sink heads")
    old = [name for name, records in runs.items()
           if any(record.get("schema", SCHEMA) < schema for record in records)]  # fmt: skip
    if old:
        notes.append(
            f"{', '.join(old)} hold{'s' if len(old) == 1 else ''} records of an older schema, "
            "whose first-two share and depth are other quantities: they count as missing"
        )
    return tuple(notes)


def read_table(path: str | Path) -> tuple[dict[str, str], dict[str, float]]:
    """Settings and outcomes of runs from a CSV with the columns run, and setting or score or both.

    Returns:
        setting by run, and score by run.

    Raises:
        RecordError: the file cannot be read, lacks these columns, or holds a score that is none.
    """
    try:
        content = text.read(Path(path))
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read {path}: {error}") from error
    first = content.partition("\n")[0]
    between = next((sign for sign in ",;\t" if sign in first), ",")
    try:
        lines = io.StringIO(content, newline="")
        rows = list(csv.reader(lines, delimiter=between, strict=True)) or [[]]
    except csv.Error as error:
        raise RecordError(f"cannot read {path}: {error}") from error
    titles, *rows = rows
    columns = [title.strip().lower() for title in titles]
    if "run" not in columns or not {"setting", "score"} & set(columns):
        raise RecordError(
            f"{path} has the columns {', '.join(titles) or 'none'}; wanted are run, and "
            "setting or score"
        )
    settings: dict[str, str] = {}
    scores: dict[str, float] = {}
    seen = set()
    for cells in rows:
        row = dict(zip(columns, map(str.strip, cells), strict=False))
        if not (name := row.get("run", "")):
            if any(row.values()):
                raise RecordError(f"{path}: a row names no run: {between.join(cells)}")
            continue
        if name in seen:
            raise RecordError(f"{path} has two rows of {name}")
        seen.add(name)
        if row.get("setting"):
            settings[name] = row["setting"]
        if row.get("score"):
            scores[name] = _score(row["score"], f"{path}: the score of {name}")
    return settings, scores


def _score(cell: str, of: str) -> float:
    try:
        score = float(cell)
    except ValueError as error:
        raise RecordError(f"{of} is no number: {cell}") from error
    if not math.isfinite(score):
        raise RecordError(f"{of} is {cell}; leave the cell empty where there is none")
    return score


class _Line:
    """A run's current records by their place on an axis."""

    def __init__(
        self, records: Sequence[Mapping[str, Any]], losses: Losses | None, axis: Axis, heads: bool
    ) -> None:
        whole = [
            record for record in records
            if (head_share(record) if heads else record.get("sink_rate")) is not None
        ]  # fmt: skip
        self._steps = np.array([record["step"] for record in whole], dtype=np.float64)
        self._known = sorted(step for step, loss in (losses or {}).items() if math.isfinite(loss))
        self._losses = [float((losses or {})[step]) for step in self._known]
        if axis == "step":
            places: list[float | None] = [float(record["step"]) for record in whole]
        elif axis == "tokens":
            places = [record.get("tokens") for record in whole]
        else:
            places = [self.loss_at(record["step"]) for record in whole]
        kept: list[tuple[int, float]] = []
        for i, place in enumerate(places):
            if place is None:
                continue
            if axis == "loss" and kept and place >= kept[-1][1]:  # only where lower than before
                continue
            kept.append((i, place))
        self.records = [whole[i] for i, _ in kept]
        self.places = np.array([place for _, place in kept], dtype=np.float64)
        self._steps = self._steps[[i for i, _ in kept]] if kept else self._steps[:0]
        self._sign = -1.0 if axis == "loss" else 1.0

    @property
    def end(self) -> float | None:
        """The last place."""
        return float(self.places[-1]) if len(self.places) else None

    @property
    def start(self) -> float | None:
        """The first place."""
        return float(self.places[0]) if len(self.places) else None

    def loss_at(self, step: float) -> float | None:
        """Of the straight line between the logged ones around a step; None outside of them."""
        if not self._known or not self._known[0] <= step <= self._known[-1]:
            return None
        return float(np.interp(step, self._known, self._losses))

    def place(self, step: float) -> float | None:
        """On the axis, of a step between two records."""
        if not len(self.places) or not self._steps[0] <= step <= self._steps[-1]:
            return None
        return float(np.interp(step, self._steps, self.places))

    def at(self, place: float) -> Mapping[str, Any] | None:
        """The last record that is not beyond a place."""
        index = int(np.searchsorted(self._sign * self.places, self._sign * place, "right")) - 1
        return self.records[index] if index >= 0 else None


def _check(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, str],
    scores: Mapping[str, float],
    losses: Mapping[str, Losses],
    axis: Axis,
) -> None:
    for what, names in (("setting", settings), ("score", scores), ("loss", losses)):
        if unknown := set(names) - set(runs):
            raise RecordError(
                f"a {what} of {', '.join(sorted(unknown))}, which is none of the runs "
                f"{', '.join(runs)}"
            )
    if axis not in ("step", "tokens", "loss"):
        raise RecordError(f"runs are aligned by step, tokens or loss, not by {axis!r}")
    if axis == "loss" and (without := set(runs) - set(losses)):
        raise RecordError(f"to align by loss, {', '.join(sorted(without))} want one")
    probes: dict[Any, str] = {}
    for name, records in runs.items():
        if records and records[-1].get("probe") is not None:
            probes.setdefault(records[-1]["probe"], name)
    if len(probes) > 1:
        one, other = list(probes.values())[:2]
        raise RecordError(
            f"{one} and {other} were measured with different probes; scan them again with one probe"
        )


def _summary(
    name: str,
    records: Sequence[Mapping[str, Any]],
    marks: Sequence[Mark],
    line: _Line,
    at: float | None,
    setting: str,
    score: float | None,
    schema: int,
) -> RunSummary:
    analysis = analyze(records, marks=marks)
    onset = None
    if analysis.onset is not None:
        ends = [line.place(step) for step in analysis.onset]
        if None not in ends:
            value, low, high = (float(end) for end in ends if end is not None)
            onset = Interval(value, min(low, high), max(low, high))
    record = (line.at(at) if at is not None else None) or {}
    interval = (record.get("intervals") or {}).get("sink_rate")
    formed = bool(record.get("formed")) and record.get("schema", SCHEMA) == schema
    moved = next((one for one in analysis.migration if one.quantity == "depth"), None)
    return RunSummary(
        name=name,
        setting=setting,
        stage=analysis.stage,
        reached=line.end,
        onset=onset,
        sink_rate=record.get("sink_rate"),
        probe=(interval[1] - interval[0]) / 2 if interval else None,
        first_two_share=record.get("first_two_share") if formed else None,
        depth=record.get("depth") if formed else None,
        first_sink_block=record.get("first_sink_block"),
        score=score,
        migration=None if moved is None else moved.per_1000_steps,
        stays=moved is not None and moved.stays,
    )


def _values(runs: Sequence[RunSummary], quantity: str) -> list[float]:
    return [value for run in runs if (value := run.value(quantity)) is not None]


def _by_setting(runs: Sequence[RunSummary]) -> dict[str, list[RunSummary]]:
    by_setting: dict[str, list[RunSummary]] = {}
    for run in runs:
        by_setting.setdefault(run.setting, []).append(run)
    return by_setting


def _spreads(runs: Sequence[RunSummary]) -> tuple[SeedSpread, ...]:
    spreads = []
    for setting, members in _by_setting(runs).items():
        for quantity in QUANTITIES:
            values = np.array(_values(members, quantity))
            if not len(values):
                continue
            mean, interval = float(values.mean()), None
            if len(values) >= LEAST_SEEDS:
                half = (
                    robust.two_sided_t(len(values) - 1)
                    * float(values.std(ddof=1))
                    / math.sqrt(len(values))
                )
                interval = Interval(mean, mean - half, mean + half)
            probes = [run.probe for run in members if run.probe is not None]
            spreads.append(SeedSpread(
                setting, quantity, len(values), len(members) - len(values), mean,
                float(values.min()), float(values.max()), interval,
                float(np.mean(probes)) if probes and quantity == "sink_rate" else None,
            ))  # fmt: skip
    return tuple(spreads)


def _differences(runs: Sequence[RunSummary], missing: list[str]) -> tuple[Difference, ...]:
    groups = _by_setting(runs)
    tested: list[tuple[str, tuple[str, str], Interval, float]] = []
    for one, other in combinations(groups, 2):
        of = f"{one or 'no setting'} against {other or 'no setting'}"
        if small := [s for s in (one, other) if len(groups[s]) < LEAST_SEEDS]:
            missing.append(
                f"{of}: {LEAST_SEEDS} runs of each are wanted, {small[0] or 'no setting'} has "
                f"{len(groups[small[0]])}"
            )
            continue
        for quantity, name in QUANTITIES.items():
            ones, others = (np.array(_values(groups[s], quantity)) for s in (one, other))
            if len(ones) < len(groups[one]) or len(others) < len(groups[other]):
                without = sum(map(len, (groups[one], groups[other]))) - len(ones) - len(others)
                runs_lack = "1 run does" if without == 1 else f"{without} runs do"
                missing.append(f"{of}: {name}, which {runs_lack} not have")
                continue
            tested.append((quantity, (one, other), _welch(ones, others), _permuted(ones, others)))
    adjusted = _holm([p for *_, p in tested])
    return tuple(Difference(*row[:3], p) for row, p in zip(tested, adjusted, strict=True))


def _welch(ones: robust.Curve, others: robust.Curve) -> Interval:
    """Second mean less first."""
    value = float(others.mean() - ones.mean())
    parts = [float(x.var(ddof=1)) / len(x) for x in (ones, others)]
    error = sum(parts)
    if error == 0:
        return Interval(value, value, value)
    free = error**2 / sum(p**2 / (len(x) - 1) for p, x in zip(parts, (ones, others), strict=True))
    half = robust.two_sided_t(int(free)) * math.sqrt(error)
    return Interval(value, value - half, value + half)


def _permuted(ones: robust.Curve, others: robust.Curve) -> float:
    """Part of the regroupings whose means differ at least as much."""
    values, size = np.concatenate([ones, others]), len(ones)
    if math.comb(len(values), size) <= _MOST:
        rows = np.array(list(combinations(range(len(values)), size)))
        drawn = 0
    else:
        order = np.random.default_rng(0).random((_MOST, len(values))).argsort(-1)
        rows, drawn = order[:, :size], 1
    of_first = values[rows].sum(-1)
    rest = (values.sum() - of_first) / len(others)
    apart = np.abs(of_first / size - rest)
    least = abs(float(ones.mean() - others.mean())) * (1 - 1e-12)
    return float((np.count_nonzero(apart >= least) + drawn) / (len(rows) + drawn))


def _holm(p: Sequence[float]) -> list[float]:
    order = np.argsort(p, kind="stable")
    adjusted, least = [1.0] * len(p), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = least
    return adjusted


def _predictions(
    runs: Sequence[RunSummary],
    lines: Mapping[str, _Line],
    axis: Axis,
    at: float | None,
    missing: list[str],
) -> tuple[Prediction, ...]:
    scored = [run for run in runs if run.score is not None]
    if len(scored) < LEAST_RUNS:
        missing.append(f"outcomes: {len(scored)} runs have one, {LEAST_RUNS} are wanted")
        return ()
    predictions = []
    starts = [x for run in scored if (x := lines[run.name].start) is not None]
    if at is not None:
        start = min(starts) if axis == "loss" else max(starts)
        for part in PARTS:
            place = start + part * (at - start)
            rows = []
            for run in scored:
                record = lines[run.name].at(place)
                if record is not None and record.get("sink_rate") is not None:
                    loss = lines[run.name].loss_at(record["step"])
                    rows.append((float(record["sink_rate"]), run.score, loss))
            predictions += _predicted("sink_rate", place, rows)
    rows = [(run.onset.value, run.score, None) for run in scored if run.onset is not None]
    predictions += _predicted("onset", None, rows)
    for name, one in (("sink rate", "sink_rate"), ("onset", "onset")):
        if not any(row.quantity == one for row in predictions):
            missing.append(
                f"outcomes: {name}, which {LEAST_RUNS} runs with an outcome have to have, and not "
                "all the same"
            )
    return tuple(predictions)


def _predicted(
    quantity: str, place: float | None, rows: Sequence[tuple[float, Any, float | None]]
) -> list[Prediction]:
    if len(rows) < LEAST_RUNS:
        return []
    values, scores = (np.array([row[i] for row in rows], dtype=np.float64) for i in (0, 1))
    if np.ptp(values) == 0 or np.ptp(scores) == 0:
        return []
    one, other = ranks(values), ranks(scores)
    beyond = None
    losses = [row[2] for row in rows if row[2] is not None]
    if len(losses) == len(rows) and np.ptp(losses) > 0:
        given = ranks(np.array(losses, dtype=np.float64))
        beyond = _rank_interval(_less(one, given), _less(other, given), 1)
    return [Prediction(quantity, place, len(rows), _rank_interval(one, other, 0), beyond)]


def _less(values: robust.Curve, given: robust.Curve) -> robust.Curve:
    """Less what a straight line in ``given`` explains."""
    values, given = values - values.mean(), given - given.mean()
    return np.asarray(values - given * (values @ given) / (given @ given))


def _rank_interval(one: robust.Curve, other: robust.Curve, given: int) -> Interval:
    """Correlation of ranks with its interval by Fisher's z, as Bonett and Wright widen it."""
    one, other = one - one.mean(), other - other.mean()
    size = math.sqrt(float(one @ one) * float(other @ other))
    value = float(one @ other) / size if size > 1e-9 else 0.0
    most = 1 - 1 / len(one) ** 2  # a perfect order of few runs is no certainty
    inner = min(most, max(-most, value))
    error = math.sqrt((1 + inner**2 / 2) / (len(one) - 3 - given))
    reach = NormalDist().inv_cdf((1 + robust.CONFIDENCE) / 2) * error
    low, high = (math.tanh(math.atanh(inner) + sign * reach) for sign in (-1, 1))
    return Interval(value, min(low, value), max(high, value))


def _axis(value: float, axis: Axis) -> str:
    return f"{value:.3f}" if axis == "loss" else f"{value:,.0f}"


def _number(quantity: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if quantity == "depth" else f"{value:.1%}"


def _migrated(run: RunSummary) -> str:
    """How the depth moves: its slope where it surely does, else what is known."""
    if run.migration is None:
        return "-"
    if run.stays:
        return "stays"
    if run.migration.low <= 0 <= run.migration.high:
        return "unsure"
    return f"{run.migration.value:+.2g}"


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.2f} (95 %: {interval.low:+.2f} to {interval.high:+.2f})"
