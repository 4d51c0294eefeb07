"""What one process sees of a model spread over many, and how the shares make a whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sinktrack.attention import Attended
from sinktrack.collect import Collector, States, Terms
from sinktrack.errors import MeasurementError
from sinktrack.taps import Observer, Write
from sinktrack.taps.layout import Layout, Routing


@dataclass
class Held:
    """A batch in a block: what the process holds of it, sums where others hold the rest."""

    dtype: torch.dtype = torch.float32
    row: Tensor | None = None
    """``[B, D]``: the P0 state."""
    others: Tensor | None = None
    """``[B, D]``: sum of the other states."""
    norms: Tensor | None = None
    """Of the other states, one number each."""
    visible: Tensor | None = None
    """``[B]``: queries after P0 that see it."""
    p0: dict[int, Tensor] | None = None
    """By first head, ``[B, H]``: sum of the attention to P0 of queries after it."""
    own: dict[int, Tensor] | None = None
    sink: dict[int, Tensor] | None = None
    gates: dict[int, Tensor] | None = None


class Shard(Observer):
    """Keeps what one process sees.

    Args:
        layout: what it holds.
        lengths: of the batches of sequences to come, without what pads them; 0 for one to ignore.
        blocks: of the whole model.
    """

    def __init__(self, layout: Layout, lengths: Sequence[int], blocks: int) -> None:
        self.layout, self.lengths, self.blocks = layout, lengths, blocks
        self.held: defaultdict[tuple[int, int], Held] = defaultdict(Held)
        """By block and batch."""
        self.terms: defaultdict[tuple[int, int], dict[str, Terms]] = defaultdict(dict)
        """By block and batch, then by sublayer."""
        self.routed: dict[tuple[int, int], Routing] = {}
        self._seen: defaultdict[int, int] = defaultdict(int)

    def batch(self, block: int) -> int | None:
        """Which batch is in the block; None for one that only fills a schedule."""
        number = self._seen[block] - 1
        return number if self.lengths[number] else None

    def batches(self) -> list[tuple[int, int]]:
        """Number and length of the batches that count."""
        return [(number, length) for number, length in enumerate(self.lengths) if length]

    def state(self, block: int, stream: Tensor) -> None:
        """Keep of ``stream`` ``[B, positions here, D]`` P0's row, and of the others sum and norms.

        Raises:
            MeasurementError: another number of positions than the layout gives this process.
        """
        self._seen[block] += 1
        number = self.batch(block)
        if number is None or not self.layout.reports_stream:
            return
        positions = self.layout.stream(self._padded(number))
        if len(positions) != stream.shape[1]:
            raise MeasurementError(
                f"block {block}: this process holds {stream.shape[1]} positions where "
                f"{len(positions)} were expected"
            )
        held = self.held[block, number]
        held.dtype = stream.dtype
        if self.layout.holds_p0:
            held.row = _kept(stream[:, 0])
        kept = ((positions > 0) & (positions < self.lengths[number])).to(stream.device)
        rest = stream[:, kept]
        held.others = rest.sum(1, dtype=torch.float32).cpu()
        norms = torch.linalg.vector_norm(rest, dim=-1, dtype=torch.float32)
        held.norms = norms.flatten().cpu()

    def attention(self, block: int, attended: Attended) -> None:
        """Keep the sums over the queries after P0; all queries of some heads are given.

        Raises:
            MeasurementError: a block attends a second time.
        """
        number = self.batch(block)
        if number is None or not self.layout.dense or self.layout.cp:
            return
        held = self.held[block, number]
        if held.visible is not None:
            raise MeasurementError(f"block {block} attends more than once; not supported")
        sequences, heads = attended.p0.shape[:2]
        first = self.layout.tp * heads
        held.visible = attended.visible.expand(sequences, -1)[:, 1:].sum(-1).cpu()
        held.p0 = {first: attended.p0[..., 1:].sum(-1).cpu()}
        held.own = {first: _kept(attended.p0[..., 0])}
        if attended.sink is not None:
            held.sink = {first: attended.sink[..., 1:].sum(-1).cpu()}

    def gate(self, block: int, gate: Tensor) -> None:
        """Keep the sum of a gate ``[B, positions here, heads here]`` over the queries after P0."""
        number = self.batch(block)
        if number is None or not self.layout.dense:
            return
        positions = self.layout.queries(self._padded(number))
        kept = ((positions > 0) & (positions < self.lengths[number])).to(gate.device)
        first = self.layout.tp * gate.shape[2]
        self.held[block, number].gates = {first: gate[:, kept].sum(1).cpu()}

    def write(self, block: int, write: Write) -> None:
        """Keep P0's row and the heads' parts of it."""
        number = self.batch(block)
        if number is None or not self.layout.dense or self.layout.cp:
            return
        row = _kept(write.added[:, 0]) if self.layout.holds_p0 else torch.zeros(0)
        terms = Terms(write.sublayer, row, None, write.added.dtype)
        if write.projection is not None:
            terms.add_heads(write.projection, self.layout.tp * write.projection.heads)
            if self.layout.tp:  # the bias is the same on each
                terms.parts.pop(("attention_bias", -1), None)
        terms.parts = {name: part.cpu() for name, part in terms.parts.items()}
        self.terms[block, number][write.sublayer] = terms

    def experts(self, block: int, inputs: Tensor, gates: Tensor) -> None:
        """Keep P0's row of what enters routed experts, ``[B, t, D]``, and of their gates.

        Args:
            block: where.
            inputs: ``[B, t, D]``.
            gates: ``[B, t, E]``, 0 for experts that are not chosen.
        """
        number = self.batch(block)
        if number is not None:
            rows = inputs[:, 0].float(), gates[:, 0].float()
            if not self.layout.holds_p0:
                rows = torch.zeros_like(rows[0]), torch.zeros_like(rows[1])
            self.routed[block, number] = Routing(*rows)

    def add_experts(self, block: int, number: int, writes: dict[int, Tensor]) -> None:
        """Add what the experts of this process write at P0, ``[D]`` each over the sequences."""
        gates = self.routed[block, number].gates.cpu()
        empty = Terms("mlp", torch.zeros(0), None, torch.float32)
        terms = self.terms[block, number].setdefault("mlp", empty)
        terms.gates = {}
        for expert, write in writes.items():
            terms.parts["expert", expert] = write.cpu()
            terms.gates[expert] = gates[gates[:, expert] != 0, expert].tolist()

    def _padded(self, number: int) -> int:
        length = self.lengths[number]
        return length + -length % self.layout.multiple


def _kept(row: Tensor) -> Tensor:
    """A copy on the CPU: a view would keep the whole stream alive."""
    return row.to("cpu", torch.float32, copy=True)


def merge_states(shards: Sequence[Shard], into: States) -> None:
    """Put the shares of the states together.

    Raises:
        MeasurementError: the shares do not make a whole.
    """
    first = shards[0]
    for block in range(first.blocks + 1):
        for number, length in first.batches():
            found = [s.held[block, number] for s in shards if (block, number) in s.held]
            rows = [held.row for held in found if held.row is not None]
            others = [held.others for held in found if held.others is not None]
            norms = [held.norms for held in found if held.norms is not None]
            wanted = len(rows[0]) * (length - 1) if rows else 0
            if len(rows) != 1 or sum(map(len, norms)) != wanted:
                raise MeasurementError(
                    f"the processes together hold P0 of block {block} {len(rows)} times and "
                    f"{sum(map(len, norms))} other states where {wanted} were expected"
                )
            into.states[block].append(rows[0])
            into.dtype = found[0].dtype
            if length > 1:
                into.others[block].append(torch.stack(others).sum(0) / (length - 1))
                into.other_norms[block].append(torch.cat(norms))


def merge(shards: Sequence[Shard]) -> Collector:
    """One process' collection of the whole model.

    Raises:
        MeasurementError: the shares do not make a whole.
    """
    whole = Collector()
    merge_states(shards, whole)
    first = shards[0]
    for block in range(first.blocks):
        for place, (number, length) in enumerate(first.batches()):
            found = [s.held[block, number] for s in shards if (block, number) in s.held]
            p0 = _heads([held.p0 for held in found])
            if p0 is not None:
                visible = next(held.visible for held in found if held.visible is not None)
                whole.visible[block].append(visible)
                whole.p0[block].append(p0 / visible[:, None])
                for of, into in (("own", whole.own), ("sink", whole.sink), ("gates", whole.gates)):
                    heads = _heads([getattr(held, of) for held in found])
                    if heads is not None:
                        into[block].append(heads if of == "own" else heads / (length - 1))
            whole.begin(block, len(whole.states[block][place]))
            for terms in _writes([s.terms[block, number] for s in shards]):
                whole.keep(block, terms)
    return whole


def _heads(shares: Sequence[dict[int, Tensor] | None]) -> Tensor | None:
    """``[B, H]``: heads side by side, sums over the processes that hold the same heads."""
    summed: dict[int, Tensor] = {}
    for share in shares:
        for first, values in (share or {}).items():
            summed[first] = summed[first] + values if first in summed else values
    return torch.cat([summed[first] for first in sorted(summed)], -1) if summed else None


def _writes(shares: Sequence[dict[str, Terms]]) -> list[Terms]:
    """The writes of a batch in a block, the MLP's last, with the parts of every process."""
    whole: dict[str, Terms] = {}
    for share in shares:
        for sublayer, terms in share.items():
            into = whole.setdefault(sublayer, Terms(sublayer, terms.row, None, terms.dtype))
            if len(terms.row):
                into.row = terms.row
            for name, part in terms.parts.items():
                into.parts[name] = into.parts[name] + part if name in into.parts else part
            if terms.gates is not None:
                into.gates = (into.gates or {}) | terms.gates
    return sorted(whole.values(), key=lambda terms: terms.sublayer == "mlp")
