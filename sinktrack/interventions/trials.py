"""The causal tests: what is changed, what it is compared with, and the verdicts."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sinktrack.events import Write
from sinktrack.interventions.effects import LEAST_EFFECT, Effect, mean
from sinktrack.interventions.experts import Profile, table
from sinktrack.interventions.first_token import (
    FirstTokens,
    first_token_dependence,
    first_tokens,
)
from sinktrack.interventions.knockout import AttentionKnockout, RandomDirectionControl, note
from sinktrack.interventions.patching import Patch, Term
from sinktrack.interventions.replay import Edit, Outcome, Replay, replaying
from sinktrack.measurement import Measurement
from sinktrack.metrics.base import number
from sinktrack.metrics.localization import Component, Sink
from sinktrack.probe import Probe

SCREENED = 0.95
"""Of the positive share, what the tested components carry."""
MATTERS = 0.3
"""Total effect on a phase's state from which a component is tested, whatever its share."""
_MOST = 4
"""Components that are tested for their total effect, and parts of a sublayer, at most."""
_SUBLAYERS = ("attention", "mlp", "mixer")
_FIRST_TWO = (0, 2)
"""Blocks in which the source says that P0 is identified."""

Found = dict[str, Any]


def run_causal_tests(
    model: nn.Module, probe: Probe, measured: Measurement, *, batch_size: int | None = None
) -> Found:
    """Run all causal tests; the record's ``causal``.

    Where no sink has formed, or it begins in block 0 before anything was written, there is nothing
    to test and the lists are empty.

    Args:
        model: the model that was measured.
        probe: the probe that it was measured with.
        measured: the measurement, whose phases pick what is tested.
        batch_size: sequences per forward pass; by default as many as logits of 256 MiB allow.

    Returns:
        ``necessity``, ``sufficiency`` and ``position`` of the main phase, the same of every phase
        in ``phases``, ``experts``, ``meaning`` (dependence on the first token); plain numbers that
        ``json.dumps`` takes.

    Raises:
        ProbeError, MeasurementError: as `sinktrack.measure` does.
    """
    started = time.perf_counter()
    found: Found = {
        "formed": bool(measured.sinks),
        "reference_block": measured.reference_block,
        "least_effect": LEAST_EFFECT,
        "necessity": [],
        "sufficiency": [],
        "position": [],
        "phases": [],
        "experts": [],
        "meaning": None,
        "forwards": 0.0,
    }
    if is_testable(measured):
        with _tests(model, probe, measured, batch_size) as tests:
            found["phases"] = [
                {"first_block": phase.first_block, "last_block": phase.last_block,
                 "peak_block": phase.peak_block}
                for phase in tests.phases
            ]  # fmt: skip
            for name in ("necessity", "sufficiency", "position"):
                by_phase = getattr(tests, name)()
                for phase, rows in zip(found["phases"], by_phase, strict=True):
                    phase[name] = rows
                found[name] = tests.of_main(by_phase)
            found["experts"] = tests.experts(found["necessity"])
            found["forwards"] = tests.replay.forwards
            seen = tests.seen
        found["meaning"] = first_token_dependence(model, probe, measured, seen)
    return found | {"seconds": time.perf_counter() - started}


examine = run_causal_tests


def necessity(
    model: nn.Module, probe: Probe, measured: Measurement, *, batch_size: int | None = None
) -> list[Found]:
    """Ablate each candidate's write at P0 and see how much of the main phase's attention goes.

    ``effect`` is the share of the attention to P0, in the phase's blocks after the ablated one,
    that is gone when the component writes at P0 what it writes at another position of the sequence
    (resample), and for the embedding, when another token's stands there; ``zero`` and ``mean`` are
    the same for no write, and for the mean over the other positions. They stand with the change of
    the next-token loss, P0's own apart, and ``outcome``: ``lost`` where the attention to all
    positions in the sink state goes too, ``diluted`` where it stays and others share it. Verdicts:
    ``necessary``; ``distinguishing``, where the sink goes with another position's write but not
    with nothing, so that P0 need not have its own, but must be without that of the others;
    ``redundant``, neither of these but one of several that stand in for each other: without all of
    them the sink goes, with this one alone it stays.

    Arguments and errors are those of `run_causal_tests`; no test where no sink has formed.
    """
    return _alone(_Tests.necessity, model, probe, measured, batch_size)


