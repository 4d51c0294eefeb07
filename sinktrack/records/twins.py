"""Steps that hold the same weights, by the digests in their records.

Public archives do serve one checkpoint under several names; and where the learning rate is zero,
nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NAMED = 8


def equal_weights(records: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """Steps of equal weights: groups of two or more, each ascending, by their first steps.

    Records without a digest, as of the first blocks alone, are in none.
    """
    steps: dict[str, set[int]] = {}
    for record in records:
        if record.get("weights"):
            steps.setdefault(record["weights"], set()).add(record["step"])
    return sorted(sorted(group) for group in steps.values() if len(group) > 1)


def told(steps: Sequence[int]) -> str:
    """A group in words."""
    named = [str(step) for step in steps]
    if len(named) > _NAMED:
        named = [*named[: _NAMED - 1], f"{len(named) - _NAMED + 1} others"]
    return f"steps {', '.join(named[:-1])} and {named[-1]} hold the same weights, by their digest"
