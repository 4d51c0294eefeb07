"""Does the sink depend on what the first token says?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sinktrack.events import Observer, Uneditable, Write
from sinktrack.interventions.patching import Term
from sinktrack.interventions.replay import Job, Replay
from sinktrack.interventions.results import FirstTokenDependence
from sinktrack.measurement import Measurement
from sinktrack.models.editable import Pass
from sinktrack.probe import Probe

_QUANTILES = (5, 25, 50, 75, 95)
_TOKENS = 256


class FirstTokens(Observer):
    """Single-token sequences: their embedding, norms, and who each token is routed to."""

    def __init__(self) -> None:
        self.norms: defaultdict[int, list[Tensor]] = defaultdict(list)
        """By block, ``[n]`` at its input."""
        self.experts: defaultdict[int, list[Tensor]] = defaultdict(list)
        """By block, ``[n, K]``."""
        self._embedded: list[Tensor] = []

    @property
    def embedded(self) -> Tensor:
        """``[n, D]`` float32: the states that enter block 0."""
        return torch.cat(self._embedded)

    def state(self, block: int, stream: Tensor) -> None:
        """Note the norms."""
        row = stream[:, 0].float().cpu()
        self.norms[block].append(row.norm(dim=-1))
        if block == 0:
            self._embedded.append(row)

    def write(self, block: int, write: Write) -> None:
        """Note the routing."""
        if write.routed is not None:
            self.experts[block].append(write.routed.index[:, 0].cpu())


class Writes(Observer):
    """What some terms write at the first position.

    A term that cannot be told exactly is left out.
    """

    def __init__(self, terms: Collection[Term]) -> None:
        self._terms = terms
        self._rows: defaultdict[Term, list[Tensor]] = defaultdict(list)

    @property
    def by_term(self) -> dict[Term, Tensor]:
        """``[n, D]`` float32 by term."""
        return {term: torch.cat(rows) for term, rows in self._rows.items()}

    def write(self, block: int, write: Write) -> None:
        """Note the terms of this write."""
        for term in self._terms:
            if term.block == block and term.sublayer == write.sublayer:
                value = write.part(term.kind, term.index)
                if value is not None:
                    self._rows[term].append(value[:, 0].float().cpu())


_Shown = TypeVar("_Shown", bound=Observer)


class Singles(Job, Generic[_Shown]):
    """Passes of single-token sequences; their outcome is the observer.

    Args:
        tokens: ``[n]``.
        observer: who is shown them.
        last: the last block that is wanted; all by default.
    """

    def __init__(self, tokens: Tensor, observer: _Shown, last: int | None = None) -> None:
        self._tokens, self.observer, self._last = tokens, observer, last

    def passes(self, replay: Replay) -> list[Pass]:
        """Of some hundred tokens each."""
        parts = self._tokens[:, None].split(_TOKENS)
        return [_Part(self, part, self.observer, last=self._last) for part in parts]

    def outcome(self) -> _Shown:
        """Who was shown them."""
        return self.observer


class _Part(Pass):
    """A part of a job."""

    def __init__(self, job: Job, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._job = job

    @property
    def wanted(self) -> bool:
        return self._job.error is None

    def failed(self, error: Exception) -> None:
        if not isinstance(error, Uneditable):
            raise error
        self._job.error = error


def first_tokens(probe: Probe) -> tuple[Tensor, int | None]:
    """Distinct tokens ``[n]`` of a probe, and the one that all of its sequences begin with, if any.

    That one, [BOS] as a rule, is always among them.
    """
    begin = probe.tokens[_beginnings(probe)].unique()
    usual = int(begin[0]) if len(begin) == 1 else None
    return torch.cat([probe.first_tokens(), begin[:1]]).unique(), usual


def _beginnings(probe: Probe) -> Tensor:
    """``[B, T]`` bool: where sequences, or packed documents, begin."""
    first = torch.zeros_like(probe.tokens, dtype=torch.bool)
    first[:, 0] = True
    if probe.documents is not None:
        first[:, 1:] = probe.documents.diff(dim=1) != 0
    return first


def first_token_dependence(
    probe: Probe, measured: Measurement, seen: FirstTokens
) -> FirstTokenDependence:
    """The P0 state over distinct first tokens.

    ``norm_ratio`` at the reference block: of [BOS], the token that all sequences of the probe begin
    with, and over the others its values by token and their quantiles.

    Args:
        probe: the probe.
        measured: the measurement.
        seen: of the probe's `first_tokens`.
    """
    reference = measured.reference_block
    assert reference is not None
    unit = float(measured.p0_norm[reference] / measured.norm_ratio[reference])
    ratios = torch.cat(seen.norms[reference]).double() / unit
    tokens, usual = first_tokens(probe)
    other = tokens != usual if usual is not None else torch.ones_like(tokens, dtype=torch.bool)
    own = ratios[~other]
    points = torch.tensor(_QUANTILES, dtype=torch.float64) / 100
    return {
        "bos": usual,
        "tokens": int(other.sum()),
        "norm_ratio": {
            "bos": float(own[0]) if len(own) else None,
            "quantiles": {
                str(quantile): float(value)
                for quantile, value in zip(
                    _QUANTILES, torch.quantile(ratios[other], points), strict=True
                )
            },
            "values": ratios[other].tolist(),
        },
    }
