"""What every ``bench_*.py --short`` prints for ``bench.py``: ratios, each as a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

Kind = Literal["count", "memory", "time"]
"""Counts are the same in every run; memory and time depend on the machine and what else it does."""


def tell(kind: Kind, ratios: Mapping[str, float]) -> None:
    """Print ratios by name; of each, less is better.

    Args:
        kind: what they are ratios of.
        ratios: a name says what is divided by what.
    """
    for name, ratio in ratios.items():
        print(json.dumps({"name": name, "kind": kind, "ratio": float(f"{ratio:.5g}")}), flush=True)
