"""The figures of docs/metrics.md, from a demo's run; that of sink logits from a model made here.

sinktrack demo --out demo && python scripts/metric_figures.py demo/run -o docs/images

Drawn by a headless Chromium (playwright), with inks that can be read on light and dark pages.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from paper_figure import picture
from transformers import AutoModelForCausalLM, GptOssConfig

from sinktrack import Probe, Run, measure
from sinktrack.metrics.attention import EPSILON, uniform

WIDTH, HEIGHT = 760, 320
INK, FAINT = "#7d8590", "rgba(125, 133, 144, 0.3)"
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee"]
"""Paul Tol's bright scheme, told apart by colour-blind eyes."""

Records = Sequence[Mapping[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run directory of a demo")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    run = Run.read(options.run)
    assert run.probe is not None
    length = run.probe.length
    figures: dict[str, Callable[[], go.Figure]] = {
        "concentration": lambda: concentration(run.records, length),
        "sink_rate": lambda: sink_rate(run.records),
        "norm_ratio": lambda: norm_ratio(run.records),
        "consistency": lambda: consistency(run.records),
        "shares": lambda: shares(run.records),
        "depth": lambda: depth(run.records),
        "gain": lambda: gain(run.records),
        "sink_logits": sink_logits,
    }
    for name, draw in figures.items():
        path = options.out / f"metric_{name}.svg"
        path.write_bytes(picture(draw(), "svg", WIDTH, HEIGHT))
        print(f"{path}  {path.stat().st_size:,} bytes")


def concentration(records: Records, length: int) -> go.Figure:
    """Attention to P0 by block, with the threshold and what looking everywhere alike gives."""
    figure = blank("optimizer steps", "attention to P0")
    for block in range(blocks(records)):
        values = [record["concentration"][block] for record in records]
        line(figure, f"block {block}", records, values, block)
    level(figure, EPSILON, "a sink: 0.3", "top left")
    level(figure, uniform(length - 1), "uniform attention", "bottom right")
    return figure


def sink_rate(records: Records) -> go.Figure:
    """The sink rate at four thresholds, that of 0.3 with its interval."""
    figure = blank("optimizer steps", "sink rate")
    low, high = zip(*(record["intervals"]["sink_rate"] for record in records), strict=True)
    band(figure, "0.3: 95 % over sequences", [record["step"] for record in records], low, high)
    for number, eps in enumerate(("0.1", "0.2", "0.3", "0.5")):
        values = [mean(record["sink_rate_by_block"][eps]) for record in records]
        line(figure, f"threshold {eps}", records, values, number)
    return figure


def norm_ratio(records: Records) -> go.Figure:
    """The norm ratio at each block's input, early and late, and over single first tokens."""
    figure = blank("input of block (the last: output)", "norm of P0 over that of the others")
    last = records[-1]
    quantiles = last["first_token"]["norm_ratio"]
    places = list(range(len(last["norm_ratio"])))
    name = f"step {last['step']}, single first tokens, 5 to 95 %"
    band(figure, name, places, quantiles["5"], quantiles["95"])
    for number, record in enumerate((records[0], records[len(records) // 3], last)):
        figure.add_scatter(
            x=places, y=record["norm_ratio"], name=f"step {record['step']}",
            mode="lines+markers", line={"color": COLOURS[number]},
        )  # fmt: skip
    figure.update_xaxes(dtick=1)
    return figure.update_yaxes(type="log", tickvals=[0.2, 0.5, 1, 2, 5, 10, 20])


def consistency(records: Records) -> go.Figure:
    """Direction consistency over single first tokens at each block's input."""
    figure = blank("optimizer steps", "mean cosine")
    for block in range(blocks(records) + 1):
        name = f"input of block {block}" if block < blocks(records) else "output"
        values = [record["first_token"]["direction_consistency"][block] for record in records]
        line(figure, name, records, values, block)
    return figure.update_yaxes(range=[-0.05, 1.05])


def shares(records: Records) -> go.Figure:
    """Who writes the P0 state that later blocks read, at some steps from the first sink on."""
    figure = blank("optimizer step (first block of the sink)", "share of the P0 state")
    formed = [record for record in records if record["formed"] and record["shares"]]
    chosen = [formed[i * (len(formed) - 1) // 5] for i in range(6)]
    names = [f"{record['step']} ({record['reference_block']})" for record in chosen]
    kinds: dict[str, None] = {}
    for record in chosen:
        kinds |= dict.fromkeys(part_name(part) for part in record["shares"])
    for number, kind in enumerate(sorted(kinds, key=lambda kind: (kind == "embedding", kind))):
        found = [
            next((p["share"] for p in record["shares"] if part_name(p) == kind), None)
            for record in chosen
        ]
        colour = INK if kind == "embedding" else COLOURS[number % len(COLOURS)]
        figure.add_bar(x=names, y=found, name=kind, marker_color=colour)
    figure.update_xaxes(type="category")
    return figure.update_layout(barmode="relative").update_yaxes(tickformat=".0%")


def part_name(part: Mapping[str, Any]) -> str:
    return "embedding" if part["block"] is None else f"{part['kind']} {part['block']}"


def depth(records: Records) -> go.Figure:
    """Where the writing is centred, over how many blocks it is spread, where the sink begins."""
    figure = blank("optimizer steps", "blocks")
    name = "reference_block"
    figure.add_scatter(
        x=[record["step"] for record in records], y=[record[name] for record in records],
        name=name, line={"color": INK, "shape": "hv"},
    )  # fmt: skip
    for number, name in enumerate(("effective_blocks", "depth")):
        line(figure, name, records, [record[name] for record in records], number)
    return figure


def sink_logits() -> go.Figure:
    """One untrained gpt-oss of two blocks, all of whose sink logits are raised together."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, intermediate_size=32, num_local_experts=2, num_experts_per_tok=1,
        sliding_window=64, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    probe, raised = Probe.random(64, 16, 16), torch.linspace(-4, 6, 21)
    found = []
    for value in raised:
        for block in model.model.layers:
            block.self_attn.sinks.data.fill_(value)
        found.append(measure(model, probe))
    figure = blank("sink logit of every head", "probability")
    for number, name in enumerate(("sink_logit_mass", "p0_attention")):
        means = [float(getattr(one, name).mean()) for one in found]
        figure.add_scatter(
            x=raised.tolist(), y=means, name=name, line={"color": COLOURS[number]}
        )  # fmt: skip
    return figure


def gain(records: Records) -> go.Figure:
    """Where the norm ratio grows at the end of the run: up to its peak, block by block."""
    figure = blank("block", "log of the norm ratio's growth")
    for number, record in enumerate((records[len(records) // 3], records[-1])):
        figure.add_bar(
            x=list(range(blocks(records))), y=record["gain"], marker_color=COLOURS[number],
            name=f"step {record['step']}, peak at the input of block {record['peak_block']}",
        )  # fmt: skip
    return figure.update_xaxes(dtick=1)


def blank(x: str, y: str) -> go.Figure:
    """No background: the page's own shows."""
    axis = {"gridcolor": FAINT, "zerolinecolor": FAINT, "linecolor": INK}
    return go.Figure(
        layout={
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": INK, "size": 13}, "margin": {"l": 62, "r": 10, "t": 10, "b": 48},
            "xaxis": axis | {"title": {"text": x}}, "yaxis": axis | {"title": {"text": y}},
        }
    )  # fmt: skip


def line(figure: go.Figure, name: str, records: Records, values: list[Any], number: int) -> None:
    steps = [record["step"] for record in records]
    figure.add_scatter(x=steps, y=values, name=name, line={"color": COLOURS[number]})


def band(
    figure: go.Figure, name: str, x: list[int], low: Sequence[float], high: Sequence[float]
) -> None:
    figure.add_scatter(
        x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=FAINT, mode="none",
        name=name,
    )  # fmt: skip


def level(figure: go.Figure, value: float, text: str, where: str) -> None:
    """A horizontal line that says what it is."""
    figure.add_hline(
        y=value, line={"color": INK, "dash": "dot", "width": 1}, annotation_text=text,
        annotation_position=where, annotation_font_size=11,
    )  # fmt: skip


def blocks(records: Records) -> int:
    return int(records[-1]["model"]["blocks"])


def mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


if __name__ == "__main__":
    main()
