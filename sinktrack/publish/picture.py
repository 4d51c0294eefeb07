"""Heat maps as pixels, for dashboards that have no heat map of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_STOPS = np.array(
    [[243, 247, 253], [185, 214, 240], [106, 166, 218], [43, 103, 176], [15, 42, 99]], dtype=float
)
_GAP = (198, 202, 210)
_LEAST = 240
"""Pixels of the shorter side at least, so that a cell can be seen."""


def heat(values: Sequence[Sequence[float | None]], top: float = 1.0) -> NDArray[np.uint8]:
    """Rows from top to bottom as RGB ``[height, width, 3]``, light for 0 and dark for ``top``.

    Args:
        values: ``[rows, columns]``; None and nan become grey.
        top: the value of the darkest colour.
    """
    cells = np.array(values, dtype=float)
    gaps = np.isnan(cells)
    place = np.clip(np.nan_to_num(cells) / top, 0, 1) * (len(_STOPS) - 1)
    low = np.minimum(place.astype(int), len(_STOPS) - 2)
    part = (place - low)[..., None]
    colours = _STOPS[low] * (1 - part) + _STOPS[low + 1] * part
    colours[gaps] = _GAP
    size = -(-_LEAST // min(cells.shape))
    pixels: NDArray[np.uint8] = colours.round().astype(np.uint8).repeat(size, 0).repeat(size, 1)
    return pixels
