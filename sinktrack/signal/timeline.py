"""The life of every head as a sink head: since when for good, when it ceased."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from sinktrack.records.lineage import current
from sinktrack.records.run import Run
from sinktrack.signal.phases import CONSECUTIVE

HALF = 0.5
"""Share of the sequences in which a head must be a sink to be a sink head."""


@dataclass(frozen=True)
class Moment:
    """A record's place."""

    step: int
    tokens: int | None


@dataclass(frozen=True)
class Head:
    """One head over the records that tell of it."""

    block: int
    head: int
    first: Moment | None
    """The first record in which it is a sink head."""
    since: Moment | None
    """From there on it is one in every record, the last `CONSECUTIVE` at least; else None."""
    ceased: Moment | None
    """It was one, and from there on it is none in every record, the last `CONSECUTIVE` at least."""
    births: int
    """Times that it is a sink head and was none in the record before; the first record bears
    none."""
    deaths: int
    """Times that it is none and was one in the record before."""


@dataclass(frozen=True)
class Timeline:
    """Sink heads over training: each head's life, and births and deaths by record."""

    moments: tuple[Moment, ...]
    """Of the records that tell of sink heads, in step order."""
    sink_heads: tuple[int, ...]
    """How many heads are sink heads, one per moment."""
    births: tuple[int, ...]
    """Heads that are sink heads and were none at the moment before; 0 at the first."""
    deaths: tuple[int, ...]
    """Heads that are none and were sink heads at the moment before."""
    first_sink_block: tuple[int | None, ...]
    """One per moment."""
    heads: tuple[Head, ...]
    """By block and head; those of blocks without softmax attention are left out."""
    missing: str | None
    """Why there is less than all records hold; None where there is not."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.moments:
            return f"no timeline: {self.missing}"
        lasting = sum(one.since is not None for one in self.heads)
        ceased = sum(one.ceased is not None for one in self.heads)
        words = [
            f"{len(self.moments)} records, steps {self.moments[0].step:,} to "
            f"{self.moments[-1].step:,}: {sum(self.births)} births and {sum(self.deaths)} deaths "
            f"of sink heads; of {len(self.heads)} heads {self.sink_heads[-1]} are sink heads at the"
            f" end, {lasting} of them for good as far as seen, and {ceased} have ceased",
        ]
        return "\n".join([*words, *([self.missing] if self.missing else [])])


def timeline(run: Run | Iterable[Mapping[str, Any]]) -> Timeline:
    """When every head became a sink head for good, and when it ceased.

    A head is a sink head where its attention to P0 exceeds 0.3 in at least half of the sequences
    (`sink_sequences`). Records that training left behind do not count.

    Args:
        run: a run, or its records in the order in which they were written.

    Raises:
        RecordError: the run's records cannot be read.
    """
    records = current(list(run.written if isinstance(run, Run) else run))
    told = [one for one in records if any(one.get("sink_sequences") or ())]
    lacking = len(records) - len(told)
    whole = [one for one in told if one.get("measured_blocks") is None]
    missing = []
    if lacking:
        missing.append(f"{lacking} records do not tell in which sequences a head is a sink")
    if len(told) > len(whole):
        missing.append(f"{len(told) - len(whole)} records are of the first blocks alone")
    if not records:
        missing.append("no records")
    moments = [Moment(one["step"], one.get("tokens")) for one in whole]
    grids = [
        {
            (block, head): share >= HALF
            for block, row in enumerate(one["sink_sequences"])
            for head, share in enumerate(row or ())
            if share is not None
        }
        for one in whole
    ]
    pairs = list(pairwise(grids))
    places = sorted(set().union(*grids))
    return Timeline(
        moments=tuple(moments),
        sink_heads=tuple(sum(grid.values()) for grid in grids),
        births=(0,) * bool(grids) + tuple(_changes(a, b, True) for a, b in pairs),
        deaths=(0,) * bool(grids) + tuple(_changes(a, b, False) for a, b in pairs),
        first_sink_block=tuple(
            min((block for (block, _), is_one in grid.items() if is_one), default=None)
            for grid in grids
        ),
        heads=tuple(_life(place, moments, grids) for place in places),
        missing="; ".join(missing) or None,
    )


def _changes(before: dict[Any, bool], after: dict[Any, bool], to: bool) -> int:
    return sum(is_one is to and before.get(place) is (not to) for place, is_one in after.items())


def _life(place: tuple[int, int], moments: list[Moment], grids: list[dict[Any, bool]]) -> Head:
    seen = [(moment, grid[place]) for moment, grid in zip(moments, grids, strict=True)
            if place in grid]  # fmt: skip
    states = [is_one for _, is_one in seen]
    turns = [i for i in range(1, len(states)) if states[i] != states[i - 1]]
    last = turns[-1] if turns else 0
    lasting = len(states) - last >= CONSECUTIVE
    return Head(
        *place,
        first=next((moment for moment, is_one in seen if is_one), None),
        since=seen[last][0] if lasting and states[-1] else None,
        ceased=seen[last][0] if lasting and turns and not states[-1] else None,
        births=sum(states[i] for i in turns),
        deaths=sum(not states[i] for i in turns),
    )
