"""The causal tests: what is changed, what it is compared with, and the verdicts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from sinktrack.interventions.edits import Change, Nudge, Sight, Term
from sinktrack.interventions.effects import LEAST_EFFECT, Effect, mean
from sinktrack.interventions.experts import Profile, table
from sinktrack.interventions.meaning import FirstTokens, first_tokens, meaning
from sinktrack.interventions.replay import Outcome, Replay, replaying
from sinktrack.measurement import Measurement
from sinktrack.metrics.localization import Component
from sinktrack.probe import Probe

SCREENED = 0.95
"""Of the positive share, what the tested components carry."""
_SUBLAYERS = ("attention", "mlp", "mixer")
_PARTS = ("head", "expert", "shared_expert", "mlp", "mixer")

Found = dict[str, Any]


def examine(
    model: nn.Module, probe: Probe, measured: Measurement, *, batch_size: int | None = None
) -> Found:
    """All causal tests; the record's ``causal``.

    Where no sink has formed, or it begins in block 0 before anything was written, there is nothing
    to test and the lists are empty.

    Args:
        model: the model that was measured.
        probe: the probe that it was measured with.
        measured: the measurement, whose shares pick what is tested.
        batch_size: sequences per forward pass; by default as many as logits of 256 MiB allow.

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
        "experts": [],
        "meaning": None,
        "forwards": 0.0,
    }
    if is_testable(measured):
        with _tests(model, probe, measured, batch_size) as tests:
            found["necessity"] = tests.necessity()
            found["sufficiency"] = tests.sufficiency()
            found["position"] = tests.position()
            seen = FirstTokens.of(tests.replay.found, first_tokens(probe)[0])
            found["experts"] = tests.experts(seen, found["necessity"])
            found["forwards"] = tests.forwards
        found["meaning"] = meaning(model, probe, measured, seen)
    return found | {"seconds": time.perf_counter() - started}


def necessity(
    model: nn.Module, probe: Probe, measured: Measurement, *, batch_size: int | None = None
) -> list[Found]:
    """Remove each candidate's write at P0 and see how much of the downstream attention goes.

    ``effect`` is the share of the attention to P0, in the blocks after the changed one, that is
    gone when the write is its mean over the other positions; ``zero`` the same for no write. Both
    stand with the change of the next-token loss, P0's own apart. Verdicts: ``necessary``;
    ``distinguishing``, where the sink goes with the mean but not with nothing, so that P0 need not
    have its own write, but must be without that of the others; ``redundant``, neither of these but
    one of several that stand in for each other: without all of them the sink goes, with this one
    alone it stays.

    Arguments and errors are those of `examine`; no test where no sink has formed.
    """
    return _alone(_Tests.necessity, model, probe, measured, batch_size)


def sufficiency(
    model: nn.Module, probe: Probe, measured: Measurement, *, batch_size: int | None = None
) -> list[Found]:
    """Put P0's writes, and its whole state at the reference block, on another position.

    ``effect`` is what that position gains in attention from later queries, over the attention to
    P0 that was there. Verdict: ``sufficient``. Arguments and errors are those of `examine`.
    """
    return _alone(_Tests.sufficiency, model, probe, measured, batch_size)


def position(
    model: nn.Module, probe: Probe, measured: Measurement, *, batch_size: int | None = None
) -> list[Found]:
    """Let another position attend to itself alone before the reference block, and P0 to all.

    ``effect`` is what the other position gains in attention from later queries (verdict
    ``follows``), or what P0 loses when it mixes the values of all positions (verdict ``unmixed``:
    the sink needs P0's attention to itself alone), over the attention to P0 that was there.
    Arguments and errors are those of `examine`.
    """
    return _alone(_Tests.position, model, probe, measured, batch_size)


def is_testable(measured: Measurement) -> bool:
    """Has a sink formed that something was written for?"""
    return bool(measured.reference_block)


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
        yield _Tests(replay, measured)


def _alone(
    test: Callable[[_Tests], list[Found]],
    model: nn.Module,
    probe: Probe,
    measured: Measurement,
    batch_size: int | None,
) -> list[Found]:
    if not is_testable(measured):
        return []
    with _tests(model, probe, measured, batch_size) as tests:
        return test(tests)


