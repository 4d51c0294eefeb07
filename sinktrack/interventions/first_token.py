"""Does the sink depend on what the first token says?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from sinktrack.events import Observer, Write
from sinktrack.interventions.patching import Term
from sinktrack.measurement import Measurement
from sinktrack.models.editable import Editable
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

    @classmethod
    def of(cls, model: Editable, tokens: Tensor) -> FirstTokens:
        """Of distinct tokens ``[n]``."""
        seen = cls()
        for part in tokens[:, None].split(_TOKENS):
            model.run(part, seen)
        return seen


class _Writes(Observer):
    """What some terms write at the first position."""

    def __init__(self, terms: Collection[Term]) -> None:
        self._terms = terms
        self.rows: defaultdict[Term, list[Tensor]] = defaultdict(list)

    def write(self, block: int, write: Write) -> None:
        """Note the terms of this write."""
        for term in self._terms:
            if term.block == block and term.sublayer == write.sublayer:
                value = write.part(term.kind, term.index)
                if value is not None:
                    self.rows[term].append(value[:, 0].float().cpu())


def writes_at_p0(model: Editable, tokens: Tensor, terms: Collection[Term]) -> dict[Term, Tensor]:
    """``[n, D]`` float32 by term: what it writes at P0 where these tokens ``[n]`` stand there.

    A term that cannot be told exactly is left out.
    """
    seen = _Writes(terms)
    for part in tokens[:, None].split(_TOKENS) if terms else ():
        model.run(part, seen)
    return {term: torch.cat(rows) for term, rows in seen.rows.items()}


def first_tokens(probe: Probe) -> tuple[Tensor, int | None]:
    """Distinct tokens ``[n]`` of a probe, and the one that all of its sequences begin with, if any.

    That one, [BOS] as a rule, is always among them.
    """
    begin = probe.tokens[_beginnings(probe)].unique()
    usual = int(begin[0]) if len(begin) == 1 else None
    return torch.cat([probe.first_tokens(), begin[:1]]).unique(), usual


def _beginnings(probe: Probe) -> Tensor:
    """``[B, T]`` bool: where sequences, or packed documents, begin."""
    found = torch.zeros_like(probe.tokens, dtype=torch.bool)
    found[:, 0] = True
    if probe.documents is not None:
        found[:, 1:] = probe.documents.diff(dim=1) != 0
    return found


def first_token_dependence(
    probe: Probe, measured: Measurement, seen: FirstTokens
) -> dict[str, Any]:
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
