"""The bench on which all causal tests stand: plain passes, trials, their controls and readings."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from sinktrack.events import Write
from sinktrack.interventions.candidates import SUBLAYERS, candidates, order, shares_of
from sinktrack.interventions.effects import Effect
from sinktrack.interventions.first_token import FirstTokens, Singles, first_tokens
from sinktrack.interventions.knockout import note
from sinktrack.interventions.patching import Term
from sinktrack.interventions.plans import Plan, ask
from sinktrack.interventions.replay import IN_STATE, Edit, Edits, Outcome, Replay
from sinktrack.interventions.results import BeforeAfter, Fate
from sinktrack.measurement import Measurement
from sinktrack.metrics.base import number
from sinktrack.metrics.localization import Sink
from sinktrack.probe import Probe

Window = tuple[str, int, int]
"""A kind of attention knockout, the first block of it, and the first after it."""
MOST = 2 / 3
"""Of the attention that P0 loses, from which on its dilution, or its loss, is the outcome."""
FIRST_TWO = (0, 2)
"""Blocks in which the source says that P0 is identified."""

_Row = TypeVar("_Row")


@dataclass(eq=False)
class Trial:
    """One change of the circuit, with its controls, to be read in every phase."""

    kind: str
    block: int
    """The last block whose attention it cannot change; -1 for none."""
    reads: Literal["lost", "gained"]
    """Is it what P0 loses, or what the other position gains?"""
    after: Outcome
    terms: tuple[Term, ...] = ()
    before: int | None = None
    """The first block of the one phase in which it is told; None for all."""
    others: dict[str, Outcome] = field(default_factory=dict)
    """The same with other replacements: ``zero``, ``mean`` and ``first_token``."""
    controls: dict[str, Outcome] = field(default_factory=dict)
    """By name; of ``other_position`` in a trial that reads a loss, the other position's counts."""


