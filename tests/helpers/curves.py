"""Curves of known truth, with what the signal's rules read of a record."""

from __future__ import annotations

from typing import Any

import numpy as np
from check_signal import Truth, records

CLEAR = Truth(
    onset=2000, width=1000, shape="linear", top=0.7, drop=None, dropped=0.3, noise=0.02,
    lasting=0.0, probe=0.01, spacing="even", restart=False,
)  # fmt: skip
"""A rise and a plateau, in 101 records."""


def curve(truth: Truth = CLEAR, seed: int = 0) -> list[dict[str, Any]]:
    """The records in the order of writing."""
    return records(truth, np.random.default_rng(seed))
