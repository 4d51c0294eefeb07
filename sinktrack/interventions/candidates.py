"""Which components the causal tests change, and in what order they are told."""

from __future__ import annotations

from collections.abc import Sequence

from sinktrack.interventions.patching import Term
from sinktrack.metrics.localization import Component, Sink

SCREENED = 0.95
"""Of the positive share, what the tested components carry."""
MATTERS = 0.3
"""Total effect on a phase's state from which a component is tested, whatever its share."""
MOST = 4
"""Components that are tested for their total effect, and parts of a sublayer, at most."""
SUBLAYERS = ("attention", "mlp", "mixer")


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


def candidates(phase: Sink) -> list[Term]:
    """Sublayers of a large share or total effect, and who writes where the state steps up."""
    terms = [term_of(part) for part in screen(phase.shares, SUBLAYERS)]
    large = [
        Term(effect.kind, effect.block)
        for effect in phase.total_effects or ()
        if effect.kind in SUBLAYERS and abs(effect.effect) >= MATTERS
    ]
    terms += large[:MOST]
    stepping = [
        part
        for part in phase.shares
        if part.kind in SUBLAYERS and part.block == phase.step_up_block
    ]
    if stepping:
        terms.append(term_of(max(stepping, key=lambda part: abs(part.share))))
    return sorted(dict.fromkeys(terms), key=order)


def order(term: Term) -> tuple[int, str, int]:
    """A key to sort by: block, kind, index."""
    return term.block, term.kind, -1 if term.index is None else term.index


def term_of(component: Component) -> Term:
    """The term that a component in a block is."""
    assert component.block is not None
    return Term(component.kind, component.block, component.index)


def shares_of(phase: Sink) -> dict[Term, float]:
    """By term, with the embedding as the state that enters block 0."""
    written = [part for part in (*phase.shares, *phase.parts) if part.block is not None]
    embedding = {Term("state", 0): phase.shares[0].share} if phase.shares else {}
    return {term_of(part): part.share for part in written} | embedding
