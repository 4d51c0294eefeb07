"""A Measurement: all that one probe pass over one set of weights yields."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinktrack.circuit import (
    EPSILON,
    NOWHERE,
    Localization,
    amplification,
    first_two_gain,
    localize,
    reference_block,
    summarize,
)
from sinktrack.collect import Collector, States
from sinktrack.errors import MeasurementError
from sinktrack.record import SCHEMA

RECORDED_EPSILONS = (0.1, 0.2, 0.3, 0.5)
_RESAMPLES = 1000
_QUANTILES = (5, 50, 95)


@dataclass(frozen=True)
class FirstToken:
    """The P0 state over single-token sequences: is the circuit independent of meaning?"""

    tokens: int
    """How many distinct first tokens were tried."""
    norm_ratio: dict[int, Tensor]
    """5, 50 and 95 % quantile over these tokens, ``[L + 1]`` each."""
    direction_consistency: Tensor
    """``[L + 1]``."""


@dataclass(frozen=True, repr=False)
class Measurement:
    """What one probe pass yields. Tensors are on the CPU; L blocks, H heads, B sequences."""

    model: dict[str, Any]
    """Type, blocks, heads and experts of the model."""
    dtype: str
    """Of the weights as they are measured, such as ``bfloat16``; of the residual stream where the
    weights are of several."""
    probe: str
    """Digest of the probe."""
    weights: str | None
    """Digest of a sample of the weights."""
    seconds: float
    block_kinds: tuple[str, ...]
    """``full``, ``sliding``, ``linear`` or ``mlp``; the last two have no softmax attention: nan."""
    visible_queries_by_sequence: Tensor
    """float32 ``[B, L]``: queries ``i >= 1`` that can see P0; nan for linear blocks."""
    p0_attention_by_sequence: Tensor
    """float32 ``[B, L, H]``: mean attention to P0 over the visible queries ``i >= 1``."""
    own_attention_by_sequence: Tensor
    """float32 ``[B, L, H]``: of query 0 to itself; 1 but for learned sink logits."""
    sink_logit_mass: Tensor | None
    """float32 ``[L, H]``: probability on learned sink logits; None where no block has them."""
    attention_gate: Tensor | None
    """float32 ``[L, H]``: mean gate on the heads' outputs at queries ``i >= 1``; None where no
    block has one. Attention to P0 is that before the gate."""
    p0_norm: Tensor
    """float32 ``[L + 1]``."""
    norm_ratio: Tensor
    """float32 ``[L + 1]``."""
    direction_consistency: Tensor
    """float32 ``[L + 1]``; nan where all first tokens are equal."""
    first_token: FirstToken
    localization: Localization
    gain: Tensor
    """float64 ``[L]``: log growth of the norm ratio per block, nan past ``peak_block``."""
    peak_block: int | None
    first_two_gain: float | None
    intervals: dict[str, Any]
    """95 % intervals over sequences of the headline numbers."""
    measured_blocks: int
    """L, or fewer where only the first blocks were measured. Then the others are nan, and what
    depends on all blocks (sink rate, peak, first-two gain, a circuit without a sink) is nan or
    None."""

    def __repr__(self) -> str:
        where = self.localization
        sink = f"starts in block {where.reference_block}" if where.formed else "not formed"
        return (
            f"Measurement({self.model['type']}, {self.model['blocks']} blocks: "
            f"sink rate {self.sink_rate():.1%}, sink {sink})"
        )

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """In a notebook: the measurement's figure, where plotly is installed."""
        from sinktrack import figures

        return figures.shown(figures.measured, self)

    @property
    def visible_queries(self) -> tuple[int | float | None, ...]:
        """Queries ``i >= 1`` of a sequence that can see P0, per block.

        The mean where sequences differ: documents of several lengths, or sparse attention.
        """
        means = self.visible_queries_by_sequence.double().mean(0).tolist()
        return tuple(
            None if math.isnan(mean) else int(mean) if mean.is_integer() else mean for mean in means
        )

    @property
    def p0_attention(self) -> Tensor:
        """float32 ``[L, H]``: mean attention to P0 over sequences and visible queries."""
        return self.p0_attention_by_sequence.mean(0)

    @property
    def concentration(self) -> Tensor:
        """float32 ``[L]``: mean of `p0_attention` over heads."""
        return self.p0_attention.nanmean(-1)

    def sink_rate(self, eps: float = EPSILON, start_block: int = 0) -> float:
        """Share of (sequence, block, head) whose mean attention to P0, query 0 included, is a sink.

        Gu et al. 2025 (2410.10781); blocks without softmax attention do not count. nan where not
        all blocks were measured.

        Args:
            eps: the threshold on one sequence's mean.
            start_block: the first block that counts.
        """
        if self._partial:
            return math.nan
        return _rate(self._alpha()[:, start_block:], eps)

    def sink_rate_by_block(self, eps: float = EPSILON) -> Tensor:
        """float64 ``[L]``: `sink_rate` of each block alone."""
        return _over(self._alpha(), eps).nanmean((0, 2))

    @property
    def _partial(self) -> bool:
        return self.measured_blocks < len(self.block_kinds)

    def _alpha(self) -> Tensor:
        """float64 ``[B, L, H]``: mean over all queries that see P0, query 0 included."""
        count = self.visible_queries_by_sequence.double()[..., None]
        seen = self.p0_attention_by_sequence.double() * count
        return (seen + self.own_attention_by_sequence.double()) / (count + 1)

    def to_record(
        self, step: int, source: str, versions: dict[str, str], tokens: int | None = None
    ) -> dict[str, Any]:
        """The measurement as a record (design: records); nan becomes null on writing."""
        where = self.localization
        record = {
            "schema": SCHEMA,
            "step": step,
            "tokens": tokens,
            "source": source,
            "weights": self.weights,
            "probe": self.probe,
            "model": self.model,
            "dtype": self.dtype,
            "versions": versions,
            "seconds": self.seconds,
            "block_kinds": list(self.block_kinds),
            "visible_queries": list(self.visible_queries),
            "p0_attention": self.p0_attention,
            "concentration": self.concentration,
            "sink_rate": self.sink_rate(),
            "sink_rate_by_block": {
                str(eps): self.sink_rate_by_block(eps) for eps in RECORDED_EPSILONS
            },
            "p0_norm": self.p0_norm,
            "norm_ratio": self.norm_ratio,
            "direction_consistency": self.direction_consistency,
            "first_token": {
                "tokens": self.first_token.tokens,
                "norm_ratio": {str(q): v for q, v in self.first_token.norm_ratio.items()},
                "direction_consistency": self.first_token.direction_consistency,
            },
            "formed": where.formed,
            "reference_block": where.reference_block,
            "shares": [component.to_record() for component in where.shares],
            "share_sum": where.share_sum,
            "first_two_share": where.first_two_share,
            "depth": where.depth,
            "effective_blocks": where.effective_blocks,
            "top_components": [component.to_record() for component in where.top_components],
            "gain": self.gain,
            "peak_block": self.peak_block,
            "first_two_gain": self.first_two_gain,
            "intervals": self.intervals,
        }
        for name in ("sink_logit_mass", "attention_gate"):
            if getattr(self, name) is not None:
                record[name] = getattr(self, name)
        if self._partial:
            record["measured_blocks"] = self.measured_blocks
        return record


