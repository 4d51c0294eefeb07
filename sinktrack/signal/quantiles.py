"""Student's t, Theil and Sen's slope and ranks, in numpy alone: a live tracker needs no scipy."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]


@lru_cache(maxsize=4096)
def student_t(tail: float, free: int) -> float:
    """The number that Student's t exceeds with probability ``tail``, at most one half.

    Newton's method on the finite series of Abramowitz and Stegun (26.7.3 and 26.7.4); the tail is
    convex, so that from the normal quantile, which is smaller, each step stays below the solution.

    Args:
        tail: above 0.
        free: degrees of freedom, 1 or more.
    """
    quantile = NormalDist().inv_cdf(1 - tail)
    log_scale = math.lgamma((free + 1) / 2) - math.lgamma(free / 2)
    scale = math.exp(log_scale) / math.sqrt(free * math.pi)
    while True:
        density = scale * math.exp(-(free + 1) / 2 * math.log1p(quantile**2 / free))
        step = (_upper_tail(quantile, free) - tail) / density
        quantile += step
        if step <= 1e-12 * quantile:
            return quantile


def _upper_tail(t: float, free: int) -> float:
    """Probability that Student's t exceeds ``t``, 0 or more."""
    angle = math.atan(t / math.sqrt(free))
    odd = free % 2
    k = np.arange(1, (free - odd) // 2)
    ratios = 2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)
    terms = np.cumprod(ratios * math.cos(angle) ** 2)
    inside = math.sin(angle) * (1 + float(terms.sum()))
    if odd:
        inside = 2 / math.pi * (angle + (inside * math.cos(angle) if free > 1 else 0.0))
    return (1 - inside) / 2


def theil_sen(x: Curve, y: Curve, sure: float) -> tuple[float, float, float]:
    """Median slope over all pairs, and the ends of its interval (Sen 1968).

    Args:
        x: distinct, ascending.
        y: values, which may be tied.
        sure: coverage of the interval.
    """
    one, other = np.triu_indices(len(x), 1)
    slopes = np.sort((y[other] - y[one]) / (x[other] - x[one]))
    count = len(y)
    ties = np.unique(y, return_counts=True)[1]
    pairs = count * (count - 1) * (2 * count + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()
    reach = NormalDist().inv_cdf((1 + sure) / 2) * math.sqrt(pairs / 18)
    low = max(round((len(slopes) - reach) / 2) - 1, 0)
    high = min(round((len(slopes) + reach) / 2), len(slopes) - 1)
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def ranks(values: Curve) -> Curve:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])
