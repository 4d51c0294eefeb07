"""Components in words, the same wherever a record is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def name(part: Mapping[str, Any]) -> str:
    """``MLP 11``, ``attention 0``, ``expert 5 of block 2``; several that were changed together."""
    if part.get("components"):
        *first, last = map(name, part["components"])
        return f"{', '.join(first)} and {last}" if first else last
    kind = {"mlp": "MLP", "state": "P0's whole state at block"}.get(
        part["kind"], part["kind"].replace("_", " ")
    )
    if part["block"] is None:
        return f"the {kind}" if kind == "embedding" else kind
    if part.get("index") is None:
        return f"{kind} {part['block']}"
    return f"{kind} {part['index']} of block {part['block']}"
