"""Heat maps as pixels with axes and a scale, for dashboards that have no heat map of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinktrack.records.thinned import evenly

_STOPS = np.array(
    [[243, 247, 253], [185, 214, 240], [106, 166, 218], [43, 103, 176], [15, 42, 99]], dtype=float
)
_GAP = (198, 202, 210)
_CELL, _WIDEST, _HIGHEST = 36, 900, 540
"""Pixels: the side of a cell where there is room, and of the whole."""
_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 34, 84, 46
"""Pixels around the cells, for the axes and the scale."""
_SMALLEST = 150
"""Pixels that the cells take at least, in both directions."""
_INK, _PAPER = (60, 66, 80), (255, 255, 255)


def heads(record: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Attention to P0, blocks from top to bottom and heads from left to right.

    Returns:
        RGB ``[height, width, 3]``; see `heat`.
    """
    attention = [row or [None] for row in record["p0_attention"]]
    count = max(map(len, attention), default=1)
    return heat(
        [[*row, *[None] * (count - len(row))] for row in attention],
        f"attention to P0, step {record['step']:,}", "head", [str(i) for i in range(count)],
    )  # fmt: skip


def blocks(records: Sequence[Mapping[str, Any]]) -> NDArray[np.uint8]:
    """Concentration, blocks from top to bottom and records from left to right.

    Returns:
        RGB ``[height, width, 3]``; of more records than pixels as many as there are, evenly.
    """
    drawn = [records[i] for i in evenly(len(records), _WIDEST)]
    values = np.array([record["concentration"] for record in drawn], dtype=float).T
    return heat(values, "attention to P0 by record", "step", [f"{r['step']:,}" for r in drawn])


def heat(values: Any, title: str, below: str, columns: Sequence[str]) -> NDArray[np.uint8]:
    """Values from 0 to 1 by block as a picture, light for 0 and dark for 1.

    Args:
        values: ``[blocks, columns]``; None and nan become grey.
        title: what is drawn.
        below: what the columns are.
        columns: their names; as many are written as there is room for.

    Returns:
        RGB ``[height, width, 3]``, with axes, and the scale at the right.
    """
    from PIL import Image, ImageDraw, ImageFont

    cells = _coloured(values)
    high, wide = (
        max(1, max(min(_CELL, room // count), _SMALLEST // count))
        for room, count in zip((_HIGHEST, _WIDEST), cells.shape[:2], strict=True)
    )
    pixels = cells.repeat(high, 0).repeat(wide, 1)
    tall, broad = pixels.shape[:2]
    picture = Image.new("RGB", (_LEFT + broad + _RIGHT, _TOP + tall + _BOTTOM), _PAPER)
    picture.paste(Image.fromarray(pixels), (_LEFT, _TOP))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)

    def write(x: float, y: float, text: str, anchor: str) -> None:
        draw.text((x, y), text, fill=_INK, font=font, anchor=anchor)

    write(_LEFT, _TOP - 10, title, "ls")
    for row in range(0, len(cells), -(-16 // high)):
        write(_LEFT - 8, _TOP + (row + 0.5) * high, str(row), "rm")
    write(6, _TOP - 10, "block", "ls")
    room = 14 + max(draw.textlength(name, font=font) for name in columns)
    for column in range(0, len(columns), max(1, math.ceil(room / wide))):
        write(_LEFT + (column + 0.5) * wide, _TOP + tall + 6, columns[column], "ma")
    write(_LEFT + broad / 2, _TOP + tall + _BOTTOM - 6, below, "ms")
    scale = _coloured(np.linspace(1, 0, tall)[:, None]).repeat(14, 1)
    picture.paste(Image.fromarray(scale), (_LEFT + broad + 18, _TOP))
    for value in (0.0, 0.5, 1.0):
        write(_LEFT + broad + 38, _TOP + (1 - value) * (tall - 1), f"{value:g}", "lm")
    return np.asarray(picture)


def _coloured(values: Any) -> NDArray[np.uint8]:
    """A colour a cell, ``[rows, columns, 3]``."""
    cells = np.array(values, dtype=float)
    cells = cells.reshape(len(cells), -1)  # of blocks without heads, a column of gaps
    gaps = np.isnan(cells)
    place = np.clip(np.nan_to_num(cells), 0, 1) * (len(_STOPS) - 1)
    low = np.minimum(place.astype(int), len(_STOPS) - 2)
    part = (place - low)[..., None]
    colours = _STOPS[low] * (1 - part) + _STOPS[low + 1] * part
    colours[gaps] = _GAP
    pixels: NDArray[np.uint8] = colours.round().astype(np.uint8)
    return pixels
