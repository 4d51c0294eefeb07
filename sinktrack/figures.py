"""Figures of a run and of a measurement, for notebooks and papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sinktrack.errors import MissingExtra, RecordError, require
from sinktrack.metrics import FIELDS
from sinktrack.metrics.axes import by_block, is_by_block

if TYPE_CHECKING:
    from sinktrack.measurement import Measurement

_DEPTHS = ["#20307c", "#6d2a93", "#b8336f", "#e0632f", "#eba52a"]
_HEATS = ["#f3f7fd", "#b9d6f0", "#6aa6da", "#2b67b0", "#0f2a63"]
_AXES = {"step": "optimizer steps", "tokens": "tokens"}


def training(records: Sequence[Mapping[str, Any]], over: Literal["step", "tokens"] = "step") -> Any:
    """Norm of the P0 state and attention to P0 over training, a line per block (2603.06591).

    Args:
        records: of one run, in step order.
        over: the x axis; records without a token count are left out of that over tokens.

    Returns:
        A plotly Figure.

    Raises:
        RecordError: no record has a place on the axis.
        MissingExtra: plotly is not installed.
    """
    drawn_fields = [FIELDS["p0_norm"], FIELDS["concentration"]]
    figure = _panels([field.title[0].upper() + field.title[1:] for field in drawn_fields])
    drawn = [record for record in records if record[over] is not None]
    if not drawn:
        raise RecordError(f"there is no record with {_AXES[over]} to draw")
    x = [record[over] for record in drawn]
    blocks = drawn[-1]["model"]["blocks"]
    colours = _colours(blocks + 1)
    mode = "lines" if len(x) > 60 else "lines+markers"
    for column, field in enumerate(drawn_fields, 1):
        for block in range(len(drawn[-1][field.name])):
            name = f"block {block}" if block < blocks else "output"
            figure.add_scatter(
                x=x,
                y=[record[field.name][block] for record in drawn],
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                mode=mode,
                line={"color": colours[block], "width": 1.2 if blocks > 12 else 2},
                row=1,
                col=column,
            )
    figure.update_xaxes(title=_AXES[over])
    for column, field in enumerate(drawn_fields, 1):
        figure.update_yaxes(type=field.scale, title=field.unit, row=1, col=column)
    figure.update_yaxes(rangemode="tozero", row=1, col=2)
    return figure


def curve(
    records: Sequence[Mapping[str, Any]], name: str, over: Literal["step", "tokens"] = "step"
) -> Any:
    """Any field over training: a line, or one for each block; of a field by head the mean.

    Args:
        records: of one run, in step order.
        name: the field's, as in `sinktrack.metrics.FIELDS`.
        over: the x axis; records without a token count are left out of that over tokens.

    Returns:
        A plotly Figure.

    Raises:
        RecordError: there is no such field, or no record that has it and a place on the axis.
        MissingExtra: plotly is not installed.
    """
    field = FIELDS.get(name)
    if field is None or not (is_by_block(field) or not field.axes):
        raise RecordError(f"{name} is no field that is drawn over training")
    drawn = [
        record for record in records if record[over] is not None and record.get(name) is not None
    ]
    if not drawn:
        raise RecordError(f"there is no record with {name} and {_AXES[over]} to draw")
    figure = _panels([field.title])
    rows = [by_block(record, field) if field.axes else [record[name]] for record in drawn]
    colours = _colours(max(2, len(rows[0])))
    for block in range(len(rows[0])):
        figure.add_scatter(
            x=[record[over] for record in drawn],
            y=[row[block] for row in rows],
            name=f"block {block}" if field.axes else field.title,
            mode="lines" if len(drawn) > 60 else "lines+markers",
            line={"color": colours[block]},
        )
    figure.update_xaxes(title=_AXES[over])
    figure.update_yaxes(type=field.scale, title=field.unit)
    return figure


def measured(measurement: Measurement) -> Any:
    """Attention to P0 by head, the norm ratio by block, and who writes the P0 state.

    Returns:
        A plotly Figure.

    Raises:
        MissingExtra: plotly is not installed.
    """
    fields = (FIELDS[name] for name in ("p0_attention", "norm_ratio", "shares"))
    figure = _panels([field.title[0].upper() + field.title[1:] for field in fields])
    figure.add_heatmap(
        z=measurement.p0_attention.tolist(),
        zmin=0,
        zmax=1,
        colorscale=_HEATS,
        colorbar={"x": 0.28, "thickness": 10},
        row=1,
        col=1,
    )
    ratio = measurement.norm_ratio.tolist()
    figure.add_bar(x=list(range(len(ratio))), y=ratio, marker_color=_HEATS[3], row=1, col=2)
    shares = measurement.localization.shares
    names = [
        part.kind if part.block is None else f"block {part.block} {part.kind}" for part in shares
    ]
    figure.add_bar(
        x=[part.share for part in shares],
        y=names,
        orientation="h",
        marker_color=_HEATS[3],
        row=1,
        col=3,
    )
    figure.update_xaxes(title="head", dtick=1 if measurement.model["heads"] <= 16 else None, col=1)
    figure.update_yaxes(title="block", autorange="reversed", col=1)
    figure.update_xaxes(title="input of block", col=2)
    figure.update_xaxes(tickformat=".0%", col=3)
    figure.update_yaxes(autorange="reversed", automargin=True, col=3)
    return figure.update_layout(showlegend=False)


def shown(draw: Callable[[Any], Any], of: Any) -> dict[str, Any]:
    """A figure as a notebook takes it; nothing where plotly is not installed."""
    try:
        bundle: dict[str, Any] = draw(of)._repr_mimebundle_()
    except MissingExtra:
        return {}
    return bundle


def _panels(titles: list[str]) -> Any:
    require("plotly", "report")
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(titles), subplot_titles=titles, horizontal_spacing=0.1)
    return figure.update_layout(template="plotly_white", height=420, margin={"t": 40, "r": 20})


def _colours(count: int) -> list[str]:
    from plotly.colors import sample_colorscale

    scale = [[i / (len(_DEPTHS) - 1), colour] for i, colour in enumerate(_DEPTHS)]
    colours: list[str] = sample_colorscale(scale, count)
    return colours
