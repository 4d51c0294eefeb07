"""Localization: who writes the P0 state that later blocks read.

At the input of block ``l`` the P0 state is the embedding plus all earlier writes, so the shares of
its projection on ``d_l``, the direction from the other positions' mean state to P0's, sum to 1. The
headline shares weight every block by how much it reads P0: no threshold decides which is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sinktrack.lazy import torch
from sinktrack.metrics.base import Field, Metric, Seen, Unmeasured, number
from sinktrack.metrics.bootstrap import interval, weights
from sinktrack.metrics.phases import Phase, component_rows

if TYPE_CHECKING:
    from torch import Tensor

    from sinktrack.metrics.total_effect import TotalEffect

SHARE_TOLERANCE = 1e-3
READ = 0.01
"""Mean weight of the readers from which the headline is told: below, nobody reads P0 yet."""
ERASES = -0.1
"""Projection on the state at a phase's peak, in parts of it, of a write that erases it."""
_TOP = 16


@dataclass(frozen=True)
class Component:
    """One term of the P0 state and its share."""

    kind: str
    """``embedding``, ``attention``, ``mixer``, ``mlp``; or a part of one: ``head``,
    ``attention_bias``, ``attention_norm``, ``expert``, ``shared_expert``, ``mlp_norm``, and
    ``attention_rest`` for what an attention adds beside its heads."""
    block: int | None
    index: int | None
    share: float
    """Share of the projection of the P0 state; all components together make 1."""
    gate: float | None = None
    """An expert's mean gate weight over the sequences whose P0 is routed to it."""

    def to_record(self) -> dict[str, Any]:
        """As it stands in a record."""
        record = {"kind": self.kind, "block": self.block, "index": self.index, "share": self.share}
        return record if self.gate is None else record | {"gate": self.gate}


@dataclass(frozen=True)
class Contribution:
    """A part of a sublayer's write at P0, averaged over the sequences."""

    kind: str
    block: int
    index: int | None
    write: Tensor
    """``[D]``."""
    gate: float | None = None
    place: int = 0
    """Of the write among those of its block."""


@dataclass(frozen=True)
class Localization:
    """Who writes the P0 state, over all blocks weighted by how much each reads it."""

    shares: tuple[Component, ...] = ()
    """The embedding, and attention and MLP of every block."""
    share_sum: float | None = None
    first_two_share: float | None = None
    """Share of blocks 0 and 1."""
    depth: float | None = None
    """Centre of mass of the blocks' absolute shares, in blocks."""
    effective_blocks: float | None = None
    """Exponential of the entropy of the blocks' absolute shares."""
    parts: tuple[Component, ...] = ()
    """The embedding and every head, expert and the like, by absolute share."""

    @property
    def top_components(self) -> tuple[Component, ...]:
        """The largest of `parts`."""
        return self.parts[:_TOP]


@dataclass(frozen=True)
class Sink(Phase):
    """A sink phase, with who writes the state that its blocks read, and who erases it."""

    shares: tuple[Component, ...] = ()
    """As those of `Localization`, weighted by the phase's own blocks."""
    parts: tuple[Component, ...] = ()
    total_effects: tuple[TotalEffect, ...] | None = None
    """Of the components before the peak on the state there, by absolute effect; None where they
    could not be had."""
    erasers: tuple[Component, ...] = ()
    """Sublayers from the phase's first block to the next phase, whose write at P0 projects on the
    state at the peak with -10 % of it or less; ``share`` is that projection."""

    @property
    def writers(self) -> tuple[Component, ...]:
        """The sublayers, and the embedding, of largest positive share."""
        positive = [part for part in self.shares if part.share > 0]
        return tuple(sorted(positive, key=lambda part: -part.share)[:_TOP])

    def to_record(self) -> dict[str, Any]:
        """As it stands in a record."""
        several = {
            "writers": self.writers,
            "erasers": self.erasers,
            "top_components": self.parts[:_TOP],
        }
        record = super().to_record() | {
            name: [part.to_record() for part in parts] for name, parts in several.items()
        }
        if self.total_effects is not None:
            record["total_effects"] = [effect.to_record() for effect in self.total_effects[:_TOP]]
        return record


