"""Runs side by side: against scipy, against known truth, and through the command."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from sinktrack import RecordError, Run
from sinktrack.signal import compare
from sinktrack.signal.compare import LEAST_RUNS, _holm, _permuted, _rank_interval
from tests.helpers.commands import sinktrack
from tests.helpers.paths import DATA
from tests.helpers.synthetic import synthetic_records

RUNS = DATA / "runs"


def a_run(level: float, onset: int = 1000, noise: float = 0.01, seed: int = 0) -> list[Any]:
    """Sink rates that rise over 500 steps from ``onset`` to ``level``."""
    draws = np.random.default_rng(seed)
    records = synthetic_records(steps=range(0, 4000, 100))
    for record in records:
        part = min(1.0, max(0.0, (record["step"] - onset) / 500))
        rate = record["sink_rate"] = 0.02 + part * level + noise * float(draws.normal())
        record["formed"] = part > 0.5
        record["intervals"] = {"sink_rate": [rate - 0.01, rate + 0.01]}
    return records


def test_spread_over_seeds_is_students() -> None:
    levels = [0.5, 0.52, 0.55, 0.56, 0.61, 0.64]
    found = compare({str(i): a_run(x, 800 + 50 * i, seed=i) for i, x in enumerate(levels)})
    by = {one.quantity: one for one in found.spreads}
    rates = [one.sink_rate for one in found.runs if one.sink_rate is not None]
    assert found.at == 3900 and len(rates) == 6
    low, high = scipy.stats.t.interval(0.95, 5, np.mean(rates), scipy.stats.sem(rates))
    assert by["sink_rate"].interval == pytest.approx((np.mean(rates), low, high))
    assert by["sink_rate"].probe == pytest.approx(0.01)
    intervals = [one.onset for one in found.runs if one.onset is not None]
    onsets = [one.value for one in intervals]
    assert by["onset"].mean == pytest.approx(np.mean(onsets)) and by["onset"].without == 0
    truth = [800 + 50 * i for i in range(6)]
    assert sum(o.low <= t <= o.high for o, t in zip(intervals, truth, strict=True)) > 4
    assert found.differences == () and found.predictions == ()
    assert found.verdict()[0] == "6 runs of 1 setting." and "onset" in found.verdict()[1]


def test_settings_are_told_apart_where_they_differ() -> None:
    runs = {f"{s}{i}": a_run(x + 0.02 * i, seed=i) for s, x in (("a", 0.3), ("b", 0.6))
            for i in range(5)}  # fmt: skip
    found = compare(runs, settings={name: name[0] for name in runs})
    one = next(d for d in found.differences if d.quantity == "sink_rate")
    firsts, seconds = (
        [r.sink_rate for r in found.runs if r.setting == setting and r.sink_rate is not None]
        for setting in "ab"
    )
    welch = scipy.stats.ttest_ind(seconds, firsts, equal_var=False)
    assert one.value.value == pytest.approx(np.mean(seconds) - np.mean(firsts))
    free = welch.df
    half = scipy.stats.t.isf(0.025, math.floor(free)) * one.value.value / welch.statistic
    assert one.value.high - one.value.value == pytest.approx(half)
    assert one.claimed and one.p == pytest.approx(2 / 252 * len(found.differences))
    assert "beyond what seeds explain" in str(found)
    assert found.verdict()[0].startswith(
        "10 runs of 2 settings. Beyond what seeds explain: sink rate (b less a: +30."
    )
    assert [line.split(":")[0] for line in found.verdict()[1:]] == ["a", "b"]
    third = {f"c{i}": a_run(0.9 + 0.01 * i, seed=i) for i in range(5)}
    more = compare(runs | third, settings={name: name[0] for name in runs | third})
    assert "on so few runs cannot tell settings apart" in more.verdict()[0]


def test_no_claim_below_five_seeds_a_side() -> None:
    runs = {f"{s}{i}": a_run(x) for s, x in (("a", 0.3), ("b", 0.6)) for i in range(4 + (s == "a"))}
    found = compare(runs, settings={name: name[0] for name in runs})
    assert found.differences == () and any("b has 4" in said for said in found.missing)
    assert not any(one.interval for one in found.spreads if one.setting == "b")


def test_a_quantity_that_some_runs_lack_is_not_compared() -> None:
    runs = {f"{s}{i}": a_run(0.5, seed=i) for s in "ab" for i in range(5)}
    runs["b4"] = synthetic_records(steps=range(0, 4000, 100), formed=False)
    found = compare(runs, settings={name: name[0] for name in runs})
    assert "onset" not in {one.quantity for one in found.differences}
    assert any("onset, which 1 run does not have" in said for said in found.missing)


@pytest.mark.parametrize("sizes", [(5, 5), (6, 9)])
def test_permutation_is_scipys(sizes: tuple[int, int]) -> None:
    draws = np.random.default_rng(1)
    one, other = draws.normal(size=sizes[0]), draws.normal(0.8, size=sizes[1])
    wanted = scipy.stats.permutation_test(
        (one, other), lambda a, b, axis: np.abs(a.mean(axis) - b.mean(axis)),
        alternative="greater", vectorized=True, n_resamples=10_000,
    ).pvalue  # fmt: skip
    assert _permuted(one, other) == pytest.approx(wanted)


def test_holm() -> None:
    assert _holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert _holm([]) == []


def test_chance_is_seldom_taken_for_a_difference() -> None:
    draws = np.random.default_rng(0)
    claims = 0
    for _ in range(400):
        tests = [_permuted(draws.normal(size=6), draws.normal(size=6)) for _ in range(4)]
        claims += min(_holm(tests)) <= 0.05
    assert claims / 400 <= 0.07


def test_rank_correlations_hold_the_truth() -> None:
    """Of normal pairs with correlation r Spearman's is 6/pi asin(r/2)."""
    draws = np.random.default_rng(0)
    for r in (0.0, 0.5, 0.8):
        truth, held = 6 / math.pi * math.asin(r / 2), 0
        for _ in range(400):
            x = draws.normal(size=20)
            y = r * x + math.sqrt(1 - r * r) * draws.normal(size=20)
            one, other = scipy.stats.rankdata(x), scipy.stats.rankdata(y)
            found = _rank_interval(one, other, 0)
            assert found.value == pytest.approx(scipy.stats.spearmanr(x, y)[0])
            held += found.low <= truth <= found.high
        assert 0.9 <= held / 400 <= 0.99


