"""Run a probe again from any block on, with something edited in it.

A plain pass keeps the residual stream at the inputs of the blocks that will be edited. An edited
pass then runs the model as it is, but for the blocks before: those hand on the kept stream. Edits
that start in the same block go through together, stacked along the batch. What a pass costs is in
proportion to the blocks that run, and it ends with the last block that is asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sinktrack.attention import Attended
from sinktrack.errors import MeasurementError
from sinktrack.events import Editor, Observer, Uneditable, Write
from sinktrack.metrics.base import median
from sinktrack.models.base import adapt
from sinktrack.models.editable import LOGITS, Editable, Enough, Pass, at_once
from sinktrack.probe import Probe

_STREAMS = 16
"""Tensors of the stream's size that a pass without logits holds, for the same limit."""
_SAME = 1e-5
_MIXED = 1e-3
IN_STATE = 0.5
"""Of the projection of P0's own state on the direction of a sink, from which a position is in the
sink state."""


class Edit:
    """What is changed in a pass. Rows number the probe's sequences, as the batches hold them."""

    start: int = 0
    """The first block with a change."""

    def state(self, block: int, stream: Tensor, rows: Tensor) -> Tensor | None:
        """Another residual stream ``[b, T, D]`` at the input of a block, or None."""

    def edit_mask(self, block: int, seen: Tensor, rows: Tensor) -> Tensor | None:
        """Other keys that are seen, ``[b or 1, H or 1, T, T]`` bool, or None."""

    def write(self, block: int, write: Write, rows: Tensor) -> Tensor | None:
        """Another write ``[b, T, D]``, or None."""

    def unmet(self, last: int) -> str | None:
        """What should have been changed up to a block, and was not there."""


@dataclass
class Outcome:
    """What a pass shows, per sequence: float64 on the CPU, nan for what was not asked for."""

    p0: Tensor
    """``[B, L]``: attention to P0, mean over heads and the later queries that see it; nan where a
    block has no softmax attention."""
    second: Tensor
    """``[B, L]``: the same to the sequence's other position."""
    in_set: Tensor
    """``[B, L]``: attention to all positions in the sink state, mean over heads and the queries
    that are not in it; in the blocks of the phases."""
    set_size: Tensor
    """``[B, L]``: how many positions are in the sink state at the input."""
    norm_ratio: Tensor
    """``[B, L]``: norm of the state at P0 over its median at the other positions."""
    loss: Tensor
    """``[B]``: next-token loss in nats, mean over positions from 1 on; nan without a head."""
    p0_loss: Tensor
    """``[B]``: of the token after P0."""


class Job:
    """Passes whose outcomes are wanted together."""

    error: Uneditable | None = None
    """Why there are none."""

    def passes(self, replay: Replay) -> Sequence[Pass]:
        """What is to be run; a pass that fails with `Uneditable` ends in ``error``."""
        raise NotImplementedError

    def outcome(self) -> Any:
        """What they showed."""
        raise NotImplementedError


class Edits(Job):
    """Passes with a change each, from the first changed block on where its input was kept.

    Those that start in the same block go through it together.

    Args:
        edits: what is changed.
        loss: is the loss wanted too?
        until: the last block whose attention is wanted; all by default.
    """

    def __init__(
        self, edits: Sequence[Edit], *, loss: bool = False, until: int | None = None
    ) -> None:
        self.edits, self.loss, self.until = edits, loss, until

    def passes(self, replay: Replay) -> list[_Stacked]:
        """A pass of each batch, stacked for as many edits as may go through at once."""
        self._replay = replay
        by_start: defaultdict[int, list[int]] = defaultdict(list)
        for place, edit in enumerate(self.edits):
            by_start[edit.start if edit.start in replay.kept else 0].append(place)
        last = replay.blocks if self.loss or self.until is None else self.until
        self._made: list[tuple[list[int], _Stacked]] = []
        for start, places in by_start.items():
            for number, batch in enumerate(replay.batches):
                size = replay.stacked(len(batch), self.loss)
                for first in range(0, len(places), size):
                    some = places[first : first + size]
                    edits = [self.edits[place] for place in some]
                    one = _Stacked(replay, self, edits, start, number, self.loss, last)
                    self._made.append((some, one))
        return [one for _, one in self._made]

    def outcome(self) -> list[Outcome]:
        """Of each edit."""
        parts: defaultdict[int, list[Outcome]] = defaultdict(list)
        for places, one in self._made:
            for place, outcome in zip(places, one.outcomes, strict=True):
                parts[place].append(outcome)
        starts = {place: one.start for places, one in self._made for place in places}
        return [
            self._replay.joined(parts[place], starts[place]) for place in range(len(self.edits))
        ]