class Localize(Metric):
    """Shares of the P0 state, in the headline and by phase."""

    fields = (
        Field("shares", "shares of the P0 state", "Share of the embedding, and of every block's "
              "attention and MLP, in the P0 state, weighted by the blocks that read it.",
              ("part",), "share", form="z.1%", rows=component_rows),
        Field("share_sum", "sum of the shares", "Sum of the shares: 1 but for rounding."),
        Field("first_two_share", "first-two share", "Share of blocks 0 and 1 in the P0 state that "
              "later blocks read.", (), "share", form=".1%", curve=True),
        Field("depth", "depth", "Centre of mass of the blocks' absolute shares.", (), "blocks",
              form=".2f", curve=True),
        Field("effective_blocks", "effective blocks", "Over how many blocks the shares spread: the "
              "exponential of their entropy.", (), "blocks", form=".2f"),
        Field("top_components", "largest parts", "The 16 heads, experts and the like with the "
              "largest absolute share.", ("part",), "share", form="z.1%", rows=component_rows),
    )  # fmt: skip
    reads_writes = True

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """As the fields say; ``sinks`` anew, with their writers and erasers.

        Raises:
            Unmeasured: the shares do not sum to 1, or the P0 state has none.
        """
        if seen.collected.lost is not None:
            raise Unmeasured(seen.collected.lost)
        shares = Projections(
            found["states"],
            seen.boundaries("state", "sum") / _others(seen),
            seen.collected.writes.rows(),
            seen.collected.writes.contributions(),
            seen.rounding,
            seen.collected.writes.table(),
        )
        concentration = found["concentration"][: seen.measured].double()
        softmax = ~concentration.isnan()
        uniform = found["uniform"][: seen.measured].double()
        readers = (concentration - uniform).clamp(min=0).nan_to_num()
        reading = float(readers[softmax].mean())
        headline, reason = Localization(), None
        if seen.partial:
            reason = f"only the first {seen.measured} blocks were measured"
        elif reading < READ:
            reason = "no block reads P0 yet: attention to it is at the level of even attention"
        else:
            headline = shares.localization(readers)
        sinks = [
            shares.sink(phase, later, readers)
            for phase, later in zip(found["sinks"], [*found["sinks"][1:], None], strict=False)
        ]
        return {
            "localization": headline,
            "missing": {each.name: reason for each in self.fields} if reason else {},
            "readers": readers,
            "sinks": tuple(sinks),
            "main": max(sinks, key=lambda sink: sink.mass, default=None),
            "shares": headline.shares or None,
            "share_sum": headline.share_sum,
            "first_two_share": headline.first_two_share,
            "depth": headline.depth,
            "effective_blocks": headline.effective_blocks,
            "top_components": headline.top_components or None,
            "projections": shares,
        }


