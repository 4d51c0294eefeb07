"""What the records of a run say, and what they do not say yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sinktrack.records.run import Run
from sinktrack.signal import robust
from sinktrack.signal.loss import Losses, Relation, read_losses, relate
from sinktrack.signal.robust import Interval
from sinktrack.signal.stages import (
    ENOUGH,
    LASTING,
    LEAST_RISE,
    MATERIAL,
    Found,
    Regression,
    Stages,
)

SATURATED = (
    "A settled rate says little about later progress: in the source paper an earlier sink went "
    "with better scores at 20B tokens, and with none at 100B, where the rate was high already."
)


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
    """How a curve of the circuit moved since the onset, by Theil and Sen's slope."""

    quantity: str
    """``first_two_share`` or ``depth``."""
    records: int
    """With a formed sink; the others do not count."""
    per_1000_steps: Interval
    per_doubling: Interval | None
    """Per doubling of the tokens; None where the records hold no counts that grow."""


@dataclass(frozen=True)
class Analysis:
    """The signal of a run. Every interval is one of 95 %."""

    steps: tuple[int, ...]
    stages: tuple[str, ...]
    """One per step, from the records up to it: ``absent``, ``emerging``, ``migrating``,
    ``settled``, ``displaced`` or ``lost``."""
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

    @property
    def stage(self) -> str | None:
        """The last stage; None without records."""
        return self.stages[-1] if self.stages else None

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; intervals as objects of ``value``, ``low`` and ``high``."""
        found: dict[str, Any] = _plain({"stage": self.stage} | asdict(self))
        return found

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *(f"not claimed: {reason}" for reason in self.missing)])

    def lines(self) -> list[str]:
        """What was found, in words."""
        found = []
        if self.stage is not None:
            since = next(
                step
                for step, stage, before in reversed(
                    list(zip(self.steps, self.stages, (None, *self.stages[:-1]), strict=True))
                )
                if stage != before
            )
            found.append(f"{self.stage}, as could be told from step {since:,} on")
        if self.onset is not None:
            found.append(
                f"the rate left its floor at step {self.onset.value:,.0f} "
                f"(95 %: {self.onset.low:,.0f} to {self.onset.high:,.0f})"
            )
        if self.plateau is not None:
            level, change = self.plateau.level, self.plateau.change
            found.append(
                f"level at {level.value:.1%} (95 %: {level.low:.1%} to {level.high:.1%}) since "
                f"step {self.plateau.since.value:,.0f}; change over the last window "
                f"{100 * change.low:+.1f} to {100 * change.high:+.1f} points"
            )
        found += [_moved(migration) for migration in self.migration]
        found += [described(regression) for regression in self.regressions]
        if self.stage == "settled":
            found.append(SATURATED)
        if self.loss is not None:
            found += self.loss.lines()
        if self.abandoned:
            found.append(
                f"left out: {len(self.abandoned)} records up to step {self.abandoned[-1]:,}, which "
                "training has left behind: it went on from before them"
            )
        return found


def analyze(
    run: Run | Iterable[Mapping[str, Any]], loss: str | Path | Losses | None = None
) -> Analysis:
    """Read the signal of a run.

    Args:
        run: a run, or its records in the order in which they were written.
        loss: the run's loss to compare with, by step, or a file of it
            (`sinktrack.signal.loss.read_losses`).

    Raises:
        RecordError: the run's records, or the losses, cannot be read.
    """
    losses = read_losses(loss) if isinstance(loss, str | Path) else loss
    stages = Stages.of(run.written if isinstance(run, Run) else run)
    found = stages.found
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
        steps=tuple(one.step for one in found),
        stages=tuple(one.stage for one in found),
        because=tuple(one.because for one in found),
        onset=onset,
        onset_tokens=_tokens(stages, onset),
        plateau=_plateau(stages),
        regressions=tuple(one.regression for one in found if one.regression is not None),
        migration=tuple(_migration(stages)),
        missing=tuple(missing),
        abandoned=tuple(sorted(stages.abandoned)),
        loss=relation,
    )


def described(regression: Regression) -> str:
    """A regression in words."""
    name = _name(regression.quantity)
    size, since = regression.size, regression.since
    verb = "rose" if regression.quantity == "depth" else "fell"
    scale, form, unit = _SCALES[regression.quantity]
    by, low, high, noise = (
        f"{scale * value:{form}}" for value in (size.value, size.low, size.high, regression.needed)
    )
    return (
        f"{name} {verb} by {by} {unit} (95 %: {low} to {high}) "
        f"between steps {since.low:,.0f} and {since.high:,.0f}; noise explains {noise}"
    )


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
    scale, _, unit = _SCALES[migration.quantity]

    def per(what: str, slope: Interval, of: str) -> str:
        value, low, high = (f"{scale * bound:+.2g}" for bound in slope)
        return f"{value} {unit} per {what} ({of}{low} to {high})"

    words = f"{name} since the onset: {per('1,000 steps', steps, '95 %: ')}"
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
            f"the sink rate is back at its floor of {found.because['floor']:.1%} "
            f"({found.because['sink_rate']:.1%} at step {found.step:,})"
        )
    return None


def _plateau(stages: Stages) -> Plateau | None:
    if stages.stage != "settled":
        return None
    trend = stages.trend("sink_rate")
    assert trend is not None
    if max(-trend.low, trend.high) > 2 * MATERIAL * stages.found[-1].because["rise"]:
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
    found = []
    for name in ("first_two_share", "depth"):
        x, y = stages.curve(name, stages.left)
        if len(y) < ENOUGH:
            continue
        tokens = {point.step: point.tokens for point in stages.points}
        counts = np.array([tokens[int(step)] or np.nan for step in x], dtype=np.float64)
        growing = bool((np.diff(counts) > 0).all())  # false for nan as well
        per_doubling = _slope(np.log2(counts), y) if growing else None
        found.append(
            Migration(name, len(y), _slope(x / 1000, y), per_doubling),
        )
    return found


def _slope(x: robust.Curve, y: robust.Curve) -> Interval:
    return Interval(*(value / float(x[-1] - x[0]) for value in robust.change(x, y)))


def _missing(stages: Stages) -> list[str]:
    count = len(stages.points)
    found = []
    if stages.partial:
        found.append(f"records of the first blocks alone have no sink rate ({stages.partial})")
    if stages.left is None:
        if count <= LASTING:
            return [*found, f"onset: {_more(count, LASTING + 1)}"]
        return [
            *found,
            f"onset: the rate has not left its floor by {100 * LEAST_RISE:.0f} points for "
            f"{LASTING} records in a row ({count} records so far)",
        ]
    since = count - stages.left
    if stages.left == 0:
        found.append("onset: the sink was there at the first records; measure earlier checkpoints")
    elif stages.floor_records < LASTING:
        found.append(f"onset: {_more(stages.floor_records, LASTING)} from before the rise")
    if stages.lost:
        found.append("plateau: the sink is lost")
    elif since < ENOUGH:
        found.append(f"plateau: {_more(since, ENOUGH)} since the rise")
        found.append(f"regression: {_more(since, ENOUGH)} since the rise")
    elif stages.stage in ("emerging", "migrating", "settled") and _plateau(stages) is None:
        trend = stages.trend("sink_rate")
        assert trend is not None
        most = MATERIAL * stages.found[-1].because["rise"]
        found.append(
            f"plateau: the change over the last window lies between {100 * trend.low:+.1f} "
            f"and {100 * trend.high:+.1f} points; flat is 0 within {100 * most:.1f}"
        )
    _, depth = stages.curve("depth", stages.left)
    if len(depth) < ENOUGH:
        found.append(f"migration: {_more(len(depth), ENOUGH)} of a formed sink behind block 0")
    return found


def _more(have: int, need: int) -> str:
    more = need - have
    return f"{more} more record{'s' if more > 1 else ''} ({have} of {need})"


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value._asdict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
