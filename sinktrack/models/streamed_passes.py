"""Passes of a checkpoint of which one block at a time is in memory; several go in lockstep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from sinktrack.events import Editor, Observer
from sinktrack.models.blockwise import BlockwiseForward, BlockwiseUnsupported
from sinktrack.models.editable import Enough, Pass, at_once
from sinktrack.models.guard import out_of_memory, preserve_state
from sinktrack.models.huggingface import resume, watch
from sinktrack.models.live import check, forward
from sinktrack.models.streaming import Streamed
from sinktrack.probe import Probe

WAITING = 2**29
"""Bytes of residual streams that wait between two blocks, at most, but for those of one pass; or
half of the weights of the largest block, if that is more."""
_LOGITS = 2**25
"""Bytes of float32 logits held at a time: the head's weights are in memory beside them."""


@contextmanager
def editable(streamed: Streamed, probe: Probe, batch_size: int | None) -> Iterator[_Passes]:
    """A checkpoint that is run and edited.

    Raises:
        BlockwiseUnsupported: its blocks cannot be run one by one, from any on.
        ArchiveError: a weight is missing or damaged.
        ProbeError, MeasurementError: as of `sinktrack.measure`.
    """
    decoder = streamed.decoder
    check(probe, decoder)
    streamed.load_surroundings(probe.tokens)
    embedding = streamed.base.get_input_embeddings()
    size = at_once(decoder.config.vocab_size, probe, batch_size)
    with out_of_memory(size, probe), preserve_state(embedding):
        passes = _Passes(streamed)
        walk = passes.walk(probe.batches(1)[0][:, :2])
        if walk.shared is not None:
            raise BlockwiseUnsupported(
                f"the blocks of {type(decoder.model).__name__} cannot be run one by one: they hand "
                f"each other more than the stream ({walk.shared})"
            )
        yield passes


class _Going:
    """A pass on its way through the blocks."""

    def __init__(self, of: Pass) -> None:
        self.of = of
        self.stream: Tensor | None = None
        """``[B, T, D]`` at the input of the next block, on the CPU; None at that of block 0."""


class _Passes:
    """`Editable` of a streamed checkpoint."""

    def __init__(self, streamed: Streamed) -> None:
        self._streamed, self._found = streamed, streamed.decoder
        self.blocks = len(self._found.blocks)
        self.routes = False
        self.width: int = self._found.config.hidden_size
        self.vocabulary: int = self._found.config.vocab_size
        self.device: torch.device = streamed.base.get_input_embeddings().weight.device
        self._forms: dict[int, int] = {}
        self._limit = max(WAITING, streamed.largest_block // 2)

    def walk(self, tokens: Tensor) -> BlockwiseForward:
        """A batch at the input of block 0."""
        walk = BlockwiseForward(self._found, self._streamed.base, tokens.to(self.device))
        self._forms = dict.fromkeys(self._found.blocks, int(walk.in_tuple))
        return walk

    def restarts(self, block: int) -> bool:
        """Blocks hand on the stream alone."""
        return True

    def run(
        self,
        tokens: Tensor,
        observer: Observer | None = None,
        editor: Editor | None = None,
        *,
        start: int = 0,
        stream: Tensor | None = None,
        logits: bool = False,
    ) -> Tensor | None:
        """As of `Editable`."""

        shown: list[Tensor] = []

        class Single(Pass):
            def stream(self) -> Tensor | None:
                return stream

            def head(self, rows: slice, logits: Tensor) -> None:
                shown.append(logits)

        self.run_together([Single(tokens, observer, editor, start=start, logits=logits)])
        return torch.cat(shown) if shown else None

    def run_together(self, passes: Sequence[Pass]) -> None:
        """As of `Editable`: each block is read once for as many passes as may wait for it."""
        waiting = sorted(passes, key=lambda each: each.start)
        while waiting:
            count = self._fitting(waiting)
            self._read([_Going(each) for each in waiting[:count]])
            del waiting[:count]

    def _fitting(self, passes: Sequence[Pass]) -> int:
        """How many of these, from the first on, may be on their way together."""
        held = [0] * self.blocks
        for place, each in enumerate(passes):
            size = each.tokens.numel() * self.width * self._found.model.dtype.itemsize
            span = range(each.start, self._last(each) + 1)
            if place and any(held[block] + size > self._limit for block in span):
                return place
            for block in span:
                held[block] += size
        return len(passes)

    def _last(self, each: Pass) -> int:
        end = self.blocks - 1
        return end if each.last is None else min(each.last, end)

    def _read(self, group: list[_Going]) -> None:
        """Take passes through the blocks, from the earliest start to the last that is wanted."""
        first = min(going.of.start for going in group)
        last = max(self._last(going.of) for going in group)
        for index in range(first, last + 1):
            there = [going for going in group if going.of.start <= index]
            with self._streamed.block(index, last):
                for going in there:
                    if not self._step(going, index):
                        group.remove(going)
        if group:
            with self._streamed.head():
                for going in group:
                    self._head(going)

    def _step(self, going: _Going, index: int) -> bool:
        """Through one block; is the pass to go on?"""
        of = going.of
        if not of.wanted:
            return False
        try:
            if index == of.start:
                going.stream = of.stream()
            walk = self.walk(of.tokens)
            if going.stream is not None:
                walk.stream = going.stream.to(self.device)
            going.stream = None
            over = True
            with (
                suppress(Enough),
                watch(self._found, of.observer or Observer(), of.editor, index, index + 1),
            ):
                walk.step(index)
                over = index == self._last(of) and not of.logits
            if over:
                of.done()
            else:
                going.stream = walk.stream.cpu()
        except Exception as error:  # whose it is decides
            of.failed(error)
            return False
        return not over

    def _head(self, going: _Going) -> None:
        """From the last block's output to the logits, by a few sequences at a time."""
        of, stream, going.stream = going.of, going.stream, None
        assert stream is not None
        each = max(1, _LOGITS // (4 * stream.shape[1] * self.vocabulary))
        try:
            for first in range(0, len(stream), each):
                rows = slice(first, first + each)
                part = stream[rows].to(self.device)
                with resume(self._found, self.blocks, part, self._forms):
                    tokens = of.tokens[rows].to(self.device)
                    output = forward(self._found.model, tokens, logits=True)
                logits = getattr(output, "logits", None)
                if logits is not None:
                    of.head(rows, logits)
            of.done()
        except Exception as error:  # whose it is decides
            of.failed(error)
