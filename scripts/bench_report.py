"""Size of a large report, and the time until it answers, against a plotly figure with a slider.

The report draws 48 blocks of 32 heads at 1,000 checkpoints. The alternative is what plotly itself
offers for the heads alone: a heat map with a frame for each checkpoint and a slider over them. Both
are opened in the same headless Chromium, in turns; medians. The work of the page's thread does not
depend on what else the machine is doing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chromium import chromium
from ratios import tell

sys.path.insert(0, str(Path(__file__).parents[1]))
from sinktrack.views.report import write_report
from tests.helpers.synthetic import synthetic_records

BLOCKS, HEADS, RECORDS, ROUNDS = 48, 32, 1000, 5
SLIDE = """async () => {
    const start = performance.now();
    const slider = document.getElementById("record");
    slider.value = Math.floor(slider.max / 2);
    slider.dispatchEvent(new Event("input"));
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    return performance.now() - start;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="small, as JSON for bench.py")
    short = parser.parse_args().short
    count, rounds = (100, 1) if short else (RECORDS, ROUNDS)
    records = synthetic_records(BLOCKS, range(0, count * 100, 100))
    for record in records:
        record["p0_attention"] = [(row * HEADS)[:HEADS] for row in record["p0_attention"]]
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        ours, frames = Path(folder, "report.html"), Path(folder, "frames.html")
        start = time.perf_counter()
        write_report({"run": records}, ours)
        written = f"written in {time.perf_counter() - start:.1f} s, signal included"
        alternative(records, frames)
        first, whole, slider, other = [], [], [], []
        for _ in range(rounds):
            page = browser.new_page()
            whole.append(seconds(page, ours, "#shares .main-svg"))
            first.append(page.evaluate("performance.getEntriesByName('first')[0].startTime") / 1e3)
            slider.append(page.evaluate(SLIDE) / 1e3)
            page.close()
            page = browser.new_page()
            other.append(seconds(page, frames, ".main-svg .hm image"))
            page.close()
        ratio = statistics.median(b[1] / a[1] for a, b in zip(whole, other, strict=True))
        smaller = frames.stat().st_size / ours.stat().st_size
        if short:
            tell("time", {"report / plotly's frames, work of the page": 1 / ratio})
            tell("count", {"report / plotly's frames, bytes": 1 / smaller})
            return
        print(f"{written}\n{BLOCKS} blocks, {HEADS} heads, {RECORDS} records")
        for name, path, took in (("report", ours, whole), ("frames", frames, other)):
            size = path.stat().st_size / 1e6
            clock, work = (statistics.median(times) for times in zip(*took, strict=True))
            print(f"{name:8} {size:6.1f} MB, all drawn after {clock:.2f} s, {work:.2f} s at work")
        print(f"frames / report: {smaller:.1f} in size, "
              f"{ratio:.1f} in work")  # fmt: skip
        print(f"report: first curves after {statistics.median(first):.2f} s, "
              f"slider answers in {statistics.median(slider):.2f} s")  # fmt: skip


def seconds(page: Any, path: Path, drawn: str) -> tuple[float, float]:
    """From the address to the last chart: by the clock, and of the page's thread at work."""
    page.add_init_script(
        """new MutationObserver((_, watching) => {
            if (!document.querySelector("#sink_rate .main-svg")) return;
            performance.mark("first");
            watching.disconnect();
        }).observe(document, { childList: true, subtree: true });"""
    )
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    start = time.perf_counter()
    page.goto(path.as_uri(), wait_until="commit")
    page.wait_for_selector(drawn, timeout=120_000)
    took = time.perf_counter() - start
    found = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    return took, found["TaskDuration"]


def alternative(records: list[dict[str, Any]], path: Path) -> None:
    from plotly import graph_objects as go

    def heat(record: dict[str, Any]) -> go.Heatmap:
        return go.Heatmap(z=record["p0_attention"], zmin=0, zmax=1)

    frames = [go.Frame(data=[heat(record)], name=str(record["step"])) for record in records]
    steps = [{"args": [[frame.name]], "label": frame.name, "method": "animate"} for frame in frames]
    layout = {"sliders": [{"steps": steps}]}
    go.Figure(data=[heat(records[0])], frames=frames, layout=layout).write_html(path)


if __name__ == "__main__":
    main()