class _Tests:
    """A plain pass, and what the interventions are compared with."""

    def __init__(self, replay: Replay, measured: Measurement) -> None:
        self.replay, self.measured = replay, measured
        where = self.sink = measured.main_sink
        assert where is not None
        self.reference = where.first_block
        self.random = random.Random(0)
        written = [part for part in (*where.shares, *where.parts) if part.block is not None]
        self.shares = {_term(part): part.share for part in written}
        self.shares[Term("state", 0)] = where.shares[0].share
        self.sublayers = [_term(part) for part in screen(where.shares, _SUBLAYERS)]
        leaves = [_term(part) for part in screen(where.parts, _PARTS)]
        self.parts = [term for term in leaves if term.kind not in _SUBLAYERS]
        self.p0 = torch.zeros_like(replay.position)
        self.others = {term: self._other(term) for term in (*self.sublayers, *self.parts)}
        blocks = {term.block for term in (*self.others, *self.others.values()) if term}
        self.before = replay.plain(blocks | {self.reference})

    @property
    def forwards(self) -> float:
        """Cost so far, in forward passes of the whole model over the whole probe."""
        whole = len(self.replay.found.blocks) * len(self.replay.batches)
        return self.replay.blocks_run / whole

    def _other(self, term: Term) -> Term | None:
        """A random component of the same kind that is no candidate; a part, of the same block."""
        candidates = (*self.sublayers, *self.parts)
        fits = [
            other
            for other in self.shares
            if other.kind == term.kind
            and other not in candidates
            and (term.kind in _SUBLAYERS or other.block == term.block)
        ]
        return self.random.choice(fits) if fits else None

    def _lost(self, after: Outcome, block: int) -> Tensor:
        return _downstream(self.before.p0 - after.p0, block)

    def _gained(self, after: Outcome, block: int) -> Tensor:
        return _downstream(after.also - self.before.also, block)

    def _attention(self, block: int) -> Tensor:
        return _downstream(self.before.p0, block)

    # Necessity

    def necessity(self) -> list[Found]:
        """Sublayers, the embedding, blocks of which both were tested, and parts."""
        found = self._several(self.sublayers)
        if not any(row["verdict"] for row in found):  # the screen missed who writes what is read
            rest = [term for term in self.shares if term.kind in _SUBLAYERS]
            self.sublayers += [term for term in rest if term not in self.sublayers]
            self.others |= dict.fromkeys(self.sublayers)
            self.replay.plain({term.block for term in self.sublayers})
            found = self._several(self.sublayers)
        found.append(self._necessary("embedding", [Term("state", 0)]) | {"block": None})
        for block in sorted({term.block for term in self.sublayers}):
            inside = [term for term in self.sublayers if term.block == block]
            if len(inside) > 1:
                found.append(self._necessary("block", inside))
        named = {(row["kind"], row["block"]) for row in found if row["verdict"]}
        for sublayer in self.sublayers:
            norm = Term(f"{sublayer.kind}_norm", sublayer.block)
            if norm not in self.shares:  # behind an output norm the parts are no terms of a sum
                parts = [term for term in self.parts if term.within(sublayer)]
                if not parts and (sublayer.kind, sublayer.block) in named:
                    parts = self._largest(sublayer)
                found += self._several(parts)
        return found

    def _largest(self, sublayer: Term) -> list[Term]:
        """The parts that carry most of one sublayer's share."""
        own = [
            part
            for part in self.sink.parts
            if part.kind not in _SUBLAYERS and part.block is not None
            if _term(part).within(sublayer)
        ]
        return [_term(part) for part in screen(own, _PARTS)]

    def _several(self, terms: Sequence[Term]) -> list[Found]:
        """Terms one by one; those that are not necessary together as well."""
        found = [self._necessary(term.kind, [term]) for term in terms]
        spared = [row for row in found if row["verdict"] is None]
        return found + self._redundant([terms[found.index(row)] for row in spared], spared)

    def _necessary(self, kind: str, terms: Sequence[Term]) -> Found:
        effect, after = self._removed(terms)
        block = _before(terms)
        zero = self._effect(
            self._lost(self.replay.run(Change(terms, self.p0, "zero")), block), block
        )
        verdict = "necessary" if zero.large else "distinguishing"
        return {
            "kind": kind,
            "block": min(term.block for term in terms),
            "index": terms[0].index,
            "share": sum(self.shares[term] for term in terms),
            **effect.to_record(),
            "zero": zero.to_record(),
            "loss": mean(after.loss - self.before.loss),
            "p0_loss": mean(after.p0_loss - self.before.p0_loss),
            "verdict": verdict if effect.holds else None,
        }

    def _removed(self, terms: Sequence[Term]) -> tuple[Effect, Outcome]:
        """Writes at P0 give way to their means; controls only where they could matter."""
        block = _before(terms)
        after = self.replay.run(Change(terms, self.p0, "mean"))
        effect = self._effect(self._lost(after, block), block)
        if not effect.large:
            return effect, after
        aside = self.replay.run(Change(terms, self.p0, "mean", aside=self.replay.generator))
        elsewhere = self.replay.run(Change(terms, self.replay.position, "mean"))
        controls = {
            "random_direction": self._lost(aside, block),
            "other_position": -self._gained(elsewhere, block),
        }
        other = self.others.get(terms[0]) if len(terms) == 1 else None
        if other is not None:
            instead = self.replay.run(Change([other], self.p0, "mean"))
            controls["other_component"] = self._lost(instead, block)
        return replace(effect, controls=controls), after

    def _redundant(self, terms: Sequence[Term], rows: Sequence[Found]) -> list[Found]:
        """Mark those of the terms, none of them necessary, that stand in for each other.

        Returns:
            The test of removing them together, if there are several.
        """
        if len(terms) < 2:
            return []
        joint = self._necessary("joint", terms) | {"components": [asdict(term) for term in terms]}
        if joint["verdict"] != "necessary":
            return [joint]
        block = _before(terms)
        gone, _ = self._removed(terms)
        saved = []
        for term, row in zip(terms, rows, strict=True):
            rest = [other for other in terms if other != term]
            left = self._lost(self.replay.run(Change(rest, self.p0, "mean")), block)
            if self._effect(gone.changed - left, block).large:
                saved.append(row)
        if len(saved) > 1:
            for row in saved:
                row["verdict"] = "redundant"
        return [joint]

    def _effect(self, changed: Tensor, block: int) -> Effect:
        return Effect(changed, self._attention(block), {})

    def experts(self, seen: FirstTokens, necessity: list[Found]) -> list[Found]:
        """The routed experts at P0 and the super experts; see `experts.table`."""
        profile = Profile()
        if seen.experts:
            self.replay.run(profile)
        shares = {
            (term.block, term.index): share
            for term, share in self.shares.items()
            if term.kind == "expert" and term.index is not None
        }
        first = {block: torch.cat(parts) for block, parts in seen.experts.items()}
        sequences, blocks = len(self.p0), len(self.replay.found.blocks)
        return table(profile, first, necessity, shares, sequences, blocks)

    # Sufficiency

    def sufficiency(self) -> list[Found]:
        """The state at the reference block, and each candidate sublayer's write."""
        terms = [Term("state", self.reference), *self.sublayers]
        return [self._transferred(term) for term in terms]

    def _transferred(self, term: Term) -> Found:
        block = _before([term])
        to, replay = self.replay.position, self.replay
        after = replay.run(Change([term], to, self.p0))
        effect = self._effect(self._gained(after, block), block)
        if effect.large:
            aside = replay.run(Change([term], to, self.p0, aside=replay.generator))
            elsewhere = replay.run(Change([term], to, self._elsewhere()))
            controls = {
                "random_direction": self._gained(aside, block),
                "other_position": self._gained(elsewhere, block),
            }
            effect = replace(effect, controls=controls)
        return {
            "kind": term.kind,
            "block": term.block,
            "index": None,
            **effect.to_record(),
            "loss": mean(after.loss - self.before.loss),
            "verdict": "sufficient" if effect.holds else None,
        }

    def _elsewhere(self) -> Tensor:
        """A position of each sequence that is neither P0 nor the other one."""
        position, lengths = self.replay.position, self.replay.lengths
        drawn = torch.rand(len(lengths), generator=self.replay.generator) * (lengths - 2)
        chosen = 1 + drawn.long()
        return torch.where(chosen >= position, chosen + 1, chosen).clamp(max=lengths - 1)

    # Position

    def position(self) -> list[Found]:
        """Another position unmixed, and P0 mixed."""
        other, before = self.replay.position, self.reference - 1
        alone = Sight(other, self.reference, _only_itself)
        follows = self._effect(self._gained(self.replay.run(alone), before), before)
        if follows.large:
            some = self.replay.run(Sight(other, self.reference, self._half))
            controls = {
                "random_direction": self._gained(self._nudged(alone), before),
                "random_keys": self._gained(some, before),
            }
            follows = replace(follows, controls=controls)
        mixed = Sight(self.p0, self.reference, _everything)
        needs = self._effect(self._lost(self.replay.run(mixed), before), before)
        if needs.large:
            elsewhere = self.replay.run(Sight(other, self.reference, _everything))
            controls = {
                "random_direction": self._lost(self._nudged(mixed), before),
                "other_position": -self._gained(elsewhere, before),
            }
            needs = replace(needs, controls=controls)
        return [
            _row("other_position_alone", follows, "follows"),
            _row("p0_mixed", needs, "unmixed"),
        ]

    def _nudged(self, changed: Sight) -> Outcome:
        """Attention's writes moved as far as other sight moved them, in random directions."""
        plain = Sight(changed.at, changed.until, None)
        self.replay.run(plain)
        norms = {
            block: (row - plain.noted[block]).norm(dim=-1) for block, row in changed.noted.items()
        }
        return self.replay.run(Nudge(changed.at, norms, self.replay.generator))

    def _half(self, at: int, length: int) -> Tensor:
        """A random half of the earlier keys: fewer, but mixed all the same."""
        seen = torch.zeros(length, dtype=torch.bool)
        chosen = torch.randperm(at, generator=self.replay.generator)[: max(2, at // 2)]
        seen[chosen] = True
        return seen


def _only_itself(at: int, length: int) -> Tensor:
    return torch.arange(length) == at


def _everything(at: int, length: int) -> Tensor:
    return torch.ones(length, dtype=torch.bool)


def _row(kind: str, effect: Effect, verdict: str) -> Found:
    return {
        "kind": kind,
        "block": None,
        "index": None,
        **effect.to_record(),
        "verdict": verdict if effect.holds else None,
    }


def _term(component: Component) -> Term:
    assert component.block is not None
    return Term(component.kind, component.block, component.index)


def _before(terms: Sequence[Term]) -> int:
    """The last block whose attention the terms cannot change; -1 for none."""
    return min(term.block - (term.kind == "state") for term in terms)


def _downstream(attention: Tensor, block: int) -> Tensor:
    """``[B]``: mean over the blocks after one, of ``[B, L]``."""
    return attention[:, block + 1 :].nanmean(-1)
