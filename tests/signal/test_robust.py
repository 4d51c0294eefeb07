"""The statistics under the signal, against definitions written out and truths that are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sinktrack.signal import robust
from sinktrack.signal.robust import Interval

RNG = np.random.default_rng


def test_what_an_interval_shows() -> None:
    assert Interval(0.2, 0.1, 0.3).shows(0.2) and Interval(-0.2, -0.3, -0.1).shows(0.2)
    assert not Interval(0.2, 0.1, 0.3).shows(0.21), "too small"
    assert not Interval(0.2, 0.0, 0.4).shows(0.1), "may be none"
    assert Interval(0.0, -0.1, 0.1).rules_out(0.1) and not Interval(0.0, -0.1, 0.2).rules_out(0.1)
    assert not Interval(0.0, -0.2, 0.1).rules_out(0.1)
    assert Interval(0.0, 0.0, 0.0).rules_out(0.0)
    assert not Interval(-0.2, -0.4, 0.0).shows(0.1), "may be none"
    assert not Interval(0.05, 0.01, 0.09).rules_out(0.1), "not flat, however small"


@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(3, 60), st.integers(0, 99))
def test_a_line_has_no_noise_and_its_own_slope(a: float, b: float, count: int, seed: int) -> None:
    x = np.sort(RNG(seed).choice(10_000, count, replace=False)).astype(float)
    y = a + b * x / 1000
    assert robust.noise(x, y) <= 1e-9 * (1 + abs(a) + 10 * abs(b))
    if count <= 24:
        change = robust.change(x, y)
        wanted = b * (x[-1] - x[0]) / 1000
        assert change == pytest.approx([wanted] * 3, abs=1e-8)


@pytest.mark.parametrize(("lasting", "least", "most"), [(0, 0.9, 1.25), (3, 0.7, 1.3)])
def test_noise_is_told_about_any_smooth_curve(lasting: int, least: float, most: float) -> None:
    x = np.arange(600.0)
    curve = 40 * np.sin(x / 150)
    white = RNG(1).normal(size=600 + lasting)
    noise = sum(white[i : 600 + i] for i in range(lasting + 1)) / np.sqrt(lasting + 1)
    assert least < robust.noise(x, curve + noise) < most


def test_change_is_theil_and_sens_over_the_span() -> None:
    x = np.array([0.0, 1, 2, 3, 5, 8, 9, 12])
    y = np.array([0.0, 2, 1, 4, 4, 9, 7, 30])
    slopes = [(y[j] - y[i]) / (x[j] - x[i]) for i in range(8) for j in range(i + 1, 8)]
    found = robust.change(x, y)
    assert found.value == pytest.approx(np.median(slopes) * 12)
    plain = stats.theilslopes(y, x, alpha=0.95)
    assert found.low <= plain[2] * 12 + 1e-9 and found.high >= plain[3] * 12 - 1e-9


def test_change_of_many_records_goes_by_medians_of_neighbours() -> None:
    """Single wild records do not move it; a trend of lasting noise is not called sure."""
    x = np.arange(240.0)
    y = 0.01 * x
    y[::20] += 100
    assert robust.change(x, y).value == pytest.approx(2.3, abs=0.05)
    walk = [robust.change(x, np.cumsum(RNG(seed).normal(size=240))) for seed in range(100)]
    iid = [robust.change(x, RNG(seed).normal(size=240)) for seed in range(100)]
    assert sum(change.shows(0) for change in iid) <= 10
    assert np.mean([c.high - c.low for c in walk]) > 2 * np.mean([c.high - c.low for c in iid])


def test_a_level_by_batches() -> None:
    y = np.array([1.0, 1, 3, 3, 2, 2, 4, 4])
    batches = [1.0, 3, 2, 4]
    half = stats.t.ppf(0.975, 3) * np.std(batches, ddof=1) / 2
    assert robust.level(y, 0.0) == pytest.approx([2.5, 2.5 - half, 2.5 + half])
    wide = np.hypot(half, 0.7)
    assert robust.level(y, 0.7) == pytest.approx([2.5, 2.5 - wide, 2.5 + wide])


def test_the_spread_of_a_rise() -> None:
    """Quiet below, lively above, between them by how far it has come; a spike counts as above."""
    y = np.array([0.2, 0.2, 0.2, 0.4, 0.6, 0.6, 0.6])
    found = robust.deviations(y, floor=0.2, top=0.6, quiet=0.01, lively=0.05)
    assert found[0] == pytest.approx(0.01) and found[-1] == pytest.approx(0.05)
    assert found[2] == pytest.approx(np.sqrt(0.01**2 + 0.5 * (0.05**2 - 0.01**2)))
    assert np.all(np.diff(found) >= 0)
    least = robust.deviations(y, floor=0.2, top=0.6, quiet=0.0, lively=0.0)
    assert least == pytest.approx([0.004] * 7), "a hundredth of the rise at least"


@pytest.mark.parametrize("cut", [3, 8, 15])
def test_a_step_is_found_and_sized(cut: int) -> None:
    x = np.arange(0.0, 2000, 100)
    exact = np.where(np.arange(20) < cut, 0.7, 0.4)
    place, size = robust.steps_down(x, exact, 0.0)
    assert place == (x[cut], x[cut - 1], x[cut]) and size == pytest.approx([0.3] * 3)
    covered, ratios = [], []
    for seed in range(200):
        noisy = exact + RNG(seed).normal(0, 0.02, 20)
        place, size = robust.steps_down(x, noisy, 0.0)
        covered.append(size.low <= 0.3 <= size.high)
        two = stats.ttest_ind(noisy[:cut], noisy[cut:]).confidence_interval()
        if place.value == x[cut]:  # as wide as for a known place, and more where noise lasts
            assert 0.99 * (two.high - two.low) <= size.high - size.low <= 4 * (two.high - two.low)
            ratios.append((size.high - size.low) / (two.high - two.low))
        assert place.low < x[cut] <= place.high
    assert 0.9 < np.mean(covered) <= 1 and np.median(ratios) < 1.3
    _, wide = robust.steps_down(x, exact, 0.1)
    assert wide == pytest.approx([0.3, 0.2, 0.4])


def test_noise_alone_seldom_looks_like_a_drop() -> None:
    """In about one of 20 runs the largest of many comparisons exceeds what is asked for."""
    looks, exceeded = 45, 0
    limit = robust.beyond_noise(looks, 10_000)
    for seed in range(400):
        exceeded += RNG(seed).normal(size=looks).max() > limit
    assert 0.005 < exceeded / 400 < 0.08
    assert robust.beyond_noise(looks, 8) > limit, "noise that is hardly known asks for more"
    assert robust.beyond_noise(1, 10_000) < limit


def test_where_a_curve_leaves_its_floor() -> None:
    x = np.arange(0.0, 40)
    covered, width = [], []
    for seed in range(200):
        y = 0.1 + 0.02 * np.clip(x - 20.4, 0, None) + RNG(seed).normal(0, 0.01, 40)
        found = robust.leaves_floor(x, y, np.full(40, 0.01))
        covered.append(found.low <= 20.4 <= found.high)
        width.append(found.high - found.low)
        assert found.low <= found.value <= found.high
    assert np.mean(covered) > 0.9 and np.median(width) < 10
    sharp = np.where(x < 30, 0.0, 1.0)[:31]
    gap = robust.leaves_floor(x[:31], sharp, np.full(31, 0.01))
    assert gap.low <= 29 and gap.high == 30 and gap.low >= 28, (
        "the gap before the one that shows it"
    )


def widening(residual: robust.Curve) -> float:
    """Of an interval for independent residuals: Kendall's bias of short series mended."""
    off = residual - residual.mean()
    if not off.any():
        return 1.0
    lag_one = sum(off[i] * off[i + 1] for i in range(len(off) - 1)) / sum(off**2)
    mended = min(0.9, max(0.0, lag_one + (1 + 3 * lag_one) / len(off)))
    return float(np.sqrt((1 + mended) / (1 - mended)))