@dataclass(frozen=True)
class Direction:
    """Of the sink at the input of a block."""

    towards: Tensor
    """``[D]``: from the other positions' mean state to P0's, a unit vector."""
    least: Tensor
    """``[B]``: the projection on it from which a position is in the sink state."""


class Replay:
    """A model, a probe and one other position in each of its sequences."""

    def __init__(self, model: Editable, probe: Probe, batch_size: int | None) -> None:
        self.model = model
        fits = at_once(model.vocabulary, probe, None)
        self._streams = max(fits, LOGITS // (4 * probe.length * _STREAMS * model.width))
        self._fits = at_once(model.vocabulary, probe, batch_size)
        batches = probe.batches(self._fits)
        if batch_size is not None:
            self._streams = max(batch_size, self._fits)
        self.batches = [batch.to(model.device) for batch in batches]
        count = torch.arange(probe.sequences)
        self.rows = list(count.split([len(batch) for batch in batches]))
        self.lengths = torch.cat([torch.full((len(b),), b.shape[1]) for b in batches])
        first, last = self.lengths.sub(2).clamp(1, 3), self.lengths // 2
        spread = (last - first + 1).clamp(min=1)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(probe.sequences, generator=generator) * spread
        self.position = first + drawn.long().clamp(max=spread - 1)
        """``[B]``: one position in the first half of each sequence, from 3 on if it can be."""
        self.blocks_run = 0.0
        """Blocks that ran over a sequence."""
        self.directions: _Looked | Mapping[int, Direction] = {}
        self.kept: dict[int, list[Tensor]] = {}
        """By block, ``[b, T, D]`` of each batch at its input, in a pass without a change."""
        self._before: Outcome | None = None

    @property
    def blocks(self) -> int:
        """L."""
        return self.model.blocks

    @property
    def forwards(self) -> float:
        """Cost so far, in forward passes of the whole model over the whole probe."""
        return self.blocks_run / (self.blocks * len(self.lengths))

    def elsewhere(self, seed: int, spared: Tensor | None = None) -> Tensor:
        """``[B]``: a random position of each sequence beside P0, and beside ``spared`` ``[B]``."""
        spare = 1 if spared is None else 2
        generator = torch.Generator().manual_seed(seed)
        room = (self.lengths - spare).clamp(min=1)
        chosen = 1 + (torch.rand(len(self.lengths), generator=generator) * room).long()
        if spared is not None:
            chosen = torch.where(chosen >= spared, chosen + 1, chosen)
        return torch.minimum(chosen, self.lengths - 1)

    def answer(self, jobs: Sequence[Job]) -> list[Any]:
        """Run jobs together.

        Returns:
            Of each, its outcome, or the `Uneditable` in its place.
        """
        self.model.run_together([one for job in jobs for one in job.passes(self)])
        return [job.error or job.outcome() for job in jobs]

    def look(self, phases: Collection[int]) -> None:
        """Find the directions of the sink at the inputs of these blocks."""
        looked = _Looked(phases, len(self.lengths))
        self.run([looked], until=max(phases, default=0))
        self.directions = looked

    def plain(
        self,
        keep: Collection[int],
        edit: Edit | None = None,
        *,
        phases: Collection[int] | None = None,
        beside: Sequence[Job] = (),
    ) -> Outcome:
        """A pass without a change, which keeps the streams at the inputs of some blocks.

        Args:
            keep: the blocks.
            edit: one that changes nothing, and looks.
            phases: blocks at whose inputs the directions of the sink are found first, as `look`
                does.
            beside: jobs that need nothing of it, and run with it.

        Raises:
            MeasurementError: what else is in a batch changes the attention to P0.
        """
        own = edit or Edit()
        kept: dict[int, list[Tensor]] = {
            block: [] for block in sorted(keep) if block > 0 and block not in self.kept
        }

        class Keep(Edit):
            def state(self, block: int, stream: Tensor, rows: Tensor) -> None:
                if block in kept:
                    kept[block].append(stream.clone())

            def write(self, block: int, write: Write, rows: Tensor) -> None:
                own.write(block, write, rows)

        before: list[Job] = []
        if phases is not None:
            looked = _Looked(phases, len(self.lengths))
            before = [Edits([looked], until=max(phases, default=0))]
            self.directions = looked
        whole = Edits([Keep()], loss=True)
        again = [_Again(block, kept[block]) for block in kept]
        for answer in self.answer([*before, whole, *again, *beside])[: len(before) + 1]:
            if isinstance(answer, Uneditable):
                raise answer
        (outcome,) = whole.outcome()
        if self.model.routes:
            self._refuse_mixing(outcome)
        self._before = outcome
        self.kept |= {one.block: kept[one.block] for one in again if one.shows(outcome)}
        return outcome

    def _refuse_mixing(self, outcome: Outcome) -> None:
        """Edits go through together; refuse a model in which they change one another's outcome.

        Raises:
            MeasurementError: copies of a sequence in one batch are not what it is by itself.
        """
        job = Edits([])
        both = _Stacked(self, job, [Edit()] * 2, 0, 0)
        self.model.run_together([both])
        for copy in both.outcomes:
            apart = (copy.p0 - outcome.p0[: len(copy.p0)]).abs().nan_to_num().amax(-1)
            if float(apart.median()) > _MIXED:  # rounding may send a token to another expert
                raise MeasurementError(
                    "what else is in a batch changes the attention to P0, as where experts have a "
                    "capacity; the causal tests put edited copies into one batch"
                )

    def run(
        self, edits: Sequence[Edit], *, loss: bool = False, until: int | None = None
    ) -> list[Outcome]:
        """The outcomes of one job of `Edits` alone.

        Raises:
            Uneditable: a pass cannot be changed so.
        """
        (answer,) = self.answer([Edits(edits, loss=loss, until=until)])
        if isinstance(answer, Uneditable):
            raise answer
        outcomes: list[Outcome] = answer
        return outcomes

    def stacked(self, rows: int, loss: bool) -> int:
        """How many copies of a batch go through at once."""
        return max(1, (self._fits if loss else self._streams) // rows)

    def joined(self, parts: Sequence[Outcome], start: int) -> Outcome:
        """Of passes of all batches from a block on; up to there, what the plain pass showed."""
        joined = Outcome(*(torch.cat([getattr(part, name) for part in parts]) for name in _FIELDS))
        if self._before is not None:
            for name in ("p0", "second", "in_set", "set_size", "norm_ratio"):
                getattr(joined, name)[:, :start] = getattr(self._before, name)[:, :start]
        return joined


class _Stacked(Pass):
    """One batch, stacked once for each edit."""

    def __init__(
        self,
        replay: Replay,
        job: Job,
        edits: Sequence[Edit],
        start: int,
        number: int,
        loss: bool = False,
        last: int | None = None,
        most: int | None = None,
    ) -> None:
        tokens, rows = replay.batches[number][:most], replay.rows[number][:most]
        self._last = replay.blocks if last is None else last
        self._watched = _Watched(replay, edits, rows, tokens.device, self._last)
        edited = _Edited(edits, rows, self._last)
        super().__init__(
            tokens.repeat(len(edits), 1),
            self._watched,
            edited,
            start=start,
            last=self._last,
            logits=loss,
        )
        self._replay, self._job, self._edits = replay, job, edits
        self._number, self._rows = number, len(rows)
        nothing = torch.full((len(self.tokens),), torch.nan, dtype=torch.float64)
        self._losses = nothing, nothing.clone()
        self.outcomes: list[Outcome] = []

    @property
    def wanted(self) -> bool:
        """Has none of the job failed?"""
        return self._job.error is None

    def kept(self) -> Sequence[Tensor]:
        """Of each batch, the stream at the input of the first block."""
        return self._replay.kept[self.start]

    def stream(self) -> Tensor | None:
        """A copy for each edit."""
        if not self.start:
            return None
        return self.kept()[self._number][: self._rows].repeat(len(self._edits), 1, 1)

    def head(self, rows: slice, logits: Tensor) -> None:
        """Note the losses."""
        for kept, losses in zip(self._losses, _losses(logits, self.tokens[rows]), strict=True):
            kept[rows] = losses

    def done(self) -> None:
        """Note the outcomes."""
        for edit in self._edits:
            if (unmet := edit.unmet(self._last)) is not None:
                raise Uneditable(unmet)
        blocks = min(self._last + 1, self._replay.blocks) - self.start
        self._replay.blocks_run += len(self._edits) * self._rows * blocks
        self.outcomes = self._watched.outcomes(self._losses)

    def failed(self, error: Exception) -> None:
        """Then the job has."""
        if not isinstance(error, Uneditable):
            raise error
        self._job.error = error


class _Again(Job):
    """Does a pass of a sequence from a block on show what the plain pass did?

    Not where blocks hand each other more than the stream: then passes run from the beginning.

    Args:
        block: where it starts.
        kept: of each batch, the stream at its input; from the plain pass, which comes before.
    """

    def __init__(self, block: int, kept: Sequence[Tensor]) -> None:
        self.block, self._kept = block, kept

    def passes(self, replay: Replay) -> list[Pass]:
        """One, of the first sequence."""
        job = self

        class One(_Stacked):
            def kept(self) -> Sequence[Tensor]:
                if not replay.model.restarts(job.block):
                    raise Uneditable(f"block {job.block} cannot be run without those before")
                return job._kept

            def failed(self, error: Exception) -> None:
                pass  # there is no outcome then

        self._one = One(replay, self, [Edit()], self.block, 0, loss=True, most=1)
        return [self._one]

    def outcome(self) -> list[Outcome]:
        """None, if it failed."""
        return self._one.outcomes

    def shows(self, whole: Outcome) -> bool:
        """Is it the same, to rounding?"""
        for again in self._one.outcomes:
            shown = (
                (one.p0[:1, self.block :], one.loss[:1], one.p0_loss[:1]) for one in (again, whole)
            )
            return all(
                torch.allclose(one, other, rtol=_SAME, atol=_SAME, equal_nan=True)
                for one, other in zip(*shown, strict=True)
            )
        return False


_FIELDS = tuple(Outcome.__dataclass_fields__)


class _Looked(Edit):
    """A pass that changes nothing, and the directions that the states at some blocks' inputs have.

    A block's direction is there once all sequences have been at its input.
    """

    def __init__(self, blocks: Collection[int], sequences: int) -> None:
        self._blocks, self._sequences = set(blocks), sequences
        self._p0: dict[int, Tensor] = {}
        self._others: dict[int, Tensor] = {}
        self._seen: defaultdict[int, int] = defaultdict(int)
        self._found: dict[int, Direction] = {}

    def state(self, block: int, stream: Tensor, rows: Tensor) -> None:
        if block in self._blocks:
            shape = self._sequences, stream.shape[-1]
            for kept, value in (
                (self._p0, stream[:, 0]),
                (self._others, stream[:, 1:].mean(1, dtype=torch.float32)),
            ):
                kept.setdefault(block, torch.zeros(shape))[rows] = value.float().cpu()
            self._seen[block] += len(rows)

    def get(self, block: int) -> Direction | None:
        """Of the sink at the input of a block, if it is there."""
        if self._seen[block] < self._sequences:
            return None
        if block not in self._found:
            rows = self._p0[block]
            apart = rows.double().mean(0) - self._others[block].double().mean(0)
            towards = torch.nn.functional.normalize(apart, dim=-1)
            least = IN_STATE * (rows.double() @ towards)
            self._found[block] = Direction(towards.float(), least)
        return self._found[block]


class _Watched(Observer):
    """What is seen of one batch of a pass, stacked once for each edit."""

    def __init__(
        self, replay: Replay, edits: Sequence[Edit], rows: Tensor, device: torch.device, last: int
    ) -> None:
        self._copies, self._rows, self._last = len(edits), rows, last
        self._directions, self._blocks = replay.directions, replay.blocks
        self._slices = _slices(len(edits), len(rows))
        self.second_key = replay.position[rows].repeat(len(edits)).to(device)
        self._seen: dict[str, defaultdict[int, list[Tensor]]] = {
            name: defaultdict(list) for name in _FIELDS[:5]
        }
        self._inside: Tensor | None = None

    def state(self, block: int, stream: Tensor) -> None:
        if block > self._last:
            raise Enough
        if block == self._blocks:
            return
        norms = stream.float().norm(dim=-1)
        self._seen["norm_ratio"][block].append(norms[:, 0] / median(norms[:, 1:]))
        self._inside = None
        if (direction := self._directions.get(block)) is not None:
            least = direction.least[self._rows].repeat(self._copies).to(stream.device)
            towards = stream.float() @ direction.towards.to(stream.device)
            self._inside = towards >= least[:, None]
            self._seen["set_size"][block].append(self._inside.sum(-1))

    def attention(self, block: int, attended: Attended) -> None:
        assert attended.second_key is not None and self.second_key is not None
        self._seen["p0"][block].append(_received(attended, torch.zeros_like(self.second_key)))
        self._seen["second"][block].append(_received(attended.second_key, self.second_key))
        if self._inside is not None:
            onto = attended.onto(self._inside).double().mean(1)
            outside = (~self._inside).double()
            outside[:, 0] = 0
            mean = (onto * outside).sum(-1) / outside.sum(-1)
            self._seen["in_set"][block].append(mean)

    def outcomes(self, losses: tuple[Tensor, Tensor]) -> list[Outcome]:
        shape = len(self._rows) * self._copies, self._blocks
        tables = []
        for of in self._seen.values():
            table = torch.full(shape, torch.nan, dtype=torch.float64)
            for block, parts in of.items():
                table[:, block] = torch.stack(parts).double().mean(0).cpu()
            tables.append(table)
        return [
            Outcome(*(value[at].clone() for value in (*tables, *losses))) for at in self._slices
        ]


class _Edited(Editor):
    """Several edits of one batch, stacked once for each."""

    def __init__(self, edits: Sequence[Edit], rows: Tensor, last: int) -> None:
        self._edits, self._rows, self._last = edits, rows, last
        self._slices = _slices(len(edits), len(rows))

    def state(self, block: int, stream: Tensor) -> Tensor | None:
        if block > self._last:
            raise Enough
        return self._joined(
            stream, [edit.state(block, stream[at], self._rows) for edit, at in self._each()]
        )

    def mask(self, block: int, seen: Tensor) -> Tensor | None:
        size = len(self._rows) * len(self._edits)
        whole = seen.expand(size, -1, -1, -1)
        changed = [edit.edit_mask(block, whole[at], self._rows) for edit, at in self._each()]
        return self._joined(whole, changed)

    def write(self, block: int, write: Write) -> Tensor | None:
        of = None
        if write.routed is not None:  # several edits may ask for an expert
            of = cache(write.routed.of) if len(self._edits) > 1 else write.routed.of
        return self._joined(
            write.added,
            [edit.write(block, _sliced(write, at, of), self._rows) for edit, at in self._each()],
        )

    def _each(self) -> Iterator[tuple[Edit, slice]]:
        return zip(self._edits, self._slices, strict=True)

    def _joined(self, whole: Tensor, parts: Sequence[Tensor | None]) -> Tensor | None:
        if all(part is None for part in parts):
            return None
        own = [
            whole[at] if part is None else part
            for part, at in zip(parts, self._slices, strict=True)
        ]
        return own[0] if len(own) == 1 else torch.cat(own)


def _slices(copies: int, count: int) -> list[slice]:
    return [slice(at * count, (at + 1) * count) for at in range(copies)]


def _sliced(write: Write, at: slice, of: Callable[[int], Tensor] | None) -> Write:
    """The write of some of the sequences."""
    raw = None if write.raw is None else write.raw[at]
    added = raw if raw is not None and write.raw is write.added else write.added[at]
    projection, routed = write.projection, write.routed
    if projection is not None:
        projection = replace(projection, mixed=projection.mixed[at])
    if routed is not None and of is not None:
        whole, own = routed, routed.own
        routed = replace(
            routed,
            index=routed.index[at],
            gate=lambda: whole.gate()[at],
            total=lambda: whole.total()[at],
            of=lambda expert: of(expert)[at],
            own=None if own is None else lambda expert: own(expert)[at],
        )
    return replace(write, added=added, raw=raw, projection=projection, routed=routed)


def _received(attended: Attended, position: Tensor) -> Tensor:
    """``[b]``: mean attention of the later queries that see the position; 0 if none does."""
    length = attended.p0.shape[-1]
    after = torch.arange(length, device=position.device) > position[:, None]
    seen = (attended.visible & after).double()
    total = (attended.p0.double() * seen[:, None]).sum(-1).mean(-1)
    return total / seen.sum(-1).clamp(min=1)


def _losses(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``[b]`` each: over positions from 1 on, and of the token after P0."""
    wanted = tokens[:, 1:].to(logits.device)
    losses = torch.stack(
        [
            nn.functional.cross_entropy(own[:-1].float(), following, reduction="none")
            for own, following in zip(logits, wanted, strict=True)
        ]
    ).double()
    return losses[:, 1:].mean(1).cpu(), losses[:, 0].cpu()


@contextmanager
def replaying(model: Any, probe: Probe, batch_size: int | None = None) -> Iterator[Replay]:
    """A `Replay` of a live model, which is left as it was found.

    Raises:
        ProbeError, MeasurementError: as `sinktrack.measure.measure` does.
    """
    with adapt(model).editable(probe, batch_size) as runs:
        yield Replay(runs, probe, batch_size)
