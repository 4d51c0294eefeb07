"""What the records of a run say, and what they do not say yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sinktrack import text
from sinktrack.records.lineage import current
from sinktrack.records.marks import Mark
from sinktrack.records.run import Run
from sinktrack.signal import robust
from sinktrack.signal.loss import Losses, Relation, read_losses, relate
from sinktrack.signal.phases import CONSECUTIVE, Event, Span, main_of, spans
from sinktrack.signal.robust import Interval
from sinktrack.signal.sensitivity import Sensitivity, sensitivity
from sinktrack.signal.stages import (
    MIN_CHANGE,
    MIN_MOVE,
    MIN_RECORDS,
    MIN_RISE,
    Found,
    Regression,
    Stages,
)

SATURATED = (
    "A settled rate, a candidate sign and no more, says little about later progress: in the source "
    "paper an earlier sink went with better scores at 20B tokens, and with none at 100B, where the "
    "rate was high already."
)
UNSURE = "cannot be told yet"
_TO_THE_STEP = "95 %: to the step"
_ALIKE = "all records agree"
"""Of intervals without width."""
_TOLD = 8
"""Events, and moves of the first sink block, that are told one by one."""


@dataclass(frozen=True)
class Plateau:
    """The rate's trend over the trailing window is indistinguishable from flat."""

    since: Interval
    """The step at which the level was reached."""
    level: Interval
    """The mean over the window; its interval holds that over the probe's sequences."""
    change: Interval
    """Of the rate over the window."""


@dataclass(frozen=True)
class Migration:
    """How a curve of the circuit moved, by Theil and Sen's slope.

    Since the onset, or since the set of sink phases last changed: across such a change share and
    depth speak of different phases, and what happened is told by `Analysis.phases`.
    """

    quantity: str
    """``first_two_share`` or ``depth``."""
    records: int
    """With a formed sink; the others do not count."""
    per_1000_steps: Interval
    per_doubling: Interval | None
    """Per doubling of the tokens; None where the records hold no counts that grow."""
    change: Interval | None = None
    """Over these records."""
    since: int | None = None
    """Step from which the set of phases is the same; None where that is the onset."""

    @property
    def stays(self) -> bool:
        """Is a change of more than `MIN_MOVE` ruled out?"""
        return self.change is not None and self.change.rules_out(MIN_MOVE[self.quantity])


@dataclass(frozen=True)
class FirstBlock:
    """The first block with a sink head from a record on, until the next."""

    step: int
    tokens: int | None
    block: int | None
    """None where no head is a sink head."""


