"""Sink phases over training: which are born, grow, are lost, and which of them is the main one.

A phase is followed from record to record by the blocks that it shares with the one before. A change
counts once `CONSECUTIVE` records in a row show it, so a concentration that wavers about a threshold
bears and loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sinktrack.metrics.phases import stretches

CONSECUTIVE = 3
"""Records in a row that a change must last."""

What = Literal["born", "split", "grew", "shrank", "moved", "merged", "lost", "main"]
BREAKS = ("born", "split", "merged", "lost", "main")
"""After which shares and depth speak of another set of phases than before."""


class Span(NamedTuple):
    """The blocks of a phase in one record, and how much attention rests there."""

    first_block: int
    last_block: int
    mass: float
    """Sum of the blocks' concentrations."""

    def __str__(self) -> str:
        if self.first_block == self.last_block:
            return f"block {self.first_block}"
        return f"blocks {self.first_block} to {self.last_block}"

    def shared(self, other: Span) -> int:
        """Blocks that both hold."""
        first = max(self.first_block, other.first_block)
        return max(0, min(self.last_block, other.last_block) - first + 1)

    def inside(self, other: Span) -> bool:
        """Does the other hold all of its blocks?"""
        return other.first_block <= self.first_block and self.last_block <= other.last_block


@dataclass(frozen=True)
class Event:
    """What happened to a phase."""

    step: int
    """The first of the records that show it."""
    tokens: int | None
    what: What
    """``born``, ``split`` (off another), ``grew``, ``shrank``, ``moved``, ``merged`` (into
    another), ``lost``, or ``main``: it became the main one."""
    phase: int
    """Phases are numbered from 0 in the order in which they were told."""
    blocks: Span
    """Of the phase since then; of one that is gone, before."""
    before: Span | None
    """What it grew, shrank or moved from; the one that it split off or merged into; the main one
    before."""
    told: int
    """The step whose record made it last."""

    def __str__(self) -> str:
        words = {
            "born": f"a sink phase formed in {self.blocks}",
            "split": f"the sink phase of {self.blocks} split off {self.before}",
            "grew": f"the sink phase of {self.before} grew to {self.blocks}",
            "shrank": f"the sink phase of {self.before} shrank to {self.blocks}",
            "moved": f"the sink phase of {self.before} moved to {self.blocks}",
            "merged": f"the sink phase of {self.blocks} merged into {self.before}",
            "lost": f"the sink phase of {self.blocks} is gone",
            "main": f"the main sink phase is {self.blocks}, no longer {self.before}",
        }[self.what]
        return f"step {self.step:,}: {words}"


def spans(record: Mapping[str, Any]) -> tuple[Span, ...] | None:
    """The phases of a record, in order; of a schema without them, by its concentrations.

    None where the record holds neither, or they were not measured.
    """
    if "sinks" in record:
        sinks = record["sinks"]
        if sinks is None:
            return None
        return tuple(Span(one["first_block"], one["last_block"], one["mass"]) for one in sinks)
    if (values := record.get("concentration")) is None or all(one is None for one in values):
        return None
    return tuple(
        Span(first, last, sum(value or 0.0 for value in values[first : last + 1]))
        for first, last in stretches(values)
    )


def main_of(phases: Sequence[Span]) -> Span | None:
    """The one of largest mass; of equal ones the first."""
    return max(phases, key=lambda one: one.mass, default=None)


@dataclass
class _Track:
    """A phase that is followed."""

    span: Span
    since: tuple[int, int | None]
    """Step and tokens of the first record of those in a row that show it."""
    parent: Span | None
    """A phase that held its blocks before."""
    recent: list[Span]
    """Of the last `CONSECUTIVE` records that show it."""
    number: int | None = None
    """None until it has lasted."""
    told: Span | None = None
    missed: int = 0
    gone: tuple[int, int | None] = (0, None)
    """Of the first record of those in a row that do not show it."""


