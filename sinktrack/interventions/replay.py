"""Run a probe again from any block on, with something changed in it.

A plain pass keeps the residual stream at the inputs of the blocks that will be changed. A changed
pass then runs the model as it is, but for the blocks before: those hand on the kept stream. What a
pass costs is in proportion to the blocks that run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sinktrack.attention import Attended
from sinktrack.events import Observer, Write
from sinktrack.measure import forward, readable, refuse_another_model
from sinktrack.models.guard import untouched
from sinktrack.models.huggingface import Decoder, resume, returned, watch
from sinktrack.probe import Probe

_LOGITS = 2**28
"""Bytes of float32 logits held at a time, from which the sequences per pass follow."""
_SAME = 1e-5


class Edit:
    """What is changed in a pass. Rows number the probe's sequences, as the batches hold them."""

    start: int = 0
    """The first block with a change."""

    def state(self, block: int, stream: Tensor, rows: Tensor) -> Tensor | None:
        """Another residual stream ``[b, T, D]`` at the input of a block, or None."""

    def sight(self, block: int, seen: Tensor, rows: Tensor) -> Tensor | None:
        """Other keys in sight, ``[b or 1, H or 1, T, T]`` bool, or None."""

    def write(self, block: int, write: Write, rows: Tensor) -> Tensor | None:
        """Another write ``[b, T, D]``, or None."""


class Outcome(NamedTuple):
    """What a pass shows, per sequence: float64 on the CPU."""

    p0: Tensor
    """``[B, L]``: attention to P0, mean over heads and the later queries that see it; nan where a
    block has no softmax attention."""
    also: Tensor
    """``[B, L]``: the same to the sequence's other position."""
    loss: Tensor
    """``[B]``: next-token loss in nats, mean over positions from 1 on; nan without a head."""
    p0_loss: Tensor
    """``[B]``: of the token after P0."""


