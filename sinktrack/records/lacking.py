"""Fields that a record lacks: an older version did not measure them, or somebody left them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sinktrack.metrics import FIELDS
from sinktrack.metrics.attention import LEVELS
from sinktrack.metrics.base import Field

_ABOUT: dict[str, Any] = {
    "tokens": None, "source": None, "weights": None, "probe": None, "seconds": None, "dtype": None,
}  # fmt: skip


def filled(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with null in the place of each field that it lacks, by block where the field is."""
    blocks = record["model"]["blocks"]
    empty = {name: null(field, blocks) for name, field in FIELDS.items() if name not in record}
    about = {"versions": {}, "intervals": {}, "block_kinds": ["unknown"] * blocks}
    return {**_ABOUT, **about, **empty, **record}


def null(field: Field, blocks: int) -> Any:
    """What a field holds where nothing of it was measured."""
    if field.axes[:2] == ("level", "block"):
        return {str(level): [None] * blocks for level in LEVELS}
    if field.axes[:1] in (("block",), ("boundary",)):
        return [None] * (blocks + (field.axes[0] == "boundary"))
    return None
