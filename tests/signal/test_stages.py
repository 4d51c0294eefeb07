"""The rules record by record, against the table of `docs/signal.md` written out in plain loops."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinktrack.records.lineage import current, superseded_steps
from sinktrack.signal import Stages, robust

Record = dict[str, Any]


def history(seed: int) -> list[Record]:
    """Rates, depths and shares that rise, fall, come back and wander, and records that lack one."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(40, 90))
    steps = np.sort(draw.choice(100 * count, count, replace=False))
    noise, floor = float(draw.choice([0.003, 0.02])), float(draw.choice([0.02, 0.1]))
    speed = 1.0 if seed % 2 else 0.04
    height = goal = floor if seed % 6 else 0.6
    depth, share, glitch = 2.0, 0.6, 0
    written = []
    for index, step in enumerate(steps):
        if draw.random() < 0.06 or (index == 8 and seed % 3):
            goal = floor + float(draw.uniform(0.08, 0.8) if draw.random() < 0.8 else 0)
        height += float(np.clip(goal - height, -speed, speed))
        if draw.random() < 0.06:
            depth, share = float(draw.uniform(0.5, 3)), float(draw.uniform(0.3, 1))
        glitch = 2 if draw.random() < 0.03 else max(0, glitch - 1)
        rate = float(np.clip((0.95 if glitch else height) + noise * draw.normal(), 0, 1))
        half = float(
            draw.choice([0.0, 0.2] if seed % 4 == 0 and index < 25 else [0.0, 0.005, 0.03])
        )
        shallow = bool(draw.random() < (0.05 if seed % 5 else 0.3))
        written.append(
            {
                "step": int(step),
                "tokens": 2048 * int(step),
                "source": "callback",
                "sink_rate": rate,
                "formed": rate > 0.2 or draw.random() < 0.03,
                "depth": None if shallow else depth + 0.02 * float(draw.normal()),
                "first_two_share": None if shallow else share + 0.01 * float(draw.normal()),
                "intervals": {
                    "sink_rate": [rate - half, rate + half],
                    "depth": None if shallow else [depth - 2 * half, depth + 2 * half],
                },
            }
        )
    return written


def of_three(values: Any) -> list[float]:
    return [sorted(values[i : i + 3])[1] for i in range(len(values) - 2)]


def peak(values: Any) -> float:
    return max(of_three(values))


def half(record: Record, name: str) -> float:
    low, high = record["intervals"].get(name) or (0, 0)
    return (high - low) / 2


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return round(float(value), 9) if isinstance(value, float) else value