class Replay:
    """A model, a probe and one other position in each of its sequences."""

    def __init__(self, found: Decoder, probe: Probe, batch_size: int | None) -> None:
        self.found = found
        fits = max(1, _LOGITS // (4 * probe.length * found.config.vocab_size))
        device = found.model.get_input_embeddings().weight.device
        batches = probe.batches(min(fits, batch_size or fits))
        self.batches = [batch.to(device) for batch in batches]
        count = torch.arange(probe.sequences)
        self.rows = list(count.split([len(batch) for batch in batches]))
        self.lengths = torch.cat([torch.full((len(b),), b.shape[1]) for b in batches])
        self.generator = torch.Generator().manual_seed(0)
        first, last = self.lengths.sub(2).clamp(1, 3), self.lengths // 2
        spread = (last - first + 1).clamp(min=1)
        drawn = torch.rand(probe.sequences, generator=self.generator) * spread
        self.position = first + drawn.long().clamp(max=spread - 1)
        """``[B]``: one position in the first half of each sequence, from 3 on if it can be."""
        self.blocks_run = 0
        self._kept: dict[int, list[Tensor]] = {}
        self._forms: dict[int, int] = {}
        self._before: Outcome | None = None

    def plain(self, keep: Collection[int]) -> Outcome:
        """A pass without a change, which keeps the streams at the inputs of some blocks."""
        kept: dict[int, list[Tensor]] = {block: [] for block in keep if block > 0}

        class Keep(Edit):
            def state(self, block: int, stream: Tensor, rows: Tensor) -> None:
                if block in kept:
                    kept[block].append(stream.clone())

        with returned(self.found, self._forms):
            outcome = self._before = self.run(Keep())
        for block in sorted(kept):
            if all(before in self._forms for before in range(block)):
                self._kept[block] = kept[block]
                if not self._restarts(block, outcome):
                    del self._kept[block]
        return outcome

    def _restarts(self, block: int, outcome: Outcome) -> bool:
        """Does a pass from this block on show what the plain pass did?

        Not where blocks hand each other more than the stream: then passes run from the beginning.
        """
        probed = Edit()
        probed.start = block
        with suppress(Exception):
            again = self.run(probed, batches=1).p0[:, block:]
            wanted = outcome.p0[: len(again), block:]
            return torch.allclose(again, wanted, rtol=0, atol=_SAME, equal_nan=True)
        return False

    def run(self, edit: Edit, batches: int | None = None) -> Outcome:
        """A pass with a change, from the first changed block on where its input was kept."""
        start = edit.start if edit.start in self._kept else 0
        shown = []
        pairs = list(zip(self.batches, self.rows, strict=True))
        for number, (tokens, rows) in enumerate(pairs[:batches]):
            watched = _Watched(edit, rows, self.position[rows].to(tokens.device))
            stream = self._kept[start][number] if start else tokens
            with (
                resume(self.found, start, stream, self._forms),
                watch(self.found, watched, start),
            ):
                output = forward(self.found.model, tokens, logits=True)
            logits = getattr(output, "logits", None)
            shown.append(watched.outcome(len(self.found.blocks), _losses(logits, tokens)))
            self.blocks_run += len(self.found.blocks) - start
        p0, also, loss, p0_loss = (torch.cat(parts) for parts in zip(*shown, strict=True))
        if self._before is not None:
            p0[:, :start] = self._before.p0[: len(p0), :start]
            also[:, :start] = self._before.also[: len(p0), :start]
        return Outcome(p0, also, loss, p0_loss)


class _Watched(Observer):
    """One batch of a pass."""

    def __init__(self, edit: Edit, rows: Tensor, position: Tensor) -> None:
        self.edit, self.rows, self.also = edit, rows, position
        self._p0: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._also: defaultdict[int, list[Tensor]] = defaultdict(list)

    def state(self, block: int, stream: Tensor) -> Tensor | None:
        return self.edit.state(block, stream, self.rows)

    def sight(self, block: int, seen: Tensor) -> Tensor | None:
        return self.edit.sight(block, seen, self.rows)

    def write(self, block: int, write: Write) -> Tensor | None:
        return self.edit.write(block, write, self.rows)

    def attention(self, block: int, attended: Attended) -> None:
        assert attended.also is not None and self.also is not None
        self._p0[block].append(_received(attended, torch.zeros_like(self.also)))
        self._also[block].append(_received(attended.also, self.also))

    def outcome(self, blocks: int, losses: tuple[Tensor, Tensor]) -> Outcome:
        def rows(of: dict[int, list[Tensor]]) -> Tensor:
            found = torch.full((len(self.rows), blocks), torch.nan, dtype=torch.float64)
            for block, parts in of.items():
                found[:, block] = torch.stack(parts).mean(0).cpu()
            return found

        return Outcome(rows(self._p0), rows(self._also), *losses)


def _received(attended: Attended, position: Tensor) -> Tensor:
    """``[b]``: mean attention of the later queries that see the position; 0 if none does."""
    length = attended.p0.shape[-1]
    after = torch.arange(length, device=position.device) > position[:, None]
    seen = (attended.visible & after).double()
    total = (attended.p0.double() * seen[:, None]).sum(-1).mean(-1)
    return total / seen.sum(-1).clamp(min=1)


def _losses(logits: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
    if logits is None:
        nothing = torch.full((len(tokens),), torch.nan, dtype=torch.float64)
        return nothing, nothing
    loss = nn.functional.cross_entropy(
        logits[:, :-1].float().mT, tokens[:, 1:].to(logits.device), reduction="none"
    )
    found = loss.double().cpu()
    return found[:, 1:].mean(1), found[:, 0]


@contextmanager
def replaying(model: nn.Module, probe: Probe, batch_size: int | None = None) -> Iterator[Replay]:
    """A `Replay` of a live model, which is left as it was found.

    Raises:
        ProbeError, MeasurementError: as `sinktrack.measure.measure` does.
    """
    found = readable(model, probe)
    refuse_another_model(found, probe)
    replay = Replay(found, probe, batch_size)
    with untouched(found.model, len(replay.batches[0]), probe):
        yield replay