def leaves_floor(x: robust.Curve, y: robust.Curve, deviation: robust.Curve) -> list[float]:
    """The definition by least squares, one start and one shape after the other."""
    x, y, weight = x[-64:], y[-64:], 1 / deviation[-64:]
    floor = np.average(y, weights=weight**2)
    starts = [x[i] + (x[i + 1] - x[i]) * k / 8 for i in range(len(x) - 1) for k in range(8)]
    errors, residuals = [], []
    for start in starts:
        ahead = np.clip((x - start) / (x[-1] - x[0]), 0, None)
        found = [(np.inf, y)]
        for power in (1, 2):
            for powers in ([power], [power, power + 1]):
                design = np.stack([weight * ahead**n for n in (0, *powers)], 1)
                design[:, 0] = weight
                fitted, _, rank, _ = np.linalg.lstsq(design, weight * y, rcond=1e-9)
                if rank == len(powers) + 1 and fitted[1] > 0:
                    off = weight * y - design @ fitted
                    found.append((float(off @ off), off))
        error, residual = min(found, key=lambda one: one[0])
        errors.append(error)
        residuals.append(residual)
    total = float(np.sum((weight * (y - floor)) ** 2))
    least, free, exact = min(errors), max(1, len(x) - 5), 1e-12 * total
    wide = widening(residuals[errors.index(least)]) ** 2 if least > exact else 1.0
    most = least + max(0.25, least / free) * wide * stats.f.ppf(0.95, 1, free) + exact
    good = [i for i, error in enumerate(errors) if error <= most]
    best = [start for start, error in zip(starts, errors, strict=True) if error <= least + exact]
    return [sum(best) / len(best), starts[max(0, good[0] - 1)], [*starts[1:], x[-1]][good[-1]]]


