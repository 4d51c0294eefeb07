"""Fewer of many, evenly, for what cannot draw them all."""

from __future__ import annotations


def evenly(count: int, most: int) -> list[int]:
    """Indices of at most so many of a sequence, evenly: the first and the last always.

    Args:
        count: the sequence's length.
        most: 2 or more; of 1 there is the last alone.
    """
    if count <= most:
        return list(range(count))
    if most < 2:
        return [count - 1]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
