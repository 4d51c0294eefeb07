"""Published counts of sink heads over real pretraining, as runs of records; and their figure.

tests/data/published_sink_heads.json holds sink heads by block of OLMo-1B, OLMoE-1B-7B and Pythia-1B
at some revisions (data behind arXiv 2606.02378; its own criterion of a sink head, about 0.105 of
one late query's attention). Each model becomes a run directory whose records hold `sink_heads` and
`first_sink_block`; what nobody published is null.

    python scripts/published_runs.py OUT
    python scripts/published_runs.py OUT --figure docs/images/first_sink_block.svg \
        --beside tests/data/runs/seed1-lr0.005

SVG and PNG are drawn by a headless Chromium (pip install playwright).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sinktrack.metrics import FIELDS
from sinktrack.records.lacking import null
from sinktrack.records.run import SCHEMA, Run

DATA = Path(__file__).parents[1] / "tests" / "data" / "published_sink_heads.json"
LEVEL = "0.1"
"""The recorded threshold that is nearest to the published one."""
REASON = "the published counts hold sink heads alone"


def published(name: str, path: Path = DATA) -> list[dict[str, Any]]:
    """Records of one of the models, in step order.

    Raises:
        KeyError: no model of that name in the file.
    """
    about = json.loads(path.read_text())["models"][name]
    model = {"type": name, "heads": about["heads"], "experts": about.get("experts")}
    return [
        _record(model, one["step"], one["tokens"], one["sink_heads_by_block"])
        for one in about["revisions"]
    ]


def names(path: Path = DATA) -> list[str]:
    """Of the models in the file."""
    return list(json.loads(path.read_text())["models"])


def _record(model: dict[str, Any], step: int, tokens: int, counts: list[int]) -> dict[str, Any]:
    blocks = len(counts)
    known = {
        "sink_heads": {LEVEL: counts},
        "first_sink_block": next((block for block, count in enumerate(counts) if count), None),
    }
    empty = {name: null(field, blocks) for name, field in FIELDS.items()}
    return {
        "schema": SCHEMA, "step": step, "tokens": tokens, "source": "published", "weights": None,
        "probe": None, "model": model | {"blocks": blocks}, "dtype": None, "versions": {},
        "seconds": None, "block_kinds": ["full"] * blocks, **empty, **known, "intervals": {},
        "missing": dict.fromkeys(sorted(FIELDS.keys() - known), REASON),
    }  # fmt: skip


def figure(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Share of each block's heads that are sink heads, a panel a run, with the first of them."""
    from plotly.subplots import make_subplots

    drawn = make_subplots(1, len(runs), subplot_titles=list(runs), horizontal_spacing=0.07)
    for column, records in enumerate(runs.values(), 1):
        heads = records[-1]["model"]["heads"]
        # at equal distances: the records lie at powers of tokens
        x = [_count(record["tokens"]) for record in records]
        shares = [[count / heads for count in record["sink_heads"][LEVEL]] for record in records]
        drawn.add_heatmap(
            x=x, y=list(range(len(shares[0]))), z=list(zip(*shares, strict=True)), zmin=0, zmax=1,
            colorscale=[[0, "#eef2f8"], [1, "#20307c"]], showscale=column == len(runs),
            colorbar={"title": {"text": "sink heads"}, "tickformat": ".0%", "thickness": 10},
            row=1, col=column,
        )  # fmt: skip
        first = [next((b for b, count in enumerate(record["sink_heads"][LEVEL]) if count), None)
                 for record in records]  # fmt: skip
        drawn.add_scatter(
            x=x, y=first, mode="lines+markers", line={"color": "#e0632f", "width": 2},
            name="first block with a sink head", showlegend=column == 1, row=1, col=column,
        )  # fmt: skip
    drawn.update_xaxes(title="tokens", type="category", nticks=8, tickangle=-45)
    drawn.update_yaxes(title="block", autorange="reversed")
    return drawn.update_layout(
        template="plotly_white", height=420, margin={"t": 60, "b": 80, "l": 50, "r": 10},
        legend={"orientation": "h", "y": 1.18, "x": 0},
    )  # fmt: skip


def _count(tokens: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return str(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="where the run directories go")
    parser.add_argument("--figure", type=Path, help="an .svg or a .png of the OLMoE trace")
    parser.add_argument("--beside", type=Path, help="a run directory that is drawn beside it")
    options = parser.parse_args()
    for name in names():
        run = Run.open(options.out / name)
        for record in published(name):
            if record["step"] not in run.steps:
                run.append(record)
        print(run)
    if options.figure is not None:
        from paper_figure import picture

        drawn = {"OLMoE-1B-7B (published)": published("OLMoE-1B-7B-0924")}
        if options.beside is not None:
            records = [json.loads(line) for line in (options.beside / "records.jsonl").open()]
            drawn["the demo's model"] = records
        options.figure.write_bytes(picture(figure(drawn), options.figure.suffix[1:], 1000, 420))


if __name__ == "__main__":
    main()