class Rules:
    """All records again for each, none of the state that `Stages` carries along but what counts."""

    def __init__(self) -> None:
        self.seen: list[Record] = []
        self.floor: Any = None
        self.floor_records: Any = None
        self.left: Any = None
        self.settled: Any = None
        self.began, self.lost = 0, False
        self.stage: str | None = None
        self.standing: dict[str, float] = {}
        self.rows: dict[str, list[int]] = {"share": [], "depth": []}

    def curve(self, name: str, since: int) -> tuple[Any, Any]:
        rows = [
            (one["step"], one[name])
            for one in self.seen[since:]
            if one[name] is not None and (name == "sink_rate" or one["formed"])
        ]
        return np.array([x for x, _ in rows], float), np.array([y for _, y in rows], float)

    def window(self) -> int:
        steps = [one["step"] for one in self.seen]
        third = steps[-1] - (steps[-1] - steps[self.left]) / 3
        inside = [i for i, step in enumerate(steps) if step >= third]
        while len(inside) < 8 and inside[0] > self.left:
            inside.insert(0, inside[0] - 1)
        return inside[0]

    def take(self, record: Record) -> tuple[str | None, dict[str, Any], list[Any] | None]:
        self.seen.append(record)
        last, fell = self.seen[-3:], None
        if self.left is None or self.lost:
            self.rise(last)
        if self.left is not None and not self.lost:
            fell = self.sink_falls(last) or (self.settled is not None and self.circuit_moves())
        self.stage, because = self.judge()
        if self.stage == "settled" and self.settled is None:
            self.settled = len(self.seen) - 1
        return self.stage, because, fell or None

    def rise(self, last: list[Record]) -> None:
        x, y = self.curve("sink_rate", self.began)
        first = len(self.seen) == 3 or (len(y) >= 4 and self.left is None)
        if first and self.no_floor(last):
            self.left, self.floor, self.floor_records = 0, 0.0, 0
        elif len(y) >= 4:
            before = y[:-3]
            limit = np.median(before) + max(0.05, 3 * robust.noise(x[:-3], before))
            sure = [one["sink_rate"] - half(one, "sink_rate") > np.median(before) for one in last]
            if min(y[-3:]) > limit and all(sure):
                still = [value for value in before if value <= limit]
                self.floor, self.floor_records = float(np.median(still)), len(still)
                self.left, self.settled, self.lost = len(self.seen) - 3, None, False
                self.standing = {}

    def no_floor(self, last: list[Record]) -> bool:
        """A sink in the last three, and in more than half of those before."""
        before = [bool(one["formed"]) for one in self.seen[:-3]]
        mostly = not before or before.count(True) > before.count(False)
        return mostly and all(one["formed"] for one in last)

    def sink_falls(self, last: list[Record]) -> list[Any] | None:
        x, y = self.curve("sink_rate", self.left)
        rise = peak(y) - self.floor
        near = max(0.05, rise / 10)
        if rise > 2 * near and max(y[-3:]) < self.floor + near:
            self.lost, self.began = True, len(self.seen) - 3
        return self.falls("sink_rate", x, y, rise / 10)

    def circuit_moves(self) -> list[Any] | None:
        for name, sign, least in (("first_two_share", 1, 0.05), ("depth", -1, 0.25)):
            x, y = self.curve(name, self.settled - 7)
            if self.seen[-1]["formed"] and self.seen[-1][name] is not None:
                fell = self.falls(name, x, sign * y, least)
                if fell:
                    return fell
        return None

    def falls(self, name: str, x: Any, y: Any, least: float) -> list[Any] | None:
        if name in self.standing:
            if min(y[-3:]) > peak(y) - self.standing[name] / 2:
                del self.standing[name]
            return None
        if len(y) < 8:
            return None
        medians = of_three(y)
        sigma = robust.noise(x[:-3], y[:-3])
        looks = len(list(combinations(medians, 2)))
        probe = max(half(one, name) for one in self.seen[-19:])
        by_chance = sigma * np.sqrt(2 * 0.449) * robust.beyond_noise(looks, len(y) - 3)
        needed = max(least, probe, by_chance)
        if max(medians[:-3]) - medians[-1] < needed:
            return None
        place, size = robust.steps_down(x[-19:], y[-19:], probe)
        self.standing[name] = size.value
        return [name, self.seen[-1]["step"], *place, *size, sigma, needed]

    def judge(self) -> tuple[str | None, dict[str, Any]]:
        rate = self.seen[-1]["sink_rate"]
        if self.left is None:
            return None if len(self.seen) < 4 else "absent", {"sink_rate": rate}
        rise = peak(self.curve("sink_rate", self.left)[1]) - self.floor
        change = {}
        for name in ("sink_rate", "first_two_share", "depth"):
            x, y = self.curve(name, self.window())
            change[name] = robust.change(x, y) if len(y) >= 8 else None
        because = {
            "sink_rate": rate,
            "floor": self.floor,
            "rise": rise,
            "window": self.seen[self.window()]["step"],
            "change": {name: one and list(one) for name, one in change.items()},
            "standing": sorted(self.standing),
        }
        of_rate, share, depth = change.values()
        for name, one, least in (("share", share, 0.05), ("depth", depth, 0.25)):
            moves = one is not None and one.shows(least)
            self.rows[name].append(0 if one is None or not moves else 1 if one.value > 0 else -1)
        before = self.stage
        if self.lost:
            return "lost", because
        if self.standing:
            return "displaced", because
        if any(abs(sum(row[-5:])) == 5 for row in self.rows.values()):
            return "migrating", because
        if of_rate and of_rate.rules_out(rise / 10):
            return "settled", because
        trending = of_rate is not None and of_rate.shows(rise / 10)
        if self.settled is not None and before != "emerging" and not trending:
            return "settled", because
        return "emerging", because

    def onset(self) -> list[float] | None:
        """`robust.leaves_floor` of all records up to a third of the rise."""
        if self.left is None or self.lost or self.floor_records < 3:
            return None
        x, y = self.curve("sink_rate", self.began)
        first = self.left - self.began
        top = peak(y[first:])
        third = [i for i in range(first, len(y)) if y[i] >= self.floor + (top - self.floor) / 3]
        end = max(first + 1, third[0]) + 1
        quiet = 1.4826 * np.median([abs(value - self.floor) for value in y[:first]])
        lively = robust.noise(x[first:], y[first:])
        deviation = robust.deviations(y, self.floor, top, quiet, lively)
        return list(robust.leaves_floor(x[:end], y[:end], deviation[:end]))

    def top(self) -> list[float]:
        """The same seen from the end, from the last record that is surely off the level."""
        x, y = self.curve("sink_rate", self.began)
        window = max(0, self.window() - self.began)
        level, quiet = np.mean(y[window:]), robust.noise(x[window:], y[window:])
        sure = max(3 * quiet, 0.1 * (max(y) - min(y)))
        lasting = of_three(y - level)[: window + 1]
        far = [i for i, value in enumerate(lasting) if abs(value) > sure]
        if not far:
            return [x[0]] * 3
        sign = np.sign(lasting[far[-1]])
        away = sign * (y - level)
        other_side = [i for i in range(far[-1]) if sign * lasting[i] <= 0]
        height = peak(away[(other_side or [0])[-1] : far[-1] + 3])
        start = max(i for i in range(far[-1] + 3) if away[i] >= height / 3)
        deviation = np.full(len(y) - start, max(quiet, height / 100))
        value, low, high = robust.leaves_floor(-x[start:][::-1], away[start:][::-1], deviation)
        return [-value, -high, -low]

    def level(self) -> list[float]:
        inside = self.seen[self.window() :]
        probe = float(np.median([half(one, "sink_rate") for one in inside]))
        return list(robust.level(np.array([one["sink_rate"] for one in inside]), probe))