@dataclass
class Story:
    """The phases' state after some records; `add` takes the next."""

    events: list[Event] = field(default_factory=list)
    now: tuple[Span, ...] | None = None
    """Of the last record that tells of phases."""
    _tracks: list[_Track] = field(default_factory=list)
    _count: int = 0
    _main: _Track | None = None
    _last_main: Span | None = None
    """Blocks of the main phase that was told last."""
    _leading: list[tuple[_Track | None, int, int | None]] = field(default_factory=list)
    """The largest phase of the last `CONSECUTIVE` records, and where."""

    @property
    def pending(self) -> bool:
        """Does the last record show a change that has not lasted yet?"""
        fresh = any(track.number is None or track.missed for track in self._tracks)
        leads = self._leading[-1][0] if self._leading else None
        return fresh or (leads is not None and leads is not self._main)

    def add(self, step: int, tokens: int | None, phases: Sequence[Span]) -> list[Event]:
        """Take the phases of the next record; what has now lasted."""
        before = len(self.events)
        self.now = tuple(phases)
        seen = self._match(phases, (step, tokens))
        for track in list(self._tracks):
            if track.missed:
                self._missed(track, step)
            elif track.number is None:
                self._young(track, step)
            else:
                self._extent(track, step)
        largest = main_of(phases)
        self._lead(None if largest is None else seen[largest], step, tokens)
        return self.events[before:]

    def _match(self, phases: Sequence[Span], at: tuple[int, int | None]) -> dict[Span, _Track]:
        """The track of each phase; the pair that shares most blocks first."""
        pairs = sorted(
            (
                (-track.span.shared(span), -span.mass, place, number)
                for number, track in enumerate(self._tracks)
                for place, span in enumerate(phases)
                if track.span.shared(span)
            ),
        )
        matched: dict[int, _Track] = {}
        taken: set[int] = set()
        for *_, place, number in pairs:
            if place not in matched and number not in taken:
                matched[place] = self._tracks[number]
                taken.add(number)
        held = [track.span for track in self._tracks if track.number is not None]
        for number, track in enumerate(self._tracks):
            if number not in taken:
                track.gone = track.gone if track.missed else at
                track.missed += 1
                track.recent = []
        for place, span in enumerate(phases):
            if place in matched:
                track = matched[place]
                track.span, track.missed = span, 0
                track.recent = [*track.recent, span][-CONSECUTIVE:]
            else:
                parent = next((one for one in held if span.inside(one)), None)
                matched[place] = _Track(span, at, parent, [span])
                self._tracks.append(matched[place])
        return {span: matched[place] for place, span in enumerate(phases)}

    def _tell(
        self, what: What, track: _Track, at: tuple[int, int | None], before: Span | None, told: int
    ) -> None:
        assert track.number is not None and track.told is not None
        self.events.append(Event(*at, what, track.number, track.told, before, told))

    def _young(self, track: _Track, step: int) -> None:
        if len(track.recent) == CONSECUTIVE:
            track.number, track.told = self._count, track.span
            self._count += 1
            self._tell("split" if track.parent else "born", track, track.since, track.parent, step)

    def _missed(self, track: _Track, step: int) -> None:
        if track.number is None:
            self._tracks.remove(track)
        elif track.missed == CONSECUTIVE:
            into = next(
                (
                    one.span
                    for one in self._tracks
                    if not one.missed and track.span.inside(one.span)
                ),
                None,
            )
            self._tell("merged" if into else "lost", track, track.gone, into, step)
            self._tracks.remove(track)
            if track is self._main:
                self._main = None

    def _extent(self, track: _Track, step: int) -> None:
        """Its ends, where the last records all lie on one side of what was told."""
        old = track.told
        assert old is not None
        if len(track.recent) < CONSECUTIVE:
            return
        first = _beyond(old.first_block, [span.first_block for span in track.recent])
        last = _beyond(old.last_block, [span.last_block for span in track.recent])
        if (first, last) == (old.first_block, old.last_block):
            return
        track.told = Span(first, last, track.span.mass)
        what: What = "moved"
        if old.inside(track.told):
            what = "grew"
        elif track.told.inside(old):
            what = "shrank"
        self._tell(what, track, self._first_of(), old, step)

    def _first_of(self) -> tuple[int, int | None]:
        """Where the last `CONSECUTIVE` records begin; the present one is not among them yet."""
        _, step, tokens = self._leading[-(CONSECUTIVE - 1)]
        return step, tokens

    def _lead(self, largest: _Track | None, step: int, tokens: int | None) -> None:
        self._leading = [*self._leading, (largest, step, tokens)][-CONSECUTIVE:]
        same = all(track is largest for track, *_ in self._leading)
        if largest is None or largest.number is None or largest is self._main:
            pass
        elif same and len(self._leading) == CONSECUTIVE:
            assert largest.told is not None
            if self._last_main is not None:
                at = self._leading[0][1:]
                self._tell("main", largest, at, self._last_main, step)
            self._main = largest
        if self._main is not None:
            self._last_main = self._main.told


def _beyond(told: int, recent: Sequence[int]) -> int:
    """What all recent values are at least beyond; what was told where they are not."""
    if max(recent) < told:
        return max(recent)
    return min(recent) if min(recent) > told else told
