from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sinktrack import Run
from sinktrack.cli import app
from sinktrack.errors import RecordError
from sinktrack.loggers.curves import summary
from sinktrack.metrics import FIELDS
from sinktrack.records.marks import Mark
from sinktrack.signal import analyze
from sinktrack.views.report import write_report
from sinktrack.views.story import story
from tests.helpers.records import serial_record
from tests.helpers.report_page import curve, drawn
from tests.helpers.synthetic import counts_alone, restarted_records, synthetic_records

pytest.importorskip("plotly")

CURVES = ("sink_rate", "blocks", "norm_ratio", "localization")
Open = Callable[..., Any]


@pytest.fixture
def open_report(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Open a report; afterwards, nothing was fetched and nothing went wrong."""
    requests: list[str] = []
    troubles: list[str] = []
    contexts = []

    def opener(
        runs: list[dict[str, Any]] | dict[str, list[dict[str, Any]]],
        name: str = "run",
        losses: dict[str, dict[int, float]] | None = None,
        marks: dict[str, list[Mark]] | None = None,
        **options: Any,
    ) -> Any:
        path = tmp_path / "report.html"
        write_report(runs if isinstance(runs, dict) else {name: runs}, path, losses, marks)
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("#shares .main-svg", state="attached")
        return page

    yield opener
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert troubles == []


def bars(page: Any) -> list[float]:
    [trace] = drawn(page, "shares")
    return list(trace["x"])


def test_causal_tests_mark_the_circuit(open_report: Open) -> None:
    records = synthetic_records()

    def test(kind: str, block: int, effect: float, verdict: str | None) -> dict[str, Any]:
        interval = [effect - 0.1, effect + 0.1]
        return {"kind": kind, "block": block, "index": None, "share": 0.5, "effect": effect,
                "interval": interval, "verdict": verdict}  # fmt: skip

    records[-1]["causal"] = {
        "necessity": [test("mlp", 0, 0.75, "necessary"), test("mlp", 1, 0.02, None)],
        "sufficiency": [test("state", 2, 0.5, "sufficient")],
        "position": [test("p0_mixed", 0, 0.6, "unmixed") | {"block": None}],
    }
    page = open_report(records)
    assert page.locator("#circuit .verdict").all_text_contents() == ["necessary"]
    assert "MLP 0 is necessary" in page.locator("#circuit svg").get_attribute("aria-label")
    rows = [row.split("\t") for row in page.locator("#tests tbody tr").all_inner_texts()]
    replaced = "replaced at P0 by what stands at another position"
    assert rows == [
        ["MLP 0", replaced, "-75.0 %", "-85.0 % to -65.0 %", "necessary"],
        ["MLP 1", replaced, "-2.0 %", "-12.0 % to 8.0 %", ""],
        [
            "P0's whole state at block 2",
            "put on another position",
            "50.0 %",
            "40.0 % to 60.0 %",
            "sufficient",
        ],
        ["", "P0 attends to all positions", "-60.0 %", "-70.0 % to -50.0 %", "unmixed"],
    ]
    page.fill("#record", "3")
    page.wait_for_selector("#causal", state="hidden")
    assert page.locator("#circuit .verdict").count() == 0


def test_headline_and_curves(open_report: Open) -> None:
    records = synthetic_records()
    page = open_report(records, "a run")
    assert page.text_content("h1") == "a run"
    assert curve(page, "sink_rate", "a run")["y"] == pytest.approx(
        [record["sink_rate"] for record in records], rel=1e-5
    )
    [heat] = drawn(page, "blocks")
    assert (len(heat["z"]), len(heat["z"][0])) == (4, len(records))
    assert len([t for t in drawn(page, "norm_ratio") if t["name"]]) == 5
    for field in ("first_two_share", "first_two_gain", "depth", "reference_block"):
        found = curve(page, "localization", "a run", field)
        assert found["x"] == [record["step"] for record in records]
        for value, record in zip(found["y"], records, strict=True):
            assert value is record[field] or value == pytest.approx(record[field], rel=1e-5)
    for chart, least in (("sink_rate", 2), ("norm_ratio", 5), ("localization", 8)):
        lines = page.eval_on_selector_all(
            f"#{chart} path.js-line", "paths => paths.map(path => path.getAttribute('d'))"
        )
        assert len([line for line in lines if re.search("[LHV]", line)]) >= least
    assert page.locator("#blocks .hm image").count() == 1
    cards = page.inner_text("#cards")
    low, high = (f"{100 * bound:.1f} %" for bound in records[-1]["intervals"]["sink_rate"])
    assert f"95 %: {low} to {high}" in cards
    assert "2 to 3" in cards and "MLP 0" in cards
    assert page.inner_text("#verdict").startswith("A sink has formed: blocks 2 to 3 rest on P0")
    told = page.locator("#story li").all_inner_texts()
    assert [page.inner_text("#verdict"), *told] == story(records, analyze(records))
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
            [part["share"] for part in records[index]["shares"] or ()], rel=1e-5
        )
        parts = records[index]["top_components"] or ()
        assert page.locator("#components tbody tr").count() == len(parts)
        bars_drawn = page.locator("#shares .bars path").count()
        assert bars_drawn == len(records[index]["shares"] or ())
        assert page.get_attribute("#record", "aria-valuetext") == f"step {records[index]['step']:,}"


def test_log_axis_and_tokens(open_report: Open) -> None:
    records = synthetic_records()
    page = open_report(records)
    axis = "chart => document.getElementById(chart)._fullLayout.xaxis.type"
    page.get_by_label("log", exact=True).check()
    page.get_by_label("tokens", exact=True).check()
    assert [page.evaluate(axis, chart) for chart in CURVES] == ["log"] * 4
    assert curve(page, "sink_rate")["x"] == [r["tokens"] for r in records[1:]]
    assert "1 record at token 0 left out" in page.inner_text("#left_out")
    page.get_by_label("linear", exact=True).check()
    assert [page.evaluate(axis, chart) for chart in CURVES] == ["linear"] * 4
    assert curve(page, "sink_rate")["x"] == [r["tokens"] for r in records]


def test_missing_values_are_gaps(open_report: Open) -> None:
    records = synthetic_records()
    records[0]["tokens"] = None
    records[10]["sink_rate"] = records[10]["intervals"]["sink_rate"] = None
    for record in records:
        record["concentration"][1] = float("nan")
    page = open_report(records)
    assert curve(page, "sink_rate")["y"][10] is None
    lines = page.locator("#sink_rate .trace").last.locator("path.js-line")
    assert lines.count() == 2, "the curve is broken at the gap"
    [heat] = drawn(page, "blocks")
    assert heat["z"][1] == [None] * len(records)
    band, *_ = drawn(page, "sink_rate")
    assert records[10]["step"] not in band["x"]
    assert band["x"].count(None) == 2
    page.get_by_label("tokens", exact=True).check()
    assert "1 record without a token count left out" in page.inner_text("#left_out")
    page.get_by_label("steps", exact=True).check()
    page.get_by_label("log", exact=True).check()
    assert curve(page, "sink_rate")["x"][0] == 100


def test_no_sink_is_said(open_report: Open) -> None:
    page = open_report(synthetic_records(formed=False))
    assert "No sink has formed: no block rests on P0" in page.inner_text("#verdict")
    assert "no block has formed a sink" in page.inner_text("#cards")
    assert "A sink has formed" not in page.inner_text("main")
    shown = page.evaluate("document.querySelector('#localization')._fullLayout.yaxis2.range")
    assert shown == [0, 1], "a gain that no record has does not go to 400 %"


def test_a_sink_before_any_write_is_said(open_report: Open) -> None:
    record = synthetic_records(steps=[10])[0]
    record |= {"reference_block": 0, "first_two_share": None, "depth": None, "formed": True}
    record["sinks"] = [{"first_block": 0, "last_block": 3, "mass": 2.0, "peak_block": 0}]
    record["shares"] = [{"kind": "embedding", "block": None, "index": None, "share": 1.0}]
    record["intervals"] |= {"first_two_share": None, "depth": None}
    page = open_report([record])
    assert "before anything is written" in page.inner_text("#story")
    assert "precedes any write" in page.inner_text("#cards")
    assert bars(page) == [1.0]


def test_first_tokens_beside_the_probe(open_report: Open) -> None:
    record = synthetic_records()[-1]
    page = open_report([record])
    band, distinct, probe = drawn(page, "first_tokens")
    quantiles = record["first_token"]["norm_ratio"]
    assert distinct["x"] == probe["x"] == list(range(5))
    assert distinct["y"] == pytest.approx(quantiles["50"], rel=1e-3)
    assert probe["y"] == pytest.approx(record["norm_ratio"], rel=1e-5)
    assert band["y"] == pytest.approx([*quantiles["95"], *quantiles["5"][::-1]], rel=1e-3)


def test_the_position_card(open_report: Open) -> None:
    first, last = synthetic_records(steps=[0, 100])
    rates = {
        "as_is": [0.7, 0.8], "with_start": [0.72, 0.82], "random_first": [0.6, 0.7],
        "repeated": [0.0, 0.0],
    }  # fmt: skip
    card = {
        name: {"sink_rate": low, "sink_rate_from_2": high,
               "intervals": {"sink_rate": [low, high], "sink_rate_from_2": None}}
        for name, (low, high) in rates.items()
    }  # fmt: skip
    last["position_card"] = card | {
        "without_start": None,
        "start_token": None,
        "answer": "position",
    }
    page = open_report([first, last])
    assert page.locator("#card_of").is_visible()
    assert "Position decides, by the position card" in page.inner_text("#card_says")
    both = drawn(page, "card")
    assert [trace["y"][:2] for trace in both] == [[0.7, None], [0.8, None]]
    assert both[0]["x"][1] == "No start token" and both[0]["y"][4] == 0
    page = open_report([first])
    assert page.locator("#card_of").is_hidden()


def test_a_sink_that_was_not_measured_is_no_none(open_report: Open) -> None:
    record = synthetic_records()[-1] | {"formed": None, "sinks": None, "reference_block": None}
    page = open_report([record | {"missing": {"sinks": "its blocks run apart"}}])
    cards = page.inner_text("#cards")
    assert "not measured: its blocks run apart" in cards and "no block has formed" not in cards


def test_counts_of_sink_heads_alone(open_report: Open) -> None:
    records = counts_alone()
    page = open_report(records)
    assert "was not measured" in page.inner_text("#verdict")
    page.select_option("#measure", "sink_heads")
    [heat] = drawn(page, "blocks")
    wanted = [record["sink_heads"]["0.3"][3] for record in records]
    assert heat["z"][3] == wanted


def test_first_blocks_only(open_report: Open, tmp_path: Path) -> None:
    """Records of a scan that read the first blocks alone."""
    records = synthetic_records(formed=False)
    for record in records:
        for name in ("concentration", "p0_attention"):
            record[name][2:] = [None] * 2 if name == "concentration" else [[None] * 4] * 2
        for values in (
            record["norm_ratio"],
            record["p0_norm"],
            *record["first_token"]["norm_ratio"].values(),
        ):
            values[3:] = [None, None]
        for name in (
            "sink_rate",
            "reference_block",
            "first_two_share",
            "depth",
            "first_two_gain",
            "share_sum",
            "peak_block",
        ):
            record[name] = None
        record |= {"shares": [], "top_components": [], "measured_blocks": 2, "sinks": []}
        record["intervals"] |= dict.fromkeys(("sink_rate", "first_two_share", "depth"))
    page = open_report({"part": records, "whole": synthetic_records()})
    assert "null" not in page.inner_text("body")
    assert "measured in 2 blocks of 4 only" in page.inner_text("#cards")
    assert "no block of the first 2, the only ones measured" in page.inner_text("#verdict")
    assert curve(page, "sink_rate", "stages")["z"] == [[None] * 20]
    assert page.locator("#circuit .phase").count() == 0, "no block is marked"
    run = Run.open(tmp_path / "run")
    for record in records:
        run.append(record)
    assert analyze(run).stage is None
    assert "sinktrack/largest_component" not in summary(run.records)


def test_large_run(open_report: Open, tmp_path: Path) -> None:
    records = synthetic_records(48, range(0, 100_000, 100))
    for record in records:
        record["p0_attention"] = [row * 8 for row in record["p0_attention"]]
    page = open_report(records)
    assert (tmp_path / "report.html").stat().st_size < 15_000_000
    assert "1,000" in page.inner_text("#facts") and "drawn" not in page.inner_text("#facts")
    assert page.input_value("#record") == "999"
    assert page.locator("#norm_ratio path.js-line").count() == 49
    page.locator("#record").press("Home")
    [heads] = drawn(page, "heads")
    assert (len(heads["z"]), len(heads["z"][0])) == (48, 32)
    assert bars(page) == []  # no sink there yet
    page.locator("#record").fill("450")
    assert len(bars(page)) == 17
    assert sum(bars(page)) == pytest.approx(1, abs=1e-4)


def test_a_larger_run_is_thinned_and_says_so(
    open_report: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinktrack.views.report.data.BUDGET", 20_000)
    page = open_report(synthetic_records(steps=range(100)))
    facts = page.inner_text("#facts").replace("\n", " ")
    found = re.search(r"100, of which (\d+) are drawn", facts)
    assert found and 10 < int(found[1]) < 34
    assert curve(page, "sink_rate")["x"][-1] == 99
    assert (tmp_path / "report.html").stat().st_size < 5_100_000


def test_sinks_in_series(open_report: Open) -> None:
    record = serial_record()
    page = open_report([record])
    assert page.inner_text("#verdict").startswith("Two sinks in series have formed.")
    circuit = page.locator("#circuit")
    assert circuit.locator(".phase").count() == 2
    assert circuit.locator(".phase-name").all_text_contents() == [
        "main sink: blocks 12 to 29", "sink: blocks 3 to 9",
    ]  # fmt: skip
    assert circuit.locator(".writer").all_text_contents() == [
        "MLP 11 writes 93.0 %", "MLP 2 writes 70.0 %",
    ]  # fmt: skip
    assert circuit.locator(".erased").all_text_contents() == ["MLP 29 erases", "MLP 8, MLP 9 erase"]
    assert circuit.locator(".eraser").count() == 3
    assert circuit.locator(".half").count() == 30 * 3, "mixing, and the writes of both sublayers"
    assert curve(page, "sink_rate", "stages")["z"] == [[None]], "one record has no stage"
    assert page.locator("#signal li").count() == 0
    with page.expect_download() as download:
        page.get_by_label("Save the circuit as SVG").press("Enter")
    saved = Path(download.value.path()).read_text()
    assert saved.startswith("<svg") and "MLP 11 writes" in saved and "var(" not in saved


def test_every_field_along_the_blocks_or_heads_can_be_seen(open_report: Open) -> None:
    records = synthetic_records()
    for step, record in enumerate(records):
        record["attention_gate"] = [[0.1 * block + 0.01 * step] * 4 for block in range(4)]
        record["rivals"] = [0.02 * step] * 5
    page = open_report(records)
    page.select_option("#measure", "attention_gate")
    [heat] = drawn(page, "blocks")
    assert heat["z"][2] == pytest.approx([0.2 + 0.01 * step for step in range(20)], rel=1e-3)
    assert FIELDS["attention_gate"].help in page.inner_text("#measured")
    page.select_option("#measure", "rivals")
    assert drawn(page, "blocks")[0]["z"][4][5] == pytest.approx(0.1, rel=1e-3)
    page.select_option("#of_heads", "attention_gate")
    [heads] = drawn(page, "heads")
    assert heads["z"][1] == pytest.approx([0.29] * 4, rel=1e-2)
    page.select_option("#number_field", "effective_blocks")
    found = curve(page, "number")["y"]
    assert found[-1] == pytest.approx(records[-1]["effective_blocks"], rel=1e-5)


def test_nothing_is_solid_before_a_sink_has_formed(open_report: Open) -> None:
    records = synthetic_records()
    for record in records[:8]:
        record |= {"first_two_share": 0.9, "depth": 1.0, "formed": False, "sinks": []}
    page = open_report(records)
    solid, dotted = page.evaluate(
        """() => ["solid", "dot"].map((dash) => document.getElementById("localization").data.filter(
            ({line, mode, yaxis, fill}) =>
                mode === "lines" && yaxis === "y" && !fill && (line.dash ?? "solid") === dash)
            .map(({y}) => y)[0])"""
    )
    assert solid[:8] == [None] * 8 and dotted[:8] == [0.9] * 8
    assert solid[-1] == dotted[-1] == pytest.approx(records[-1]["first_two_share"], rel=1e-5)


def test_narrow_screens_and_colour_schemes(open_report: Open) -> None:
    page = open_report(
        synthetic_records(), color_scheme="light", viewport={"width": 360, "height": 700}
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360

    def wait_for(sign: int) -> None:
        """Until the page is lighter (1) or darker (-1) than a chart's tick labels."""
        page.wait_for_function(
            """(sign) => {
                const light = (colour) =>
                    colour.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b);
                const tick = document.querySelector("#sink_rate .xtick text");
                const paper = getComputedStyle(document.body).backgroundColor;
                return sign * (light(paper) - light(getComputedStyle(tick).fill)) > 300;
            }""",
            arg=sign,
        )

    wait_for(1)
    page.emulate_media(color_scheme="dark")
    wait_for(-1)
    page.emulate_media(media="print")
    wait_for(1)


def test_printed_pages_hold_whole_charts(open_report: Open) -> None:
    runs = {"one": synthetic_records(), "two": synthetic_records()}
    page = open_report(runs, viewport={"width": 1600, "height": 900}, color_scheme="dark")
    printed = page.pdf(prefer_css_page_size=True, print_background=True)
    assert re.findall(rb"/MediaBox \[0 0 (\d+)", printed) == [b"1080"] * 3, "three pages, 1440 px"
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 1360, "height": 900})
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("figure svg")].filter((svg) =>
            svg.getBoundingClientRect().right > svg.closest("figure").getBoundingClientRect().right)
            .length"""
    )
    assert beyond == 0
    assert not page.locator("#axis").is_visible()


def test_titles_cannot_break_out(open_report: Open) -> None:
    title = "</script><script>document.title = 'broken'</script>{{style}}\u2028&amp;"
    page = open_report(synthetic_records(), title)
    assert page.text_content("h1") == title
    assert "broken" not in page.evaluate("document.title").split("'")[0]
    assert page.locator("script").count() == 3


def test_data_is_small_and_escaped(tmp_path: Path) -> None:
    records = synthetic_records()
    records[0]["model"]["type"] = "<!--<script>&\u2029"
    write_report({"run": records}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = page.split('type="application/json">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(data)
    assert json.loads(data)["runs"][0]["records"][3]["step"] == 300
    digits = [match.replace(".", "").strip("0") for match in re.findall(r"\d+\.\d+", data)]
    assert max(map(len, digits)) <= 6


def test_runs_of_different_probes_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "two", "other"):
        run = Run.open(tmp_path / name)
        for record in synthetic_records():
            run.append(record | ({"probe": "f" * 32} if name == "other" else {}))
    out = ["-o", str(tmp_path / "report.html")]
    same = CliRunner().invoke(app, ["report", str(tmp_path / "one"), str(tmp_path / "two"), *out])
    assert same.exit_code == 0 and "different probes" not in same.output
    both = CliRunner().invoke(app, ["report", str(tmp_path / "one"), str(tmp_path / "other"), *out])
    assert both.exit_code == 0 and "different probes; do not compare" in both.output


def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="train with a callback, or scan"):
        write_report({"run": []}, tmp_path / "report.html")


def test_unwritable(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot write"):
        write_report({"run": synthetic_records()}, tmp_path / "missing" / "report.html")


def shifted(records: list[dict[str, Any]], by: float) -> list[dict[str, Any]]:
    for record in records:
        record["sink_rate"] *= by
    return records


def test_runs_are_compared(open_report: Open) -> None:
    runs = {
        "one": synthetic_records(),
        "two": shifted(synthetic_records(6, range(0, 3000, 100)), 0.5),
        "two <b>": synthetic_records(formed=False),
    }
    page = open_report(runs)
    for name, records in runs.items():
        found = curve(page, "sink_rate", name.replace("<", "&lt;"))
        assert found["y"] == pytest.approx([record["sink_rate"] for record in records], rel=1e-5)
    assert [(len(heat["z"]), len(heat["z"][0])) for heat in drawn(page, "blocks")] == [
        (4, 20), (6, 30), (4, 20),
    ]  # fmt: skip
    assert page.locator("#blocks .hm image").count() == 3
    table = page.locator("#compared tbody tr")
    assert [line.split("\t")[0].strip() for line in table.all_inner_texts()] == list(runs)
    heads = [head.lower() for head in page.locator("#compared thead th").all_inner_texts()]
    rows = [dict(zip(heads, line.split("\t"), strict=True)) for line in table.all_inner_texts()]
    for name in ("first-two share", "depth"):
        assert rows[0][name].strip() != "\u2013" and rows[2][name].strip() == "\u2013", "of no sink"
    assert "0 to 1,900" in page.inner_text("#facts")
    page.locator("input[name=run]").first.press("ArrowDown")
    assert "0 to 2,900" in page.inner_text("#facts")
    assert len([t for t in drawn(page, "norm_ratio") if t["name"]]) == 7
    [shown] = drawn(page, "heads")
    assert len(shown["z"]) == 6
    page.locator("input[name=run]").nth(2).check()
    assert "No sink has formed" in page.inner_text("#verdict")


def test_the_slider_shows_heads_and_circuit(open_report: Open) -> None:
    records = synthetic_records()
    for index, record in enumerate(records):
        record["p0_attention"] = [[0.01 * index, 0.0, 1.0, 0.2 * block] for block in range(4)]
    records[5]["p0_attention"][2] = [float("nan")] * 4
    page = open_report(records)
    page.locator("#record").fill("5")
    [heads] = drawn(page, "heads")
    assert heads["z"][1] == pytest.approx([0.05, 0, 1, 0.2], abs=1e-5)
    assert heads["z"][2] == [None] * 4
    assert page.locator("#heads .hm image").count() == 1
    marked = page.evaluate("document.getElementById('blocks').layout.shapes[0].x0")
    assert marked == records[5]["step"]
    picture = page.locator("#circuit svg")
    assert picture.locator(".part").count() == len(records[5]["shares"] or ())
    assert picture.locator(".block").count() == 4
    page.locator("#record").press("End")
    assert picture.locator(".phase").count() == 1
    assert "blocks 2 to 3 rest on P0" in str(picture.get_attribute("aria-label"))
    assert f"embedding {100 * records[-1]['shares'][0]['share']:.1f} %" in str(
        picture.get_attribute("aria-label")
    )


def test_stages_and_onset(open_report: Open) -> None:
    records = synthetic_records(steps=range(0, 8000, 100))
    found = analyze(records)
    assert found.onset is not None and len(set(found.stages)) > 1
    page = open_report(records)
    strip = curve(page, "sink_rate", "stages")
    stages = page.evaluate("STAGES")
    drawn_stages = [None if code is None else stages[code] for code in strip["z"][0]]
    assert drawn_stages == list(found.stages)
    told = set(found.stages) - {None}
    assert set(page.inner_text("#stages").split()) == told | {s[0].upper() for s in told if s}
    letters = [letter for letter in strip["text"][0] if letter]
    firsts = [
        s for s, before in zip(found.stages, (None, *found.stages), strict=False) if s != before
    ]
    assert letters == [stage[0].upper() for stage in firsts if stage]
    shade, line = page.evaluate("document.getElementById('sink_rate').layout.shapes")
    assert [shade["x0"], line["x0"], shade["x1"]] == [
        found.onset.low, found.onset.value, found.onset.high,
    ]  # fmt: skip
    assert page.locator("#signal li").all_text_contents() == found.lines()
    page.get_by_label("tokens", exact=True).check()
    assert found.onset_tokens is not None
    _, line = page.evaluate("document.getElementById('sink_rate').layout.shapes")
    assert line["x0"] == found.onset_tokens.value


def test_a_line_on_every_curve(open_report: Open) -> None:
    marks = {"run": [Mark(5000, "other <data>")]}
    page = open_report(synthetic_records(steps=range(0, 7000, 100)), marks=marks)
    for chart in ("sink_rate", "localization", "number", "norm_ratio"):
        shapes = page.evaluate(f"document.getElementById('{chart}').layout.shapes")
        assert any(one["x0"] == one["x1"] == 5000 for one in shapes), chart
    (name,) = page.evaluate("document.getElementById('sink_rate').layout.annotations")
    assert name["text"] == "other &lt;data>"
    page.get_by_label("tokens", exact=True).check()
    shapes = page.evaluate("document.getElementById('number').layout.shapes")
    assert any(one["x0"] == 5000 * 2048 for one in shapes)


def test_the_address_keeps_what_is_shown(open_report: Open) -> None:
    page = open_report({"one": synthetic_records(), "two & more": synthetic_records()})
    page.get_by_label("tokens", exact=True).check()
    page.locator("#measure").select_option("norm_ratio")
    page.locator("input[name=run][value='1']").check()
    page.locator("#record").fill("7")
    page.reload()
    page.wait_for_selector("#shares .main-svg")
    assert page.evaluate("[state.run, state.record[1]]") == [1, 7]
    assert page.locator("input[name=run][value='1']").is_checked()
    assert page.input_value("#record") == "7" and page.input_value("#measure") == "norm_ratio"
    assert page.evaluate("choice('x')") == "tokens"
    bare = page.url.split("#")[0]
    page.goto("about:blank")
    page.goto(bare + "#run=nobody&step=x&x=miles&measure=none")
    page.wait_for_selector("#shares .main-svg")
    assert page.evaluate("[state.run, choice('x')]") == [0, "step"]


def test_what_is_not_claimed_yet_is_said(open_report: Open) -> None:
    records = synthetic_records(steps=[0, 100])
    page = open_report(records)
    missing = page.text_content("#missing")
    assert all(line in missing for line in analyze(records).missing)


def test_steps_that_hold_the_same_weights_are_said(open_report: Open) -> None:
    records = synthetic_records(steps=[0, 100, 200])
    assert not open_report(records).is_visible("#same_weights")
    adapters = [*records[:2], records[2] | {"weights": records[1]["weights"]}]
    assert not open_report(adapters).is_visible("#same_weights")  # the digest alone says nothing
    records[2] = records[1] | {"step": 200}
    said = open_report(records).inner_text("#same_weights")
    assert said == "Steps 100 and 200 hold the same weights, by their digest."


def test_a_restart_from_an_older_checkpoint(open_report: Open) -> None:
    """Records in the order of writing; of two of one step the last counts."""
    records = synthetic_records(steps=range(0, 3000, 100))
    again = synthetic_records(steps=range(2000, 3500, 100))
    page = open_report([*records, *again])
    found = curve(page, "sink_rate")
    assert found["x"] == list(range(0, 3500, 100))
    assert found["y"][20:] == pytest.approx([record["sink_rate"] for record in again], rel=1e-5)


def test_records_that_training_left_behind_are_left_out(open_report: Open) -> None:
    page = open_report(restarted_records())
    assert curve(page, "sink_rate")["x"] == list(range(0, 1500, 100))
    assert "left out: 15 records up to step 2,900" in page.text_content("#signal")


def test_runs_of_several_probes_say_so(open_report: Open, tmp_path: Path) -> None:
    page = open_report(synthetic_records())
    assert not page.locator("#probes").is_visible()
    other = [record | {"probe": "f" * 32} for record in synthetic_records()]
    write_report({"one": synthetic_records(), "other": other}, tmp_path / "both.html")
    page.goto((tmp_path / "both.html").as_uri())
    page.wait_for_selector("#shares .main-svg")
    assert "different probes" in page.inner_text("#probes")
    assert page.inner_text("#facts").split()[:2] == ["run", "one"]


def test_loss_as_the_axis(open_report: Open) -> None:
    records = synthetic_records()
    page = open_report(records, losses={"run": {100: 4.0, 300: 3.0, 1900: 1.0}})
    page.get_by_label("loss", exact=True).check()
    found = curve(page, "sink_rate")
    assert found["x"][:3] == [4.0, 3.5, 3.0]
    assert len(found["x"]) == 19
    assert "1 record without a loss left out" in page.inner_text("#left_out")
    [heat] = drawn(page, "blocks")
    assert heat["x"] == sorted(found["x"])
    span = page.evaluate("document.getElementById('sink_rate')._fullLayout.xaxis.range")
    assert span[0] > span[1], "training goes to the right"


def test_losses_and_names_from_the_command_line(tmp_path: Path) -> None:
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for directory in runs:
        run = Run.open(directory)
        for record in synthetic_records():
            run.append(record)
    state = tmp_path / "trainer_state.json"
    state.write_text(
        json.dumps({"log_history": [{"step": s, "loss": 9 - s / 1e3} for s in (0, 1900)]})
    )
    table = tmp_path / "loss.csv"
    table.write_text("step,loss\n0,5\n1900,3\n")
    out = tmp_path / "report.html"
    command = [
        "report",
        *map(str, runs),
        "-o",
        str(out),
        "--loss",
        str(state),
        "--loss",
        str(table),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    data = (
        out.read_text(encoding="utf-8").split('type="application/json">')[1].split("</script>")[0]
    )
    first, second = json.loads(data)["runs"]
    assert [first["name"], second["name"]] == ["a/run", "b/run"]
    assert [first["records"][-1]["loss"], second["records"][-1]["loss"]] == [7.1, 3]
    result = CliRunner().invoke(app, command[:-2])
    assert result.exit_code == 2 and "--loss 1 times for 2 runs" in result.output


def test_block_measures(open_report: Open) -> None:
    records = synthetic_records()
    page = open_report(records)
    page.select_option("#measure", "sink_rate_by_block")
    [heat] = drawn(page, "blocks")
    assert heat["z"][3] == pytest.approx(
        [record["sink_rate_by_block"]["0.3"][3] for record in records], rel=1e-3
    )
    page.select_option("#measure", "norm_ratio")
    [heat] = drawn(page, "blocks")
    assert len(heat["z"]) == 5


def test_the_table_of_records_moves_the_slider(open_report: Open) -> None:
    records = synthetic_records()
    page = open_report(records)
    page.locator("#records summary").press("Enter")
    rows = page.locator("#records tbody tr")
    rows.first.wait_for()
    assert rows.count() == len(records)
    assert rows.nth(3).inner_text().split("\t")[1] == f"{records[3]['tokens']:,}"
    rows.nth(3).locator("button").press("Enter")
    assert page.input_value("#record") == "3"


def test_figures_and_data_are_saved(open_report: Open, tmp_path: Path) -> None:
    records = synthetic_records()
    records[2]["sink_rate"] = None
    page = open_report({'a, "b"': records, "two": synthetic_records(2)})

    def saved(button: Any) -> bytes:
        with page.expect_download() as download:
            button.press("Enter")
        return Path(download.value.path()).read_bytes()

    assert saved(page.get_by_label("Save Sink rate and stage over training as SVG")).startswith(
        b"<svg"
    )
    table = list(csv.DictReader(io.StringIO(saved(page.get_by_text("data as CSV")).decode())))
    assert len(table) == 40
    assert table[2]["run"] == 'a, "b"' and table[2]["sink_rate"] == ""
    assert float(table[7]["sink_rate_low"]) == pytest.approx(
        records[7]["intervals"]["sink_rate"][0], rel=1e-5
    )
    assert float(table[7]["concentration_03"]) == pytest.approx(
        records[7]["concentration"][3], rel=1e-5
    )
    assert table[25]["concentration_03"] == ""
    first, _ = json.loads(saved(page.get_by_text("data as JSON")))
    assert first["records"][9]["p0_attention"][3] == pytest.approx(
        records[9]["p0_attention"][3], abs=1e-5
    )