def assemble(
    collected: Collector,
    singles: States,
    first_tokens: Tensor,
    kinds: Sequence[str],
    dtypes: Collection[torch.dtype],
    **identity: Any,
) -> Measurement:
    """Compute everything from what the two passes left.

    Args:
        collected: of the probe's pass.
        singles: of the first-token pass, one sequence per distinct first token.
        first_tokens: ``[B]`` int64, token 0 of each of the probe's sequences.
        kinds: the kinds of all L blocks; where the passes saw fewer, the first were measured.
        dtypes: of the parameters.
        identity: ``model``, ``probe``, ``weights`` and ``seconds`` of the Measurement.

    Raises:
        MeasurementError: no softmax attention at all, states that are not finite, or shares that
            do not sum to 1.
    """
    if not collected.p0:
        raise MeasurementError("no block has softmax attention, so there is no attention to P0")
    collected.check()
    singles.check()
    states = collected.stacked(collected.states)
    others = collected.stacked(collected.others)
    other_norms = collected.stacked(collected.other_norms)
    measured, sequences = len(states) - 1, states.shape[1]
    blocks = len(kinds)
    partial = measured < blocks

    p0 = _heads(collected.p0, blocks, sequences)
    norms = torch.linalg.vector_norm(states, dim=-1)
    median = _median(other_norms)
    norm_ratio = norms.mean(-1) / median
    single = singles.stacked(singles.states)
    single_ratio = torch.linalg.vector_norm(single, dim=-1) / median[:, None]
    points = torch.tensor(_QUANTILES, dtype=single_ratio.dtype) / 100
    quantiles = torch.quantile(single_ratio, points, dim=-1)

    found = set(dtypes)
    concentration = p0[:, :measured].mean(0).nanmean(-1)
    reference, formed = reference_block(concentration, norm_ratio)
    writes = [
        (sublayer, block, torch.cat([part.cpu() for part in parts]))
        for (block, _, sublayer), parts in sorted(collected.writes.items())
    ]
    gain, peak, two_gain = amplification(norm_ratio)
    if partial:  # the peak may be further on
        gain = norm_ratio.double().log().diff()
    measurement = Measurement(
        block_kinds=tuple(kinds),
        visible_queries_by_sequence=_heads(
            {
                block: [count[:, None] for count in parts]
                for block, parts in collected.visible.items()
            },
            blocks,
            sequences,
        )[..., 0],
        p0_attention_by_sequence=p0,
        own_attention_by_sequence=_heads(collected.own, blocks, sequences),
        sink_logit_mass=_heads(collected.sink, blocks, sequences).mean(0)
        if collected.sink
        else None,
        attention_gate=_heads(collected.gates, blocks, sequences).mean(0)
        if collected.gates
        else None,
        p0_norm=_padded(norms.mean(-1), blocks + 1),
        norm_ratio=_padded(norm_ratio, blocks + 1),
        direction_consistency=_padded(_consistency(states, first_tokens), blocks + 1),
        first_token=FirstToken(
            single.shape[1],
            {
                quantile: _padded(values, blocks + 1)
                for quantile, values in zip(_QUANTILES, quantiles, strict=True)
            },
            _padded(_consistency(single, torch.arange(single.shape[1])), blocks + 1),
        ),
        localization=NOWHERE
        if partial and not formed
        else localize(
            reference,
            formed,
            states,
            others,
            writes,
            collected.leaves(),
            torch.finfo(collected.dtype).eps / 2,
        ),
        gain=_padded(gain, blocks),
        peak_block=None if partial else peak,
        first_two_gain=None if partial else two_gain,
        intervals={},
        measured_blocks=measured,
        dtype=str(next(iter(found)) if len(found) == 1 else collected.dtype).removeprefix("torch."),
        **identity,
    )
    measurement.intervals.update(_intervals(measurement, states, others, writes, norms, median))
    return measurement


