"""Keep what the measurement needs of a forward pass: position zero's rows and a few sums."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sinktrack.attention import Attended
from sinktrack.circuit import Leaf
from sinktrack.errors import MeasurementError
from sinktrack.taps import Observer, Projection, Write


@dataclass
class Terms:
    """A write at P0 and the parts of it that are known."""

    sublayer: str
    row: Tensor
    """float32 ``[B, D]``: the write."""
    raw: Tensor | None
    """float32 ``[B, D]``: the sublayer's output before an output norm, where there is one."""
    dtype: torch.dtype
    """Of the stream, for what rounding may leave over."""
    parts: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """By kind and index (-1 for none), ``[D]`` float32 summed over the sequences."""
    gates: dict[int, list[float]] | None = None
    """By routed expert, its gate weights; None where nothing is routed."""

    def add_heads(self, of: Projection, first: int = 0) -> None:
        """What each head writes, and the bias; ``first`` is the number of the first head."""
        mixed = of.mixed[:, 0].float().sum(0).view(of.heads, -1)
        weight = of.weight.float().unflatten(1, (of.heads, -1))
        for head, part in enumerate(torch.einsum("hv,dhv->hd", mixed, weight) * of.factor):
            self.parts["head", first + head] = part
        if of.bias is not None:
            self.parts["attention_bias", -1] = of.bias.float() * (of.factor * len(of.mixed))


class States(Observer):
    """P0 states and norms, block by block."""

    def __init__(self) -> None:
        self.states: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.others: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.other_norms: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.dtype = torch.float32

    def state(self, block: int, stream: Tensor) -> None:
        """Keep the P0 row, the mean of the other rows and their norms."""
        self.dtype = stream.dtype
        self.states[block].append(_row(stream))
        if stream.shape[1] > 1:
            rest = stream[:, 1:]
            wide = torch.promote_types(rest.dtype, torch.float32)
            self.others[block].append(rest.mean(1, dtype=wide).float())
            norms = torch.linalg.vector_norm(rest, dim=-1, dtype=wide)
            self.other_norms[block].append(norms.flatten().float())

    def stacked(self, of: dict[int, list[Tensor]]) -> Tensor:
        """``[L + 1, ...]`` on the CPU, the batches side by side."""
        return torch.stack([torch.cat([part.detach().cpu() for part in of[b]]) for b in sorted(of)])

    def check(self) -> None:
        """Refuse what is no number.

        Raises:
            MeasurementError: states or attention are not finite; names the first block of them.
        """
        for block in sorted(self.states):
            if found := self._not_finite(block):
                raise MeasurementError(
                    f"{found}: NaN or infinite weights, or an overflow in {self.dtype}"
                )

    def _not_finite(self, block: int) -> str | None:
        rows = [*self.states[block], *self.others[block], *self.other_norms[block]]
        if all(bool(row.isfinite().all()) for row in rows):
            return None
        where = f"input of block {block}" if block < max(self.states) else "last block's output"
        return f"the residual stream is not finite at the {where}"


