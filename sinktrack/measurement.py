"""A Measurement: all that one probe pass over one set of weights yields."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinktrack.collect import Collector
from sinktrack.errors import MeasurementError
from sinktrack.metrics import FIELDS, METRICS
from sinktrack.metrics.attention import EPSILON, alphas, rate
from sinktrack.metrics.base import Seen, Unmeasured
from sinktrack.metrics.bootstrap import interval, weights
from sinktrack.metrics.localization import Localization, Sink
from sinktrack.metrics.phases import first_two_gain
from sinktrack.metrics.total_effect import Ablations
from sinktrack.records.run import SCHEMA

_OPTIONAL = ("sink_logit_mass", "attention_gate")
_OVER_ZERO = "null where it is infinite: what it is divided by is zero there"
"""Fields that a record holds only where the model has such a thing."""


@dataclass(frozen=True, repr=False)
class Measurement:
    """What one probe pass yields. Tensors are on the CPU; L blocks, H heads, B sequences.

    Every field of a record is an attribute by its name (docs/metrics.md); what could not be had is
    None, or nan in a tensor.
    """

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
    measured_blocks: int
    """L, or fewer where only the first blocks were measured. Then the others are nan, and what
    depends on all blocks (sink rate, peak, first-two gain, the shares over all readers) is nan or
    None."""
    visible_queries_by_sequence: Tensor
    """float32 ``[B, L]``: queries ``i >= 1`` that can see P0; nan for linear blocks."""
    p0_attention_by_sequence: Tensor
    """float32 ``[B, L, H]``: mean attention to P0 over the visible queries ``i >= 1``."""
    own_attention_by_sequence: Tensor
    """float32 ``[B, L, H]``: of query 0 to itself; 1 but for learned sink logits."""
    localization: Localization
    sinks: tuple[Sink, ...]
    """The sink phases in order."""
    missing: dict[str, str]
    """Why a field could not be had, by its name."""
    values: Mapping[str, Any]
    """The fields of all metrics, by name."""

    if TYPE_CHECKING:  # a few of `values`, by `__getattr__`
        concentration: Tensor
        p0_norm: Tensor
        norm_ratio: Tensor
        direction_consistency: Tensor
        gain: Tensor
        reference_block: int | None
        peak_block: int | None
        first_two_gain: float | None
        intervals: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name in ("values", "__setstate__"):  # not there yet while it is unpickled
            raise AttributeError(name)
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(f"a Measurement has no {name}") from None

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.values})

    def __repr__(self) -> str:
        spans = [f"{sink.first_block} to {sink.last_block}" for sink in self.sinks]
        sink = f"in blocks {' and '.join(spans)}" if spans else "not formed"
        if self._partial:
            sink += f" in the first {self.measured_blocks}, the only ones measured"
            return f"Measurement({self.model['type']}, {self.model['blocks']} blocks: sink {sink})"
        return (
            f"Measurement({self.model['type']}, {self.model['blocks']} blocks: "
            f"sink rate {self.sink_rate():.1%}, sink {sink})"
        )

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """In a notebook: the measurement's figure, where plotly is installed."""
        from sinktrack import figures

        return figures.shown(figures.measured, self)

    @property
    def main_sink(self) -> Sink | None:
        """The sink phase of largest mass; None where none has formed."""
        return max(self.sinks, key=lambda sink: sink.mass, default=None)

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
        return rate(self._alpha()[:, start_block:], eps)

    def sink_rate_by_block(self, eps: float = EPSILON) -> Tensor:
        """float64 ``[L]``: `sink_rate` of each block alone."""
        alpha = self._alpha()
        return torch.where(alpha.isnan(), torch.nan, (alpha > eps).double()).nanmean((0, 2))

    @property
    def _partial(self) -> bool:
        return self.measured_blocks < len(self.block_kinds)

    def _alpha(self) -> Tensor:
        return alphas(
            self.visible_queries_by_sequence,
            self.p0_attention_by_sequence,
            self.own_attention_by_sequence,
        )

    def to_record(
        self, step: int, source: str, versions: dict[str, str], tokens: int | None = None
    ) -> dict[str, Any]:
        """The measurement as a record (design: records); nan becomes null on writing."""
        record: dict[str, Any] = {
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
        }
        own = {"visible_queries": list(self.visible_queries), "p0_attention": self.p0_attention}
        missing = dict(self.missing)
        for name in FIELDS:
            value = own.get(name, self.values.get(name))
            if value is not None or name not in _OPTIONAL:
                record[name] = _finite(_plain(value), name, missing)
        record["intervals"] = {
            name: None if math.inf in (bounds or ()) or -math.inf in (bounds or ()) else bounds
            for name, bounds in self.intervals.items()
        }
        if missing:
            record["missing"] = missing
        if self._partial:
            record["measured_blocks"] = self.measured_blocks
        return record


