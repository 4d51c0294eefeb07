"""What a metric is: what it keeps of a forward pass, how partial keeps join, and its fields.

A metric sees the events of a pass (streams, attention, gates, writes), keeps small tensors of them
as *states*, and computes its fields from these at the end. How the states of several processes make
a whole is declared with each (`State`), so one piece of code serves batches and every parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from sinktrack.errors import MeasurementError
from sinktrack.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sinktrack.attention import Attended
    from sinktrack.collect import Collector
    from sinktrack.events import Write
    from sinktrack.metrics.total_effect import Ablations

Row = dict[str, Any]
"""One number of a record: ``value``, and those that apply of ``metric`` (appended to the field's
name), ``block``, ``kind``, ``index`` and ``level``."""

Axis = Literal["block", "boundary", "head", "kv_head", "level", "part", "channel", "phase"]
"""What a field has one value of, or one row of:

``block`` 0 to L - 1; ``boundary`` 0 to L, the inputs of the blocks and the last one's output;
``head`` and ``kv_head`` within a block; ``level``, a threshold by its name; ``part`` of the P0
state, ``channel`` and ``phase``, rows of several numbers.
"""


@dataclass(frozen=True)
class Field:
    """One field of a record: its name and axes, and how it is shown to people."""

    name: str
    title: str
    """A few words, for a chart or a column."""
    help: str
    """One sentence that says what the number is."""
    axes: tuple[Axis, ...] = ()
    """In the order of the nesting; none for a single number."""
    unit: str = ""
    """What the number counts or is a share of; empty for a ratio."""
    scale: Literal["linear", "log"] = "linear"
    """Of its axis in a chart."""
    form: str = ".3g"
    """How the number is written, in Python's format language."""
    curve: bool = False
    """Does every dashboard draw it over training? A field by head as the mean over the heads."""
    rows: Callable[[Any], Iterable[Row]] | None = None
    """Long-form rows of a value that its axes do not describe."""
    chart: str = ""
    """Of a value in rows by block, those that charts draw, by their ``metric``: ``.ratio``."""


@dataclass(frozen=True)
class State:
    """How the partial values of one state, ``[b, ...]`` a batch, join over processes.

    Batches always stand one after another.
    """

    positions: Literal["whole", "p0", "sum", "cat", "max"]
    """``whole``: from all positions, on each process that holds these heads. ``p0``: from position
    zero, on the process that holds it. The others are partial where positions are spread: ``sum``
    is added up, ``cat`` stands side by side along dimension 1, of ``max`` the row with the largest
    first entry counts."""
    heads: bool = False
    """Is the last dimension the heads that a process holds? They stand side by side."""


@dataclass(frozen=True)
class PositionShard:
    """Which positions of the sequences a tensor ``[b, t, ...]`` holds."""

    p0: bool = True
    """Is its first position zero?"""
    others: Tensor | None = None
    """bool ``[t]``: its other positions, without padding; None for all but the first."""

    def row(self, stream: Tensor) -> Tensor | None:
        """float32 ``[b, D]``: position zero, copied, if it is here."""
        return stream[:, 0].to(torch.float32, copy=True) if self.p0 else None

    def rest(self, stream: Tensor) -> Tensor:
        """``[b, t', D]``: the other positions."""
        return stream[:, 1:] if self.others is None else stream[:, self.others.to(stream.device)]


WHOLE = PositionShard()
"""Where one process holds the whole sequence."""

PartialStates: TypeAlias = "dict[str, Tensor | None]"
"""States of one batch by name; None for what is not here."""


class Unmeasured(MeasurementError):
    """A metric cannot be had of this model or probe; the reason goes into the record."""


