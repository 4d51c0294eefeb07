"""The P0 state: its norm beside other positions, its direction, and who rivals it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from sinktrack.lazy import torch
from sinktrack.metrics.base import (
    Field,
    Metric,
    PartialStates,
    PositionShard,
    Seen,
    State,
    median,
    norms,
)

if TYPE_CHECKING:
    from torch import Tensor

_COMPARED = ("direction_consistency", "direction_to_mean")
"""Fields that want sequences with distinct first tokens."""
RIVAL = 0.5
"""Of the sequence's P0 norm, from which another position's norm is a rival's."""


class P0State(Metric):
    """The residual stream at position zero, at every block's input and at the last one's output."""

    fields = (
        Field("p0_norm", "norm of the P0 state", "Mean norm of the residual stream at P0.",
              ("boundary",), "l2 norm", "log"),
        Field("norm_ratio", "norm ratio", "Norm of the P0 state over the median norm at other "
              "positions.", ("boundary",), "", "log", curve=True),
        Field("direction_consistency", "consistency of direction", "Mean cosine between the P0 "
              "states of two sequences whose first tokens differ.", ("boundary",), "cosine",
              form=".3f"),
        Field("direction_to_mean", "cosine to the mean direction", "Mean cosine of the P0 states "
              "to their mean direction.", ("boundary",), "cosine", form=".3f"),
        Field("rivals", "rivals of P0", "Share of the other positions whose norm is at least half "
              "of that at their sequence's P0.", ("boundary",), "share", form=".1%"),
    )  # fmt: skip
    states: ClassVar = {"row": State("p0"), "sum": State("sum"), "norms": State("cat")}

    def on_state(self, stream: Tensor, shard: PositionShard) -> PartialStates:
        """P0's row, and of the others the sum and the norms."""
        rest = shard.rest(stream)
        if not rest.shape[1]:
            return {"row": shard.row(stream), "sum": None, "norms": None}
        wide = torch.promote_types(rest.dtype, torch.float32)
        return {
            "row": shard.row(stream),
            "sum": rest.sum(1, dtype=wide).float(),
            "norms": norms(rest),
        }

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """As the fields say; also ``states`` and ``norms``, for other metrics."""
        states = seen.boundaries("state", "row")
        size = norms(states)
        others = seen.collected.of("state", "norms")
        middle = torch.stack(
            [median(torch.cat([part.flatten() for part in others[at]])) for at in sorted(others)]
        )
        beside = torch.stack([_rivals(size[at], others[at]) for at in sorted(others)])
        from sinktrack.probe import begin_alike  # torch is slow to import

        alike = begin_alike(seen.first_tokens)
        towards = torch.full((len(states),), torch.nan) if alike else direction_to_mean(states)
        end = seen.blocks + 1
        reasons = (
            dict.fromkeys(_COMPARED, f"{alike}; distinct first tokens are compared")
            if alike
            else {}
        )
        return {
            "missing": reasons,
            "p0_norm": seen.padded(size.mean(-1), end),
            "norm_ratio": seen.padded(size.mean(-1) / middle, end),
            "direction_consistency": seen.padded(consistency(states, seen.first_tokens), end),
            "direction_to_mean": seen.padded(towards, end),
            "rivals": seen.padded(beside, end),
            "states": states,
            "norms": size,
            "other_norm": middle,
        }


def _rivals(size: Tensor, others: list[Tensor]) -> Tensor:
    """Share of the other positions, in batches ``[b, t]``, beside norms ``size`` ``[B]`` of P0."""
    own = size.split([len(part) for part in others])
    beside = [(part >= RIVAL * at[:, None]).flatten() for part, at in zip(others, own, strict=True)]
    return torch.cat(beside).float().mean()


def consistency(states: Tensor, tokens: Tensor) -> Tensor:
    """Mean cosine over pairs of sequences with different first tokens.

    Args:
        states: ``[L + 1, B, D]``.
        tokens: ``[B]``.

    Returns:
        float32 ``[L + 1]``; nan where all first tokens are equal.
    """
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    _, group, size = tokens.unique(return_inverse=True, return_counts=True)
    pairs = float(len(tokens) ** 2 - (size**2).sum())
    if not pairs:
        return torch.full((len(states),), torch.nan)
    sums = torch.zeros(len(states), len(size), unit.shape[-1], dtype=torch.float64)
    sums.index_add_(1, group, unit)
    squares = sums.sum(1).square().sum(-1) - sums.square().sum((1, 2))
    return (squares / pairs).float()


def direction_to_mean(states: Tensor) -> Tensor:
    """float32 ``[L + 1]``: mean cosine of ``[L + 1, B, D]`` to the mean of their directions."""
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    mean = torch.nn.functional.normalize(unit.mean(1, keepdim=True), dim=-1)
    return (unit * mean).sum(-1).mean(-1).float()