def _plain(value: Any) -> Any:
    """For a record: rows of several numbers as objects; tensors stay as they are."""
    if hasattr(value, "to_record"):
        return value.to_record()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _finite(value: Any, name: str, missing: dict[str, str]) -> Any:
    """With nan in the place of an infinity, and the reason in ``missing``."""
    if isinstance(value, Mapping):
        return {key: _finite(item, name, missing) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, name, missing) for item in value]
    if not isinstance(value, float | Tensor):
        return value
    infinite = torch.as_tensor(value).isinf()
    if not infinite.any():
        return value
    missing.setdefault(name, _OVER_ZERO)
    return torch.as_tensor(value).masked_fill(infinite, torch.nan)


def assemble(
    collected: Collector,
    alone: Collector,
    first_tokens: Tensor,
    kinds: Sequence[str],
    dtypes: Collection[torch.dtype],
    ablated: Ablations | str,
    **identity: Any,
) -> Measurement:
    """Compute everything from what the two passes left.

    Args:
        collected: of the probe's pass.
        alone: of the first-token pass, one sequence per distinct first token.
        first_tokens: ``[B]`` int64, token 0 of each of the probe's sequences.
        kinds: the kinds of all L blocks; where the passes saw fewer, the first were measured.
        dtypes: of the parameters.
        ablated: single first tokens without one component's write, or why they cannot be had.
        identity: ``model``, ``probe``, ``weights`` and ``seconds`` of the Measurement.

    Raises:
        MeasurementError: no softmax attention at all, or states that are not finite.
    """
    if not collected.of("attention", "p0"):
        raise MeasurementError("no block has softmax attention, so there is no attention to P0")
    collected.check()
    alone.check()
    seen = Seen(collected, alone, first_tokens, kinds, ablated)
    values: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, metric in METRICS.items():
        try:
            computed = metric.compute(seen, values)
        except Unmeasured as error:
            computed = {each.name: None for each in metric.fields}
            missing |= dict.fromkeys(computed or [name], str(error))
        missing |= computed.pop("missing", {})
        values |= computed
    values["intervals"] = _intervals(seen, values)
    stored = set(dtypes)
    dtype = next(iter(stored)) if len(stored) == 1 else collected.dtype
    return Measurement(
        dtype=str(dtype).removeprefix("torch."),
        block_kinds=tuple(kinds),
        measured_blocks=seen.measured,
        visible_queries_by_sequence=values["visible_queries"],
        p0_attention_by_sequence=values["p0_attention"],
        own_attention_by_sequence=values["own_attention"],
        localization=values.get("localization") or Localization(),
        sinks=values["sinks"],
        missing=missing,
        values={name: values.get(name) for name in (*FIELDS, "intervals")},
        **identity,
    )


def _intervals(seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
    """95 % over sequences of the headline numbers; directions, peak, medians stay as measured."""
    weight = weights(seen.sequences)
    alpha = alphas(found["visible_queries"], found["p0_attention"], found["own_attention"])
    over = torch.where(alpha.isnan(), torch.nan, (alpha > EPSILON).double())
    by_sequence = found["p0_attention"].nanmean(-1).double()
    concentration = weight @ by_sequence
    logs = (weight @ (found["norms"] / found["other_norm"][:, None]).double().T).log()
    share = depth = None
    if found["first_two_share"] is not None:
        share, depth = found["projections"].resampled(
            found["readers"], by_sequence, found["uniform"].double()
        )
    whole = not seen.partial
    return {
        "sink_rate": interval(weight @ over.nanmean((1, 2))) if whole else None,
        "sink_rate_from_2": interval(weight @ over[:, 2:].nanmean((1, 2))) if whole else None,
        "concentration": [interval(concentration[:, block]) for block in range(seen.blocks)],
        "first_two_share": share,
        "depth": depth,
        "first_two_gain": interval(first_two_gain(logs, found["peak_block"]))
        if found["first_two_gain"] is not None
        else None,
    }
