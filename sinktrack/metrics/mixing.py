"""The two halves of the circuit: P0's attention is unmixed, and an MLP amplifies it.

The source (arXiv 2603.06591) takes the expected squared norm of an attention output to grow with
``sum_j A_ij^2``, which is 1 where a query attends to one key alone, as P0 does by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from sinktrack.lazy import torch
from sinktrack.metrics.base import (
    Field,
    Metric,
    PartialStates,
    PositionShard,
    Seen,
    State,
    Unmeasured,
    median,
    norms,
)

if TYPE_CHECKING:
    from sinktrack.attention import Attended
    from sinktrack.events import Write


class Mixing(Metric):
    """How unmixed the attention of other positions is."""

    fields = (
        Field("mixing", "unmixedness of other positions", "Mean over the queries after the first "
              "of the sum of their squared attention probabilities; 1 at P0 by construction.",
              ("block", "head"), "probability", form=".3f"),
    )  # fmt: skip
    states: ClassVar = {"squares": State("whole", heads=True)}
    reads_mixing = True

    def on_attention(self, attended: Attended) -> PartialStates:
        """Average over the queries after the first."""
        return {"squares": attended.mixing()[..., 1:].mean(-1)}

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """As the field says."""
        return {"mixing": seen.by_block("mixing", "squares").mean(0)}


class WriteRatios(Metric):
    """What the sublayers write at P0, beside what they write elsewhere."""

    fields = tuple(
        Field(f"{name}_write_ratio", f"{name} write ratio", f"Norm of what the {name} of a block "
              "writes at P0, over the median at the other positions.", ("block",), "", "log")
        for name in ("attention", "mlp")
    )  # fmt: skip
    states: ClassVar = {
        f"{name}_{part}": State(positions)  # type: ignore[arg-type]
        for name in ("attention", "mlp")
        for part, positions in (("p0", "p0"), ("others", "cat"))
    }

    def on_write(self, write: Write, shard: PositionShard) -> PartialStates:
        """Norms of the write."""
        if write.sublayer not in ("attention", "mlp"):
            return {}
        size = norms(write.added)
        rest = shard.rest(size)
        return {
            f"{write.sublayer}_p0": size[:, :1].clone() if shard.p0 else None,
            f"{write.sublayer}_others": rest.clone() if rest.shape[1] else None,
        }

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """nan where a block has no such write, or several.

        Raises:
            Unmeasured: some writes were not seen.
        """
        if seen.collected.lost is not None:
            raise Unmeasured(seen.collected.lost)
        result = {}
        for name in ("attention", "mlp"):
            ratios = torch.full((seen.blocks,), torch.nan)
            others = seen.collected.of("write_ratios", f"{name}_others")
            for block, rows in seen.collected.of("write_ratios", f"{name}_p0").items():
                own = torch.cat(rows)
                if len(own) == seen.sequences:
                    rest = torch.cat([part.flatten() for part in others[block]])
                    ratios[block] = own.mean() / median(rest)
            result[f"{name}_write_ratio"] = ratios
        return result
