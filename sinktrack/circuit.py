"""From states and writes to where the circuit is: who writes the P0 state, and where it grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinktrack.errors import MeasurementError

EPSILON = 0.3
"""Attention to P0 from which a head, or a block's mean, counts as a sink (Gu et al. 2025)."""
SHARE_TOLERANCE = 1e-3
_TOP = 16


@dataclass(frozen=True)
class Component:
    """One term of the P0 state."""

    kind: str
    """``embedding``, ``attention``, ``mixer``, ``mlp``; or a part of one: ``head``,
    ``attention_bias``, ``attention_norm``, ``expert``, ``shared_expert``, ``mlp_norm``, and
    ``attention_rest`` for what an attention adds beside its heads."""
    block: int | None
    index: int | None
    share: float
    """Share of the projection of the P0 state on ``d``; all components together make 1."""
    gate: float | None = None
    """An expert's mean gate weight over the sequences whose P0 is routed to it."""

    def to_record(self) -> dict[str, Any]:
        """As it stands in a record."""
        found = {"kind": self.kind, "block": self.block, "index": self.index, "share": self.share}
        return found if self.gate is None else found | {"gate": self.gate}


@dataclass(frozen=True)
class Leaf:
    """A part of a sublayer's write at P0, averaged over the sequences."""

    kind: str
    block: int
    index: int | None
    write: Tensor
    """``[D]``."""
    gate: float | None = None


@dataclass(frozen=True)
class Localization:
    """Who writes the state that starts the sink (design: circuit localization)."""

    formed: bool
    """Did any block's concentration reach `EPSILON`?"""
    reference_block: int | None
    """The first block that did; where none did, the one with the highest norm ratio. None where
    none did among the first blocks and no others were measured: nothing is localized then."""
    shares: tuple[Component, ...]
    """The embedding, and attention and MLP of every block before the reference block."""
    share_sum: float | None
    first_two_share: float | None
    """Share of blocks 0 and 1; None where the reference block is 0: nothing was written yet."""
    depth: float | None
    """Centre of mass of the blocks' absolute shares, in blocks."""
    effective_blocks: float | None
    """Exponential of the entropy of the blocks' absolute shares."""
    parts: tuple[Component, ...]
    """The embedding and every head, expert and the like, by absolute share."""

    @property
    def top_components(self) -> tuple[Component, ...]:
        """The largest of `parts`."""
        return self.parts[:_TOP]


NOWHERE = Localization(False, None, (), None, None, None, None, ())
"""Of a measurement of the first blocks alone, in which no sink has formed."""


def reference_block(concentration: Tensor, norm_ratio: Tensor) -> tuple[int, bool]:
    """The block whose input is localized, and whether a sink formed there.

    The threshold on attention to P0 is that of Gu et al. 2025 (arXiv 2410.10781).

    Args:
        concentration: float ``[L]``, nan where a block has no softmax attention.
        norm_ratio: float ``[L + 1]``.
    """
    reached = (concentration >= EPSILON).nonzero()
    if len(reached):
        return int(reached[0]), True
    return int(norm_ratio[:-1].argmax()), False


