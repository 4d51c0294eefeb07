"""Outliers: the largest activations and their channels, which quantization and FP8 meet.

Sun et al. 2024 (arXiv 2402.17762) call an activation massive where it exceeds 100 and about 1,000
times the median.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sinktrack.lazy import torch
from sinktrack.metrics.base import (
    Field,
    Metric,
    PartialStates,
    PositionShard,
    Row,
    Seen,
    State,
    lower_median_,
    median,
)

if TYPE_CHECKING:
    from torch import Tensor

_CHANNELS = 3


def _activations(value: Mapping[str, Sequence[float | None]]) -> Iterator[Row]:
    for name, values in value.items():
        for block, number in enumerate(values):
            yield {"metric": f".{name}", "block": block, "value": number}


def _channels(value: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for channel in value:
        yield {"kind": "channel", "index": channel["channel"], "value": channel["share"]}


class Outliers(Metric):
    """The largest activations of the residual stream."""

    fields = (
        Field("max_activation", "largest activation", "Largest absolute value of the stream at P0 "
              "and elsewhere, their channels, and the ratio of the larger to the median: that over "
              "the other positions of each one's median over channels.", ("boundary",), "",
              "log", rows=_activations, chart=".ratio"),
        Field("p0_channels", "channels of the P0 state", "The three channels with the largest "
              "share of P0's squared norm at the main phase's peak.", ("channel",), "share",
              form=".1%", rows=_channels),
    )  # fmt: skip
    states: ClassVar = {"p0": State("p0"), "others": State("max"), "medians": State("cat")}

    def on_state(self, stream: Tensor, shard: PositionShard) -> PartialStates:
        """Largest value and its channel, ``[b, 2]``, at P0 and elsewhere; medians ``[b, t]``."""
        rest = shard.rest(stream)
        kept: PartialStates = {"p0": _largest(stream[:, :1].abs()) if shard.p0 else None}
        if rest.shape[1]:
            size = rest.abs()
            kept["others"] = _largest(size)
            kept["medians"] = lower_median_(size).float()
        return kept

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """As the fields say; channels are None where no sink has formed."""
        own, others = (seen.boundaries("outliers", name) for name in ("p0", "others"))
        medians = seen.collected.of("outliers", "medians")
        middle = torch.stack(
            [median(torch.cat([part.flatten() for part in medians[at]])) for at in sorted(medians)]
        )
        end = seen.blocks + 1
        top, beside = (_first(of) for of in (own, others))
        ratio = torch.maximum(top[:, 0], beside[:, 0]) / middle
        found_at = {"p0": top, "others": beside}
        largest: dict[str, Any] = {
            name: seen.padded(rows[:, 0], end) for name, rows in found_at.items()
        }
        for name, rows in found_at.items():
            channels_at = rows[:, 1].int().tolist()
            largest[f"{name}_channel"] = channels_at + [None] * (end - len(rows))
        largest["ratio"] = seen.padded(ratio, end)
        channels = None
        if found["main"] is not None:
            state = found["states"][found["main"].peak_block].double()
            share = (state.square() / state.square().sum(-1, keepdim=True)).mean(0)
            values, indices = share.topk(min(_CHANNELS, len(share)))
            channels = [
                {"channel": channel, "share": value}
                for channel, value in zip(indices.tolist(), values.tolist(), strict=True)
            ]
        return {"max_activation": largest, "p0_channels": channels}


def _largest(size: Tensor) -> Tensor:
    """``[b, 2]``: the largest of absolute values ``[b, t, D]`` and its channel."""
    value, channel = size.amax(1).float().max(-1)
    return torch.stack([value, channel.float()], -1)


def _first(rows: Tensor) -> Tensor:
    """``[n, 2]``: of ``[n, B, 2]`` the row with the largest value."""
    chosen = rows[..., 0].argmax(1)
    return rows[torch.arange(len(rows)), chosen]