def sufficiency(
    model: nn.Module, probe: Probe, measured: Measurement, *, batch_size: int | None = None
) -> list[Found]:
    """Put P0's writes, and its whole state at the first block of a phase, on another position.

    ``effect`` is what that position gains in attention from later queries, over the attention to
    P0 that was there. Verdict: ``sufficient``. Arguments and errors are those of
    `run_causal_tests`.
    """
    return _alone(_Tests.sufficiency, model, probe, measured, batch_size)


def position(
    model: nn.Module, probe: Probe, measured: Measurement, *, batch_size: int | None = None
) -> list[Found]:
    """Let another position attend to itself alone before the main phase, and P0 to all.

    ``effect`` is what the other position gains in attention from later queries (verdict
    ``follows``), or what P0 loses when it mixes the values of all positions (verdict ``unmixed``:
    the sink needs P0's attention to itself alone), over the attention to P0 that was there.
    ``share_of_two`` is the other position's part of the attention to both afterwards: 0.5 where it
    draws as much as P0. Arguments and errors are those of `run_causal_tests`.
    """
    return _alone(_Tests.position, model, probe, measured, batch_size)


def is_testable(measured: Measurement) -> bool:
    """Has a sink formed that something was written for?"""
    return any(sink.first_block for sink in measured.sinks)


def screen(components: Sequence[Component], kinds: Sequence[str]) -> list[Component]:
    """The largest components of these kinds that carry `SCREENED` of their positive share."""
    positive = sorted(
        (part for part in components if part.kind in kinds and part.share > 0),
        key=lambda part: -part.share,
    )
    total, carried, chosen = sum(part.share for part in positive), 0.0, []
    for part in positive:
        if carried >= SCREENED * total:
            break
        chosen.append(part)
        carried += part.share
    return chosen


@contextmanager
def _tests(
    model: nn.Module, probe: Probe, measured: Measurement, batch_size: int | None
) -> Iterator[_Tests]:
    with replaying(model, probe, batch_size) as replay:
        yield _Tests(replay, probe, measured)


def _alone(
    test: Callable[[_Tests], list[list[Found]]],
    model: nn.Module,
    probe: Probe,
    measured: Measurement,
    batch_size: int | None,
) -> list[Found]:
    if not is_testable(measured):
        return []
    with _tests(model, probe, measured, batch_size) as tests:
        return tests.of_main(test(tests))


@dataclass(eq=False)
class _Trial:
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
    """The same with other replacements: ``zero`` and ``mean``."""
    controls: dict[str, Outcome] = field(default_factory=dict)
    """By name; of ``other_position`` in a trial that reads a loss, the other position's counts."""