class Collector(States):
    """All that one probe pass yields."""

    def __init__(self) -> None:
        super().__init__()
        self.p0: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.own: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.sink: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.gates: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.visible: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.writes: defaultdict[tuple[int, int, str], list[Tensor]] = defaultdict(list)
        self._parts: defaultdict[tuple[int, str, int], Tensor] = defaultdict(
            lambda: torch.zeros(())
        )
        self._gates: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        self._order: dict[int, int] = {}
        self._sequences = 0

    def attention(self, block: int, attended: Attended) -> None:
        """Average the attention to P0 over the queries that see it.

        Raises:
            MeasurementError: P0 is masked from itself, or a block attends a second time.
        """
        sequences = len(attended.p0)
        seen = attended.visible.expand(sequences, -1)
        if not bool(seen[:, 0].all()):
            raise MeasurementError(
                f"block {block}: P0 does not see itself; sequences padded on the left have no P0"
            )
        if len(self.p0[block]) > len(self.states[block]) - 1:
            raise MeasurementError(f"block {block} attends more than once; not supported")
        counts = seen[:, 1:].sum(-1)
        self.visible[block].append(counts)
        self.p0[block].append(attended.p0[..., 1:].sum(-1) / counts[:, None])
        self.own[block].append(attended.p0[..., 0].clone())
        if attended.sink is not None:
            self.sink[block].append(attended.sink[..., 1:].mean(-1))

    def _not_finite(self, block: int) -> str | None:
        """Also attention: a kernel may give a finite output of what is no number."""
        if found := super()._not_finite(block):
            return found
        for p0, counts in zip(self.p0.get(block, ()), self.visible.get(block, ()), strict=True):
            bad = (~p0.isfinite() & (counts > 0)[:, None]).any(0)
            if bool(bad.any()):
                head = int(bad.nonzero()[0])
                return f"the attention of block {block}, head {head} is not finite"
        return None

    def gate(self, block: int, gate: Tensor) -> None:
        """Average a gate ``[B, T, H]`` over the queries after P0."""
        self.gates[block].append(gate[:, 1:].mean(1))

    def state(self, block: int, stream: Tensor) -> None:
        """As in `States`."""
        super().state(block, stream)
        self.begin(block, len(stream))

    def begin(self, block: int, sequences: int) -> None:
        """A batch of sequences enters a block."""
        self._order[block] = 0
        if block == 0:
            self._sequences += sequences

    def write(self, block: int, write: Write) -> None:
        """Keep the P0 row of a write, and add up its parts over the sequences."""
        raw = None if write.raw is None else _row(write.raw)
        terms = Terms(write.sublayer, _row(write.added), raw, write.added.dtype)
        if write.projection is not None:
            terms.add_heads(write.projection)
        if write.routed is not None:
            routed, terms.gates = write.routed, {}
            outputs = routed.outputs(0).float() * routed.factor
            index, gate = routed.index[:, 0].cpu(), routed.gate[:, 0].cpu()
            for expert in index.unique().tolist():
                chosen = index == expert
                terms.parts["expert", expert] = outputs[chosen.to(outputs.device)].sum(0)
                terms.gates[expert] = gate[chosen].tolist()
        self.keep(block, terms)

    def keep(self, block: int, terms: Terms) -> None:
        """Keep a write and its parts; what they leave over is a part of its own."""
        place = self._order[block]
        self._order[block] += 1
        row, raw = terms.row, terms.row if terms.raw is None else terms.raw
        self.writes[block, place, terms.sublayer].append(row)
        rest = raw.sum(0)
        for (kind, index), part in terms.parts.items():
            self._add(block, kind, index, part)
            rest = rest - part
        for expert, gates in (terms.gates or {}).items():
            self._gates[block, expert] += gates
        if terms.gates is not None:
            kind = "shared_expert"
        elif terms.sublayer in ("mlp", "mixer"):
            kind = terms.sublayer
        else:
            kind = "attention_rest"
        residue = 16 * torch.finfo(terms.dtype).eps * raw.norm(dim=-1).sum()
        if kind in ("mlp", "mixer") or rest.norm() > residue:  # else nothing but rounding is left
            self._add(block, kind, -1, rest)
        if terms.raw is not None:
            self._add(block, f"{terms.sublayer}_norm", -1, row.sum(0) - raw.sum(0))

    def _add(self, block: int, kind: str, index: int, part: Tensor) -> None:
        self._parts[block, kind, index] = self._parts[block, kind, index].to(part.device) + part

    def leaves(self) -> list[Leaf]:
        """The parts of all writes, averaged over the sequences."""
        return [
            Leaf(
                kind,
                block,
                None if index < 0 else index,
                part.cpu() / self._sequences,
                _mean(self._gates[block, index]) if kind == "expert" else None,
            )
            for (block, kind, index), part in self._parts.items()
        ]


def _row(stream: Tensor) -> Tensor:
    """Position zero, copied: a view would keep the whole stream alive."""
    return stream[:, 0].to(torch.float32, copy=True)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)