class Bench:
    """Plain passes, and what the interventions are compared with."""

    def __init__(self, replay: Replay, probe: Probe, measured: Measurement) -> None:
        self.replay, self.probe, self.measured = replay, probe, measured
        self.phases = [sink for sink in measured.sinks if sink.first_block > 0]
        self.p0 = torch.zeros_like(replay.position)
        self.missing: dict[str, str] = {}
        """By test, or kind of one, why it cannot be done in this model."""
        self.shares = [shares_of(phase) for phase in self.phases]
        last = max(phase.last_block for phase in self.phases)
        self.candidates = [candidates(phase) for phase in self.phases]
        tested = sorted(
            {term for terms in self.candidates for term in terms}
            | {
                Term(part.kind, part.block)
                for phase in self.phases
                for part in phase.erasers
                if part.block is not None and part.block < last
            },
            key=order,
        )
        self.sublayers = tested
        """The candidates of all phases, and the erasers of one that another follows."""
        blocks = {term.block for term in (*tested, *map(self.other, tested)) if term}
        starts = {start for window in windows(self.phases) for start in window[1:2]}
        inside = {
            block
            for phase in measured.sinks
            for block in range(phase.first_block, phase.last_block + 1)
        }
        self.plain = Plain(self.p0, replay.position)
        firsts = {phase.first_block for phase in self.phases}
        self._seen = Singles(first_tokens(probe)[0], FirstTokens())
        self.before = replay.plain(
            blocks | firsts | starts, self.plain, phases=inside, beside=[self._seen]
        )

    def of_main(self, by_phase: Sequence[list[_Row]]) -> list[_Row]:
        """The rows of the main phase; none where nothing was written before it."""
        main = self.measured.main_sink
        return next(
            (rows for phase, rows in zip(self.phases, by_phase, strict=True) if phase is main), []
        )

    @property
    def seen(self) -> FirstTokens:
        """Single first tokens.

        Raises:
            Uneditable: they cannot be shown.
        """
        if self._seen.error is not None:
            raise self._seen.error
        return self._seen.observer

    def other(self, term: Term) -> Term | None:
        """A random component of the same kind that is no candidate; a part, of the same block."""
        tested = {other for terms in self.candidates for other in terms}
        whole = term.kind in SUBLAYERS
        fits = {
            other
            for shares in self.shares
            for other in shares
            if other.kind == term.kind and other != term and other not in tested
            if whole or other.block == term.block
        }
        chooser = random.Random(seed_of("other", term))
        return chooser.choice(sorted(fits, key=order)) if fits else None

    def mean(self, attention: Tensor, phase: Sink, block: int) -> Tensor:
        """``[B]``: mean of ``[B, L]`` over the phase's blocks after one."""
        span = attention[:, max(phase.first_block, block + 1) : phase.last_block + 1]
        return span.nanmean(-1)

    def changed(self, trial: Trial, after: Outcome, phase: Sink, second: bool = False) -> Tensor:
        """``[B]``: attention lost or gained; with ``second``, what the other position loses."""
        before = self.before
        if trial.reads == "gained":
            return self.mean(after.second - before.second, phase, trial.block)
        if second:
            return self.mean(before.second - after.second, phase, trial.block)
        return self.mean(before.p0 - after.p0, phase, trial.block)

    def effect(self, trial: Trial, phase: Sink, after: Outcome | None = None) -> Effect:
        """Of a trial in a phase, with its controls; or of another outcome, without."""
        whole = self.mean(self.before.p0, phase, trial.block)
        if after is not None:
            return Effect(self.changed(trial, after, phase), whole, {})
        controls = {
            name: self.changed(trial, other, phase, second=name == "other_position")
            for name, other in trial.controls.items()
        }
        seen = {name: changed for name, changed in controls.items() if not changed.isnan().any()}
        return Effect(self.changed(trial, trial.after, phase), whole, seen)

    def reaches(self, trial: Trial, phase: Sink) -> bool:
        """Does a block of the phase come after what is changed?"""
        return trial.block < phase.last_block

    def reaching(self, trials: Sequence[Trial], phase: Sink) -> list[Trial]:
        """Those of which that holds."""
        return [trial for trial in trials if self.reaches(trial, phase)]

    def _until(self, trial: Trial) -> int | None:
        """The last block of the phases where the effect is large; None where it is nowhere."""
        large = [
            phase.last_block
            for phase in self.phases
            if self.reaches(trial, phase) and self.effect(trial, phase).large
            if trial.before is None or trial.before == phase.first_block
        ]
        return max(large, default=None)

    def control(self, planned: Sequence[tuple[Trial, str, Edit, bool]]) -> Plan[None]:
        """Run what is compared with trials, those together that end in the same block.

        Args:
            planned: of a trial, the name, the change, and whether it is another replacement.
        """
        by_end: dict[int, list[tuple[Trial, str, Edit, bool]]] = {}
        for one in planned:
            until = self._until(one[0])
            if until is not None:
                by_end.setdefault(until, []).append(one)
        jobs = [
            Edits([edit for _, _, edit, _ in several], until=until)
            for until, several in by_end.items()
        ]
        for several, outcomes in zip(by_end.values(), (yield from ask(jobs)), strict=True):
            for (trial, name, _, replaces), outcome in zip(several, outcomes, strict=True):
                (trial.others if replaces else trial.controls)[name] = outcome

    def fate(self, trial: Trial, phase: Sink, effect: Effect) -> Fate:
        """Is the sink lost, or is P0 one of several positions that share it?

        Sequences differ, so this is asked of each, weighted by the attention that it loses.
        """
        peak = phase.peak_block

        def both(of: Callable[[Outcome], Tensor]) -> BeforeAfter:
            return {
                "before": number(of(self.before).nanmean()),
                "after": number(of(trial.after).nanmean()),
            }

        def to_set(outcome: Outcome) -> Tensor:
            return self.mean(outcome.in_set, phase, trial.block)

        def ratio(outcome: Outcome) -> Tensor:
            return outcome.norm_ratio[:, peak]

        diluted = outcome = None
        if effect.large:
            lost = (effect.changed / effect.before).clamp(min=0)
            gone = 1 - to_set(trial.after) / to_set(self.before)
            large = ratio(trial.after) >= IN_STATE * ratio(self.before)
            weight = effect.changed.clamp(min=0).masked_fill(gone.isnan(), 0).nan_to_num()
            diluted = number((weight * (large & (gone < lost / 2))).sum() / weight.sum())
        if diluted is not None:  # null where no query stands outside of the set
            most = max(diluted, 1 - diluted)
            outcome = "both" if most < MOST else "diluted" if diluted >= MOST else "lost"
        return {
            "p0_norm_ratio": both(ratio),
            "set_size": both(lambda outcome: outcome.set_size[:, peak]),
            "attention_to_set": both(to_set),
            "diluted": diluted,
            "outcome": outcome,
        }

    def by_block(self, trial: Trial) -> list[float | None]:
        """Of each block, the attention that P0 loses, or that the other position gains."""
        change = (
            trial.after.second - self.before.second
            if trial.reads == "gained"
            else self.before.p0 - trial.after.p0
        )
        return [number(value) for value in change.mean(0)]

    def share_of_two(self, trial: Trial, phase: Sink) -> float | None:
        """The other position's part of the attention to it and P0 together."""
        second = self.mean(trial.after.second, phase, trial.block).mean()
        return number(second / (second + self.mean(trial.after.p0, phase, trial.block).mean()))


class Plain(Edit):
    """Notes what attention writes at P0 and at the other position, in a pass without a change."""

    def __init__(self, p0: Tensor, other: Tensor) -> None:
        self._p0, self._other = p0, other
        self.at_p0: dict[int, Tensor] = {}
        self.at_other: dict[int, Tensor] = {}

    def write(self, block: int, write: Write, rows: Tensor) -> None:
        """Note both."""
        note(self.at_p0, block, write, rows, self._p0)
        note(self.at_other, block, write, rows, self._other)


def windows(phases: Sequence[Sink]) -> list[Window]:
    """Who attends to what else, in the blocks from one on and before another."""
    spans = [("other_position_alone", *FIRST_TWO)]
    for place, phase in enumerate(phases):
        spans += [(kind, 0, phase.first_block) for kind in ("other_position_alone", "p0_mixed")]
        before = phases[place - 1] if place else None
        for since in (before.first_block, before.last_block + 1) if before else ():
            if 0 < since < phase.first_block:
                spans.append(("other_position_alone", since, phase.first_block))
    return sorted(dict.fromkeys(spans), key=lambda window: window[1:])


def seed_of(*key: object) -> int:
    """The same for the same test, whatever ran before."""
    return zlib.crc32(repr(key).encode())


def before_all(terms: Sequence[Term]) -> int:
    """The last block whose attention the terms cannot change; -1 for none."""
    return min(term.block - (term.kind == "state") for term in terms)