class _Tests:
    """Plain passes, and what the interventions are compared with."""

    def __init__(self, replay: Replay, probe: Probe, measured: Measurement) -> None:
        self.replay, self.probe, self.measured = replay, probe, measured
        self.phases = [sink for sink in measured.sinks if sink.first_block > 0]
        self.p0 = torch.zeros_like(replay.position)
        self._joint: dict[tuple[Term, ...], _Trial] = {}
        self.shares = [_shares(phase) for phase in self.phases]
        last = max(phase.last_block for phase in self.phases)
        self.candidates = [self._candidates(phase) for phase in self.phases]
        tested = sorted(
            {term for terms in self.candidates for term in terms}
            | {
                Term(part.kind, part.block)
                for phase in self.phases
                for part in phase.erasers
                if part.block is not None and part.block < last
            },
            key=_order,
        )
        self.sublayers = tested
        blocks = {term.block for term in (*tested, *map(self._other, tested)) if term}
        starts = {start for window in self._windows() for start in window[1:2]}
        replay.look(
            {b for phase in measured.sinks for b in range(phase.first_block, phase.last_block + 1)}
        )
        self.plain = _Plain(self.p0, replay.position)
        firsts = {phase.first_block for phase in self.phases}
        self.before = replay.plain(blocks | firsts | starts, self.plain)

    def of_main(self, by_phase: Sequence[list[Found]]) -> list[Found]:
        """The rows of the main phase; none where nothing was written before it."""
        main = self.measured.main_sink
        return next(
            (rows for phase, rows in zip(self.phases, by_phase, strict=True) if phase is main), []
        )

    @cached_property
    def seen(self) -> FirstTokens:
        """Single first tokens."""
        return FirstTokens.of(self.replay.found, first_tokens(self.probe)[0])

    def _candidates(self, phase: Sink) -> list[Term]:
        """Sublayers of a large share or total effect, and who writes where the state steps up."""
        found = [_term(part) for part in screen(phase.shares, _SUBLAYERS)]
        large = [
            Term(effect.kind, effect.block)
            for effect in phase.total_effects or ()
            if effect.kind in _SUBLAYERS and abs(effect.effect) >= MATTERS
        ]
        found += large[:_MOST]
        stepping = [
            part
            for part in phase.shares
            if part.kind in _SUBLAYERS and part.block == phase.step_up_block
        ]
        if stepping:
            found.append(_term(max(stepping, key=lambda part: abs(part.share))))
        return sorted(dict.fromkeys(found), key=_order)

    def _other(self, term: Term) -> Term | None:
        """A random component of the same kind that is no candidate; a part, of the same block."""
        candidates = {other for terms in self.candidates for other in terms}
        whole = term.kind in _SUBLAYERS
        fits = {
            other
            for shares in self.shares
            for other in shares
            if other.kind == term.kind and other != term and other not in candidates
            if whole or other.block == term.block
        }
        chooser = random.Random(_seed("other", term))
        return chooser.choice(sorted(fits, key=_order)) if fits else None

    # Reading an outcome in a phase

    def _mean(self, attention: Tensor, phase: Sink, block: int) -> Tensor:
        """``[B]``: mean of ``[B, L]`` over the phase's blocks after one."""
        span = attention[:, max(phase.first_block, block + 1) : phase.last_block + 1]
        return span.nanmean(-1)

    def _changed(self, trial: _Trial, after: Outcome, phase: Sink, second: bool = False) -> Tensor:
        before = self.before
        if trial.reads == "gained":
            return self._mean(after.second - before.second, phase, trial.block)
        if second:
            return self._mean(before.second - after.second, phase, trial.block)
        return self._mean(before.p0 - after.p0, phase, trial.block)

    def _effect(self, trial: _Trial, phase: Sink, after: Outcome | None = None) -> Effect:
        whole = self._mean(self.before.p0, phase, trial.block)
        if after is not None:
            return Effect(self._changed(trial, after, phase), whole, {})
        controls = {
            name: self._changed(trial, other, phase, second=name == "other_position")
            for name, other in trial.controls.items()
        }
        seen = {name: changed for name, changed in controls.items() if not changed.isnan().any()}
        return Effect(self._changed(trial, trial.after, phase), whole, seen)

    def _reaches(self, trial: _Trial, phase: Sink) -> bool:
        return trial.block < phase.last_block

    def _until(self, trial: _Trial) -> int | None:
        """The last block of the phases where the effect is large; None where it is nowhere."""
        large = [
            phase.last_block
            for phase in self.phases
            if self._reaches(trial, phase) and self._effect(trial, phase).large
            if trial.before is None or trial.before == phase.first_block
        ]
        return max(large, default=None)

    def _control(self, planned: Sequence[tuple[_Trial, str, Edit, bool]]) -> None:
        """Run what is compared with trials, those together that end in the same block.

        Args:
            planned: of a trial, the name, the change, and whether it is another replacement.
        """
        by_end: dict[int, list[tuple[_Trial, str, Edit, bool]]] = {}
        for one in planned:
            until = self._until(one[0])
            if until is not None:
                by_end.setdefault(until, []).append(one)
        for until, several in by_end.items():
            outcomes = self.replay.run([edit for _, _, edit, _ in several], until=until)
            for (trial, name, _, replaces), outcome in zip(several, outcomes, strict=True):
                (trial.others if replaces else trial.controls)[name] = outcome

    # Necessity

    def necessity(self) -> list[list[Found]]:
        """Of each phase: sublayers, the embedding, and parts of what has a verdict."""
        trials = self._ablate([("", [term]) for term in self.sublayers])
        embedding = self._ablate([("embedding", [Term("state", 0)])])
        found = [self._rows(trials, phase) for phase in self.phases]
        rest = self._rest(found)
        if rest:  # the screen missed who writes what is read
            self.replay.plain({term.block for term in rest})
            trials += self._ablate([("", [term]) for term in rest])
            found = [self._rows(trials, phase) for phase in self.phases]
        named = {(row["kind"], row["block"]) for rows in found for row in rows if row["verdict"]}
        parts: dict[Term, list[Term]] = {}
        for term in [trial.terms[0] for trial in trials]:
            if (term.kind, term.block) in named:
                parts[term] = self._parts(term)
        inside = self._ablate([("", [part]) for own in parts.values() for part in own])
        result = []
        for place, (phase, rows) in enumerate(zip(self.phases, found, strict=True)):
            spared = [
                trial
                for trial, row in zip(self._reaching(trials, phase), rows, strict=True)
                if row["verdict"] is None
                and (trial.terms[0] in self.candidates[place] or trial.terms[0] in rest)
                and trial.terms[0].block < phase.first_block
            ]
            rows += self._redundant(spared, rows, phase)
            rows += [row | {"block": None} for row in self._rows(embedding, phase)]
            for own in parts.values():
                tried = [trial for trial in inside if trial.terms[0] in own]
                of_parts = self._rows(tried, phase)
                left = [
                    trial
                    for trial, row in zip(self._reaching(tried, phase), of_parts, strict=True)
                    if row["verdict"] is None
                ]
                rows += of_parts + self._redundant(left, of_parts, phase)
            result.append(rows)
        return result

    def _rest(self, found: Sequence[list[Found]]) -> list[Term]:
        """The untested sublayers before each phase in which none has a verdict."""
        tested = set(self.sublayers)
        return sorted(
            {
                term
                for phase, shares, rows in zip(self.phases, self.shares, found, strict=True)
                if not any(row["verdict"] for row in rows)
                for term in shares
                if term.kind in _SUBLAYERS and term.block < phase.first_block
            }
            - tested,
            key=_order,
        )

    def _parts(self, sublayer: Term) -> list[Term]:
        """The parts that carry most of one sublayer's share, in any phase."""
        found: dict[Term, None] = {}
        for phase, shares in zip(self.phases, self.shares, strict=True):
            if Term(f"{sublayer.kind}_norm", sublayer.block) in shares:
                return []  # behind an output norm the parts are no terms of a sum
            own = [
                part
                for part in phase.parts
                if part.kind not in _SUBLAYERS and part.block is not None
                if _term(part).within(sublayer)
            ]
            kinds = ("head", "expert", "shared_expert")
            found |= dict.fromkeys(_term(part) for part in screen(own, kinds)[:_MOST])
        return sorted(found, key=_order)

    def _ablate(self, jobs: Sequence[tuple[str, Sequence[Term]]]) -> list[_Trial]:
        """Ablate terms at P0; the controls only where they could matter."""
        if not jobs:
            return []
        sources = [self._resampled(terms) for _, terms in jobs]
        after = self.replay.run(
            [Patch(terms, self.p0, own) for (_, terms), own in zip(jobs, sources, strict=True)],
            loss=True,
        )
        nothing = self.replay.run([Patch(terms, self.p0, "zero") for _, terms in jobs])
        trials = [
            _Trial(kind or terms[0].kind, _before(terms), "lost", outcome, tuple(terms))
            for (kind, terms), outcome in zip(jobs, after, strict=True)
        ]
        planned: list[tuple[_Trial, str, Edit, bool]] = []
        for trial, source, without in zip(trials, sources, nothing, strict=True):
            trial.others["zero"] = without
            terms, at = trial.terms, self.replay.position
            aside = Patch(terms, self.p0, source, aside=_seed("aside", terms))
            elsewhere = Patch(terms, at, self._resampled(terms, spared=at))
            planned += [
                (trial, "mean", Patch(terms, self.p0, "mean"), True),
                (trial, "random_direction", aside, False),
                (trial, "other_position", elsewhere, False),
            ]
            other = self._other(terms[0]) if len(terms) == 1 and terms[0].kind != "state" else None
            if other is not None:
                instead = Patch([other], self.p0, self._resampled([other]))
                planned.append((trial, "other_component", instead, False))
        self._control(planned)
        return trials

    def _resampled(self, terms: Sequence[Term], spared: Tensor | None = None) -> Tensor:
        """What comes in the place of terms: the same at other positions, another embedding."""
        if terms[0].kind != "state":
            return self.replay.elsewhere(_seed("resample"), spared)
        tokens, _ = first_tokens(self.probe)
        own = torch.cat([batch[:, 0].cpu() for batch in self.replay.batches])
        generator = torch.Generator().manual_seed(_seed("embedding"))
        drawn = torch.randint(len(tokens), (len(own),), generator=generator)
        drawn = torch.where(tokens[drawn] == own, (drawn + 1) % len(tokens), drawn)
        return self.seen.embedded[drawn]

    def _reaching(self, trials: Sequence[_Trial], phase: Sink) -> list[_Trial]:
        return [trial for trial in trials if self._reaches(trial, phase)]

    def _rows(self, trials: Sequence[_Trial], phase: Sink) -> list[Found]:
        return [self._necessary(trial, phase) for trial in self._reaching(trials, phase)]

    def _necessary(self, trial: _Trial, phase: Sink) -> Found:
        effect = self._effect(trial, phase)
        other = {name: self._effect(trial, phase, of) for name, of in trial.others.items()}
        average = other.get("mean")
        if average is not None and average.changed.isnan().any():
            average = None  # its pass ended before
        verdict = "necessary" if other["zero"].large else "distinguishing"
        shares = self.shares[self.phases.index(phase)]
        own = [shares[term] for term in trial.terms if term in shares]
        return {
            "kind": trial.kind,
            "block": min(term.block for term in trial.terms),
            "index": trial.terms[0].index,
            "share": sum(own) if own else None,
            **effect.to_record(),
            "zero": other["zero"].to_record(),
            "mean": average and average.to_record(),
            "loss": mean(trial.after.loss - self.before.loss),
            "p0_loss": mean(trial.after.p0_loss - self.before.p0_loss),
            **self._fate(trial, phase, effect),
            "by_block": self._by_block(trial),
            "verdict": verdict if effect.holds else None,
        }

    def _fate(self, trial: _Trial, phase: Sink, effect: Effect) -> Found:
        """Is the sink lost, or is P0 one of several positions that share it?"""
        peak = phase.peak_block

        def both(of: Callable[[Outcome], Tensor]) -> Found:
            return {
                name: number(of(outcome).nanmean())
                for name, outcome in (("before", self.before), ("after", trial.after))
            }

        attention = both(lambda outcome: self._mean(outcome.in_set, phase, trial.block))
        outcome = None
        if effect.large and attention["before"]:
            gone = 1 - (attention["after"] or 0.0) / attention["before"]
            outcome = "diluted" if gone < effect.value / 2 else "lost"
        return {
            "p0_norm_ratio": both(lambda outcome: outcome.norm_ratio[:, peak]),
            "set_size": both(lambda outcome: outcome.set_size[:, peak]),
            "attention_to_set": attention,
            "outcome": outcome,
        }

    def _by_block(self, trial: _Trial) -> list[float | None]:
        """Of each block, the attention that P0 loses, or that the other position gains."""
        change = (
            trial.after.second - self.before.second
            if trial.reads == "gained"
            else self.before.p0 - trial.after.p0
        )
        return [number(value) for value in change.mean(0)]

    def _redundant(
        self, trials: Sequence[_Trial], rows: Sequence[Found], phase: Sink
    ) -> list[Found]:
        """Mark those of the terms, none of them necessary, that stand in for each other.

        Returns:
            The test of removing them together, if there are several.
        """
        if len(trials) < 2:
            return []
        terms = [term for trial in trials for term in trial.terms]
        key = tuple(terms)
        if key not in self._joint:
            (self._joint[key],) = self._ablate([("joint", terms)])
        gone = self._joint[key]
        row = self._necessary(gone, phase) | {"components": [asdict(term) for term in terms]}
        if row["verdict"] != "necessary":
            return [row]
        rests = [[other for other in terms if other not in trial.terms] for trial in trials]
        kept = self.replay.run(
            [Patch(rest, self.p0, self._resampled(rest)) for rest in rests],
            until=phase.last_block,
        )
        lost = self._changed(gone, gone.after, phase)
        whole = self._mean(self.before.p0, phase, gone.block)
        saved = [
            trial
            for trial, left in zip(trials, kept, strict=True)
            if Effect(lost - self._changed(gone, left, phase), whole, {}).large
        ]
        if len(saved) > 1:
            names = {(trial.kind, trial.terms[0].block, trial.terms[0].index) for trial in saved}
            for other in rows:
                if (other["kind"], other["block"], other["index"]) in names:
                    other["verdict"] = "redundant"
        return [row]

    def experts(self, necessity: list[Found]) -> list[Found]:
        """The routed experts at P0 and the super experts; see `experts.table`."""
        profile = Profile()
        if self.seen.experts:
            self.replay.run([profile])
        main = self.measured.main_sink
        assert main is not None
        shares = {
            (term.block, term.index): share
            for term, share in _shares(main).items()
            if term.kind == "expert" and term.index is not None
        }
        first = {block: torch.cat(parts) for block, parts in self.seen.experts.items()}
        return table(profile, first, necessity, shares, len(self.p0), self.replay.blocks)

    # Sufficiency

    def sufficiency(self) -> list[list[Found]]:
        """Of each phase: the state at its first block, and each candidate sublayer's write."""
        to = self.replay.position
        states = [Term("state", phase.first_block) for phase in self.phases]
        writers = {
            _term(part) for phase in self.phases for part in screen(phase.shares, _SUBLAYERS)
        }
        terms = [*states, *sorted(writers, key=_order)]
        after = self.replay.run([Patch([term], to, self.p0) for term in terms], loss=True)
        trials = [
            _Trial(term.kind, _before([term]), "gained", outcome, (term,))
            for term, outcome in zip(terms, after, strict=True)
        ]
        planned: list[tuple[_Trial, str, Edit, bool]] = []
        for trial in trials:
            aside = Patch(trial.terms, to, self.p0, aside=_seed("patched", trial.terms))
            other = self.replay.elsewhere(_seed("patched", trial.terms), spared=to)
            planned += [
                (trial, "random_direction", aside, False),
                (trial, "other_position", Patch(trial.terms, to, other), False),
            ]
        self._control(planned)
        return [
            [
                self._sufficient(trial, phase)
                for trial in self._reaching(trials, phase)
                if trial.kind != "state" or trial.terms[0].block <= phase.first_block
            ]
            for phase in self.phases
        ]

    def _sufficient(self, trial: _Trial, phase: Sink) -> Found:
        effect = self._effect(trial, phase)
        return {
            "kind": trial.kind,
            "block": trial.terms[0].block,
            "index": None,
            **effect.to_record(),
            "share_of_two": self._share_of_two(trial, phase),
            "loss": mean(trial.after.loss - self.before.loss),
            "by_block": self._by_block(trial),
            "verdict": "sufficient" if effect.holds else None,
        }

    def _share_of_two(self, trial: _Trial, phase: Sink) -> float | None:
        """The other position's part of the attention to it and P0 together."""
        second = self._mean(trial.after.second, phase, trial.block).mean()
        return number(second / (second + self._mean(trial.after.p0, phase, trial.block).mean()))

    # Position

    def _windows(self) -> list[tuple[str, int, int]]:
        """Who attends to what else, in the blocks from one on and before another."""
        found = [("other_position_alone", *_FIRST_TWO)]
        for place, phase in enumerate(self.phases):
            found += [(kind, 0, phase.first_block) for kind in ("other_position_alone", "p0_mixed")]
            since = self.phases[place - 1].last_block + 1 if place else 0
            if 0 < since < phase.first_block:
                found.append(("other_position_alone", since, phase.first_block))
        return sorted(dict.fromkeys(found), key=lambda window: window[1:])

    def position(self) -> list[list[Found]]:
        """Of each phase: another position unmixed, and P0 mixed, in the blocks before it."""
        windows = self._windows()
        changes = [self._knocked_out(*window) for window in windows]
        after = self.replay.run(changes)
        trials = {
            window: _Trial(
                window[0],
                window[2] - 1,
                "lost" if window[0] == "p0_mixed" else "gained",
                outcome,
                before=None if window[1:] == _FIRST_TWO else window[2],
            )
            for window, outcome in zip(windows, after, strict=True)
        }
        planned: list[tuple[_Trial, str, Edit, bool]] = []
        for window, change in zip(windows, changes, strict=True):
            kind, start, until = window
            trial, mixed = trials[window], kind == "p0_mixed"
            at = self.p0 if mixed else self.replay.position
            before = self.plain.at_p0 if mixed else self.plain.at_other
            norms = {
                block: (row - before[block]).norm(dim=-1) for block, row in change.noted.items()
            }
            nudged = RandomDirectionControl(at, norms, _seed("nudge", window))
            planned.append((trial, "random_direction", nudged, False))
            if mixed:
                elsewhere = AttentionKnockout(self.replay.position, (start, until), _everything)
                planned.append((trial, "other_position", elsewhere, False))
            else:
                some = AttentionKnockout(at, (start, until), _half(_seed("half", window)))
                planned.append((trial, "random_keys", some, False))
        self._control(planned)
        return [
            [
                self._positioned(trials[window], window, phase)
                for window in windows
                if window[2] == phase.first_block or window[1:] == _FIRST_TWO
                if self._reaches(trials[window], phase)
            ]
            for phase in self.phases
        ]

    def _knocked_out(self, kind: str, start: int, until: int) -> AttentionKnockout:
        if kind == "p0_mixed":
            return AttentionKnockout(self.p0, (start, until), _everything)
        return AttentionKnockout(self.replay.position, (start, until), _only_itself)

    def _positioned(self, trial: _Trial, window: tuple[str, int, int], phase: Sink) -> Found:
        effect = self._effect(trial, phase)
        kind, start, until = window
        if until != phase.first_block:
            kind = f"{kind}_in_first_two"
        elif start:
            kind = f"{kind}_since_last_sink"
        mixed = trial.kind == "p0_mixed"
        found = {
            "kind": kind,
            "block": None,
            "index": None,
            "blocks": [start, until - 1],
            **effect.to_record(),
            "share_of_two": None if mixed else self._share_of_two(trial, phase),
            "by_block": self._by_block(trial),
        }
        if mixed:
            found |= self._fate(trial, phase, effect)
        verdict = "unmixed" if mixed else "follows"
        return found | {"verdict": verdict if effect.holds else None}