def test_outcomes_beside_the_loss() -> None:
    """The sink follows the loss, and so does the outcome: beyond the loss nothing is left."""
    draws = np.random.default_rng(3)
    runs, scores, losses = {}, {}, {}
    for i in range(24):
        skill = float(draws.normal())
        name = f"r{i}"
        runs[name] = a_run(0.5 + 0.05 * skill + 0.005 * float(draws.normal()), noise=0, seed=i)
        losses[name] = {step: 3 - 0.2 * skill - step / 4000 for step in range(0, 4000, 50)}
        scores[name] = skill + 0.1 * float(draws.normal())
    found = compare(runs, scores=scores, losses=losses)
    last = [one for one in found.predictions if one.quantity == "sink_rate"][-1]
    assert last.runs == 24 and last.at == found.at and last.correlation.low > 0.7
    assert last.beyond_loss is not None and last.beyond_loss.low < 0.3
    few = dict(list(scores.items())[: LEAST_RUNS - 1])
    assert compare(runs, scores=few).predictions == ()
    assert any("10 are wanted" in said for said in compare(runs, scores=few).missing)


def test_aligned_by_tokens_and_by_loss() -> None:
    runs = {"fast": a_run(0.5, noise=0), "slow": a_run(0.5, noise=0)}
    for record in runs["slow"]:
        record["tokens"] //= 2
    by_tokens = compare(runs, axis="tokens")
    fast, slow = by_tokens.runs
    assert fast.onset and slow.onset and by_tokens.at == 3900 * 1024
    assert fast.onset.value == pytest.approx(2 * slow.onset.value)
    losses = {name: {step: 4 - step / 2000 for step in range(0, 4000, 10)} for name in runs}
    by_loss = compare(runs, losses=losses, axis="loss")
    assert by_loss.at == pytest.approx(4 - 3900 / 2000)
    one = by_loss.runs[0].onset
    assert one and one.value == pytest.approx(4 - 1000 / 2000, abs=0.05)
    with pytest.raises(RecordError, match="slow want"):
        compare(runs, losses={"fast": losses["fast"]}, axis="loss")


def test_what_cannot_be_compared() -> None:
    other = a_run(0.5)
    for record in other:
        record["probe"] = "0" * 32
    with pytest.raises(RecordError, match="different probes"):
        compare({"one": a_run(0.5), "two": other})
    with pytest.raises(RecordError, match="a setting of three"):
        compare({"one": a_run(0.5)}, settings={"three": "x"})
    empty: list[Any] = []
    assert compare({"one": a_run(0.5), "none": empty}).at == 3900
    assert "none: no record" in str(compare({"one": a_run(0.5), "none": empty}))


def test_the_command(tmp_path: Path) -> None:
    names = [f"seed{i}-lr{lr}" for lr in ("0.01", "0.005") for i in (1, 2)]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["run", "setting"], *([n, n[-4:]] for n in names)])
    command = ("compare", *(RUNS / name for name in names), "--table", tmp_path / "table.csv")
    told = sinktrack(*command)
    assert told.returncode == 0, told.stderr
    assert all(name in told.stdout for name in names)
    assert "5 runs of each are wanted" in told.stdout
    found = json.loads(sinktrack(*command, "--json").stdout)
    direct = compare(
        {name: Run.read(RUNS / name) for name in names},
        settings={name: name[-4:] for name in names},
    )
    assert found == json.loads(json.dumps(direct.to_json()))
    (tmp_path / "table.csv").write_text("name,setting\na,b\n")
    wrong = sinktrack(*command)
    assert wrong.returncode == 2 and "the columns" in wrong.stderr