@pytest.mark.parametrize("seed", range(12))
def test_leaving_a_floor_is_least_squares_on_a_grid(seed: int) -> None:
    """Uneven steps, unequal noise, floors of 4 to 70 records, straight and bent rises."""
    draw = RNG(seed)
    count = int(draw.integers(12, 90))
    x = np.sort(draw.choice(10 * count, count, replace=False)).astype(float)
    start = x[int(draw.integers(4, count - 6))]
    ahead = np.clip(x - start, 0, None) / (x[-1] - start)
    deviation = 0.02 * (1 + 3 * (ahead > 0) * draw.random(count))
    y = (
        0.1
        + ahead ** float(draw.choice([1, 2])) * (0.5 + ahead)
        + deviation * draw.normal(size=count)
    )
    wanted = leaves_floor(x, y, deviation)
    assert list(robust.leaves_floor(x, y, deviation)) == pytest.approx(wanted, abs=1e-9)


@given(st.integers(3, 40), st.integers(0, 999))
def test_noise_by_the_lines_between_neighbours(count: int, seed: int) -> None:
    draw = RNG(seed)
    x = np.sort(draw.choice(10_000, count, replace=False)).astype(float)
    y = draw.normal(size=count)
    found = [0.0]
    for lag in (1, 2, 4):
        if lag > 1 and count < 2 * lag + 3:
            break
        off = []
        for i in range(lag, count - lag):
            part = (x[i] - x[i - lag]) / (x[i + lag] - x[i - lag])
            line = (1 - part) * y[i - lag] + part * y[i + lag]
            off.append((y[i] - line) ** 2 / (1 + part**2 + (1 - part) ** 2))
        found.append(np.sqrt(np.mean(off)))
    assert robust.noise(x, y) == pytest.approx(max(found))
    assert robust.noise(x[:2], y[:2]) == 0.0


@pytest.mark.parametrize("count", [2, 23, 24, 25, 47, 48, 49, 240, 1000])
def test_change_of_bins_as_numpy_splits_them(count: int) -> None:
    draw = RNG(count)
    x = np.sort(draw.choice(10 * count, count, replace=False)).astype(float)
    y = draw.normal(size=count).cumsum()
    parts = min(count, 24)
    bx, by = (np.array([np.median(part) for part in np.array_split(v, parts)]) for v in (x, y))
    slope, _, low, high = stats.theilslopes(by, bx, alpha=0.95)
    span, wide = bx[-1] - bx[0], widening(by - slope * bx)
    wanted = [slope * span, (slope - wide * (slope - low)) * span]
    wanted.append((slope + wide * (high - slope)) * span)
    assert list(robust.change(x, y)) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(6))
def test_a_step_down_is_the_best_of_all_cuts(seed: int) -> None:
    draw = RNG(seed)
    count = int(draw.integers(6, 25))
    x = np.sort(draw.choice(1000, count, replace=False)).astype(float)
    y = np.where(np.arange(count) < draw.integers(2, count - 2), 1.0, 0.6)
    y += 0.1 * draw.normal(size=count)
    errors = {}
    for cut in range(2, count - 1):
        halves = y[:cut], y[cut:]
        errors[cut] = sum(float(((half - half.mean()) ** 2).sum()) for half in halves)
    cut = min(errors, key=lambda one: errors[one])
    free = max(1, count - 3)
    most = errors[cut] * (1 + stats.f.ppf(0.95, 1, free) / free)
    good = [one for one, error in errors.items() if error <= most + 1e-15]
    place, size = robust.steps_down(x, y, 0.03)
    assert place == (x[cut], x[good[0] - 1], x[good[-1]])
    residual = np.concatenate([y[:cut] - y[:cut].mean(), y[cut:] - y[cut:].mean()])
    error = np.sqrt(errors[cut] / free * (1 / cut + 1 / (count - cut)))
    half = np.hypot(stats.t.isf(0.025, free) * error * widening(residual), 0.03)
    middle = y[:cut].mean() - y[cut:].mean()
    assert size == pytest.approx((middle, middle - half, middle + half))


def test_how_far_noise_goes_in_many_looks() -> None:
    assert robust.beyond_noise(1, 40) == pytest.approx(stats.t.isf(0.025, 20))
    assert robust.beyond_noise(100, 40) == pytest.approx(stats.t.isf(0.00025, 20))
    assert robust.beyond_noise(0, 3) == pytest.approx(stats.t.isf(0.025, 2))
