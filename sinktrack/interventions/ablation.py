"""Necessity: does the sink stay when a component's write at P0 gives way to another?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from sinktrack.interventions.bench import Bench, Trial, before_all, seed_of
from sinktrack.interventions.candidates import MOST, SUBLAYERS, order, screen, term_of
from sinktrack.interventions.effects import Effect, mean
from sinktrack.interventions.first_token import Singles, Writes, first_tokens
from sinktrack.interventions.patching import Patch, Term
from sinktrack.interventions.plans import Plan, ask, in_lockstep
from sinktrack.interventions.replay import Edit, Edits, Job
from sinktrack.interventions.results import Necessity
from sinktrack.metrics.localization import Sink


class Ablation:
    """The tests of necessity on one bench."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._joint: dict[tuple[Term, ...], Trial] = {}

    def by_phase(self) -> Plan[list[list[Necessity]]]:
        """Of each phase: sublayers, the embedding, and parts of what has a verdict."""
        phases = self.bench.phases
        trials, embedding = yield from in_lockstep(
            [
                self._ablate([("", [term]) for term in self.bench.sublayers]),
                self._ablate([("embedding", [Term("state", 0)])]),
            ]
        )
        rows_of = [self._rows(trials, phase) for phase in phases]
        rest = self._rest(rows_of)
        if rest:  # the screen missed who writes what is read
            self.bench.replay.plain({term.block for term in rest})
            trials += yield from self._ablate([("", [term]) for term in rest])
            rows_of = [self._rows(trials, phase) for phase in phases]
        named = {(row["kind"], row["block"]) for rows in rows_of for row in rows if row["verdict"]}
        parts: dict[Term, list[Term]] = {}
        for term in [trial.terms[0] for trial in trials]:
            if (term.kind, term.block) in named:
                parts[term] = self._parts(term)
        spared = [
            [
                trial
                for trial, row in zip(self.bench.reaching(trials, phase), rows, strict=True)
                if row["verdict"] is None
                and (trial.terms[0] in self.bench.candidates[place] or trial.terms[0] in rest)
                and trial.terms[0].block < phase.first_block
            ]
            for place, (phase, rows) in enumerate(zip(phases, rows_of, strict=True))
        ]
        several: list[Plan[Any]] = [
            self._ablate([("", [part]) for own in parts.values() for part in own]),
            self._remove(spared),
        ]
        inside, _ = yield from in_lockstep(several)
        by_part = []
        for phase in phases:
            for own in parts.values():
                tried = [trial for trial in inside if trial.terms[0] in own]
                rows = self._rows(tried, phase)
                reaching = self.bench.reaching(tried, phase)
                left = [
                    trial
                    for trial, row in zip(reaching, rows, strict=True)
                    if row["verdict"] is None
                ]
                by_part.append((rows, left, phase))
        whole = [
            self._redundant(own, rows, phase)
            for own, rows, phase in zip(spared, rows_of, phases, strict=True)
        ]

        def of_parts() -> Plan[list[list[Necessity]]]:
            yield from self._remove([left for _, left, _ in by_part])
            return (
                yield from in_lockstep(
                    [self._redundant(left, rows, phase) for rows, left, phase in by_part]
                )
            )

        of_whole, joint_parts = yield from in_lockstep([in_lockstep(whole), of_parts()])
        told = [
            own
            for place, phase in enumerate(phases)
            for own in (spared[place], *(left for _, left, of in by_part if of is phase))
        ]
        self._joint = {
            key: self._joint[key]
            for key in dict.fromkeys(_terms(own) for own in told if len(own) > 1)
        }
        result, each = [], iter(zip(by_part, joint_parts, strict=True))
        for place, phase in enumerate(phases):
            rows = rows_of[place] + of_whole[place]
            rows += [{**row, "block": None} for row in self._rows(embedding, phase)]
            for _ in parts:
                (of_part, _, _), joint = next(each)
                rows += of_part + joint
            result.append(rows)
        return [
            rows + self._joint_elsewhere(phase, rows)
            for phase, rows in zip(phases, result, strict=True)
        ]

    def _joint_elsewhere(self, phase: Sink, rows: Sequence[Necessity]) -> list[Necessity]:
        """What sets that were removed together for another phase do to this one."""
        told = [row["components"] for row in rows if "components" in row]
        return [
            self._together(trial, phase)
            for trial in self.bench.reaching(list(self._joint.values()), phase)
            if [asdict(term) for term in trial.terms] not in told
        ]

    def _together(self, trial: Trial, phase: Sink) -> Necessity:
        components = [asdict(term) for term in trial.terms]
        row = self._necessary(trial, phase)
        row["components"] = components
        return row

    def _rest(self, found: Sequence[list[Necessity]]) -> list[Term]:
        """The untested sublayers before each phase in which none has a verdict."""
        tested = set(self.bench.sublayers)
        return sorted(
            {
                term
                for phase, shares, rows in zip(
                    self.bench.phases, self.bench.shares, found, strict=True
                )
                if not any(row["verdict"] for row in rows)
                for term in shares
                if term.kind in SUBLAYERS and term.block < phase.first_block
            }
            - tested,
            key=order,
        )

    def _parts(self, sublayer: Term) -> list[Term]:
        """The parts that carry most of one sublayer's share, in any phase."""
        parts: dict[Term, None] = {}
        for phase, shares in zip(self.bench.phases, self.bench.shares, strict=True):
            if Term(f"{sublayer.kind}_norm", sublayer.block) in shares:
                return []  # behind an output norm the parts are no terms of a sum
            own = [
                part
                for part in phase.parts
                if part.kind not in SUBLAYERS and part.block is not None
                if term_of(part).within(sublayer)
            ]
            kinds = ("head", "expert", "shared_expert")
            parts |= dict.fromkeys(term_of(part) for part in screen(own, kinds)[:MOST])
        return sorted(parts, key=order)

    def _ablate(self, jobs: Sequence[tuple[str, Sequence[Term]]]) -> Plan[list[Trial]]:
        """Ablate terms at P0; the controls only where they could matter."""
        if not jobs:
            return []
        sources = [self._resampled(terms) for _, terms in jobs]
        written = [term for _, terms in jobs for term in terms if term.kind != "state"]
        asked: list[Job] = [
            Edits(
                [
                    Patch(terms, self.bench.p0, own)
                    for (_, terms), own in zip(jobs, sources, strict=True)
                ],
                loss=True,
            )
        ]
        elsewhere: Mapping[Term, Tensor] = {}
        if written:
            last = max(term.block for term in written)
            asked.append(Singles(self._other_tokens, Writes(written), last))
        after, *writes = yield from ask(asked)
        if writes:
            elsewhere = writes[0].by_term
        trials = [
            Trial(kind or terms[0].kind, before_all(terms), "lost", outcome, tuple(terms))
            for (kind, terms), outcome in zip(jobs, after, strict=True)
        ]
        planned: list[tuple[Trial, str, Edit, bool]] = []
        for trial, source in zip(trials, sources, strict=True):
            terms, at = trial.terms, self.bench.replay.position
            aside = Patch(terms, self.bench.p0, source, aside=seed_of("aside", terms))
            there = Patch(terms, at, self._resampled(terms, spared=at))
            if all(term in elsewhere for term in terms):
                of_others = Patch(terms, self.bench.p0, elsewhere)
                planned.append((trial, "first_token", of_others, True))
            planned += [
                (trial, "zero", Patch(terms, self.bench.p0, "zero"), True),
                (trial, "mean", Patch(terms, self.bench.p0, "mean"), True),
                (trial, "random_direction", aside, False),
                (trial, "other_position", there, False),
            ]
            alone = len(terms) == 1 and terms[0].kind != "state"
            if alone and (other := self.bench.other(terms[0])) is not None:
                instead = Patch([other], self.bench.p0, self._resampled([other]))
                planned.append((trial, "other_component", instead, False))
        yield from self.bench.control(planned)
        return trials

    def _resampled(self, terms: Sequence[Term], spared: Tensor | None = None) -> Tensor:
        """What comes in the place of terms: the same at other positions, another embedding."""
        if terms[0].kind != "state":
            return self.bench.replay.elsewhere(seed_of("resample"), spared)
        return self.bench.seen.embedded[self._drawn]

    @cached_property
    def _drawn(self) -> Tensor:
        """``[B]``: for each sequence, which of the distinct first tokens stands in for its own."""
        tokens, _ = first_tokens(self.bench.probe)
        own = torch.cat([batch[:, 0].cpu() for batch in self.bench.replay.batches])
        generator = torch.Generator().manual_seed(seed_of("embedding"))
        drawn = torch.randint(len(tokens), (len(own),), generator=generator)
        return torch.where(tokens[drawn] == own, (drawn + 1) % len(tokens), drawn)

    @property
    def _other_tokens(self) -> Tensor:
        """``[B]``."""
        return first_tokens(self.bench.probe)[0][self._drawn]

    def _rows(self, trials: Sequence[Trial], phase: Sink) -> list[Necessity]:
        return [self._necessary(trial, phase) for trial in self.bench.reaching(trials, phase)]

    def _necessary(self, trial: Trial, phase: Sink) -> Necessity:
        effect = self.bench.effect(trial, phase)
        other = {name: self.bench.effect(trial, phase, of) for name, of in trial.others.items()}
        told = {
            name: one.to_record() for name, one in other.items() if not one.changed.isnan().any()
        }  # the others' passes ended before this phase
        verdict: Literal["necessary", "distinguishing"] | None = None
        if effect.holds:
            verdict = "necessary" if other["zero"].large else "distinguishing"
        shares = self.bench.shares[self.bench.phases.index(phase)]
        own = [shares[term] for term in trial.terms if term in shares]
        return {
            "kind": trial.kind,
            "block": min(term.block for term in trial.terms),
            "index": trial.terms[0].index,
            "share": sum(own) if own else None,
            **effect.to_record(),
            "zero": told.get("zero"),
            "mean": told.get("mean"),
            "first_token": told.get("first_token"),
            "loss": mean(trial.after.loss - self.bench.before.loss),
            "p0_loss": mean(trial.after.p0_loss - self.bench.before.p0_loss),
            **self.bench.fate(trial, phase, effect),  # type: ignore[typeddict-item]
            "by_block": self.bench.by_block(trial),
            "verdict": verdict,
        }

    def _remove(self, several: Sequence[Sequence[Trial]]) -> Plan[None]:
        """Ablate together what each of these removes, where that has not been done."""
        keys = dict.fromkeys(_terms(trials) for trials in several if len(trials) > 1)
        new = [key for key in keys if key not in self._joint]
        removed = yield from in_lockstep([self._ablate([("joint", key)]) for key in new])
        self._joint |= {key: trial for key, (trial,) in zip(new, removed, strict=True)}

    def _redundant(
        self, trials: Sequence[Trial], rows: Sequence[Necessity], phase: Sink
    ) -> Plan[list[Necessity]]:
        """Mark those of the terms, none of them necessary, that stand in for each other.

        Returns:
            The test of removing them together, if there are several.
        """
        if len(trials) < 2:
            return []
        terms = _terms(trials)
        gone = self._joint[terms]
        row = self._together(gone, phase)
        if row["verdict"] != "necessary":
            return [row]
        rests = [[other for other in terms if other not in trial.terms] for trial in trials]
        patches = [Patch(rest, self.bench.p0, self._resampled(rest)) for rest in rests]
        (kept,) = yield from ask([Edits(patches, until=phase.last_block)])
        lost = self.bench.changed(gone, gone.after, phase)
        whole = self.bench.mean(self.bench.before.p0, phase, gone.block)
        saved = [
            trial
            for trial, left in zip(trials, kept, strict=True)
            if Effect(lost - self.bench.changed(gone, left, phase), whole, {}).large
        ]
        if len(saved) > 1:
            names = {(trial.kind, trial.terms[0].block, trial.terms[0].index) for trial in saved}
            for other in rows:
                if (other["kind"], other["block"], other["index"]) in names:
                    other["verdict"] = "redundant"
        return [row]


def _terms(trials: Sequence[Trial]) -> tuple[Term, ...]:
    return tuple(term for trial in trials for term in trial.terms)
