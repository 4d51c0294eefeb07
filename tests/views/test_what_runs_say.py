"""Intervals without width, runs that hold little, and comparisons of odd runs, in words."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sinktrack import RecordError, Run
from sinktrack.records.lacking import filled
from sinktrack.signal import analyze, compare
from sinktrack.signal.analysis import Plateau
from sinktrack.signal.compare import read_table
from sinktrack.signal.robust import Interval
from sinktrack.text import interval
from sinktrack.views.report import write_report
from sinktrack.views.story import story
from sinktrack.views.terminal import show, show_comparison
from tests.helpers.paths import DATA
from tests.helpers.synthetic import counts_alone, synthetic_records
from tests.views.test_report_runs import seeds

pytest.importorskip("plotly")

SEEDS = DATA / "seeds"


def printed(draw: Any, width: int = 80, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    draw(Console(file=file, width=width))
    file.seek(0)
    return file.read()


def compared(*runs: Any, **given: Any) -> list[str]:
    found = compare(*runs, **given)
    return printed(lambda console: show_comparison(found, console)).splitlines()


def test_an_interval_without_width_is_explained() -> None:
    assert interval((0.5, 0.7), ".1%") == "95 %: 50.0% to 70.0%"
    assert interval((1.0, 1.0), ".1%") == "every sequence gives the same"
    assert interval((0.70001, 0.70002), ".1%") == "95 %: narrower than the last digit"
    signal = analyze(synthetic_records())
    flat = Plateau(Interval(9, 9, 9), Interval(1.0, 1.0, 1.0), Interval(0, 0, 0))
    lines = replace(signal, plateau=flat).lines()
    assert (
        "candidate plateau: 100.0% (every sequence and record gives the same) since step 9; it "
        "does not change at all over the last window"
    ) in lines
    near = replace(flat, change=Interval(0.0, -1e-5, 1e-5))
    [line] = [one for one in replace(signal, plateau=near).lines() if "plateau" in one]
    assert line.endswith("change over the last window +0.0 points")
    sharp = replace(signal, onset=Interval(700.0, 700.0, 700.0), sensitivity=None)
    assert any("at step 700 (95 %: to the step)" in one for one in sharp.lines())


def test_an_onset_stands_beside_those_of_other_definitions() -> None:
    signal = analyze(synthetic_records())
    assert signal.sensitivity is not None and signal.onset is not None
    first, *_, last = signal.sensitivity.steps
    [said] = [one for one in story(synthetic_records(), signal) if "left its floor" in one]
    assert said.endswith(f"; by other definitions between {first:,.0f} and {last:,.0f}).")


def test_counts_of_sink_heads_tell_their_own_story() -> None:
    records = counts_alone()
    told = story(records, analyze(records))
    assert not any("sink rate" in one for one in told)
    [moved] = [one for one in told if one.startswith("The first block with a sink head was")]
    assert moved.endswith(f"it is {records[-1]['first_sink_block']}.")
    rows = printed(lambda console: show(records, analyze(records), "run", console)).splitlines()
    at = next(i for i, row in enumerate(rows) if row.split() == ["block", "kind", "heads"])
    counts = [row.split()[-1] for row in rows[at + 1 : at + 5]]
    assert counts == [f"{count:.0f}" for count in records[-1]["sink_heads"]["0.3"]]


def test_records_that_lack_fields_are_shown_with_what_they_hold() -> None:
    """As those of the seeds that are kept as test data."""
    run = Run.read(SEEDS / "seed1-lr0.005")
    assert "p0_attention" not in run.records[-1]
    whole = filled(run.records[-1])
    assert whole["p0_attention"] == [None] * 4 and whole["norm_ratio"] == [None] * 5
    assert {name: whole[name] for name in run.records[-1]} == run.records[-1]
    text = printed(lambda console: show(run.records, analyze(run), "run", console), 80, "ascii")
    assert "block 3 rests on P0" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 100])
def test_a_comparison_fits_and_cuts_no_name(width: int) -> None:
    names = [f"seed{i}-with-a-name-of-all-its-hyperparameters-lr0.0005-wd0.1" for i in range(3)]
    found = compare(
        {name: synthetic_records() for name in names},
        settings=dict.fromkeys(names, "s") | {names[0]: "t"},
    )
    text = printed(lambda console: show_comparison(found, console), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and "depth" in text
    assert all(title in str(found) for title in ("first", "depth per", *names))


def test_what_makes_runs_less_comparable_is_said() -> None:
    """Another model, one run twice, records of an older schema, a run that ended early."""
    twin = synthetic_records()
    for record in twin:
        record["weights"] = f"w{record['step']}"
    other = synthetic_records(6)
    old = [record | {"schema": 1} for record in synthetic_records()]
    short = synthetic_records(steps=range(0, 500, 100))
    found = compare({"a": twin, "b": twin, "other": other, "old": old, "short": short})
    said = " ".join(found.notes)
    assert "different models" in said and "other is mixtral, 6 blocks, 4 heads" in said
    assert "a, b end on the same weights: one run, counted 2 times" in said
    assert "old holds records of an older schema" in said
    by = {run.name: run for run in compare({"a": twin, "old": old}).runs}
    assert by["old"].depth is None and by["a"].depth is not None
    assert "short ends there, the next at 1,900" in " ".join(found.lines())
    assert compare({"a": twin, "c": synthetic_records()}).notes == ()


def test_a_run_without_a_place_takes_nothing_from_the_others() -> None:
    lacks = synthetic_records()
    for record in lacks:
        record["tokens"] = None
    found = compare({"a": synthetic_records(), "b": lacks, "c": []}, axis="tokens")
    assert found.at == synthetic_records()[-1]["tokens"]
    assert found.runs[0].sink_rate is not None and found.runs[1].sink_rate is None
    assert found.missing == (
        "b: no record with a sink rate has a count of tokens",
        "c: no records yet",
    )


def test_counts_of_sink_heads_are_compared_by_them() -> None:
    found = compare({"a": counts_alone(), "b": counts_alone()})
    assert found.at == 1900 and found.runs[0].sink_rate is None
    assert found.runs[0].first_sink_block == counts_alone()[-1]["first_sink_block"]
    assert any("share of sink heads" in note for note in found.notes)
    mixed = compare({"a": counts_alone(), "b": synthetic_records()})
    assert mixed.runs[0].onset is None and "a: no record has a sink rate" in mixed.missing


def test_seeds_that_agree_have_no_spread_to_tell() -> None:
    same = {f"{s}{i}": synthetic_records() for s in "ab" for i in range(5)}
    lines = compared(same, settings={name: name[0] for name in same})
    text = " ".join(lines)
    assert "first-two share 95.0%, the same in 5 runs" in text
    assert "no spread within either" in text and "675 to 675" not in text
    assert compared({"only": synthetic_records()})[0] == "1 run of 1 setting."


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("\ufeffRUN, Setting ,score\r\n a , x ,1.5\r\n\r\nb,,\r\n", ({"a": "x"}, {"a": 1.5})),
        ("run;setting\na;x, y\n", ({"a": "x, y"}, {})),
        ("run\tscore\na\t-1e-3\n", ({}, {"a": -0.001})),
        ("run,setting\n", ({}, {})),
        ("", "columns none"),
        ("run\na\n", "columns run;"),
        ("run,score\na,nan\n", "a is nan"),
        ("run,score\na,inf\n", "a is inf"),
        ("run;score\na;0,5\n", "no number: 0,5"),
        ("run,score\na,1\na,2\n", "two rows of a"),
        ("run,setting\n,x\n", "names no run"),
        ('run,setting\n"a,x\n', "cannot read"),
    ],
)
def test_tables_as_people_write_them(tmp_path: Path, content: str, wanted: Any) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(content, encoding="utf-8", newline="")
    if isinstance(wanted, str):
        with pytest.raises(RecordError, match=wanted):
            read_table(path)
    else:
        assert read_table(path) == wanted


def opened(browser: Any, path: Path, size: tuple[int, int] = (1440, 900)) -> Any:
    page = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)))
    page.goto(path.as_uri())
    page.wait_for_selector("#shares .main-svg", state="attached")
    page.wait_for_function("document.getElementById('reference').firstElementChild.textContent")
    return page


def test_the_page_of_many_runs_begins_with_verdict_and_curves(browser: Any, tmp_path: Path) -> None:
    write_report(seeds(), tmp_path / "report.html")
    for size in ((1440, 900), (1024, 768)):
        page = opened(browser, tmp_path / "report.html", size)
        top = page.evaluate(
            """() => { const chart = document.getElementById("sink_rate");
                return chart.getBoundingClientRect().top + chart._fullLayout.yaxis._offset; }"""
        )
        assert top < size[1] - 200
        order = page.evaluate("[...document.querySelector('main').children].map(({id}) => id)")
        wanted = ["verdicts", "axis", "curves", "compared", "facts", "told"]
        assert [name for name in order if name in wanted] == wanted
        page.close()


def test_the_page_of_one_record_begins_with_its_circuit(browser: Any, tmp_path: Path) -> None:
    write_report({"one": synthetic_records()[-1:]}, tmp_path / "report.html")
    page = opened(browser, tmp_path / "report.html")
    assert page.locator("#circuit svg").bounding_box()["y"] < 700
    assert not page.locator("#reference").is_visible(), "the story above is of this record"
    names = page.locator("#components tbody tr td:first-child").all_text_contents()
    assert "expert 5 of block 0" in names
    assert page.locator("#components thead th").all_text_contents() == ["part", "share", "gate"]
    page.close()


def test_what_no_record_holds_is_named_and_not_drawn(browser: Any, tmp_path: Path) -> None:
    write_report({"counts": counts_alone()}, tmp_path / "report.html")
    page = opened(browser, tmp_path / "report.html")
    for chart in ("localization", "norm_ratio", "circuit", "heads", "shares", "first_tokens"):
        assert not page.locator(f"#{chart}").is_visible(), chart
    assert "the circuit; heads; who writes the P0 state" in page.text_content("#undrawn")
    assert page.text_content("#rate_title") == "Share of sink heads"
    rates = page.evaluate(
        "document.getElementById('sink_rate').data.find(({name}) => name === 'counts').y"
    )
    assert rates[-1] == pytest.approx(sum(counts_alone()[-1]["sink_heads"]["0.3"]) / 16)
    assert page.locator("#onsets").is_visible() is False
    page.close()
    write_report({"none": synthetic_records(formed=False)}, tmp_path / "none.html")
    page = opened(browser, tmp_path / "none.html")
    assert "no sink has formed, so there is no state to locate" in page.text_content(
        "#localization"
    )
    page.close()


def test_the_onset_by_other_definitions_is_on_the_page(browser: Any, tmp_path: Path) -> None:
    signal = analyze(synthetic_records())
    write_report({"run": synthetic_records()}, tmp_path / "report.html")
    page = opened(browser, tmp_path / "report.html")
    page.locator("#statistics summary").click()
    cells = [row.split("\t") for row in page.locator("#onsets tbody tr").all_inner_texts()]
    assert signal.sensitivity is not None
    steps = [one.step for one in signal.sensitivity.onsets]
    told = ["\u2013" if step is None else f"{int(step + 0.5):,}" for step in steps]
    assert [cell for row in cells for cell in row[1:]] == told
    said = page.locator("#reference li").all_text_contents()
    assert page.locator("#reference > p").text_content().startswith("A sink has formed")
    assert len(said) >= 3
    page.close()


def test_a_few_runs_begin_with_what_each_shows(browser: Any, tmp_path: Path) -> None:
    other = synthetic_records(formed=False)
    for record in other:
        record["probe"] = "0" * 32
    write_report({"one": synthetic_records(), "two": other}, tmp_path / "report.html")
    page = opened(browser, tmp_path / "report.html")
    one, two = page.locator("#together li").all_text_contents()
    assert one.startswith("one: A sink has formed") and two.startswith("two: No sink has formed")
    assert "different probes" in page.locator("#verdicts").inner_text()
    page.close()
