"""Attention to P0: concentration, sink rate, sink heads.

Gu et al. 2025 (arXiv 2410.10781) define the sink rate; a head of one sequence is a sink where its
mean attention to P0, query 0 included, exceeds a threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from sinktrack.lazy import torch
from sinktrack.metrics.base import Field, Metric, PartialStates, PositionShard, Seen, State

if TYPE_CHECKING:
    from torch import Tensor

    from sinktrack.attention import Attended

EPSILON = 0.3
"""Attention to P0 from which a head, or a block's mean, counts as a sink (Gu et al. 2025)."""
LEVELS = (0.1, 0.2, 0.3, 0.5)
"""Thresholds of which the sink rate by block is recorded."""
HEAD_LEVELS = (0.1, 0.3)
"""Thresholds of which the sink heads are counted; published counts take about 0.105."""


class Attention(Metric):
    """Attention to P0 by block and head."""

    fields = (
        Field("visible_queries", "queries that see P0", "Queries after the first of a sequence "
              "that can see P0.", ("block",), "queries"),
        Field("p0_attention", "attention to P0", "Mean attention probability on P0 over the "
              "queries after the first that can see it.", ("block", "head"), "probability"),
        Field("concentration", "attention to P0", "Mean attention to P0 over the heads of a "
              "block.", ("block",), "probability", form=".3f", curve=True),
        Field("uniform", "even attention to P0", "What attention spread evenly over the visible "
              "keys would give P0.", ("block",), "probability", form=".3f"),
        Field("sink_rate", "sink rate", "Share of (sequence, block, head) whose mean attention to "
              "P0 exceeds 0.3.", (), "share", form=".1%", curve=True),
        Field("sink_rate_from_2", "sink rate from block 2", "The sink rate without blocks 0 and "
              "1.", (), "share", form=".1%", curve=True),
        Field("sink_rate_by_block", "sink rate", "Share of a block's (sequence, head) whose mean "
              "attention to P0 exceeds a threshold.", ("level", "block"), "share", form=".1%"),
        Field("sink_heads", "sink heads", "Heads of a block that are sinks in at least half of "
              "the sequences.", ("level", "block"), "heads", form=".0f"),
        Field("sink_sequences", "sequences with a sink", "Share of the sequences in which a head "
              "is a sink at 0.3.", ("block", "head"), "share", form=".0%"),
        Field("first_sink_block", "first block with a sink head", "The first block of which a "
              "head is a sink in at least half of the sequences.", (), "block", form=".0f",
              curve=True),
    )  # fmt: skip
    states: ClassVar = {
        "visible": State("whole"),
        "uniform": State("whole"),
        "p0": State("whole", heads=True),
        "own": State("whole", heads=True),
    }

    def on_attention(self, attended: Attended) -> PartialStates:
        """Average over the queries that see P0; ``visible`` is nan where P0 sees not itself."""
        sequences = len(attended.p0)
        seen = attended.visible.expand(sequences, -1)
        counts = seen[:, 1:].sum(-1, keepdim=True)
        even = (seen[:, 1:] / attended.keys[..., 1:]).sum(-1, keepdim=True) / counts
        return {
            "visible": counts.float().where(seen[:, :1], torch.nan),  # no GPU is waited for
            "uniform": even.float(),
            "p0": attended.p0[..., 1:].sum(-1) / counts,
            "own": attended.p0[..., 0].clone(),
        }

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """As the fields say."""
        visible = seen.by_block("attention", "visible")[..., 0]
        p0, own = seen.by_block("attention", "p0"), seen.by_block("attention", "own")
        alpha = alphas(visible, p0, own)
        sinks = {eps: _over(alpha, eps) for eps in {*LEVELS, *HEAD_LEVELS}}
        often = {eps: sinks[eps].mean(0) for eps in HEAD_LEVELS}
        heads = {eps: (share >= 0.5).double().sum(-1) for eps, share in often.items()}
        for count in heads.values():
            count[p0.isnan().all(0).all(-1)] = torch.nan
        first = (heads[EPSILON] >= 1).nonzero()
        concentration = p0.mean(0).nanmean(-1)
        whole = not seen.partial
        return {
            "visible_queries": visible,
            "p0_attention": p0,
            "own_attention": own,
            "concentration": concentration,
            "uniform": seen.by_block("attention", "uniform")[..., 0].mean(0),
            "sink_rate": rate(alpha, EPSILON) if whole else None,
            "sink_rate_from_2": rate(alpha[:, 2:], EPSILON) if whole else None,
            "sink_rate_by_block": {str(eps): sinks[eps].nanmean((0, 2)) for eps in LEVELS},
            "sink_heads": {str(eps): heads[eps] for eps in HEAD_LEVELS},
            "sink_sequences": often[EPSILON],
            "first_sink_block": int(first[0]) if len(first) else None,
        }


def alphas(visible: Tensor, p0: Tensor, own: Tensor) -> Tensor:
    """float64 ``[B, L, H]``: mean over all queries that see P0, query 0 included.

    Args:
        visible: ``[B, L]``, queries after the first that see P0.
        p0: ``[B, L, H]``, their mean attention to it.
        own: ``[B, L, H]``, of query 0 to itself.
    """
    count = visible.double()[..., None]
    return (p0.double() * count + own.double()) / (count + 1)


def uniform(queries: int) -> float:
    """Attention to P0 of a head that looks at all earlier positions alike.

    Args:
        queries: how many see P0, from query 1 on: the mean over them of ``1 / (i + 1)``.
    """
    return sum(1 / (i + 1) for i in range(1, queries + 1)) / queries


def rate(alpha: Tensor, eps: float) -> float:
    """Share of ``alpha`` ``[B, L, H]`` above ``eps``; nan where no block has softmax attention."""
    return float(_over(alpha, eps).nanmean())


def _over(alpha: Tensor, eps: float) -> Tensor:
    return torch.where(alpha.isnan(), torch.nan, (alpha > eps).double())


class SinkLogits(Metric):
    """Probability on learned sink logits, which stand for no position (gpt-oss)."""

    fields = (
        Field("sink_logit_mass", "on sink logits", "Mean probability on a head's learned sink "
              "logit.", ("block", "head"), "probability", form=".3f"),
    )  # fmt: skip
    states: ClassVar = {"mass": State("whole", heads=True)}

    def on_attention(self, attended: Attended) -> PartialStates:
        """Average over the queries after the first."""
        return {"mass": None if attended.sink is None else attended.sink[..., 1:].mean(-1)}

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """None where no block has sink logits."""
        kept = seen.collected.of("sink_logits", "mass")
        return {"sink_logit_mass": seen.by_block("sink_logits", "mass").mean(0) if kept else None}


class Gates(Metric):
    """Gates on the heads' outputs, which may close where attention rests on P0 (Qwen3-Next)."""

    fields = (
        Field("attention_gate", "gate", "Mean gate on a head's output after the first query; "
              "attention to P0 is that before the gate.", ("block", "head"), "share", form=".2f"),
    )  # fmt: skip
    states: ClassVar = {"sum": State("sum", heads=True), "count": State("sum")}

    def on_gate(self, gate: Tensor, shard: PositionShard) -> PartialStates:
        """Add up over the queries after the first."""
        rest = shard.rest(gate)
        count = torch.full((len(gate), 1), float(rest.shape[1]))
        return {"sum": rest.sum(1), "count": count}

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """None where no block has gates."""
        if not seen.collected.of("gates", "sum"):
            return {"attention_gate": None}
        gate = seen.by_block("gates", "sum") / seen.by_block("gates", "count")
        return {"attention_gate": gate.mean(0)}
