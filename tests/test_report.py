from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sinktrack.errors import RecordError
from sinktrack.report import write_report
from tests.synthetic import synthetic_records

pytest.importorskip("plotly")
playwright = pytest.importorskip("playwright.sync_api")

CURVES = ("sink_rate", "concentration", "norm_ratio", "localization")
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as started:
        chromium = started.chromium
        if installed is None and not Path(chromium.executable_path).exists():
            pytest.skip("no Chromium here: playwright install chromium")
        opened = chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_report(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Open a report; afterwards, nothing was fetched and nothing went wrong."""
    requests: list[str] = []
    troubles: list[str] = []
    contexts = []

    def opener(records: list[dict[str, Any]], title: str = "run", **options: Any) -> Any:
        path = tmp_path / "report.html"
        write_report(records, path, title)
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("#shares .main-svg")
        return page

    yield opener
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert troubles == []


def drawn(page: Any, chart: str) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = page.evaluate(
        """chart => document.getElementById(chart).data.map(
            ({type, name, x, y, z}) => ({type, name, x, y, z}))""",
        chart,
    )
    return traces


def curve(page: Any, chart: str, name: str) -> dict[str, Any]:
    return next(trace for trace in drawn(page, chart) if trace["name"] == name)


def bars(page: Any) -> list[float]:
    [trace] = drawn(page, "shares")
    return list(trace["x"])


def test_headline_and_curves(open_report: Open) -> None:
    records = synthetic_records()
    page = open_report(records, "a run")
    assert page.text_content("h1") == "a run"
    assert curve(page, "sink_rate", "sink rate")["y"] == pytest.approx(
        [record["sink_rate"] for record in records], rel=1e-5
    )
    [heat] = drawn(page, "concentration")
    assert (len(heat["z"]), len(heat["z"][0])) == (4, len(records))
    assert len([t for t in drawn(page, "norm_ratio") if t["name"]]) == 5
    for name in ("first-two share", "first-two gain", "depth", "reference block"):
        assert curve(page, "localization", name)["x"] == [record["step"] for record in records]
    for chart, least in (("sink_rate", 2), ("norm_ratio", 5), ("localization", 8)):
        lines = page.eval_on_selector_all(
            f"#{chart} path.js-line", "paths => paths.map(path => path.getAttribute('d'))"
        )
        assert len([line for line in lines if re.search("[LHV]", line)]) >= least
    assert page.locator("#concentration .hm image").count() == 1
    cards = page.inner_text("#cards")
    low, high = (f"{100 * bound:.1f} %" for bound in records[-1]["intervals"]["sink_rate"])
    assert f"95 %: {low} to {high}" in cards
    assert "block 2" in cards
    assert "by construction" in page.inner_text("#verdict")
    assert "candidate" in page.inner_text("main")
    facts = page.inner_text("#facts").replace("\n", " ")
    for fact in ("mixtral", "4 blocks, 4 heads, 8 experts", "0 to 1,900", "758e6409a456"):
        assert fact in facts


def test_slider_moves_with_the_keyboard(open_report: Open) -> None:
    records = synthetic_records()
    page = open_report(records)
    for key, index in (("End", 19), ("ArrowLeft", 18), ("Home", 0)):
        page.locator("#record").press(key)
        assert bars(page) == pytest.approx(
            [part["share"] for part in records[index]["shares"]], rel=1e-5
        )
        assert page.locator("#components tbody tr").count() == len(records[index]["top_components"])
        assert page.locator("#shares .bars path").count() == len(records[index]["shares"])
        assert page.get_attribute("#record", "aria-valuetext") == f"step {records[index]['step']:,}"


def test_log_axis_and_tokens(open_report: Open) -> None:
    records = synthetic_records()
    page = open_report(records)
    axis = "chart => document.getElementById(chart)._fullLayout.xaxis.type"
    page.get_by_label("log", exact=True).check()
    page.get_by_label("tokens", exact=True).check()
    assert [page.evaluate(axis, chart) for chart in CURVES] == ["log"] * 4
    assert curve(page, "sink_rate", "sink rate")["x"] == [r["tokens"] for r in records[1:]]
    assert "1 record at token 0 left out" in page.inner_text("#left_out")
    page.get_by_label("linear", exact=True).check()
    assert [page.evaluate(axis, chart) for chart in CURVES] == ["linear"] * 4
    assert curve(page, "sink_rate", "sink rate")["x"] == [r["tokens"] for r in records]


def test_missing_values_are_gaps(open_report: Open) -> None:
    records = synthetic_records()
    records[0]["tokens"] = None
    records[10]["sink_rate"] = records[10]["intervals"]["sink_rate"] = None
    for record in records:
        record["concentration"][1] = float("nan")
    page = open_report(records)
    assert curve(page, "sink_rate", "sink rate")["y"][10] is None
    lines = page.locator("#sink_rate .trace").last.locator("path.js-line")
    assert lines.count() == 2, "the curve is broken at the gap"
    [heat] = drawn(page, "concentration")
    assert heat["z"][1] == [None] * len(records)
    band, _ = drawn(page, "sink_rate")
    assert records[10]["step"] not in band["x"]
    assert band["x"].count(None) == 2
    assert page.locator("input[value=tokens]").count() == 0
    page.get_by_label("log", exact=True).check()
    assert curve(page, "sink_rate", "sink rate")["x"][0] == 100


def test_no_sink_is_said(open_report: Open) -> None:
    page = open_report(synthetic_records(formed=False))
    assert "No sink has formed in this run: no block's concentration reaches 0.3" in (
        page.inner_text("#verdict")
    )
    assert "no block has formed a sink" in page.inner_text("#cards")
    assert "starts in" not in page.inner_text("main")


def test_a_sink_before_any_write_is_said(open_report: Open) -> None:
    record = synthetic_records(steps=[10])[0]
    record |= {"reference_block": 0, "first_two_share": None, "depth": None}
    record["shares"] = [{"kind": "embedding", "block": None, "index": None, "share": 1.0}]
    record["intervals"] |= {"first_two_share": None, "depth": None}
    page = open_report([record])
    assert "precedes any write" in page.inner_text("#verdict")
    assert bars(page) == [1.0]


def test_large_run(open_report: Open) -> None:
    records = synthetic_records(48, range(0, 100_000, 100))
    page = open_report(records)
    assert page.input_value("#record") == "999"
    assert page.locator("#norm_ratio path.js-line").count() == 49
    page.locator("#record").press("Home")
    assert len(bars(page)) == 17
    assert sum(bars(page)) == pytest.approx(1, abs=1e-4)


def test_narrow_screens_and_colour_schemes(open_report: Open) -> None:
    page = open_report(
        synthetic_records(), color_scheme="light", viewport={"width": 360, "height": 700}
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360

    def contrast() -> int:
        """Of the page over a chart's tick labels: positive for dark on light."""
        page.wait_for_timeout(300)
        paper, ink = page.evaluate(
            """() => {
                const tick = document.querySelector("#sink_rate .xtick text");
                const page = getComputedStyle(document.body);
                return [page.backgroundColor, getComputedStyle(tick).fill];
            }"""
        )
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (paper, ink)]
        return light[0] - light[1]

    assert contrast() > 300
    page.emulate_media(color_scheme="dark")
    assert contrast() < -300
    page.emulate_media(media="print")
    assert contrast() > 300


def test_titles_cannot_break_out(open_report: Open) -> None:
    title = "</script><script>document.title = 'broken'</script>{{style}}\u2028&amp;"
    page = open_report(synthetic_records(), title)
    assert page.text_content("h1") == title
    assert "broken" not in page.evaluate("document.title").split("'")[0]
    assert page.locator("script").count() == 3


def test_data_is_small_and_escaped(tmp_path: Path) -> None:
    records = synthetic_records()
    records[0]["model"]["type"] = "<!--<script>&\u2029"
    write_report(records, tmp_path / "report.html", "run")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = page.split('type="application/json">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(data)
    assert json.loads(data)["records"][3]["step"] == 300
    digits = [match.replace(".", "").lstrip("0") for match in re.findall(r"\d+\.\d+", data)]
    assert max(map(len, digits)) <= 6


def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="train with a callback, or scan"):
        write_report([], tmp_path / "report.html", "run")


def test_unwritable(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot write"):
        write_report(synthetic_records(), tmp_path / "missing" / "report.html", "run")