@pytest.mark.parametrize("seed", range(32))
def test_every_record_is_judged_by_the_rules(seed: int) -> None:
    written = history(seed)
    rules, stages = Rules(), Stages()
    for index, record in enumerate(written):
        stage, because, fell = rules.take(record)
        found = stages.add(record)
        assert (found.step, found.stage) == (record["step"], stage)
        assert rounded(found.because) == rounded(because)
        one = found.regression
        assert rounded(fell) == rounded(
            one and [one.quantity, one.detected, *one.since, *one.size, one.noise, one.needed]
        )
        if index % 3 == 0 or fell:
            assert rounded(stages.onset()) == rounded(rules.onset())
        if stage == "settled":
            assert list(stages.top()) == pytest.approx(rules.top(), abs=1e-6)
            assert list(stages.level()) == pytest.approx(rules.level())
    assert Stages.of(written).found == stages.found


def test_the_histories_hold_what_the_rules_name() -> None:
    found = [one for seed in range(32) for one in Stages.of(history(seed)).found]
    names = {None, "absent", "emerging", "migrating", "settled", "displaced", "lost"}
    assert {one.stage for one in found} == names
    fell = {one.regression.quantity for one in found if one.regression is not None}
    assert fell == {"sink_rate", "first_two_share", "depth"}


