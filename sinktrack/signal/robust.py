"""The statistics under the rules: noise, trends, levels and breaks, each with its interval.

Sources: Sen (1968) for the slope's interval; Kendall (1954) and Marriott and Pope (1954) for the
bias of short autocorrelations; Schmeiser (1982) for batch means; Seber and Wild (1989) for
intervals by the F distribution; Bonferroni's bound for many looks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sinktrack.signal.quantiles import Curve as Curve
from sinktrack.signal.quantiles import student_t, theil_sen

CONFIDENCE = 0.95
_LAGS = (1, 2, 4)
_BINS = 24
_BATCHES = 4
_POWERS = (1, 2)
_PER_GAP = 8
_NEAR = 64
_LEAST_SCALE = 0.25  # deviations may be told up to twice too large


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def shows(self, least: float) -> bool:
        """Is it surely not 0, and at least ``least`` in size?"""
        return (self.low > 0 or self.high < 0) and abs(self.value) >= least

    def rules_out(self, most: float) -> bool:
        """Does it hold 0, and surely nothing larger than ``most``?"""
        return self.low <= 0 <= self.high and max(-self.low, self.high) <= most


def noise(x: Curve, y: Curve) -> float:
    """Standard deviation of a record about its curve, from the records beside it.

    Each record is compared with the line between those 1, 2 and 4 places before and after it; the
    largest of the three counts, so that noise which lasts over several records is seen as well.
    """
    largest = 0.0
    for lag in _LAGS:
        if len(y) < (2 * lag + 3 if lag > 1 else 3):
            break
        before, here, after = slice(None, -2 * lag), slice(lag, -lag), slice(2 * lag, None)
        part = (x[here] - x[before]) / (x[after] - x[before])
        off = y[here] - (1 - part) * y[before] - part * y[after]
        largest = max(largest, float(np.sqrt(np.mean(off**2 / (1 + part**2 + (1 - part) ** 2)))))
    return largest


def change(x: Curve, y: Curve) -> Interval:
    """Change of a curve from the first to the last ``x`` by Theil and Sen's slope (Sen 1968).

    At most 24 medians of neighbouring records enter; the interval is widened by the
    autocorrelation that the records have about the line.
    """
    x, y = _binned(x), _binned(y)
    span = x[-1] - x[0]
    slope, low, high = theil_sen(x, y, CONFIDENCE)
    wide = _widening(y - slope * x)
    return Interval(
        float(slope * span),
        float((slope - wide * (slope - low)) * span),
        float((slope + wide * (high - slope)) * span),
    )


def level(y: Curve, probe: float) -> Interval:
    """Mean of a flat stretch.

    Args:
        y: the stretch.
        probe: half the 95 % interval over the probe's sequences, which all records share.

    The spread over time is that of the means of 4 batches, which autocorrelation leaves valid.
    """
    batches = np.array([part.mean() for part in np.array_split(y, _BATCHES)])
    middle = float(y.mean())
    error = float(batches.std(ddof=1)) / np.sqrt(len(batches))
    half = float(np.hypot(two_sided_t(len(batches) - 1) * error, probe))
    return Interval(middle, middle - half, middle + half)


def deviations(y: Curve, floor: float, top: float, quiet: float, lively: float) -> Curve:
    """Standard deviation of each record of a rise, which is seldom the same below and above.

    Args:
        y: values, the floor first.
        floor: level of the floor.
        top: level after the rise.
        quiet: standard deviation on the floor; at least a hundredth of the rise is taken.
        lively: standard deviation after the rise.
    """
    quiet = max(quiet, (top - floor) / 100)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(y, 1, mode="edge"), 3).max(-1)
    part = np.clip((around - floor) / (top - floor), 0, 1)
    return np.asarray(np.sqrt(quiet**2 + part * max(0.0, lively**2 - quiet**2)))


def leaves_floor(x: Curve, y: Curve, deviation: Curve) -> Interval:
    """Where a curve leaves its floor: ``c`` up to ``t``, then ``c + u^p (a + b u)``, u = x - t.

    All ``t`` of a grid are tried, with ``p`` of 1 and 2 and without ``b``. The interval holds the
    ``t`` whose best fit is at 95 % not worse than the best of all by the F distribution, widened by
    the autocorrelation about that fit. Where a single record shows the rise, nothing tells one
    ``t`` from another in the gap before it, and the interval is that gap.

    Args:
        x: steps, the floor first.
        y: values up to about a third of the rise: further on the shape would have to be known.
        deviation: of each value, as `deviations` tells it.
    """
    x, y, weight = x[-_NEAR:], y[-_NEAR:], 1 / deviation[-_NEAR:]
    gaps = np.diff(x)[:, None] * np.arange(_PER_GAP) / _PER_GAP
    starts = (x[:-1, None] + gaps).ravel()
    ahead = np.clip((x - starts[:, None]) / (x[-1] - x[0]), 0, None)
    off = _less_floor(y, weight)
    errors, fits = np.full(len(starts), np.inf), np.zeros_like(ahead)
    for power in _POWERS:
        for fitted, rises in _rising_fits(ahead**power, ahead ** (power + 1), off, weight):
            error = np.where(rises, np.square(off - fitted).sum(-1), np.inf)
            better = error < errors
            errors[better], fits[better] = error[better], fitted[better]
    free = max(1, len(x) - 5)
    least, exact = errors.min(), 1e-12 * float(off @ off)
    wide = _widening(off - fits[errors.argmin()]) ** 2 if least > exact else 1.0
    scale = max(_LEAST_SCALE, least / free)
    good = np.nonzero(errors <= least + scale * wide * two_sided_t(free) ** 2 + exact)[0]
    ends = np.append(starts[1:], x[-1])
    middle = starts[errors <= least + exact]
    return Interval(float(middle.mean()), float(starts[max(0, good[0] - 1)]), float(ends[good[-1]]))


def steps_down(x: Curve, y: Curve, probe: float) -> tuple[Interval, Interval]:
    """Where a curve drops, and by how much, if it is flat before and after.

    Args:
        x: steps.
        y: values, the drop among them.
        probe: half the 95 % interval over the probe's sequences.

    Returns:
        the drop's place, from the last record before to the first after it; and its size.
    """
    cuts = np.arange(2, len(y) - 1)
    errors = np.array([y[:cut].var() * cut + y[cut:].var() * (len(y) - cut) for cut in cuts])
    free = max(1, len(y) - 3)
    good = cuts[errors <= errors.min() * (1 + two_sided_t(free) ** 2 / free) + 1e-15]
    cut = int(cuts[errors.argmin()])
    before, after = y[:cut], y[cut:]
    residual = np.concatenate([before - before.mean(), after - after.mean()])
    error = float(np.sqrt(errors.min() / free * (1 / len(before) + 1 / len(after))))
    half = float(np.hypot(two_sided_t(free) * error * _widening(residual), probe))
    size = float(before.mean() - after.mean())
    place = Interval(float(x[cut]), float(x[good[0] - 1]), float(x[good[-1]]))
    return place, Interval(size, size - half, size + half)


def beyond_noise(looks: int, records: int) -> float:
    """How many standard deviations noise alone exceeds in one of 20 runs.

    Args:
        looks: comparisons made over the run.
        records: from which the noise was estimated.
    """
    return student_t((1 - CONFIDENCE) / (2 * max(1, looks)), max(2, records // 2))


def _less_floor(values: Curve, weight: Curve) -> Curve:
    """Weighted values less their projection on a weighted constant, the floor."""
    mean = (values * weight**2).sum(-1, keepdims=True) / np.square(weight).sum()
    return np.asarray((values - mean) * weight)


def _rising_fits(
    first: Curve, second: Curve, off: Curve, weight: Curve
) -> list[tuple[Curve, NDArray[np.bool]]]:
    """Least squares on the first regressor and on both, a row each: the fit, and does it rise."""
    first, second = _less_floor(first, weight), _less_floor(second, weight)
    one, two, both = (np.square(first).sum(-1), np.square(second).sum(-1), (first * second).sum(-1))
    with_one, with_two = first @ off, second @ off
    alone = with_one / np.where(one > 0, one, 1)
    determinant = one * two - both**2
    apart = determinant > 1e-9 * one * two
    determinant = np.where(apart, determinant, 1)
    a = (two * with_one - both * with_two) / determinant
    b = (one * with_two - both * with_one) / determinant
    return [
        (alone[:, None] * first, alone > 0),
        (a[:, None] * first + b[:, None] * second, apart & (a > 0)),
    ]


def two_sided_t(free: int) -> float:
    """What Student's t exceeds in size in 5 % of cases, at 1 degree of freedom or more."""
    return student_t((1 - CONFIDENCE) / 2, max(1, free))


def _binned(values: Curve) -> Curve:
    if len(values) <= _BINS:
        return values
    size, longer = divmod(len(values), _BINS)  # as numpy's array_split does: the first are longer
    cut = longer * (size + 1)
    parts = values[:cut].reshape(longer, size + 1), values[cut:].reshape(-1, size)
    return np.concatenate([np.median(part, axis=-1) for part in parts])


def _widening(residual: Curve) -> float:
    """Of an interval that took the residuals for independent; a bias of short series is mended."""
    off = residual - residual.mean()
    total = float(off @ off)
    if total == 0:
        return 1.0
    count = len(off)
    lag_one = float(off[1:] @ off[:-1]) / total
    mended = min(0.9, max(0.0, lag_one + (1 + 3 * lag_one) / count))
    return float(np.sqrt((1 + mended) / (1 - mended)))
