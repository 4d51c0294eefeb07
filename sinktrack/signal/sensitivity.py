"""How much an onset depends on its definition: thresholds, heads or means, and three methods.

The fitted curve is the logistic one; its onset is where the tangent of its steepest place meets its
floor (Zwietering et al. 1990 call that the lag time).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinktrack.signal import robust
from sinktrack.signal.phases import CONSECUTIVE
from sinktrack.signal.robust import Curve
from sinktrack.signal.stages import MIN_RISE, fitted_onset, highest

METHODS = ("crossing", "change point", "fitted curve")
_PART = 0.1
"""Of the rise, that a crossing has to pass."""
_WIDTHS = 24
_STARTS = 200


@dataclass(frozen=True)
class OnsetBy:
    """An onset under one definition."""

    over: str
    """``mean``: of the share of (sequence, head) that attend to P0 by more than the threshold on
    average; ``heads``: of the share of heads that do so in half of the sequences or more."""
    threshold: float
    method: str
    """One of `METHODS`."""
    step: float | None
    """None where this curve does not rise from a floor."""


@dataclass(frozen=True)
class Sensitivity:
    """The onset under other definitions than the one that is claimed."""

    onsets: tuple[OnsetBy, ...]

    @property
    def steps(self) -> list[float]:
        """Of the definitions that find one, ascending."""
        return sorted(one.step for one in self.onsets if one.step is not None)

    def __str__(self) -> str:
        steps = self.steps
        if not steps:
            return "no other definition finds an onset"
        levels = [one.threshold for one in self.onsets]
        none = len(self.onsets) - len(steps)
        return (
            f"under {len(self.onsets)} definitions (threshold {min(levels)} to {max(levels)}, by "
            f"mean or by heads, {', '.join(METHODS)}) the onset lies between steps {steps[0]:,.0f} "
            f"and {steps[-1]:,.0f}, the middle at {float(np.median(steps)):,.0f}"
            + (f"; {none} find none" if none else "")
        )

    def table(self) -> list[str]:
        """One line for each threshold, a column for each method."""
        rows = [["threshold", *METHODS]]
        for over, threshold in dict.fromkeys((one.over, one.threshold) for one in self.onsets):
            cells = [
                "-" if one.step is None else f"{one.step:,.0f}"
                for one in self.onsets
                if (one.over, one.threshold) == (over, threshold)
            ]
            rows.append([f"{threshold} by {over}", *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]


def sensitivity(records: Sequence[Mapping[str, Any]]) -> Sensitivity:
    """The onset by every threshold that the records hold, over means and heads, by three methods.

    Args:
        records: the current ones, in step order.
    """
    onsets = []
    for over, field in (("mean", "sink_rate_by_block"), ("heads", "sink_heads")):
        levels: dict[str, None] = {}
        for record in records:
            levels.update(dict.fromkeys(record.get(field) or {}))
        for level in sorted(levels, key=float):
            x, y = _curve(records, field, level)
            onsets += [OnsetBy(over, float(level), method, step)
                      for method, step in zip(METHODS, _onsets(x, y), strict=True)]  # fmt: skip
    return Sensitivity(tuple(onsets))


def _curve(records: Sequence[Mapping[str, Any]], field: str, level: str) -> tuple[Curve, Curve]:
    """Steps, and the share over all heads, of the records that hold one."""
    x, y = [], []
    for record in records:
        by_block = (record.get(field) or {}).get(level)
        if by_block is None or record.get("measured_blocks") is not None:
            continue
        rows = record.get("p0_attention") or [None] * len(by_block)
        most = (record.get("model") or {}).get("heads") or 1
        heads = [most if row is None else sum(a is not None for a in row) for row in rows]
        known = [(v, n) for v, n in zip(by_block, heads, strict=False) if v is not None and n]
        total = sum(n for _, n in known)
        if not total:
            continue
        x.append(float(record["step"]))
        y.append(sum(v * n if field != "sink_heads" else v for v, n in known) / total)
    return np.array(x), np.array(y)


def _onsets(x: Curve, y: Curve) -> tuple[float | None, float | None, float | None]:
    """By each of `METHODS`; None of all where the curve does not leave a floor."""
    left = _leaves(x, y)
    if left is None:
        return None, None, None
    floor, top = float(np.median(y[:left])), highest(y[left:])
    if not top > floor:
        return None, None, None
    over = y > floor + _PART * (top - floor)
    lasting = np.convolve(over, np.ones(CONSECUTIVE), "valid") == CONSECUTIVE
    crossing = None
    if lasting.any() and (i := int(lasting.argmax())) > 0:
        level = floor + _PART * (top - floor)
        crossing = float(np.interp(level, sorted(y[i - 1 : i + 1]), x[i - 1 : i + 1]))
    change = fitted_onset(x, y, left, floor).value
    peak = left + int(np.argmax(y[left:]))
    return crossing, change, _logistic(x[: peak + 1], y[: peak + 1])


def _leaves(x: Curve, y: Curve) -> int | None:
    """Index of the first of 3 records in a row that are above the floor by more than noise."""
    for i in range(CONSECUTIVE, len(y) - CONSECUTIVE + 1):
        floor = float(np.median(y[:i]))
        needed = max(MIN_RISE, CONSECUTIVE * robust.noise(x[:i], y[:i]))
        if (y[i : i + CONSECUTIVE] > floor + needed).all():
            return i
    return None


def _logistic(x: Curve, y: Curve) -> float | None:
    """Middle less twice the width of the logistic curve that fits best."""
    middles = np.linspace(x[0], x[-1], _STARTS)[:, None, None]
    widths = ((x[-1] - x[0]) * np.geomspace(1e-3, 0.5, _WIDTHS))[:, None]
    shape = 1 / (1 + np.exp(np.clip((middles - x) / widths, -60, 60)))
    centred, off = shape - shape.mean(-1, keepdims=True), y - y.mean()
    size = np.square(centred).sum(-1)
    height = np.where(size > 1e-12, centred @ off / np.where(size > 1e-12, size, 1), 0)
    error = np.square(off - height[..., None] * centred).sum(-1)
    error = np.where(height > 0, error, np.inf)
    if not np.isfinite(error).any():
        return None
    i, j = np.unravel_index(int(error.argmin()), error.shape)
    return float(max(x[0], middles[i, 0, 0] - 2 * widths[j, 0]))
