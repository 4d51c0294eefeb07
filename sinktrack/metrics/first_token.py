"""The P0 state of single-token sequences: does position decide, or a token?

Under a causal mask the P0 state depends on token 0 alone, so sequences of one token show it for
many first tokens at next to no cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sinktrack.lazy import torch
from sinktrack.metrics.base import Field, Metric, Row, Seen
from sinktrack.metrics.state import consistency

if TYPE_CHECKING:
    from torch import Tensor

QUANTILES = (5, 50, 95)
LIKE_P0 = 0.5
"""Of the probe's P0 norm, from which a first token's state counts as a sink's."""


@dataclass(frozen=True)
class FirstToken:
    """The P0 state over single-token sequences."""

    tokens: int
    """How many distinct first tokens were tried."""
    norm_ratio: dict[int, Tensor]
    """5, 50 and 95 % quantile over these tokens, ``[L + 1]`` each."""
    direction_consistency: Tensor
    """``[L + 1]``."""

    def to_record(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {
            "tokens": self.tokens,
            "norm_ratio": {str(q): values for q, values in self.norm_ratio.items()},
            "direction_consistency": self.direction_consistency,
        }


def _rows(value: Mapping[str, Any]) -> Iterator[Row]:
    for quantile, ratios in value["norm_ratio"].items():
        for block, ratio in enumerate(ratios):
            level = int(quantile) / 100
            yield {"metric": ".norm_ratio", "block": block, "level": level, "value": ratio}
    for block, cosine in enumerate(value["direction_consistency"]):
        yield {"metric": ".direction_consistency", "block": block, "value": cosine}


class FirstTokens(Metric):
    """P0 states of single tokens beside those of the probe."""

    fields = (
        Field("first_token", "P0 state of single first tokens", "Norm ratio (quantiles) and "
              "consistency of direction over single-token sequences.", rows=_rows),
        Field("position_share", "first tokens that make a sink", "Share of distinct first tokens "
              "whose norm at the main phase's peak is at least half of the probe's P0 norm: 1 "
              "where position decides, 0 where one token does.", (), "share", form=".0%",
              curve=True),
    )  # fmt: skip

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """As the fields say; the share is None where no sink has formed."""
        of = seen.alone.of("state", "row")
        states = torch.stack([torch.cat(of[boundary]) for boundary in sorted(of)])
        norms = torch.linalg.vector_norm(states, dim=-1)
        ratio = norms / found["other_norm"][:, None]
        points = torch.tensor(QUANTILES, dtype=ratio.dtype) / 100
        quantiles = torch.quantile(ratio, points, dim=-1)
        end, main = seen.blocks + 1, found["main"]
        share = None
        if main is not None:
            own = found["p0_norm"][main.peak_block]
            share = float((norms[main.peak_block] >= LIKE_P0 * own).double().mean())
        return {
            "first_token": FirstToken(
                states.shape[1],
                {
                    quantile: seen.padded(values, end)
                    for quantile, values in zip(QUANTILES, quantiles, strict=True)
                },
                seen.padded(consistency(states, torch.arange(states.shape[1])), end),
            ),
            "position_share": share,
        }
