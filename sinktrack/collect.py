"""Keep what the metrics need of a forward pass: small tensors, batch by batch."""

from __future__ import annotations

import math
import mmap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from sinktrack.attention import Attended
from sinktrack.errors import MeasurementError
from sinktrack.events import Observer, Projection, Write
from sinktrack.metrics.base import WHOLE, Metric, PartialStates, PositionShard
from sinktrack.metrics.localization import WriteAtP0, Writes

_CHUNK = 4 * 2**20
"""Bytes that are mapped at a time."""
_HELD = 32 * 2**20
"""Bytes on a device that may wait to be copied."""


class Arena:
    """Room for tensors that outlast a pass, mapped apart from the heap of the temporaries.

    Small rows that are kept among large temporaries would pin the holes that these leave.
    """

    def __init__(self) -> None:
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8), 0

    def keep(self, value: Tensor) -> Tensor:
        """A copy on the CPU."""
        size = -(-value.numel() * value.element_size() // 64) * 64
        if size > len(self._chunk) - self._used:
            mapped = mmap.mmap(-1, max(_CHUNK, size))
            self._chunk = torch.frombuffer(mapped, dtype=torch.uint8)
            self._used = 0
        room = self._chunk[self._used : self._used + value.numel() * value.element_size()]
        self._used += size
        return room.view(value.dtype).view(value.shape).copy_(value)


class Copies:
    """What a pass shows, on the CPU; what comes from another device travels together.

    Whoever copies from a device waits for all that it was asked to compute before.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], None]]] = []
        self._bytes = 0

    def keep(self, values: Mapping[str, Tensor], use: Callable[[dict[str, Tensor]], None]) -> None:
        """Hand values to ``use``: at once, or copies by the next `settle`; always in order.

        What is to outlast the call must be copied there.
        """
        if not self._waiting and all(value.device.type == "cpu" for value in values.values()):
            use(dict(values))
            return
        self._waiting.append(({name: value.clone() for name, value in values.items()}, use))
        self._bytes += sum(value.numel() * value.element_size() for value in values.values())
        if self._bytes > _HELD:
            self.settle()

    def settle(self) -> None:
        """Hand over what waits; all of it waits on where memory ends."""
        alike: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for values, _ in self._waiting:
            for value in values.values():
                alike[value.device, value.dtype].append(value)
        copied = {
            key: iter(
                _on_cpu(torch.cat([value.flatten() for value in values])).split(
                    [value.numel() for value in values]
                )
            )
            for key, values in alike.items()
        }
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        for values, use in waiting:
            use({
                name: next(copied[value.device, value.dtype]).view(value.shape)
                for name, value in values.items()
            })  # fmt: skip


def _on_cpu(value: Tensor) -> Tensor:
    """In page-locked memory where it can be, which a GPU copies to by itself; torch reuses it."""
    if value.device.type == "cuda" and torch.cuda.is_available():
        with suppress(RuntimeError):
            room = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
            return room.copy_(value)
    return value.cpu()


class Collector(Observer):
    """What the metrics keep of one pass.

    Args:
        metrics: those that look at it, by the name under which their states are found.
        shard: the positions that the tensors hold.
    """

    def __init__(self, metrics: dict[str, Metric], shard: PositionShard = WHOLE) -> None:
        self._metrics, self.shard = metrics, shard
        self.with_mixing = any(metric.reads_mixing for metric in metrics.values())
        self._with_writes = any(metric.reads_writes for metric in metrics.values())
        self._kept: defaultdict[tuple[str, str], dict[int, list[Tensor]]] = defaultdict(dict)
        self._copies, self._arena = Copies(), Arena()
        self._writes = Writes()
        self.dtype = torch.float32
        self.lost: str | None = None
        """Why what writes the P0 state cannot be told, where that is so."""
        self._attended: dict[int, int] = {}

    @property
    def writes(self) -> Writes:
        """What was written at P0."""
        self._copies.settle()
        return self._writes

    def of(self, metric: str, state: str) -> dict[int, list[Tensor]]:
        """By block or boundary, what was kept of each batch ``[b, ...]``."""
        self._copies.settle()
        return self._kept.get((metric, state), {})

    def keep(self, metric: str, block: int, kept: PartialStates) -> None:
        """Keep the states of a batch."""

        def put(copies: dict[str, Tensor]) -> None:
            for name, value in copies.items():
                rows = self._kept[metric, name].setdefault(block, [])
                rows.append(self._arena.keep(value))

        self._copies.keep({name: x for name, x in kept.items() if x is not None}, put)

    def state(self, block: int, stream: Tensor) -> None:
        """A batch enters a block, or leaves the last one."""
        self.dtype = stream.dtype
        self._attended[block] = 0
        sequences = len(stream)
        self._copies.keep({}, lambda _: self._writes.begin(block, sequences))
        for name, metric in self._metrics.items():
            self.keep(name, block, metric.on_state(stream, self.shard))

    def factors(self, block: int, factors: Mapping[tuple[int, int], float]) -> None:
        """What each term of the stream at a boundary is multiplied with."""
        known = self._writes.factors.setdefault(block, dict(factors))
        alike = known.keys() == factors.keys() and all(
            math.isclose(known[term], factors[term], rel_tol=1e-4, abs_tol=1e-5) for term in known
        )
        if not alike:
            self.untold(
                block,
                f"what the terms of the stream at block {block} are multiplied with depends on the "
                "probe's tokens",
            )

    def attention(self, block: int, attended: Attended) -> None:
        """A softmax attention of a block.

        Raises:
            MeasurementError: a block attends a second time.
        """
        self._attended[block] = self._attended.get(block, 0) + 1
        if self._attended[block] > 1:
            raise MeasurementError(f"block {block} attends more than once; not supported")
        for name, metric in self._metrics.items():
            self.keep(name, block, metric.on_attention(attended))

    def gate(self, block: int, gate: Tensor) -> None:
        """A gate ``[b, t, H]`` on the heads' outputs."""
        for name, metric in self._metrics.items():
            self.keep(name, block, metric.on_gate(gate, self.shard))

    def write(self, block: int, write: Write) -> None:
        """What a sublayer adds to the stream."""
        for name, metric in self._metrics.items():
            self.keep(name, block, metric.on_write(write, self.shard))
        if self._with_writes:
            rows, terms = at_p0(write, self._arena)
            self._copies.keep(rows, lambda copies: self._writes.add(block, terms(copies)))

    def untold(self, block: int, reason: str) -> None:
        """What writes the P0 state cannot be told; the rest stands."""
        self.lost = self.lost or reason

    def check(self) -> None:
        """Refuse what is no number.

        Raises:
            MeasurementError: states or attention are not finite, or P0 is masked from itself; names
                the first block of them.
        """
        last = max(self.of("state", "row"))
        for block in sorted(self.of("state", "row")):
            where = f"input of block {block}" if block < last else "last block's output"
            for name in ("row", "sum", "norms"):
                if not _finite(self.of("state", name).get(block, ())):
                    self._refuse(f"the residual stream is not finite at the {where}")
            counts = self.of("attention", "visible").get(block, ())
            for p0, count in zip(self.of("attention", "p0").get(block, ()), counts, strict=True):
                if bool(count.isnan().any()):
                    raise MeasurementError(
                        f"block {block}: P0 does not see itself; sequences padded on the left have "
                        "no P0"
                    )
                bad = (~p0.isfinite() & (count > 0)).any(0)
                if bool(bad.any()):
                    head = int(bad.nonzero()[0])
                    self._refuse(f"the attention of block {block}, head {head} is not finite")

    def _refuse(self, what: str) -> None:
        raise MeasurementError(f"{what}: NaN or infinite weights, or an overflow in {self.dtype}")


def at_p0(
    write: Write, arena: Arena
) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], WriteAtP0]]:
    """P0's row of a write, and its parts summed over the sequences.

    Args:
        write: of a sublayer, ``[b, t, D]`` with position zero first.
        arena: where the rows are kept.

    Returns:
        Tensors where the write is, and what they are made of once they are on the CPU.
    """
    rows = {"added": write.added[:, 0].float()}
    if write.raw is not None:
        rows["raw"] = write.raw[:, 0].float()
    if write.projection is not None:
        rows |= head_writes(write.projection)
    if write.routed is not None:
        rows["outputs"] = write.routed.outputs(0).float() * write.routed.factor
        rows["index"], rows["gate"] = write.routed.index[:, 0], write.routed.gate()[:, 0]
    sublayer, dtype = write.sublayer, write.added.dtype

    def terms(copies: dict[str, Tensor]) -> WriteAtP0:
        added, raw = (
            arena.keep(copies[name]) if name in copies else None for name in ("added", "raw")
        )
        assert added is not None
        made = WriteAtP0(sublayer, added, raw, dtype, head_parts(copies))
        if "index" in copies:
            made.gates = {}
            for expert in copies["index"].unique().tolist():
                chosen = copies["index"] == expert
                made.parts["expert", expert] = copies["outputs"][chosen].sum(0)
                made.gates[expert] = copies["gate"][chosen].tolist()
        return made

    return rows, terms


def head_writes(of: Projection) -> dict[str, Tensor]:
    """What each head writes at P0, ``[H, D]``, and the bias, ``[D]``: sums over the sequences."""
    mixed = of.mixed[:, 0].float().sum(0).view(of.heads, -1)
    weight = of.weight.float().unflatten(1, (of.heads, -1))
    written = {"heads": torch.einsum("hv,dhv->hd", mixed, weight) * of.factor}
    if of.bias is not None:
        written["bias"] = of.bias.float() * (of.factor * len(of.mixed))
    return written


def head_parts(copies: Mapping[str, Tensor], first: int = 0) -> dict[tuple[str, int], Tensor]:
    """The parts of a write that `head_writes` gave, ``[D]`` each.

    Args:
        copies: on the CPU.
        first: the number of the first head that is here.
    """
    parts = {("head", first + head): part for head, part in enumerate(copies.get("heads", ()))}
    if "bias" in copies:
        parts["attention_bias", -1] = copies["bias"]
    return parts


def _finite(rows: Sequence[Tensor]) -> bool:
    return all(bool(row.isfinite().all()) for row in rows)
