"""What one process sees of a model spread over many, and how the shares make a whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sinktrack.attention import Attended
from sinktrack.collect import Collector, Copies, head_parts, head_writes
from sinktrack.errors import MeasurementError
from sinktrack.events import Observer, Write
from sinktrack.metrics.base import Metric, PartialStates, PositionShard, State
from sinktrack.metrics.localization import WriteAtP0
from sinktrack.models.megatron.layout import Layout, Routing

Key = tuple[str, str]
"""A metric's name and a state's."""


class Shard(Observer):
    """Keeps what one process sees.

    Args:
        layout: what it holds.
        lengths: of the batches of sequences to come, without what pads them; 0 for one to ignore.
        blocks: of the whole model.
        metrics: those that look at the pass, by name.
    """

    def __init__(
        self, layout: Layout, lengths: Sequence[int], blocks: int, metrics: Mapping[str, Metric]
    ) -> None:
        self.layout, self.lengths, self.blocks = layout, lengths, blocks
        self.metrics = metrics
        self.with_mixing = any(metric.reads_mixing for metric in metrics.values())
        self._with_writes = any(metric.reads_writes for metric in metrics.values())
        self.kept: defaultdict[tuple[int, int], dict[Key, Tensor]] = defaultdict(dict)
        """By block and batch, partial states on the CPU."""
        self.terms: defaultdict[tuple[int, int], dict[str, WriteAtP0]] = defaultdict(dict)
        """By block and batch, then by sublayer."""
        self.lost: dict[int, str] = {}
        """By block, why what writes the P0 state cannot be told there."""
        self.routed: dict[tuple[int, int], Routing] = {}
        self.dtype = torch.float32
        self._seen: defaultdict[int, int] = defaultdict(int)
        self._attended: set[tuple[int, int]] = set()
        self._copies = Copies()

    def batch(self, block: int) -> int | None:
        """Which batch is in the block; None for one that only fills a schedule."""
        number = self._seen[block] - 1
        return number if self.lengths[number] else None

    def batches(self) -> list[int]:
        """Numbers of the batches that count."""
        return [number for number, length in enumerate(self.lengths) if length]

    def state(self, block: int, stream: Tensor) -> None:
        """Show ``stream`` ``[B, positions here, D]`` to the metrics.

        Raises:
            MeasurementError: another number of positions than the layout gives this process.
        """
        self._seen[block] += 1
        number = self.batch(block)
        if number is None or not self.layout.reports_stream:
            return
        self.dtype = stream.dtype
        shard = self._shard(block, number, stream)
        for name, metric in self.metrics.items():
            self._keep(block, number, name, metric.on_state(stream, shard))

    def attention(self, block: int, attended: Attended) -> None:
        """Show an attention of all queries and of some heads.

        Raises:
            MeasurementError: a block attends a second time.
        """
        number = self.batch(block)
        if number is None or not self.layout.dense or self.layout.cp:
            return
        if (block, number) in self._attended:
            raise MeasurementError(f"block {block} attends more than once; not supported")
        self._attended.add((block, number))
        for name, metric in self.metrics.items():
            self._keep(block, number, name, metric.on_attention(attended), same=True)

    def gate(self, block: int, gate: Tensor) -> None:
        """Show a gate ``[B, positions here, heads here]``."""
        number = self.batch(block)
        if number is None or not self.layout.dense:
            return
        positions = self.layout.queries(self._padded(number))
        shard = PositionShard(self.layout.cp == 0, self._others(number, positions))
        for name, metric in self.metrics.items():
            self._keep(block, number, name, metric.on_gate(gate, shard), same=True)

    def write(self, block: int, write: Write) -> None:
        """Show a write, and keep P0's row and the heads' parts of it."""
        number = self.batch(block)
        if number is None:
            return
        if self.layout.reports_stream:
            shard = self._shard(block, number, write.added)
            for name, metric in self.metrics.items():
                self._keep(block, number, name, metric.on_write(write, shard))
        if not self._with_writes or not self.layout.dense or self.layout.cp:
            return
        rows = {}
        if self.layout.holds_p0:
            rows["added"] = write.added[:, 0].float()
        first = 0
        if write.projection is not None:
            rows |= head_writes(write.projection)
            first = self.layout.tp * write.projection.heads
            if self.layout.tp:  # the bias is the same on each
                rows.pop("bias", None)
        sublayer, dtype = write.sublayer, write.added.dtype

        def put(copies: dict[str, Tensor]) -> None:
            row = copies.get("added", torch.zeros(0)).clone()  # whole storages are sent
            parts = {name: part.clone() for name, part in head_parts(copies, first).items()}
            self.terms[block, number][sublayer] = WriteAtP0(sublayer, row, None, dtype, parts)

        self._copies.keep(rows, put)

    def untold(self, block: int, reason: str) -> None:
        """What writes the P0 state in a block cannot be told; the rest stands."""
        self.lost.setdefault(block, reason)

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
        empty = WriteAtP0("mlp", torch.zeros(0), None, torch.float32, {})
        terms = self.terms[block, number].setdefault("mlp", empty)
        terms.gates = {}
        for expert, write in writes.items():
            terms.parts["expert", expert] = write.cpu()
            terms.gates[expert] = gates[gates[:, expert] != 0, expert].tolist()

    def _keep(
        self, block: int, number: int, name: str, kept: PartialStates, same: bool = False
    ) -> None:
        """Keep partial states; of the ``same`` positions on all heads' processes those of one."""
        states = self.metrics[name].states
        values = {
            state: value
            for state, value in kept.items()
            if value is not None and (states[state].heads or not (same and self.layout.tp))
        }

        def put(copies: dict[str, Tensor]) -> None:
            for state, value in copies.items():
                self.kept[block, number][name, state] = value.clone()

        self._copies.keep(values, put)

    def settle(self) -> None:
        """A pass is over: what was kept is on the CPU, and nothing but that is sent."""
        self._copies.settle()
        self._copies = Copies()

    def _shard(self, block: int, number: int, stream: Tensor) -> PositionShard:
        positions = self.layout.stream(self._padded(number))
        if len(positions) != stream.shape[1]:
            raise MeasurementError(
                f"block {block}: this process holds {stream.shape[1]} positions where "
                f"{len(positions)} were expected"
            )
        return PositionShard(self.layout.holds_p0, self._others(number, positions))

    def _others(self, number: int, positions: Tensor) -> Tensor:
        return (positions > 0) & (positions < self.lengths[number])

    def _padded(self, number: int) -> int:
        return self.layout.length(self.lengths[number])