class Metric:
    """What is computed of a probe pass. Subclasses say what they keep, and their fields.

    Each ``on_...`` returns states by name, ``[b, ...]`` of the batch that is passing; tensors
    are live, so what is returned must be a copy or a result.
    """

    fields: ClassVar[tuple[Field, ...]] = ()
    states: ClassVar[Mapping[str, State]] = {}
    reads_mixing: ClassVar[bool] = False
    """Does it ask every attention for `Attended.mixing`? Said before, it costs less."""
    reads_writes: ClassVar[bool] = False
    """Does it use P0's row of every write, and its parts? Else none are made."""

    def on_state(self, stream: Tensor, shard: PositionShard) -> PartialStates:
        """The residual stream ``[b, t, D]`` at a block's input, and at the last one's output."""
        return {}

    def on_attention(self, attended: Attended) -> PartialStates:
        """Every softmax attention, of all positions and of the heads that are here."""
        return {}

    def on_gate(self, gate: Tensor, shard: PositionShard) -> PartialStates:
        """Where heads are gated: ``[b, t, H]`` float32."""
        return {}

    def on_write(self, write: Write, shard: PositionShard) -> PartialStates:
        """What a sublayer adds to the stream, ``[b, t, D]``."""
        return {}

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """The fields by name; `found` holds those of the metrics before.

        Raises:
            Unmeasured: none of the fields can be had, with the reason.
        """
        raise NotImplementedError


class Seen:
    """What the passes left, for metrics to compute from.

    Args:
        collected: of the probe's pass.
        alone: of the pass of single first tokens; without writes.
        first_tokens: ``[B]`` int64, token 0 of each sequence, in the order of the batches.
        kinds: of all L blocks.
        ablated: single first tokens without one component's write, or why they cannot be had.
    """

    def __init__(
        self,
        collected: Collector,
        alone: Collector,
        first_tokens: Tensor,
        kinds: Sequence[str],
        ablated: Ablations | str = "",
    ) -> None:
        self.collected, self.alone, self.ablated = collected, alone, ablated
        self.first_tokens, self.kinds = first_tokens, tuple(kinds)
        self.blocks = len(self.kinds)
        self.measured = len(collected.of("state", "row")) - 1
        """Blocks that were measured; the first, where not all."""
        self.rounding = torch.finfo(collected.dtype).eps / 2
        """Unit roundoff of the stream's dtype."""

    @property
    def partial(self) -> bool:
        """Were the first blocks alone measured?"""
        return self.measured < self.blocks

    @property
    def sequences(self) -> int:
        """B."""
        return len(self.first_tokens)

    def boundaries(self, metric: str, state: str) -> Tensor:
        """``[measured + 1, B, ...]``: a state kept of the stream at every boundary."""
        of = self.collected.of(metric, state)
        return torch.stack([torch.cat(of[boundary]) for boundary in sorted(of)])

    def by_block(self, metric: str, state: str) -> Tensor:
        """``[B, L, width]``: a state ``[b, width]`` of blocks, nan where it was not kept."""
        of = {block: torch.cat(rows) for block, rows in self.collected.of(metric, state).items()}
        width = max((row.shape[1] for row in of.values()), default=1)
        result = torch.full((self.sequences, self.blocks, width), torch.nan)
        for block, row in of.items():
            result[:, block, : row.shape[1]] = row
        return result

    def padded(self, values: Tensor, length: int | None = None) -> Tensor:
        """``[length, ...]``, L by default: nan for the blocks that were not measured."""
        missing = (self.blocks if length is None else length) - len(values)
        if not missing:
            return values
        return torch.cat([values, values.new_full((missing, *values.shape[1:]), math.nan)])


def norms(vectors: Tensor) -> Tensor:
    """float32: norms over the last dimension, computed in float32 or wider."""
    wide = torch.promote_types(vectors.dtype, torch.float32)
    size: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=wide)
    return size.float()


def median(values: Tensor) -> Tensor:
    """Median over the last dimension, the mean of the middle two where their number is even."""
    count = values.shape[-1]
    if not count:
        return values.new_full(values.shape[:-1], math.nan)
    import numpy as np

    middle = [(count - 1) // 2, count // 2]
    ordered = np.partition(values.cpu().contiguous().numpy(), middle, axis=-1)  # no sort is needed
    return torch.from_numpy(np.asarray(ordered[..., middle].sum(-1) / 2)).to(values.device)


def lower_median_(values: Tensor) -> Tensor:
    """Median over the last dimension as torch takes it: the lower one of the middle two.

    The values change their order. nan is the largest number here, on a CPU.
    """
    if values.device.type != "cpu":
        return values.median(-1).values
    place = (values.shape[-1] - 1) // 2
    wide = values.to(torch.promote_types(values.dtype, torch.float32))  # numpy has no bfloat16
    wide.numpy().partition(place, axis=-1)  # no sort is needed
    return wide[..., place].to(values.dtype)


def number(value: Tensor) -> float | None:
    """A plain number; None for nan."""
    return None if bool(value.isnan().any()) else float(value)