class _Plain(Edit):
    """Notes what attention writes at P0 and at the other position, in a pass without a change."""

    def __init__(self, p0: Tensor, other: Tensor) -> None:
        self._p0, self._other = p0, other
        self.at_p0: dict[int, Tensor] = {}
        self.at_other: dict[int, Tensor] = {}

    def write(self, block: int, write: Write, rows: Tensor) -> None:
        """Note both."""
        note(self.at_p0, block, write, rows, self._p0)
        note(self.at_other, block, write, rows, self._other)


def _only_itself(row: int, at: int, length: int) -> Tensor:
    return torch.arange(length) == at


def _everything(row: int, at: int, length: int) -> Tensor:
    return torch.ones(length, dtype=torch.bool)


def _half(seed: int) -> Callable[[int, int, int], Tensor]:
    """A random half of the earlier keys: fewer, but mixed all the same."""

    def sees(row: int, at: int, length: int) -> Tensor:
        seen = torch.zeros(length, dtype=torch.bool)
        generator = torch.Generator().manual_seed(seed + row)
        seen[torch.randperm(at, generator=generator)[: max(2, at // 2)]] = True
        return seen

    return sees


def _seed(*key: object) -> int:
    """The same for the same test, whatever ran before."""
    return zlib.crc32(repr(key).encode())


def _order(term: Term) -> tuple[int, str, int]:
    return term.block, term.kind, -1 if term.index is None else term.index


def _term(component: Component) -> Term:
    assert component.block is not None
    return Term(component.kind, component.block, component.index)


def _shares(phase: Sink) -> dict[Term, float]:
    """By term, with the embedding as the state that enters block 0."""
    written = [part for part in (*phase.shares, *phase.parts) if part.block is not None]
    embedding = {Term("state", 0): phase.shares[0].share} if phase.shares else {}
    return {_term(part): part.share for part in written} | embedding


def _before(terms: Sequence[Term]) -> int:
    """The last block whose attention the terms cannot change; -1 for none."""
    return min(term.block - (term.kind == "state") for term in terms)