SOURCES = st.sampled_from(["callback", "callback", "checkpoint-1", ""])


@given(st.lists(st.tuples(st.integers(0, 9), SOURCES), max_size=20))
def test_what_training_left_behind(places: list[tuple[int, str]]) -> None:
    """A callback's record that it wrote another before, later on, unless a newer one took over."""
    gone = set()
    for index, (step, source) in enumerate(places):
        after = places[index + 1 :]
        replaced = any(later == step for later, _ in after)
        restarted = any(later < step and by == "callback" for later, by in after)
        if source == "callback" and restarted and not replaced:
            gone.add(step)
    assert superseded_steps(places) == gone
    (plain,) = history(0)[:1]
    written = [plain | {"step": step, "source": source or None, "at": index}
               for index, (step, source) in enumerate(places)]  # fmt: skip
    newest = {one["step"]: one for one in written if one["step"] not in gone}
    assert current(written) == [newest[step] for step in sorted(newest)]
    stages = Stages(partial=2)
    for record in written:
        stages.add(record)
    assert stages.abandoned == gone and stages.partial == 2
    assert [point.step for point in stages.points] == sorted(newest)


def test_records_that_say_less() -> None:
    """No intervals, no source, no tokens; and none but those of the first blocks."""
    written = history(1)
    bare = [
        {name: one[name] for name in ("step", "sink_rate", "formed", "depth", "first_two_share")}
        for one in written
    ]
    none = [one | {"intervals": {}} for one in written]
    assert [f.because for f in Stages.of(bare).found] == [f.because for f in Stages.of(none).found]
    partial = Stages.of([one | {"sink_rate": None} for one in written])
    assert partial.partial == len(written) and partial.stage is None and not partial.points


def levels(*parts: tuple[int, float]) -> list[Record]:
    """So many records at each of these rates, with hardly any noise."""
    rates = [rate for count, rate in parts for _ in range(count)]
    draw = np.random.default_rng(4)
    return [
        {
            "step": 100 * index,
            "sink_rate": rate + 0.002 * float(draw.normal()),
            "formed": rate > 0.2,
            "depth": None,
            "first_two_share": None,
        }
        for index, rate in enumerate(rates)
    ]


@pytest.mark.parametrize(("back", "good"), [(0.53, True), (0.47, False)])
def test_a_fall_is_made_good_above_half_of_it(back: float, good: bool) -> None:
    stages = Stages.of(levels((20, 0.1), (20, 0.7), (20, 0.3), (4, back)))
    assert stages.found[59].stage == "displaced"
    assert (stages.stage == "displaced") != good and bool(stages.standing) != good


@pytest.mark.parametrize(("rate", "lost"), [(0.15, True), (0.17, False)])
def test_lost_is_within_a_tenth_of_the_rise(rate: float, lost: bool) -> None:
    stages = Stages.of(levels((20, 0.1), (20, 0.7), (3, rate)))
    assert stages.lost == lost and (stages.stage == "lost") == lost


@pytest.mark.parametrize(("height", "lost"), [(0.115, True), (0.095, False)])
def test_lost_only_after_a_rise_of_twice_five_points(height: float, lost: bool) -> None:
    assert Stages.of(levels((20, 0.1), (20, 0.1 + height), (3, 0.1))).lost == lost


@pytest.mark.parametrize(("slope", "stage"), [(0.004, "emerging"), (0.0015, "settled")])
def test_a_settled_rate_that_surely_trends_again_is_not_settled(slope: float, stage: str) -> None:
    """A tenth of the rise over the last third of the steps counts."""
    climb = ((1, 0.5 + slope * index) for index in range(30))
    stages = Stages.of(levels((20, 0.1), (30, 0.5), *climb))
    assert stages.found[49].stage == "settled" and stages.stage == stage