class Projections:
    """The P0 states, their directions, and the projections of all writes on them.

    Args:
        states: ``[n + 1, B, D]`` P0 states at the blocks' inputs and the last one's output.
        others: ``[n + 1, B, D]`` mean state of the other positions, per sequence.
        writes: sublayer, block and write at P0 ``[B, D]``, in the order of the forward pass.
        parts: of the writes, averaged over the sequences.
        rounding: unit roundoff of the stream's dtype.
        factors: float64 ``[n + 1, 1 + W]``: what the embedding and each of the W writes stand in
            each state with; None where that is 1 for all before it, as in most models.

    Raises:
        Unmeasured: at some block the shares do not sum to 1.
    """

    def __init__(
        self,
        states: Tensor,
        others: Tensor,
        writes: Sequence[tuple[str, int, Tensor]],
        parts: Sequence[Contribution],
        rounding: float,
        factors: Tensor | None = None,
    ) -> None:
        self.states, self.writes, self.parts = states, writes, parts
        self.factors = factors
        mean = states.double().mean(1)
        direction = mean - others.double().mean(1)
        self.direction = torch.nn.functional.normalize(direction, dim=-1)
        """float64 ``[n + 1, D]``."""
        self.total = (mean * self.direction).sum(-1)
        """float64 ``[n + 1]``: projection of the mean P0 state."""
        self.embedding = mean[0]
        self.means = [write.double().mean(0) for _, _, write in self.writes]
        self._check(rounding)

    def _check(self, rounding: float) -> None:
        norms = self.states.double().norm(dim=-1).mean(-1)
        written = self.embedding.clone()
        size, place = float(norms[0]), 0
        scaled = None
        if self.factors is not None:
            scaled = self.factors @ torch.stack([self.embedding, *self.means])
        for block in range(1, len(self.total)):
            while place < len(self.writes) and self.writes[place][1] < block:
                written = written + self.means[place]
                place += 1
            if scaled is not None:
                written = scaled[block]
            total = float(self.total[block])
            size += float(norms[block])
            if not abs(total) > 0:  # nan where it has no direction
                continue
            share = float(written @ self.direction[block]) / total
            slack = rounding * size * 2 / abs(total)
            if not abs(share - 1) <= SHARE_TOLERANCE + slack:
                kinds = [f"{kind} {at}" for kind, at, _ in self.writes[:place]]
                raise Unmeasured(
                    f"embedding and writes before block {block} make {share:.6f} of the P0 state "
                    "there, not 1: something writes to the stream outside of the blocks' additions "
                    f"(seen: {', '.join(kinds[-8:]) or 'no write'})"
                )

    def localization(self, readers: Tensor) -> Localization:
        """The shares, each block weighted by how much it reads.

        Args:
            readers: float64 ``[n]``.
        """
        shares, parts = self.of(readers)
        by_block = torch.zeros(1, len(readers), dtype=torch.float64)
        for component in shares[1:]:
            assert component.block is not None
            by_block[0, component.block] += component.share
        first_two, depth, effective = (number(value) for value in summarize(by_block))
        share_sum = sum(component.share for component in shares)
        return Localization(shares, share_sum, first_two, depth, effective, parts)

    def of(self, readers: Tensor) -> tuple[tuple[Component, ...], tuple[Component, ...]]:
        """Shares of embedding and sublayers, and of the smallest parts by absolute share.

        Raises:
            Unmeasured: a block that reads P0 finds a state that is zero there.
        """
        read = readers.nonzero()[:, 0]
        for block in read.tolist():
            if not abs(float(self.total[block])) > 0:
                raise Unmeasured(
                    f"the P0 state at the input of block {block} is zero, or that of all "
                    "positions, and has no shares; is the first token's embedding zero, as a "
                    "padding token's is?"
                )
        weight = torch.zeros(len(readers), dtype=torch.float64)
        weight[read] = readers[read] / self.total[read] / readers.sum()
        weighted = weight[:, None] * self.direction[: len(readers)]
        after = weighted.flip(0).cumsum(0).flip(0)  # of blocks from one on
        beyond = torch.cat([after[1:], torch.zeros_like(after[:1])])
        """``[n, D]``: what a write of block ``k`` is projected on, all later blocks."""
        if self.factors is None:
            reach = [after[0], *(beyond[block] for _, block, _ in self.writes)]
        else:
            reach = list(self.factors[: len(readers)].T @ weighted)
        first = Component("embedding", None, None, float(self.embedding @ reach[0]))
        shares = [first]
        of_block: dict[int, list[Tensor]] = {}
        """What each write of a block is projected on, by their places."""
        for (kind, block, _), mean, on in zip(self.writes, self.means, reach[1:], strict=True):
            shares.append(Component(kind, block, None, float(mean @ on)))
            of_block.setdefault(block, []).append(on)
        parts = [
            Component(
                part.kind,
                part.block,
                part.index,
                float(part.write.double() @ of_block[part.block][part.place]),
                part.gate,
            )
            for part in self.parts
        ]
        last = int(read[-1]) if len(read) else 0
        shares = [part for part in shares if part.block is None or part.block < last]
        parts = [part for part in parts if part.block is not None and part.block < last]
        parts.append(first)
        parts.sort(key=lambda part: -abs(part.share))
        return tuple(shares), tuple(parts)

    def sink(self, phase: Phase, later: Phase | None, readers: Tensor) -> Sink:
        """A phase with its writers and erasers."""
        own = torch.zeros_like(readers)
        span = slice(phase.first_block, phase.last_block + 1)
        own[span] = readers[span]
        shares, parts = self.of(own)
        peak = phase.peak_block
        end = len(readers) if later is None else later.first_block
        erasers = []
        for write, ((kind, block, _), mean) in enumerate(
            zip(self.writes, self.means, strict=True), start=1
        ):
            if phase.first_block <= block < end:
                projection = float(mean @ self.direction[peak]) / float(self.total[peak])
                if self.factors is not None:  # as it enters the stream
                    projection *= float(self.factors[block + 1, write])
                if projection <= ERASES:
                    erasers.append(Component(kind, block, None, projection))
        plain = {name: getattr(phase, name) for name in Phase.__dataclass_fields__}
        return Sink(**plain, shares=shares, parts=parts, erasers=tuple(erasers))

    def resampled(
        self, readers: Tensor, attention: Tensor, uniform: Tensor
    ) -> tuple[list[float] | None, list[float] | None]:
        """95 % intervals of first-two share and depth over sequences.

        Directions stay as measured; readers, states and writes vary with the sequences.

        Args:
            readers: float64 ``[n]``.
            attention: ``[B, n]``, each sequence's concentration.
            uniform: ``[n]``.
        """
        blocks, sequences = len(readers), self.states.shape[1]
        directions = self.direction[:blocks].float()
        own = torch.einsum("lbd,ld->bl", self.states[:blocks], directions).double()
        written = torch.zeros(sequences, blocks, blocks, dtype=torch.float64)  # reader, writer
        for place, (_, block, write) in enumerate(self.writes, start=1):
            projected = (write @ directions.T).double()
            if self.factors is not None:
                projected = projected * self.factors[:blocks, place]
            written[:, :, block] += projected
        reads = torch.arange(blocks)[:, None] > torch.arange(blocks)
        written *= reads
        weight = weights(sequences)
        drawn = (weight @ attention.double().nan_to_num() - uniform).clamp(min=0).nan_to_num()
        drawn[:, readers == 0] = 0
        share = (weight @ written.flatten(1)).unflatten(1, (blocks, blocks))
        share = share / (weight @ own)[..., None]
        share[:, readers == 0] = 0
        by_block = (drawn[..., None] * share).sum(1) / drawn.sum(1, keepdim=True)
        first_two, depth, _ = summarize(by_block)
        return interval(first_two), interval(depth)


