"""Sufficiency: does another position draw attention with what P0 has?"""

from __future__ import annotations

from sinktrack.interventions.bench import Bench, Trial, before_all, seed_of
from sinktrack.interventions.candidates import SUBLAYERS, order, screen, term_of
from sinktrack.interventions.effects import mean
from sinktrack.interventions.patching import Patch, Term
from sinktrack.interventions.plans import Plan, ask
from sinktrack.interventions.replay import Edit, Edits
from sinktrack.interventions.results import Sufficiency
from sinktrack.metrics.localization import Sink


def sufficiency(bench: Bench) -> Plan[list[list[Sufficiency]]]:
    """Of each phase: the state at its first block, and each candidate sublayer's write."""
    to = bench.replay.position
    states = [Term("state", phase.first_block) for phase in bench.phases]
    writers = {term_of(part) for phase in bench.phases for part in screen(phase.shares, SUBLAYERS)}
    terms = [*states, *sorted(writers, key=order)]
    job = Edits([Patch([term], to, bench.p0) for term in terms], loss=True)
    (after,) = yield from ask([job])
    trials = [
        Trial(term.kind, before_all([term]), "gained", outcome, (term,))
        for term, outcome in zip(terms, after, strict=True)
    ]
    planned: list[tuple[Trial, str, Edit, bool]] = []
    for trial in trials:
        aside = Patch(trial.terms, to, bench.p0, aside=seed_of("patched", trial.terms))
        other = bench.replay.elsewhere(seed_of("patched", trial.terms), spared=to)
        planned += [
            (trial, "random_direction", aside, False),
            (trial, "other_position", Patch(trial.terms, to, other), False),
        ]
    yield from bench.control(planned)
    return [
        [
            _sufficient(bench, trial, phase)
            for trial in bench.reaching(trials, phase)
            if trial.kind != "state" or trial.terms[0].block <= phase.first_block
        ]
        for phase in bench.phases
    ]


def _sufficient(bench: Bench, trial: Trial, phase: Sink) -> Sufficiency:
    effect = bench.effect(trial, phase)
    return {
        "kind": trial.kind,
        "block": trial.terms[0].block,
        "index": None,
        **effect.to_record(),
        "share_of_two": bench.share_of_two(trial, phase),
        "loss": mean(trial.after.loss - bench.before.loss),
        "by_block": bench.by_block(trial),
        "verdict": "sufficient" if effect.holds else None,
    }
