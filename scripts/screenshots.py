"""Screenshots for the documentation, from a demo's run.

sinktrack demo --out demo && python scripts/screenshots.py demo -o docs/images
With --pretrained, also from a scan of one model, such as that of the tutorial.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from chromium import chromium
from paper_figure import picture
from PIL import Image

from sinktrack import Run
from sinktrack.figures import training
from sinktrack.signal.loss import read_losses
from sinktrack.views.report import write_report

MOST_BYTES = 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="what sinktrack demo wrote")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--pretrained", type=Path, help="a run of one record")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    online, offline = (Run.read(options.demo / name) for name in ("run", "scanned"))
    one, two = options.demo / "one.html", options.demo / "two.html"
    checkpoints = options.demo / "checkpoints" / offline.records[-1]["source"]
    write_report({"demo": online.history}, one, {"demo": read_losses(checkpoints)})
    write_report({"callback": online.history, "scanner": offline.history}, two)
    with chromium() as browser:
        page = opened(browser, one, "light")
        keep(options.out / "report.png", page.screenshot())
        keep(options.out / "report_blocks.png", shot(page, "#blocks"))
        page.locator("#record").fill(str(len(online) // 2))
        keep(options.out / "report_record.png", page.locator("#detail").screenshot())
        keep(options.out / "report_dark.png", opened(browser, one, "dark").screenshot())
        keep(options.out / "report_runs.png", opened(browser, two, "light").screenshot())
        if options.pretrained is not None:
            write_report({"SmolLM2-135M": Run.read(options.pretrained).history}, one)
            keep(options.out / "report_pretrained.png", opened(browser, one, "light").screenshot())
    keep(options.out / "paper_figure.png", picture(training(online.records), "png"))


def opened(browser: Any, path: Path, scheme: str) -> Any:
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 1060})
    page.goto(path.absolute().as_uri())
    page.wait_for_selector("#shares .main-svg")
    return page


def shot(page: Any, chart: str) -> bytes:
    """The figure around a chart."""
    found: bytes = page.locator("figure", has=page.locator(chart)).screenshot()
    return found


def keep(path: Path, png: bytes) -> None:
    """Write with 128 colours: half the size, and no eye sees it."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{path} takes {size:,} bytes, more than {MOST_BYTES:,}")
    print(f"{path}  {size:,} bytes")


if __name__ == "__main__":
    main()