def _others(seen: Seen) -> Tensor:
    """``[B, 1]``: positions of each sequence beside P0."""
    batches = seen.collected.of("state", "norms")[0]
    return torch.cat([torch.full((len(part), 1), float(part.shape[1])) for part in batches])


def summarize(by_block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First-two share, depth and effective blocks: the centre and spread of who writes.

    The share of blocks 0 and 1 is what arXiv 2603.06591 finds to grow; effective blocks is the Hill
    number of order 1 (Hill 1973): the exponential of the entropy of absolute shares.

    Args:
        by_block: ``[..., blocks]``, each block's share.

    Returns:
        float64 ``[...]`` each; the last two are nan where all shares are 0.
    """
    weight = by_block.abs() / by_block.abs().sum(-1, keepdim=True)
    depth = (weight * torch.arange(by_block.shape[-1])).sum(-1)
    effective = torch.special.entr(weight).sum(-1).exp()
    return by_block[..., :2].sum(-1), depth, effective


class Writes:
    """What a pass keeps of the writes at P0: the rows, and their parts summed over sequences."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int, str], list[Tensor]] = {}
        self._parts: dict[tuple[int, int, str, int], Tensor] = {}
        self._gates: dict[tuple[int, int], list[float]] = {}
        self._order: dict[int, int] = {}
        self._sequences = 0
        self.factors: dict[int, dict[tuple[int, int], float]] = {}
        """By boundary, what the terms of the stream stand in it with; see `Observer.factors`."""

    def begin(self, block: int, sequences: int) -> None:
        """A batch of sequences enters a block."""
        self._order[block] = 0
        if block == 0:
            self._sequences += sequences

    def add(self, block: int, terms: WriteAtP0) -> None:
        """Keep a write and its parts; what they leave over is a part of its own."""
        place = self._order[block]
        self._order[block] += 1
        row, raw = terms.row, terms.row if terms.raw is None else terms.raw
        self._rows.setdefault((block, place, terms.sublayer), []).append(row)
        rest = raw.sum(0)
        for (kind, index), part in terms.parts.items():
            self._add(block, kind, index, part)
            rest = rest - part
        for expert, gates in (terms.gates or {}).items():
            self._gates[block, expert] = self._gates.get((block, expert), []) + gates
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
        key = (block, self._order[block] - 1, kind, index)
        known = self._parts.get(key)
        self._parts[key] = part if known is None else known + part

    def rows(self) -> list[tuple[str, int, Tensor]]:
        """Sublayer, block and write at P0 ``[B, D]``, in the order of the forward pass."""
        return [
            (sublayer, block, torch.cat(parts))
            for (block, _, sublayer), parts in sorted(self._rows.items())
        ]

    def table(self) -> Tensor | None:
        """float64 ``[n + 1, 1 + W]``: the factors of the embedding and all writes at each boundary.

        None where nothing is scaled.
        """
        keys = [(-1, 0), *((block, place) for block, place, _ in sorted(self._rows))]
        plain = {at: {key: 1.0 for key in keys if key[0] < at} for at in self.factors}
        if plain == self.factors:
            return None
        rows = [[self.factors[at].get(key, 0.0) for key in keys] for at in sorted(self.factors)]
        return torch.tensor(rows, dtype=torch.float64)

    def contributions(self) -> list[Contribution]:
        """The parts of all writes, averaged over the sequences; several of one kind as one."""
        apart = self.table() is not None
        joined: dict[tuple[int, int, str, int], Tensor] = {}
        for (block, place, kind, index), part in self._parts.items():
            key = (block, place if apart else 0, kind, index)
            joined[key] = joined[key] + part if key in joined else part
        return [
            Contribution(
                kind,
                block,
                None if index < 0 else index,
                part / self._sequences,
                _mean(self._gates[block, index]) if kind == "expert" else None,
                place,
            )
            for (block, place, kind, index), part in joined.items()
        ]


@dataclass
class WriteAtP0:
    """A write at P0 and the parts of it that are known."""

    sublayer: str
    row: Tensor
    """float32 ``[B, D]``: the write."""
    raw: Tensor | None
    """float32 ``[B, D]``: the sublayer's output before an output norm, where there is one."""
    dtype: torch.dtype
    """Of the stream, for what rounding may leave over."""
    parts: dict[tuple[str, int], Tensor]
    """By kind and index (-1 for none), ``[D]`` float32 summed over the sequences."""
    gates: dict[int, list[float]] | None = None
    """By routed expert, its gate weights; None where nothing is routed."""


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