def _padded(values: Tensor, length: int) -> Tensor:
    """With nan for the blocks that were not measured."""
    return torch.nn.functional.pad(values, (0, length - len(values)), value=math.nan)


def _heads(of: dict[int, list[Tensor]], blocks: int, sequences: int) -> Tensor:
    """``[B, L, H]`` with nan for blocks, and heads, that are not there."""
    rows = {block: torch.cat([part.cpu() for part in parts]) for block, parts in of.items()}
    width = max((row.shape[1] for row in rows.values()), default=1)
    result = torch.full((sequences, blocks, width), torch.nan)
    for block, row in rows.items():
        result[:, block, : row.shape[1]] = row
    return result


def _median(values: Tensor) -> Tensor:
    """Median over the last dimension, the mean of the middle two where their number is even."""
    ordered = values.sort(-1).values
    count = ordered.shape[-1]
    return (ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2


def _consistency(states: Tensor, tokens: Tensor) -> Tensor:
    """Mean cosine ``[L + 1]`` over pairs of sequences with different first tokens."""
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    _, group, size = tokens.unique(return_inverse=True, return_counts=True)
    pairs = float(len(tokens) ** 2 - (size**2).sum())
    if not pairs:
        return torch.full((len(states),), torch.nan)
    sums = torch.zeros(len(states), len(size), unit.shape[-1], dtype=torch.float64)
    sums.index_add_(1, group, unit)
    squares = sums.sum(1).square().sum(-1) - sums.square().sum((1, 2))
    return (squares / pairs).float()


def _over(alpha: Tensor, eps: float) -> Tensor:
    return torch.where(alpha.isnan(), torch.nan, (alpha > eps).double())


def _rate(alpha: Tensor, eps: float) -> float:
    return float(_over(alpha, eps).nanmean())


def _intervals(
    measured: Measurement,
    states: Tensor,
    others: Tensor,
    writes: Sequence[tuple[str, int, Tensor]],
    norms: Tensor,
    median: Tensor,
) -> dict[str, Any]:
    """Bootstrap over sequences; reference block, peak and medians stay as measured."""
    sequences, blocks = norms.shape[1], len(measured.block_kinds)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(sequences, (_RESAMPLES, sequences), generator=generator)
    weight = torch.zeros(_RESAMPLES, sequences, dtype=torch.float64)
    weight.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    weight /= sequences

    rate = weight @ _over(measured._alpha(), EPSILON).nanmean((1, 2))
    concentration = weight @ measured.p0_attention_by_sequence.nanmean(-1).double()
    logs = (weight @ (norms / median[:, None]).double().T).log()
    reference = measured.localization.reference_block
    first_two = depth = torch.zeros(0)
    if reference is not None:
        direction = weight @ (states[reference] - others[reference]).double()
        by_block = torch.zeros(_RESAMPLES, reference, dtype=torch.float64)
        for _, block, write in writes:
            if block < reference:
                by_block[:, block] += ((weight @ write.double()) * direction).sum(-1)
        total = ((weight @ states[reference].double()) * direction).sum(-1, keepdim=True)
        first_two, depth, _ = summarize(by_block / total)
    return {
        "sink_rate": None if measured.peak_block is None else _interval(rate),
        "concentration": [_interval(concentration[:, block]) for block in range(blocks)],
        "first_two_share": _interval(first_two),
        "depth": _interval(depth),
        "first_two_gain": _interval(first_two_gain(logs, measured.peak_block))
        if measured.first_two_gain is not None and measured.peak_block is not None
        else None,
    }


def _interval(samples: Tensor) -> list[float] | None:
    samples = samples[~samples.isnan()]
    if not len(samples):
        return None
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=samples.dtype))
    return [float(low), float(high)]