def localize(
    reference: int,
    formed: bool,
    states: Tensor,
    others: Tensor,
    writes: Sequence[tuple[str, int, Tensor]],
    leaves: Sequence[Leaf],
    rounding: float,
) -> Localization:
    """Shares of the P0 state at the input of the reference block.

    Args:
        reference: the reference block.
        formed: whether a sink formed there.
        states: ``[L + 1, B, D]`` P0 states at the blocks' inputs.
        others: ``[L + 1, B, D]`` mean state of the other positions, per sequence.
        writes: sublayer, block and write at P0 ``[B, D]``, in the order of the forward pass.
        leaves: the parts of the writes.
        rounding: unit roundoff of the stream's dtype.

    Raises:
        MeasurementError: the P0 state is zero, or the shares do not sum to 1 within
            `SHARE_TOLERANCE` and rounding.
    """
    state = states[reference].double().mean(0)
    direction = state - others[reference].double().mean(0)
    direction = direction / direction.norm()
    total = float(state @ direction)
    if not abs(total) > 0:  # nan where it has no direction
        raise MeasurementError(
            f"the P0 state at the input of block {reference} is zero, or that of all positions, "
            "and has no shares; is the first token's embedding zero, as a padding token's is?"
        )

    def share(write: Tensor) -> float:
        return float(write.double() @ direction) / total

    shares = [Component("embedding", None, None, share(states[0].double().mean(0)))]
    before = [(kind, block, write) for kind, block, write in writes if block < reference]
    for kind, block, write in before:
        shares.append(Component(kind, block, None, share(write.double().mean(0))))
    share_sum = math.fsum(component.share for component in shares)
    norms = states[: reference + 1].double().norm(dim=-1).mean(-1)
    slack = rounding * float(norms.sum()) * 2 / abs(total)
    if not abs(share_sum - 1) <= SHARE_TOLERANCE + slack:
        raise MeasurementError(
            f"embedding and writes before block {reference} make {share_sum:.6f} of the P0 state "
            f"there, not 1: something writes to the stream outside of the blocks' additions "
            f"(seen: {', '.join(f'{c.kind} {c.block}' for c in shares[1:]) or 'no write'})"
        )
    parts = [
        Component(leaf.kind, leaf.block, leaf.index, share(leaf.write), leaf.gate)
        for leaf in leaves
        if leaf.block < reference
    ]
    parts.append(shares[0])
    parts.sort(key=lambda component: -abs(component.share))
    by_block = torch.zeros(1, reference, dtype=torch.float64)
    for component in shares[1:]:
        assert component.block is not None
        by_block[0, component.block] += component.share
    first_two, depth, effective = (_number(value) for value in summarize(by_block))
    return Localization(
        formed,
        reference,
        tuple(shares),
        share_sum,
        first_two,
        depth,
        effective,
        tuple(parts),
    )


def summarize(by_block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First-two share, depth and effective blocks, the centre and spread of who writes.

    The share of blocks 0 and 1 is what arXiv 2603.06591 finds to grow; effective blocks is the Hill
    number of order 1 (Hill 1973): the exponential of the entropy of absolute shares.

    Args:
        by_block: ``[..., blocks]``, each block's share.

    Returns:
        float64 ``[...]`` each; nan where there are no blocks, the last two also where all shares
        are 0.
    """
    blocks = by_block.shape[-1]
    if not blocks:
        nothing = torch.full(by_block.shape[:-1], torch.nan, dtype=torch.float64)
        return nothing, nothing, nothing
    weight = by_block.abs() / by_block.abs().sum(-1, keepdim=True)
    depth = (weight * torch.arange(blocks)).sum(-1)
    effective = torch.special.entr(weight).sum(-1).exp()
    return by_block[..., :2].sum(-1), depth, effective


def amplification(norm_ratio: Tensor) -> tuple[Tensor, int, float | None]:
    """Per-block gain, the peak, and the share of the growth in the first two blocks.

    The trace of arXiv 2603.06591: where the norm of the P0 state grows on its way up.

    Args:
        norm_ratio: float ``[L + 1]``.

    Returns:
        ``gain`` ``[L]``, log of the growth per block, nan past the peak; ``peak_block``, at whose
        input (L: at the last block's output) the ratio is highest; ``first_two_gain``, None while
        the peak is below twice the start.
    """
    logs = norm_ratio.double().log()
    peak = int(norm_ratio.argmax())
    gain = logs.diff()
    gain[peak:] = torch.nan
    return gain, peak, _number(first_two_gain(logs, peak))


def first_two_gain(logs: Tensor, peak: int) -> Tensor:
    """Share of the growth up to the peak that lies in blocks 0 and 1.

    Args:
        logs: ``[..., L + 1]``, log norm ratios.
        peak: where they are highest.

    Returns:
        ``[...]``; nan while the peak is below twice the start.
    """
    grown = logs[..., peak] - logs[..., 0]
    early = logs[..., min(2, peak)] - logs[..., 0]
    return torch.where(grown >= math.log(2), early / grown, torch.nan)


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan().any()) else float(value)
