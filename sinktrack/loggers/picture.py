"""Heat maps as pixels, for dashboards that have no heat map of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinktrack.records.thinned import evenly

_STOPS = np.array(
    [[243, 247, 253], [185, 214, 240], [106, 166, 218], [43, 103, 176], [15, 42, 99]], dtype=float
)
_GAP = (198, 202, 210)
_CELL, _WIDEST, _HIGHEST = 24, 960, 480
"""Pixels: the side of a cell where there is room, and of the whole."""


def heads(record: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Attention to P0, blocks from top to bottom and heads from left to right.

    Returns:
        RGB ``[height, width, 3]``; see `heat`.
    """
    return heat(record["p0_attention"])


def blocks(records: Sequence[Mapping[str, Any]]) -> NDArray[np.uint8]:
    """Concentration, blocks from top to bottom and records from left to right.

    Returns:
        RGB ``[height, width, 3]``; of more records than pixels as many as there are, evenly.
    """
    drawn = [records[i] for i in evenly(len(records), _WIDEST)]
    return heat(np.array([record["concentration"] for record in drawn], dtype=float).T)


def heat(values: Any) -> NDArray[np.uint8]:
    """Values from 0 to 1 as RGB ``[height, width, 3]``, light for 0 and dark for 1.

    Args:
        values: ``[rows, columns]``; None and nan become grey.
    """
    cells = np.array(values, dtype=float)
    cells = cells.reshape(len(cells), -1)  # of blocks without heads, a column of gaps
    gaps = np.isnan(cells)
    place = np.clip(np.nan_to_num(cells), 0, 1) * (len(_STOPS) - 1)
    low = np.minimum(place.astype(int), len(_STOPS) - 2)
    part = (place - low)[..., None]
    colours = _STOPS[low] * (1 - part) + _STOPS[low + 1] * part
    colours[gaps] = _GAP
    high, wide = (
        max(1, min(_CELL, room // count))
        for room, count in zip((_HIGHEST, _WIDEST), cells.shape, strict=True)
    )
    pixels: NDArray[np.uint8] = colours.round().astype(np.uint8).repeat(high, 0).repeat(wide, 1)
    return pixels
