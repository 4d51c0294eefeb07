"""Value drain: a sink of small value vectors does nothing, one of large ones broadcasts.

Guo et al. 2024 (arXiv 2410.13835) name heads whose sink has a small value dormant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from sinktrack.lazy import torch
from sinktrack.metrics.base import Field, Metric, PartialStates, Seen, State, median, norms

if TYPE_CHECKING:
    from sinktrack.attention import Attended


class Values(Metric):
    """The norm of P0's value vectors beside those of other positions."""

    fields = (
        Field("value_ratio", "value ratio", "Norm of P0's value vector over the median norm of "
              "the other positions' values.", ("block", "kv_head"), "", "log"),
    )  # fmt: skip
    states: ClassVar = {"p0": State("whole", heads=True), "others": State("whole", heads=True)}

    def on_attention(self, attended: Attended) -> PartialStates:
        """Norms of the values; nothing where the values are not shown."""
        if attended.value is None:
            return {}
        size = norms(attended.value)
        rest = size[..., 1:].transpose(1, 2)
        return {
            "p0": size[..., 0].clone(),
            "others": rest.clone() if rest.shape[1] else None,
        }

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """None where no attention shows its values."""
        own, others = (seen.collected.of("values", name) for name in ("p0", "others"))
        rows = {}
        for block, parts in own.items():
            rest = torch.cat([part.flatten(0, 1) for part in others[block]])
            rows[block] = torch.cat(parts).mean(0) / median(rest.T)
        if not rows:
            return {"value_ratio": None}
        width = max(len(row) for row in rows.values())
        ratio = torch.full((seen.blocks, width), torch.nan)
        for block, row in rows.items():
            ratio[block, : len(row)] = row
        return {"value_ratio": ratio}