def merge(shards: Sequence[Shard]) -> Collector:
    """One process' collection of the whole model."""
    first = shards[0]
    whole = Collector(dict(first.metrics))
    whole.dtype = next(s.dtype for s in shards if s.layout.reports_stream)
    lost = {block: reason for s in shards for block, reason in s.lost.items()}
    if lost:
        whole.untold(min(lost), lost[min(lost)])
    for block in range(first.blocks + 1):
        for number in first.batches():
            keys = dict.fromkeys(key for s in shards for key in s.kept[block, number])
            for name, state in keys:
                parts = [
                    (s.layout.tp, s.kept[block, number][name, state])
                    for s in shards
                    if (name, state) in s.kept[block, number]
                ]
                joined = join(first.metrics[name].states[state], parts)
                whole.keep(name, block, {state: joined})
                if (name, state) == ("state", "row"):
                    whole.writes.begin(block, len(joined))
            for terms in _writes([s.terms[block, number] for s in shards]):
                whole.writes.add(block, terms)
    return whole


def join(state: State, parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """One value of several processes' partial ones, as the state says.

    Args:
        state: how they join.
        parts: of each process its tensor parallel rank and its value.
    """
    by_rank: defaultdict[int, list[Tensor]] = defaultdict(list)
    for rank, value in parts:
        by_rank[rank if state.heads else 0].append(value)
    joined = []
    for rank in sorted(by_rank):
        values = by_rank[rank]
        if state.positions == "sum":
            joined.append(torch.stack(values).sum(0))
        elif state.positions == "cat":
            joined.append(torch.cat(values, 1))
        elif state.positions == "max":
            stacked = torch.stack(values)
            chosen = stacked[..., 0].argmax(0)
            joined.append(stacked[chosen, torch.arange(stacked.shape[1])])
        else:
            joined.append(values[0])
    return torch.cat(joined, -1)


def _writes(shares: Sequence[dict[str, WriteAtP0]]) -> list[WriteAtP0]:
    """The writes of a batch in a block, the MLP's last, with the parts of every process."""
    whole: dict[str, WriteAtP0] = {}
    for share in shares:
        for sublayer, terms in share.items():
            into = whole.setdefault(sublayer, WriteAtP0(sublayer, terms.row, None, terms.dtype, {}))
            if len(terms.row):
                into.row = terms.row
            for name, part in terms.parts.items():
                into.parts[name] = into.parts[name] + part if name in into.parts else part
            if terms.gates is not None:
                into.gates = (into.gates or {}) | terms.gates
    return sorted(whole.values(), key=lambda terms: terms.sublayer == "mlp")