@dataclass(frozen=True)
class Analysis:
    """The signal of a run. Every interval is one of 95 %."""

    steps: tuple[int, ...]
    stages: tuple[str | None, ...]
    """One per step, from the records up to it: ``absent``, ``emerging``, ``migrating``,
    ``settled``, ``displaced`` or ``lost``; None where these are too few to tell."""
    because: tuple[dict[str, Any], ...]
    """The numbers that decided each stage."""
    onset: Interval | None
    """The step at which the rate left its floor."""
    onset_tokens: Interval | None
    plateau: Plateau | None
    regressions: tuple[Regression, ...]
    migration: tuple[Migration, ...]
    missing: tuple[str, ...]
    """What is not claimed yet, and why."""
    abandoned: tuple[int, ...]
    """Steps whose records were left behind by a restart from an older checkpoint."""
    loss: Relation | None
    """How the rate stands to the loss; None without one."""
    phases: tuple[Event, ...] = ()
    """What happened to the sink phases: birth, growth, loss, change of the main one."""
    first_sink_block: tuple[FirstBlock, ...] = ()
    """One per change, and the first."""
    shows: tuple[str, ...] = ()
    """What the last record shows by itself, in words."""
    notes: tuple[str, ...] = ()
    """What to bear in mind of these records, in words."""
    sensitivity: Sensitivity | None = None
    """The onset under other definitions; None where none is claimed."""
    marks: tuple[Mark, ...] = ()
    """Where something but the model changed; trends and level are judged from the last on."""
    rate: str = "sink rate"
    """What the stages are told by: the share of sink heads where no record has a sink rate."""

    @property
    def stage(self) -> str | None:
        """The last stage; None without records, or with too few to tell."""
        return self.stages[-1] if self.stages else None

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; intervals as objects of ``value``, ``low`` and ``high``."""
        plain: dict[str, Any] = _plain({"stage": self.stage} | asdict(self))
        return plain

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *(f"not claimed: {reason}" for reason in self.missing)])

    def lines(self) -> list[str]:
        """What was found, in words."""
        lines = []
        if self.stage is not None:
            since = next(
                step
                for step, stage, before in reversed(
                    list(zip(self.steps, self.stages, (None, *self.stages[:-1]), strict=True))
                )
                if stage != before
            )
            lines.append(f"candidate stage: {self.stage}, as could be told from step {since:,} on")
        else:
            lines += self.shows
        if self.onset is not None:
            lines.append(f"candidate onset: the {self.rate} left its floor {self._when()}")
        if self.sensitivity is not None and self.sensitivity.onsets:
            lines.append(str(self.sensitivity))
        if self.plateau is not None:
            level = self.plateau.level
            sure = text.interval(level[1:], ".1%", "every sequence and record gives the same")
            lines.append(
                f"candidate plateau: {level.value:.1%} ({sure}) since step "
                f"{self.plateau.since.value:,.0f}; {_over_window(self.plateau.change)}"
            )
        lines += [f"marked at step {mark.step:,}: {mark.what}" for mark in self.marks]
        lines += _events(self.phases)
        lines += _first_blocks(self.first_sink_block)
        lines += [_moved(migration) for migration in self.migration]
        lines += [described(regression, self.rate) for regression in self.regressions]
        if self.stage == "settled":
            lines.append(SATURATED)
        if self.loss is not None:
            lines += self.loss.lines()
        if self.abandoned:
            lines.append(
                f"left out: {len(self.abandoned)} records up to step {self.abandoned[-1]:,}, which "
                "training has left behind: it went on from before them"
            )
        return [*lines, *self.notes]

    def _when(self) -> str:
        """The onset in words: one that may lie anywhere before its end is no date."""
        assert self.onset is not None
        value, low, high = self.onset
        if low <= self.steps[0]:
            return f"by step {high:,.0f}; how long before {UNSURE}"
        return f"at step {value:,.0f} ({text.interval((low, high), ',.0f', _TO_THE_STEP)})"


def analyze(
    run: Run | Iterable[Mapping[str, Any]],
    loss: str | Path | Losses | None = None,
    marks: Iterable[Mark] | None = None,
) -> Analysis:
    """Read the signal of a run.

    Args:
        run: a run, or its records in the order in which they were written.
        loss: the run's loss to compare with, by step, or a file of it
            (`sinktrack.signal.loss.read_losses`).
        marks: where something but the model changed; those of the run unless given.

    Raises:
        RecordError: the run's records, or the losses, cannot be read.
    """
    losses = read_losses(loss) if isinstance(loss, str | Path) else loss
    marks = None if marks is None else tuple(marks)
    written = list(run.written if isinstance(run, Run) else run)
    if marks is None:
        marks = run.marks if isinstance(run, Run) else ()
    stages = Stages.of(written, [mark.step for mark in marks])
    findings, left = stages.found, current(written)
    onset = stages.onset()
    missing, relation = _missing(stages), None
    if losses is not None:
        points = stages.points
        related = relate([p.step for p in points], [p.sink_rate for p in points], losses)
        if isinstance(related, str):
            missing.append(related)
        else:
            relation = related
    return Analysis(
        steps=tuple(one.step for one in findings),
        stages=tuple(one.stage for one in findings),
        because=tuple(one.because for one in findings),
        onset=onset,
        onset_tokens=_tokens(stages, onset),
        plateau=_plateau(stages),
        regressions=tuple(one.regression for one in findings if one.regression is not None),
        migration=tuple(_migration(stages)),
        missing=tuple(missing),
        abandoned=tuple(sorted(stages.abandoned)),
        loss=relation,
        phases=tuple(stages.story.events),
        first_sink_block=tuple(_first_sink_block(left)),
        shows=tuple(shown(left[-1])) if left else (),
        notes=tuple(_notes(stages)),
        sensitivity=None if onset is None else sensitivity(left),
        marks=tuple(marks),
        rate=_rate(stages),
    )


def shown(record: Mapping[str, Any]) -> list[str]:
    """What a record shows by itself, in words; no stage, which takes several."""
    at = f"step {record['step']:,} shows"
    if record.get("sink_rate") is not None:
        words = f"{at} a sink rate of {record['sink_rate']:.1%}"
        if bounds := (record.get("intervals") or {}).get("sink_rate"):
            words += f" ({text.interval(bounds, '.1%')})"
    elif (blocks := record.get("measured_blocks")) is not None:
        words = f"{at} the first {blocks} blocks alone"
    else:
        words = f"{at} no sink rate"
    sentences = [words]
    phases = spans(record)
    if phases:
        main = main_of(phases)
        told = [f"{one} (main)" if one is main and len(phases) > 1 else str(one) for one in phases]
        what = f"sink phases: {', '.join(told)}" if told[1:] else f"a sink phase: {told[0]}"
        sentences.append(f"{at} {what}")
        sentences += _main_writer(record, at)
    elif phases is not None:
        sentences.append(f"{at} no block that rests on P0")
    if counts_heads(record):
        first = record["first_sink_block"]
        sentences.append(
            f"{at} no sink head" if first is None else f"{at} its first sink head in block {first}"
        )
    return sentences


def _main_writer(record: Mapping[str, Any], at: str) -> list[str]:
    sinks = record.get("sinks") or ()
    main: Mapping[str, Any] = max(sinks, key=lambda sink: sink["mass"], default={})
    for part in (main.get("writers") or ())[:1]:
        where = "" if part["block"] is None else f" of block {part['block']}"
        name = part["kind"].replace("mlp", "MLP")
        of = "the main one" if len(sinks) > 1 else "it"
        return [f"{at} the {name}{where} as the largest writer of {of} ({part['share']:.0%})"]
    return []


def _rate(stages: Stages) -> str:
    of_heads = bool(stages.points) and stages.points[-1].of_heads
    return "share of sink heads" if of_heads else "sink rate"


def _notes(stages: Stages) -> list[str]:
    notes = []
    if stages.older:
        notes.append(
            f"depth and first-two share of the {stages.older} records of an older schema than "
            f"{stages.schema} are other quantities: they count as missing"
        )
    told = {one.quantity for notes in stages.found if (one := notes.regression) is not None}
    if stages.schema == 1 and (stages.left is not None or told & set(MIN_MOVE)):
        notes.append(
            "records of schema 1 take depth and first-two share at one block that a threshold "
            "chose: where the first sink phase begins elsewhere, they jump by that alone"
        )
    if stages.points and stages.points[-1].of_heads:
        notes.append(
            "no record has a sink rate: the share of sink heads stands in for it, without an "
            "interval over sequences"
        )
    return notes


def _first_sink_block(records: Sequence[Mapping[str, Any]]) -> list[FirstBlock]:
    blocks: list[FirstBlock] = []
    for record in records:
        if not counts_heads(record) or record.get("measured_blocks") is not None:
            continue
        block = record["first_sink_block"]
        if not blocks or blocks[-1].block != block:
            blocks.append(FirstBlock(record["step"], record.get("tokens"), block))
    return blocks


def counts_heads(record: Mapping[str, Any]) -> bool:
    """Does it say in which block the first sink head is, be it in none?"""
    if "first_sink_block" not in record:
        return False
    counts = record.get("sink_heads")
    if record["first_sink_block"] is not None or counts is None:
        return record["first_sink_block"] is not None
    return any(count is not None for by_block in counts.values() for count in by_block)


def _first_blocks(moves: Sequence[FirstBlock]) -> list[str]:
    """Where the first sink head stood, in words; nothing where there never was one."""
    known = [one.block for one in moves if one.block is not None]
    if not known:
        return []
    if len(moves) > _TOLD:
        last = "none" if moves[-1].block is None else moves[-1].block
        return [
            f"first block with a sink head: between {min(known)} and {max(known)}, {len(moves) - 1}"
            f" changes, the last to {last} at step {moves[-1].step:,}"
        ]
    told = ", ".join(
        f"{'none' if one.block is None else one.block} from step {one.step:,}" for one in moves
    )
    return [f"first block with a sink head: {told}"]


def _events(events: Sequence[Event]) -> list[str]:
    """The first birth and the last events, in words."""
    if len(events) <= _TOLD:
        return [str(one) for one in events]
    between = len(events) - _TOLD
    words = f"{between} more changes of the sink phases up to step {events[between].step:,}"
    return [str(events[0]), words, *(str(one) for one in events[between + 1 :])]


def described(regression: Regression, rate: str = "sink rate") -> str:
    """A regression in words."""
    name = rate if regression.quantity == "sink_rate" else _name(regression.quantity)
    size, since = regression.size, regression.since
    verb = "rose" if regression.quantity == "depth" else "fell"
    scale, form, unit = _SCALES[regression.quantity]
    by, noise = (f"{scale * value:{form}}" for value in (size.value, regression.needed))
    ends = [scale * bound for bound in size[1:]]
    amount = f"{by} {unit} ({text.interval(ends, form, _ALIKE)})"
    if size.low <= 0 <= size.high:
        amount = f"an amount that {UNSURE}"
    return (
        f"candidate regression: {name} {verb} by {amount} "
        f"between steps {since.low:,.0f} and {since.high:,.0f}; noise explains {noise}"
    )


def _over_window(change: Interval) -> str:
    """What became of the rate over the last window, in words."""
    if change.low == change.high == 0:
        return "it does not change at all over the last window"
    ends = [f"{100 * bound:+z.1f}" for bound in change[1:]]
    if ends[0] == ends[1]:
        return f"change over the last window {ends[0]} points"
    return f"change over the last window {ends[0]} to {ends[1]} points"


_SCALES = {
    "sink_rate": (100, ".1f", "points"),
    "first_two_share": (100, ".1f", "points"),
    "depth": (1, ".2f", "blocks"),
}
"""What a change is multiplied by, how it is written, and in what."""


def _name(quantity: str) -> str:
    return quantity.replace("first_two", "first-two").replace("_", " ")


def _moved(migration: Migration) -> str:
    name, steps = _name(migration.quantity), migration.per_1000_steps
    scale, form, unit = _SCALES[migration.quantity]
    least = MIN_MOVE[migration.quantity]

    def per(what: str, slope: Interval, of: str) -> str:
        told = text.interval([scale * bound for bound in slope[1:]], "+.2g", _ALIKE)
        return f"{scale * slope.value:+.2g} {unit} per {what} ({of}{told.removeprefix('95 %: ')})"

    since = "the onset" if migration.since is None else f"step {migration.since:,}"
    words = f"candidate migration: {name} since {since}: "
    if migration.stays:
        return words + f"stays within {scale * least:{form}} {unit}"
    if steps.low <= 0 <= steps.high:
        return words + UNSURE
    words += per("1,000 steps", steps, "95 %: ")
    if migration.per_doubling is not None:
        words += f", {per('doubling of the tokens', migration.per_doubling, '')}"
    return words


def alarm(found: Found, before: str | None) -> str | None:
    """What a record gave away that calls for attention, in words.

    Args:
        found: of the record.
        before: the stage before it.
    """
    if found.regression is not None:
        return described(found.regression)
    if found.stage == "lost" and before != "lost":
        return (
            "candidate regression: the sink rate is back at its floor of "
            f"{found.because['floor']:.1%} ({found.because['sink_rate']:.1%} at step "
            f"{found.step:,})"
        )
    return None


def _plateau(stages: Stages) -> Plateau | None:
    if stages.stage != "settled":
        return None
    trend = stages.trend("sink_rate")
    if trend is None:  # too few records since a mark
        return None
    if max(-trend.low, trend.high) > 2 * MIN_CHANGE * stages.found[-1].because["rise"]:
        return None  # it may have moved since it was found flat
    return Plateau(stages.top(), stages.level(), trend)


def _tokens(stages: Stages, at: Interval | None) -> Interval | None:
    tokens = [point.tokens for point in stages.points]
    if at is None or None in tokens:
        return None
    steps = [point.step for point in stages.points]
    return Interval(*(float(np.interp(step, steps, np.array(tokens, float))) for step in at))


def _migration(stages: Stages) -> list[Migration]:
    if stages.left is None:
        return []
    moves = []
    since = max(stages.left, stages.broke)
    step = stages.points[since].step if since > stages.left and since < len(stages.points) else None
    for name in ("first_two_share", "depth"):
        x, y = stages.curve(name, since)
        if len(y) < MIN_RECORDS:
            continue
        tokens = {point.step: point.tokens for point in stages.points}
        counts = np.array([tokens[int(step)] or np.nan for step in x], dtype=np.float64)
        growing = bool((np.diff(counts) > 0).all())  # false for nan as well
        per_doubling = _slope(np.log2(counts), y) if growing else None
        moves.append(
            Migration(name, len(y), _slope(x / 1000, y), per_doubling, robust.change(x, y), step),
        )
    return moves


def _slope(x: robust.Curve, y: robust.Curve) -> Interval:
    return Interval(*(value / float(x[-1] - x[0]) for value in robust.change(x, y)))


def _missing(stages: Stages) -> list[str]:
    count = len(stages.points)
    sentences = []
    marked = stages.marked() if stages.points else 0
    if stages.left is not None and marked > stages.left and count - marked < MIN_RECORDS:
        sentences.append(f"trends: {_more(count - marked, MIN_RECORDS)} since the last mark")
    if stages.partial:
        sentences.append(f"records of the first blocks alone have no sink rate ({stages.partial})")
    if stages.left is None:
        if count <= CONSECUTIVE:
            return [*sentences, f"stage and onset: {_more(count, CONSECUTIVE + 1)}"]
        return [
            *sentences,
            f"onset: the rate has not left its floor by {100 * MIN_RISE:.0f} points for "
            f"{CONSECUTIVE} records in a row ({count} records so far)",
        ]
    since = count - stages.left
    if stages.left == 0:
        sentences.append(
            "onset: the sink was there at the first records; measure earlier checkpoints"
        )
    elif stages.floor_records < CONSECUTIVE:
        sentences.append(f"onset: {_more(stages.floor_records, CONSECUTIVE)} from before the rise")
    if stages.lost:
        sentences.append("plateau: the sink is lost")
    elif since < MIN_RECORDS:
        sentences.append(f"plateau: {_more(since, MIN_RECORDS)} since the rise")
        sentences.append(f"regression: {_more(since, MIN_RECORDS)} since the rise")
    elif (
        stages.stage in ("emerging", "migrating", "settled")
        and _plateau(stages) is None
        and (trend := stages.trend("sink_rate")) is not None
    ):
        most = MIN_CHANGE * stages.found[-1].because["rise"]
        window = (
            f"{UNSURE} whether the rate moves over the last window"
            if trend.low <= 0 <= trend.high
            else f"the change over the last window lies between {100 * trend.low:+.1f} and "
            f"{100 * trend.high:+.1f} points"
        )
        sentences.append(f"plateau: {window}; flat is 0 within {100 * most:.1f} points")
    _, depth = stages.curve("depth", max(stages.left, stages.broke))
    if len(depth) < MIN_RECORDS and not stages.lost and not stages.points[-1].of_heads:
        words = f"migration: {_more(len(depth), MIN_RECORDS)} of a formed sink"
        if stages.left < stages.broke < count:
            step = stages.points[stages.broke].step
            words += f" since step {step:,}, where the sink phases last changed"
        sentences.append(words)
    return sentences


def _more(have: int, need: int) -> str:
    more = need - have
    return f"{more} more record{'s' if more > 1 else ''} ({have} of {need})"


def _plain(value: Any) -> Any:
    if isinstance(value, Interval | Span | Mark):
        return value._asdict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
