"""The page of many runs, the page on a phone, and its tooltips; one browser, few pages."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sinktrack.errors import RecordError
from sinktrack.records.thinned import evenly
from sinktrack.signal import analyze, timeline
from sinktrack.text import natural
from sinktrack.views.report import page, write_report
from sinktrack.views.story import asides, story
from tests.helpers.records import serial_record
from tests.helpers.synthetic import synthetic_records

pytest.importorskip("plotly")

STEPS = range(0, 2000, 100)
WIDTHS = {"phone": 390, "laptop": 1024}


def seeds(count: int = 12, steps: range = STEPS) -> dict[str, list[dict[str, Any]]]:
    """Runs of two settings, in the order in which a shell names them; the last is wild."""
    runs = {}
    for i in range(1, count + 1):
        records = synthetic_records(steps=steps)
        for record in records:
            record["sink_rate"] *= 1 - 0.02 * i
            bounds = record["intervals"]["sink_rate"]
            record["intervals"]["sink_rate"] = bounds and [
                bound * (1 - 0.02 * i) for bound in bounds
            ]
        runs[f"seed{i}-lr{0.005 if i % 2 else 0.01}"] = records
    for record in records:
        record["depth"] = record["depth"] and 1e6
    return dict(sorted(runs.items()))


@pytest.fixture(scope="module")
def twelve(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("twelve") / "report.html"
    write_report(seeds(), path)
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    opened = context.new_page()
    opened.goto(path.as_uri())
    opened.wait_for_selector("#shares .main-svg")
    yield opened
    context.close()


def traces(opened: Any, chart: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = opened.evaluate(
        """chart => document.getElementById(chart).data.map(
            ({x, y, name, meta, line, customdata, zmax, error_x}) =>
            ({x, y, name, meta, line, customdata, zmax, error_x}))""",
        chart,
    )
    return found


def test_names_in_natural_order() -> None:
    names = ["run10", "run9", "lr5e-4", "lr0.01", "lr0.005", "b", "a10b2", "a10b1", "a9", ""]
    wanted = ["", "a9", "a10b1", "a10b2", "b", "lr5e-4", "lr0.005", "lr0.01", "run9", "run10"]
    for seed in range(20):
        shuffled = random.Random(seed).sample(names, len(names))
        assert sorted(shuffled, key=natural) == wanted


def test_twelve_runs_are_two_settings(twelve: Any) -> None:
    assert twelve.text_content("h1") == "12 runs"
    rows = [row.split("\t") for row in twelve.locator("#compared tbody tr").all_inner_texts()]
    assert [row[0].strip() for row in rows] == sorted(seeds(), key=natural)
    assert [row[1] for row in rows[:3]] == ["lr0.005", "lr0.01", "lr0.005"]
    onset = analyze(seeds()["seed1-lr0.005"]).onset
    assert onset is not None
    assert rows[0][2] == "{:,.0f} ({:,.0f} to {:,.0f})".format(*onset)
    swatches = twelve.locator("#compared .swatch").evaluate_all(
        "all => all.map(one => getComputedStyle(one).backgroundColor)"
    )
    assert len(set(swatches)) == 2 and swatches[0] == swatches[2] != swatches[1]


def test_the_band_over_seeds_is_their_range(twelve: Any) -> None:
    runs = {name: records for name, records in seeds().items() if name.endswith("0.01")}
    rates = [[record["sink_rate"] for record in records] for records in runs.values()]
    [mean] = [one for one in traces(twelve, "sink_rate") if one["name"] == "lr0.01 (6 runs)"]
    wanted = list(zip(*rates, strict=True))
    assert mean["x"] == list(STEPS)
    assert mean["y"] == pytest.approx([sum(each) / 6 for each in wanted], rel=1e-5)
    low, high = zip(*mean["customdata"], strict=True)
    assert low == pytest.approx(tuple(map(min, wanted)), rel=1e-5)
    assert high == pytest.approx(tuple(map(max, wanted)), rel=1e-5)


def test_the_band_where_records_are_missing(twelve: Any) -> None:
    """On the lines between records; where a run has none on both sides there is no band."""
    found = twelve.evaluate(
        """() => {
            const kept = runs[0].records;
            runs[0].records = kept.filter((_, i) => i % 2 === 0).map((one) => ({ ...one }));
            runs[0].records[3].sink_rate = null;
            const found = overSeeds([0, 2], "sink_rate");
            runs[0].records = kept;
            return found;
        }"""
    )
    assert found["x"][:6] == [0, 100, 200, 300, 400, 800]
    first, third = seeds()["seed1-lr0.005"], seeds()["seed3-lr0.005"]
    line = (first[0]["sink_rate"] + first[2]["sink_rate"]) / 2
    assert found["mean"][1] == pytest.approx((line + third[1]["sink_rate"]) / 2, rel=1e-5)
    assert 1900 not in found["x"]


def test_onsets_stand_on_the_strips(twelve: Any) -> None:
    points = [one for one in traces(twelve, "sink_rate") if one["name"] == "onset"]
    assert [one["y"] for one in points] == [[i] for i in range(12)]
    found = analyze(seeds()["seed1-lr0.005"]).onset
    assert found is not None and points[0]["x"] == [pytest.approx(found.value, rel=1e-5)]
    assert points[0]["error_x"]["array"] == [pytest.approx(found.high - found.value, rel=1e-4)]
    assert not twelve.evaluate("document.getElementById('sink_rate').layout.shapes").count("rect")


def test_panels_are_equal_and_their_names_apart(twelve: Any) -> None:
    sizes = twelve.evaluate(
        """() => runs.map((_, i) => {
            const full = document.getElementById("blocks")._fullLayout;
            const [x, y] = ["xaxis", "yaxis"].map((name) => full[`${name}${i ? i + 1 : ""}`]);
            return [x._length, y._length, ...x.range];
        })"""
    )
    for size in sizes:
        assert size == pytest.approx(sizes[0], rel=1e-3)
    boxes = twelve.locator("#blocks .annotation-text").evaluate_all(
        "all => all.map(one => { const {x, y, right, bottom} = one.getBoundingClientRect();"
        " return [x, y, right, bottom]; })"
    )
    assert len(boxes) == 12
    for i, (left, top, right, bottom) in enumerate(boxes):
        for x, y, end, floor in boxes[:i]:
            assert right <= x or end <= left or bottom <= y or floor <= top


def test_one_wild_run_leaves_the_axis(twelve: Any) -> None:
    low, high = twelve.evaluate("document.getElementById('localization').layout.yaxis3.range")
    assert low <= 0 and high < 5
    told = twelve.evaluate(
        "document.getElementById('localization').layout.annotations.map(({text}) => text)"
    )
    formed = sum(1 for record in synthetic_records(steps=STEPS) if record["depth"])
    assert told == [f"{formed} values beyond this axis"]


@pytest.mark.parametrize(
    ("curves", "wanted"),
    [
        ([[[1, 2, 3]]], [1, 3]),
        ([[[1, 2, 1e6, 2, 1, 2, 3]]], [0.7, 3.3]),
        ([[[1, 2, 3]], [[1, 2, 2]], [[50, 60, 70]]], [0.7, 3.3]),
        ([[[1, 2, 3]], [[50, 60, 70]]], [1, 70]),
        ([[[-9e9, -9e9, -9e9]], [[1, 2, 3]], [[1, 2, 2]]], [0.7, 3.3]),
        ([[[1, None, 3, 3]]], [1, 3]),
        ([[[2, 2, 2]]], [2, 2]),
        ([[[0, 0.01, 0, 0.02, 0.5]]], [0, 0.5]),
        ([[[4, 0.01, 0, 0.02, 0.1, 0.05]]], [-0.015, 0.115]),
        ([[[0] * 50 + [1] * 50 + [100] * 50]], [0, 100]),
    ],
)
def test_what_an_axis_must_show(twelve: Any, curves: Any, wanted: list[float]) -> None:
    found = twelve.evaluate("curves => robustRange(curves)", curves)
    assert [found["low"], found["high"]] == pytest.approx(wanted)


def test_labels_of_log_axes_do_not_touch(twelve: Any) -> None:
    for low, high in [(1, 1e9), (0.9, 1.1), (1, 2), (3, 400), (1e-5, 1), (5, 5), (1e5, 1.2e5)]:
        ticks = twelve.evaluate("([low, high]) => logTicks([low, high], 6)", [low, high])
        assert 1 <= len(ticks["tickvals"]) <= 7 or low == high
        assert len(set(ticks["ticktext"])) == len(ticks["ticktext"])
    twelve.get_by_label("log", exact=True).check()
    for chart in ("sink_rate", "norm_ratio", "localization", "number", "blocks", "first_tokens"):
        boxes = twelve.locator(f"#{chart} .xtick text").evaluate_all(
            "all => all.map(one => { const {x, y, right, bottom} = one.getBoundingClientRect();"
            " return [x, y, right, bottom]; })"
        )
        for i, (left, top, right, bottom) in enumerate(boxes):
            for x, y, end, floor in boxes[:i]:
                assert right <= x or end <= left or bottom <= y or floor <= top, chart
    twelve.get_by_label("linear", exact=True).check()


def test_every_tooltip_has_quantity_and_place(twelve: Any) -> None:
    """Those of curves and heat maps say what it is, at which step, and of which run."""
    tips = twelve.evaluate(
        """() => Object.fromEntries(
            [...document.querySelectorAll(".js-plotly-plot")].map((chart) => [chart.id, chart.data
                .filter(({hoverinfo}) => hoverinfo !== "skip")
                .flatMap(({hovertemplate}) => hovertemplate ?? null)]))"""
    )
    words = {
        "sink_rate": ("Sink rate", "Stage", "Onset"), "number": ("First tokens that make a sink",),
        "norm_ratio": ("Norm ratio",), "blocks": ("Attention to P0",),
        "heads": ("Attention to P0",), "shares": ("Share of the P0 state",),
        "first_tokens": ("Norm ratio",),
        "localization": ("First-two share", "First-two gain", "Depth", "First block"),
    }  # fmt: skip
    for chart, quantities in words.items():
        found = [tip for tip in tips[chart] if tip is not None]
        assert found, chart
        for tip in found:
            assert tip.startswith(quantities), tip
            assert "step " in tip, tip
    assert any(" blocks<extra>" in tip for tip in tips["localization"]), "the unit of depth"
    twelve.get_by_label("tokens", exact=True).check()
    tip = twelve.evaluate("document.getElementById('sink_rate').data[0].hovertemplate")
    assert "%{x:,} tokens" in tip
    twelve.get_by_label("steps", exact=True).check()


def test_curves_are_above_the_fold(browser: Any, tmp_path: Path) -> None:
    """Also below the longest story: what can wait is folded."""
    record = serial_record()
    record["rivals"] = [0.2] * len(record["rivals"])
    runs = [record | {"step": step, "sink_rate": min(0.7, step / 9)} for step in range(12)]
    told = story(runs, analyze(runs))
    write_report({"deep": runs}, tmp_path / "deep.html")
    for width, height in ((1440, 900), (1024, 768)):
        opened = browser.new_page(viewport={"width": width, "height": height})
        opened.goto((tmp_path / "deep.html").as_uri())
        opened.wait_for_selector("#shares .main-svg")
        top = opened.evaluate(
            """() => { const chart = document.getElementById("sink_rate");
                return chart.getBoundingClientRect().top + chart._fullLayout.yaxis._offset; }"""
        )
        assert top < height - 60
        lines = opened.locator("#story li, #asides li").all_text_contents()
        assert sorted(lines) == sorted(told[1:])
        assert asides(told) == opened.locator("#asides li").all_text_contents()
        opened.close()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_nothing_is_cut_off(browser: Any, tmp_path: Path, width: int) -> None:
    """No text leaves the page or its chart; what scrolls says so."""
    deep = synthetic_records()
    for name, runs in {
        "one": {"deep": [serial_record()]},
        "many": {name: deep for name in [*seeds(4), "a name that is far longer than any panel"]},
    }.items():
        write_report(runs, tmp_path / f"{name}.html")
        context = browser.new_context(viewport={"width": width, "height": 844})
        opened = context.new_page()
        opened.goto((tmp_path / f"{name}.html").as_uri())
        opened.wait_for_selector("#shares .main-svg")
        opened.wait_for_function("document.querySelector('.hint') !== null")
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        beyond = opened.evaluate(
            """() => [...document.querySelectorAll(".js-plotly-plot")].flatMap((chart) => {
                const {left, right} = chart.getBoundingClientRect();
                return [...chart.querySelectorAll("text")].filter((text) => {
                    const box = text.getBoundingClientRect();
                    return box.width && (box.left < left - 1 || box.right > right + 1);
                }).map((text) => `${chart.id}: ${text.textContent}`);
            })"""
        )
        assert beyond == []
        unsaid = opened.evaluate(
            """() => [...document.querySelectorAll(".scroll")].filter((box) => box.clientWidth &&
                (box.scrollWidth > box.clientWidth + 1) === box.previousElementSibling.hidden)
                .map((box) => box.innerHTML.slice(0, 80))"""
        )
        assert unsaid == []
        if name == "many" and width == WIDTHS["phone"]:
            domains = opened.evaluate(
                """() => runs.map((_, i) => document.getElementById("blocks")
                    ._fullLayout[`xaxis${i ? i + 1 : ""}`].domain)"""
            )
            assert all(domain == [0, 1] for domain in domains), "one below the other"
        context.close()


def test_the_life_of_every_head(twelve: Any) -> None:
    """Head 1.2 comes and ceases, 2.0 comes and goes, 3.3 stays."""
    path = Path(twelve.url.split("#")[0].removeprefix("file://")).with_name("lives.html")
    records = synthetic_records(steps=STEPS)
    for i, record in enumerate(records):
        states = [[0.0] * 4 for _ in range(4)]
        states[1][2], states[2][0], states[3][3] = 5 <= i < 9, i % 2, i >= 7
        record["sink_sequences"] = [[float(one) for one in row] for row in states]
    write_report({"run": records}, path)
    opened = twelve.context.new_page()
    opened.goto(path.as_uri())
    opened.wait_for_selector("#shares .main-svg")
    wanted = timeline(records)
    count, born, died = traces(opened, "head_counts")
    assert count["y"] == list(wanted.sink_heads) and born["y"] == list(wanted.births)
    assert died["y"] == [-one for one in wanted.deaths] and sum(wanted.births) == 1 + 10 + 1
    heat, ceased, changing = opened.evaluate(
        "document.getElementById('head_lives').data.map(({x, y, z, text}) => ({x, y, z, text}))"
    )
    assert heat["z"][3] == [None, None, None, 700]
    assert (ceased["x"], ceased["y"], ceased["text"]) == ([2], [1], ["ceased at step 900"])
    assert (changing["x"], changing["y"]) == ([0], [2])
    assert "12 births" in opened.inner_text("#lives_told")
    opened.close()


def embedded(runs: dict[str, Any], **options: Any) -> dict[str, Any]:
    text = page(runs, **options).split('type="application/json">')[1].split("</script>")[0]
    found: dict[str, Any] = json.loads(text)
    return found


def test_settings_are_given_or_told_by_names() -> None:
    runs = seeds(4, range(0, 300, 100))
    assert embedded(runs)["compared"] is None
    given = dict.fromkeys(runs, "low") | {"seed2-lr0.01": "high"}
    found = embedded(runs, settings=given)
    assert [run["setting"] for run in found["runs"]] == ["low", "high", "low", "low"]
    assert found["compared"]["verdict"][0].startswith("4 runs of 2 settings: too few runs")
    with pytest.raises(RecordError, match="a setting of nobody"):
        page(runs, settings={"nobody": "x"})
    many = {f"{name}/Seed_{i}": runs["seed1-lr0.005"] for i in range(5) for name in "ab"}
    assert {run["setting"] for run in embedded(many)["runs"]} == {"a", "b"}
    alike = {f"seed{i}": runs["seed1-lr0.005"] for i in range(9)}
    assert {run["setting"] for run in embedded(alike)["runs"]} == {"all seeds"}


@pytest.mark.parametrize(("count", "most"), [(1000, 7), (10, 9), (3, 2), (5, 5), (1, 9), (9, 1)])
def test_the_first_and_the_last_are_never_thinned_away(count: int, most: int) -> None:
    kept = evenly(count, most)
    assert len(kept) == min(count, most) == len(set(kept)) and kept == sorted(kept)
    assert kept[-1] == count - 1 and (most == 1 or kept[0] == 0)
    apart = [b - a for a, b in pairwise(kept)]
    assert not apart or max(apart) - min(apart) <= 1


def test_a_thinned_page_keeps_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinktrack.views.report.data.BUDGET", 20_000)
    [run] = embedded({"run": synthetic_records(steps=range(97))})["runs"]
    assert len(run["records"]) < 40
    assert [run["records"][i]["step"] for i in (0, -1)] == [0, 96]
