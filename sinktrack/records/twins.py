"""Records of the same weights, by their digests and by what was measured of them.

Public archives do serve one checkpoint under several names; and where the learning rate is zero,
nothing is trained. The digest alone does not tell: it is of norms, biases and rows of the
embedding, which adapters leave as they are, and trainings that freeze them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_NAMED = 8
_NUMBERS = ("p0_attention", "norm_ratio", "p0_norm")
"""Fields that other weights would change, whichever they are."""
_APART = 1e-6
"""By how much two measurements of the same weights differ on one machine, in parts of a number."""


def digests_agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Are two records of the same digest, the same probe and the same dtype?"""
    named = ("weights", "probe", "dtype", "measured_blocks")
    return bool(one.get("weights")) and all(one.get(name) == other.get(name) for name in named)


def apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How far the numbers of two records are from each other, in parts of the larger or of 1."""
    return max(_apart(one.get(name), other.get(name)) for name in _NUMBERS)


def _apart(one: Any, other: Any) -> float:
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((_apart(*pair) for pair in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) / max(1.0, abs(one), abs(other))
    return 0.0 if one == other else math.inf


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Are two records of the same weights, as far as their numbers tell?"""
    return digests_agree(one, other) and apart(one, other) <= _APART


def groups(
    records: Mapping[T, Mapping[str, Any]], alike: Callable[[T], Any] = lambda _: None
) -> list[list[T]]:
    """Those of two or more records of the same weights, in order.

    Args:
        records: by what names them.
        alike: what the names of a group must have in common.
    """
    found: list[list[T]] = []
    by_digest: dict[Any, list[list[T]]] = {}
    for name, record in records.items():
        if not record.get("weights"):
            continue
        others = by_digest.setdefault((record["weights"], alike(name)), [])
        own = next((group for group in others if same(records[group[0]], record)), None)
        if own is None:
            others.append(own := [])
            found.append(own)
        own.append(name)
    return [group for group in found if len(group) > 1]


def equal_weights(records: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """Steps of equal weights: groups of two or more, each ascending, by their first steps.

    Records without a digest, as of the first blocks alone, are in none.
    """
    latest = {record["step"]: record for record in records}
    return sorted(map(sorted, groups(latest)))


def like(record: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> list[int]:
    """Steps of the same weights as this record, its own among them, ascending."""
    latest = {one["step"]: one for one in records} | {record["step"]: record}
    return sorted(step for step, one in latest.items() if one is record or same(one, record))


def told(steps: Sequence[int]) -> str:
    """A group in words."""
    named = [str(step) for step in steps]
    if len(named) > _NAMED:
        named = [*named[: _NAMED - 1], f"{len(named) - _NAMED + 1} others"]
    return f"steps {', '.join(named[:-1])} and {named[-1]} hold the same weights, by their digest"
