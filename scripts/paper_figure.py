"""Per-block norm of the P0 state and attention to P0 over training, as in arXiv 2603.06591.

python scripts/paper_figure.py RUN -o figure.svg    # or .png, .html; --over tokens

SVG and PNG are drawn by a headless Chromium (pip install playwright); .html needs none.
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from chromium import chromium

from sinktrack import Run, SinktrackError
from sinktrack.figures import training

WIDTH, HEIGHT = 1000, 420


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("-o", "--out", type=Path, default=Path("figure.svg"))
    parser.add_argument("--over", choices=["step", "tokens"], default="step")
    options = parser.parse_args()
    if options.out.suffix not in (".svg", ".png", ".html"):
        parser.error(f"{options.out}: an .svg, a .png or an .html")
    try:
        figure = training(Run.read(options.run).records, options.over)
        if options.out.suffix == ".html":
            figure.write_html(options.out)
        else:
            options.out.write_bytes(picture(figure, options.out.suffix[1:]))
    except (SinktrackError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(f"{error}; see the head of this script")
    print(f"wrote {options.out}")


def picture(figure: Any, form: str, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A plotly Figure as ``svg`` or ``png``."""
    from plotly.offline import get_plotlyjs

    with chromium() as browser:
        page = browser.new_page()
        page.set_content("<div id='figure'></div>")
        page.add_script_tag(content=get_plotlyjs())
        address = page.evaluate(
            """async ([figure, format, width, height]) => {
                const { data, layout } = JSON.parse(figure);
                return Plotly.toImage({ data, layout }, { format, width, height, scale: 2 });
            }""",
            [figure.to_json(), form, width, height],
        )
    head, body = address.split(",", 1)
    return base64.b64decode(body) if head.endswith(";base64") else unquote(body).encode()


if __name__ == "__main__":
    main()
