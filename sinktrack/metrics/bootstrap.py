"""The bootstrap over sequences: how far a number would move with other sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinktrack.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


RESAMPLES = 1000


def weights(sequences: int, resamples: int = RESAMPLES) -> Tensor:
    """float64 ``[resamples, B]``: of each resample the share that a sequence makes of it.

    The same for all numbers: intervals of differences need the same draws.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(sequences, (resamples, sequences), generator=generator)
    weight = torch.zeros(resamples, sequences, dtype=torch.float64)
    return weight.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64)) / sequences


def interval(samples: Tensor) -> list[float] | None:
    """The middle 95 % of resampled values, without nan: lower and upper bound."""
    samples = samples[~samples.isnan()]
    if not len(samples):
        return None
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=samples.dtype))
    return [float(low), float(high)]
