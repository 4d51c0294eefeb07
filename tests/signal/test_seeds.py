"""Ten seeds of the demo's model at two learning rates, from scripts/real_runs.py --seeds."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from sinktrack import Run
from sinktrack.signal import compare
from sinktrack.signal.compare import Comparison
from sinktrack.signal.loss import read_losses
from tests.helpers.paths import DATA

SEEDS = DATA / "seeds"
RATES = ("lr0.005", "lr0.01")


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {path.name: Run.read(path) for path in sorted(SEEDS.iterdir())}


@pytest.fixture(scope="module")
def found(runs: dict[str, Run]) -> Comparison:
    losses = {name: read_losses(run.directory / "loss.csv") for name, run in runs.items()}
    settings = {name: name.split("-")[1] for name in runs}
    scores = {name: losses[name][max(losses[name])] for name in runs}
    return compare(runs, settings=settings, losses=losses, scores=scores)


def test_ten_seeds_of_each(runs: dict[str, Run], found: Comparison) -> None:
    assert len(runs) == 20 and found.at == 400
    assert {run.records[0]["schema"] for run in runs.values()} == {2}
    names = [one.name for one in found.runs]
    assert names[:3] == ["seed1-lr0.005", "seed1-lr0.01", "seed2-lr0.005"]
    assert names[-1] == "seed10-lr0.01"


@pytest.mark.parametrize("rate", RATES)
def test_the_spread_over_real_seeds(runs: dict[str, Run], found: Comparison, rate: str) -> None:
    """Of the records themselves, by scipy."""
    lasts = [run.records[-1] for name, run in runs.items() if name.endswith(rate)]
    rates = [one["sink_rate"] for one in lasts]
    [spread] = [one for one in found.spreads if (one.setting, one.quantity) == (rate, "sink_rate")]
    low, high = scipy.stats.t.interval(0.95, 9, np.mean(rates), scipy.stats.sem(rates))
    assert spread.interval == pytest.approx((np.mean(rates), low, high))
    assert (spread.low, spread.high, spread.runs) == (min(rates), max(rates), 10)
    halves = [np.subtract(*one["intervals"]["sink_rate"][::-1]) / 2 for one in lasts]
    assert spread.probe == pytest.approx(np.mean(halves))
    assert high - low > 2 * np.mean(halves), "seeds scatter more than sequences"


def test_settings_of_real_seeds(runs: dict[str, Run], found: Comparison) -> None:
    """The p of a permutation test, and Holm's order, against scipy and a loop."""
    p = {}
    for quantity in {one.quantity for one in found.differences}:
        groups = [
            [one.value(quantity) for one in found.runs if one.setting == rate] for rate in RATES
        ]
        p[quantity] = scipy.stats.permutation_test(
            groups, lambda a, b, axis: np.abs(a.mean(axis) - b.mean(axis)), alternative="greater",
            vectorized=True, n_resamples=20_000, rng=np.random.default_rng(1),
        ).pvalue  # fmt: skip
    assert "sink_rate" in p
    least = 0.0
    for rank, (quantity, value) in enumerate(sorted(p.items(), key=lambda one: one[1])):
        least = max(least, min(1.0, (len(p) - rank) * value))
        [one] = [one for one in found.differences if one.quantity == quantity]
        assert one.p == pytest.approx(least, abs=0.03)
    verdict = found.verdict()
    assert verdict[0].startswith("20 runs of 2 settings")
    assert ("Beyond" in verdict[0]) is any(one.claimed for one in found.differences)


def test_half_of_the_seeds_against_the_others_are_no_difference(runs: dict[str, Run]) -> None:
    """Splits of one setting's seeds: no run changes by it, and differences are seldom found."""
    of = {name: run for name, run in runs.items() if name.endswith(RATES[0])}
    draws = np.random.default_rng(0)
    claims = 0
    base = compare(of)
    for _ in range(4):
        order = draws.permutation(sorted(of))
        again = {name: "ab"[i % 2] for i, name in enumerate(order)}
        split = compare(of, settings=again)
        claims += any(one.claimed for one in split.differences)
        assert {one.name: one.onset for one in split.runs} == {
            one.name: one.onset for one in base.runs
        }
    assert claims <= 1
