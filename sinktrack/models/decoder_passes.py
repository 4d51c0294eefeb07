"""Passes of any PyTorch decoder that are watched and edited, and where its logits are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor

from sinktrack.events import Editor, Observer
from sinktrack.models.any_decoder import Decoder, Found, Restart, Several, _found, _Tap
from sinktrack.models.editable import at_once
from sinktrack.models.guard import probe_context
from sinktrack.probe import Probe

_FEW = 2, 64
"""Sequences and positions of the pass that finds out what the model's tensors are like."""


class _Done(Exception):
    """The last block is over, and logits are not wanted."""


class _Ending(Observer):
    """Shows a pass to another, and ends it with the last block."""

    def __init__(self, observer: Observer, blocks: int) -> None:
        self.also, self._blocks = observer.also, blocks
        self._observer = observer
        for name in ("factors", "attention", "gate", "untold", "write"):
            setattr(self, name, getattr(observer, name))

    def state(self, block: int, stream: Tensor) -> None:
        self._observer.state(block, stream)
        if block == self._blocks:
            raise _Done


class _Passes:
    """`Editable` of any PyTorch decoder."""

    def __init__(self, decoder: Decoder, found: Found, few: Tensor) -> None:
        self._decoder, self._found = decoder, found
        self.blocks = len(found.blocks)
        self.device = next(found.model.parameters()).device
        tap, logits = self._pass(few, Observer(), None, None)
        self._dims, self._time_first, self.width = tap.dims, tap.time_first, tap.width
        found.carries = tap.carries
        self.vocabulary = self.width if logits is None else logits.shape[-1]

    def restarts(self, block: int) -> bool:
        """Do all blocks before it return the stream alone, in a shape that is known?"""
        found = self._found
        if found.carries or self._dims > 3:
            return False
        return all(
            before in found.forms and not isinstance(found.blocks[before], Several)
            for before in range(block)
        )

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
        """As of `Editable`; single tokens go twice, as code for one may expect a cache.

        Where there are two heads, three times: their order is told by these numbers.
        """
        if tokens.shape[1] == 1:
            tokens = tokens.expand(-1, 3 if self._found.most_heads == 2 else 2)
        restart = None
        if start:
            assert stream is not None
            restart = Restart(start, stream, self._dims, self._time_first)
        own = observer or Observer()
        if not logits:
            own = _Ending(own, self.blocks)
        with suppress(_Done):
            return self._pass(tokens, own, editor, restart)[1]
        return None

    def _pass(
        self, tokens: Tensor, observer: Observer, editor: Editor | None, restart: Restart | None
    ) -> tuple[_Tap, Tensor | None]:
        tap = _Tap(
            self._decoder, self._found, observer, tokens.to(self.device), "all", editor, restart
        )
        with tap.watching():
            output = self._decoder.run(tap.tokens)
            tap.end()
        return tap, _logits(output, tap, self._found)


def _logits(output: Any, tap: _Tap, found: Found) -> Tensor | None:
    """``[B, T, V]`` in what a model returned; None where no tensor is evidently that.

    It is what is named so, or the one tensor of every position that is as wide as the embedding has
    rows, or else wider than any token and not as wide as the stream; and no probabilities.
    """
    named = output.get("logits") if isinstance(output, Mapping) else None
    named = getattr(output, "logits", named)
    if isinstance(output, Mapping):
        output = tuple(output.values())
    given = (
        [named] if named is not None else output if isinstance(output, tuple | list) else [output]
    )
    rows = None
    if found.embedding is not None:
        rows = found.model.get_parameter(found.embedding).shape[0]
    wanted = []
    for value in given:
        if not isinstance(value, Tensor) or value.ndim < 2:
            continue
        width = value.shape[-1]
        fits = width == rows or (width != tap.width and width > int(tap.tokens.max()))
        own = tap.rows(value, width) if fits else None
        if own is not None:
            wanted.append(own)
    if len(wanted) != 1:
        return None
    (logits,) = wanted
    sums = logits.float().sum(-1)
    if bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all()):
        return None
    return logits


@contextmanager
def editable(decoder: Decoder, probe: Probe, batch_size: int | None) -> Iterator[_Passes]:
    """A decoder that is run and edited, and left as it was found.

    Raises:
        ProbeError, MeasurementError: as of `sinktrack.measure`; or what writes to its stream cannot
            be told.
    """
    found = _found(decoder)
    few = probe.tokens[: _FEW[0], : _FEW[1]]
    with probe_context(found.model, len(few), probe):
        passes = _Passes(decoder, found, few)
    size = at_once(passes.vocabulary, probe, batch_size)
    with probe_context(found.model, size, probe):
        yield passes
