"""Passes of any PyTorch decoder: it is measured, tried and edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sinktrack.collect import Collector
from sinktrack.errors import MeasurementError
from sinktrack.events import Editor, Observer
from sinktrack.measurement import Measurement
from sinktrack.models.any_decoder.decoder import Decoder, Found, Several, class_of, found_in
from sinktrack.models.any_decoder.stream import Decided, Restart, Undecided
from sinktrack.models.any_decoder.tap import Tap
from sinktrack.models.editable import InMemory, at_once
from sinktrack.models.guard import probe_context
from sinktrack.models.passes import Digest, Passes
from sinktrack.probe import Probe

_FEW = 2, 64
"""Sequences and positions of the pass that finds out what the model's tensors are like."""


def measure_decoder(
    decoder: Decoder, probe: Probe, batch_size: int | None, in_training: bool = False
) -> Measurement:
    """`sinktrack.measure` for any PyTorch decoder; errors are the same."""
    tried = found_in(decoder)
    passes = Passes(probe, batch_size)
    (collected, batches), (singles, firsts) = passes.both
    with probe_context(tried.model, passes.size, probe):
        wholes = [_show(decoder, tried, collected, tokens) for tokens in batches]
        alone = [_show(decoder, tried, singles, _alone(tokens), parts=False) for tokens in firsts]
        _check_p0(tried, wholes[0], alone[0])
        passes.ablate_whole(_Passes(decoder, tried), in_training)
    seen = collected.of("attention", "visible")
    length = probe.length - 1
    tried.kinds = tuple(
        "full" if all(bool((rows == length).all()) for rows in seen[block]) else "sliding"
        for block in tried.blocks
    )
    weights = None
    if tried.embedding is not None:
        digest = Digest(tried.model.get_parameter(tried.embedding), passes.first)
        for block in tried.blocks.values():
            digest.add(block)
        weights = digest.hex()
    measured = passes.measurement(tried, weights)
    if tried.notes:
        told = {"parts": "; ".join(dict.fromkeys(tried.notes))}
        measured = replace(measured, missing=measured.missing | told)
    return measured


def check(decoder: Decoder, probe: Probe) -> str:
    """Try a model on a few tokens of the probe, and say what was found; errors as of `measure`."""
    tried = found_in(decoder)
    few = probe.tokens[:2, :8]
    collected = Collector({})
    with probe_context(tried.model, len(few), probe):
        whole = _show(decoder, tried, collected, few)
        first = _alone(few[:, :1].unique(dim=0))  # alike, they do not tell the order of tensors
        _check_p0(tried, whole, _show(decoder, tried, Collector({}), first, parts=False))
    blocks, how = len(tried.blocks), " and ".join(tried.how)
    experts = f", {tried.experts} experts" if tried.experts else ""
    experts += " told apart" if experts and tried.told else ""
    lost = [collected.lost] if collected.lost else []
    said = f"{tried.type}: {blocks} of {blocks} blocks, {how}, {tried.most_heads} heads{experts}"
    return "; ".join([said, *lost, *dict.fromkeys(tried.notes)])


@dataclass(frozen=True)
class _AtP0:
    """Of a pass."""

    first: Tensor
    """``[B]``: its first tokens."""
    dtype: torch.dtype
    yielded: dict[int, tuple[Tensor, Tensor | None, Tensor | None]]
    """As of `Tap`."""


def _alone(first: Tensor) -> Tensor:
    """Single tokens ``[B, 1]`` twice, as code for one may expect a cache; the first sees itself."""
    return first.expand(-1, 2)


def _show(
    decoder: Decoder, found: Found, observer: Collector, tokens: Tensor, parts: bool = True
) -> _AtP0:
    """Show a forward pass of tokens ``[B, T]``, with the parts of its writes or without."""

    def make() -> Tap:
        return Tap(decoder, found, observer, tokens.to(found.device), "p0" if parts else None)

    tap, _ = _passed(make)
    found.notes += tap.notes if parts else []
    return _AtP0(tap.tokens[:, 0], observer.dtype, tap.yielded)


def _passed(make: Callable[[], Tap]) -> tuple[Tap, Any]:
    """A pass, and what the model gives; before the first one it is decided what its stream is."""
    tap = make()
    try:
        return tap, _run(tap)
    except Undecided as undecided:
        _decide(make(), undecided.count)
    tap = make()
    return tap, _run(tap)


def _run(tap: Tap) -> Any:
    with tap.watching():
        output = tap.decoder.run(tap.tokens)
        tap.end()
    return output


def _decide(like: Tap, count: int) -> None:
    """Which of several tensors at block 0 is the stream: the one to which the block adds.

    Raises:
        MeasurementError: none, or more than one.
    """
    tried, came = like.found, {}
    errors: list[MeasurementError] = []
    for place in range(count):
        tried.start = place
        tap = Tap(like.decoder, tried, Collector({}), like.tokens, None)
        tap.deciding = True
        try:
            _run(tap)
        except Decided as decided:
            if decided.places:
                came[place] = decided.places
        except MeasurementError as error:
            errors.append(error)
    tried.start = min(came, default=0)
    if not came and len(errors) == count:
        raise errors[0]
    if len(set(came.values())) != 1:
        what = (
            "several of them come out with writes added, and several streams side by side "
            "(hyper-connections, reversible blocks) are not supported"
            if came
            else "none comes out with a write added to it; let a block take the residual stream as "
            "its only tensor of that shape, or return it plus what it writes"
        )
        raise MeasurementError(
            f"block 0 ({class_of(tried.blocks[0])}): {count} tensors of the stream's shape come "
            f"in, and which is the residual stream cannot be told: {what}"
        )


def _check_p0(found: Found, whole: _AtP0, alone: _AtP0) -> None:
    """Is position 0 of the model's tensors P0, which sees nothing but itself?

    Raises:
        MeasurementError: something at P0 is another among other tokens than alone, where nothing
            before it is; or it is alike for all tokens.
    """
    at, same = (whole.first[:, None] == alone.first).nonzero(as_tuple=True)
    fine = torch.finfo(whole.dtype).eps < 1e-4
    for block, (rows, heads, size) in whole.yielded.items():
        name = f"block {block} ({class_of(found.blocks[block])})" if block in found.blocks else ""
        lone, yields, _ = alone.yielded[block]
        if _apart(rows[at], lone[same]) > (1e-3 if fine else 5e-2):
            if block:
                return  # what is written there may hang on the batch, as where experts are full
            raise MeasurementError(
                f"{name}: what stands first in the stream hangs on later tokens, so it is not the "
                "first token: the model reads its tokens in another order, or counts positions "
                "from their end; not supported"
            )
        if heads is None or yields is None or size is None or heads.shape[1] != yields.shape[1]:
            continue
        off = torch.linalg.vector_norm(heads[at] - yields[same], dim=-1).mean()
        if float(off) > (0.1 if fine else 0.5) * float(size):
            raise MeasurementError(
                f"{name}: what its first query sees hangs on later tokens, though P0 sees only "
                "itself: its attention goes over positions in another order; not supported"
            )
        fixed = bool((yields == yields[:1]).all()) and not bool((lone == lone[:1]).all())
        if block == 0 and fixed and float(size) > 0:
            raise MeasurementError(
                f"{name}: what its first query sees is the same for all tokens, so the first key "
                "is not P0's: keys are moved by a place, or a learned one stands first; not "
                "supported"
            )


def _apart(one: Tensor, two: Tensor) -> float:
    """The largest distance of two rows, in parts of a row's norm."""
    if not len(one):
        return 0.0
    apart = torch.linalg.vector_norm(one - two, dim=-1)
    return float((apart / torch.linalg.vector_norm(two, dim=-1).clamp(min=1e-30)).max())


class _Done(Exception):
    """The last block is over, and logits are not wanted."""


class _Ending(Observer):
    """Shows a pass to another, and ends it with the last block."""

    def __init__(self, observer: Observer, blocks: int) -> None:
        self.second_key, self._blocks = observer.second_key, blocks
        self._observer = observer
        for name in ("factors", "attention", "gate", "untold", "write"):
            setattr(self, name, getattr(observer, name))

    def state(self, block: int, stream: Tensor) -> None:
        self._observer.state(block, stream)
        if block == self._blocks:
            raise _Done


class _Passes(InMemory):
    """`Editable` of any PyTorch decoder."""

    def __init__(self, decoder: Decoder, found: Found) -> None:
        self._decoder, self._found = decoder, found
        self.blocks = len(found.blocks)
        self.device = found.device
        self.width = self.vocabulary = 0
        self.routes = False
        self._dims, self._time_first = 0, False

    def look(self, few: Tensor) -> None:
        """Find out by a pass of a few tokens what the model's tensors are like."""
        tap, logits = self._pass(few, Observer(), None, None)
        self._dims, self._time_first, self.width = tap.dims, tap.time_first, tap.width
        self._found.carries = tap.carries
        self.routes = self._found.experts is not None
        self.vocabulary = self.width if logits is None else logits.shape[-1]

    def restarts(self, block: int) -> bool:
        """Do all blocks before it return the stream alone, in a shape that is known?"""
        tried = self._found
        if tried.carries or self._dims not in (2, 3):
            return False
        return all(
            before in tried.forms and not isinstance(tried.blocks[before], Several)
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
    ) -> tuple[Tap, Tensor | None]:
        def make() -> Tap:
            return Tap(
                self._decoder, self._found, observer, tokens.to(self.device), "all", editor, restart
            )

        tap, output = _passed(make)
        return tap, _logits(output, tap, self._found)


def _logits(output: Any, tap: Tap, found: Found) -> Tensor | None:
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
    tried = found_in(decoder)
    few = probe.tokens[: _FEW[0], : _FEW[1]]
    passes = _Passes(decoder, tried)
    with probe_context(tried.model, len(few), probe):
        passes.look(few)
    size = at_once(passes.vocabulary, probe, batch_size)
    with probe_context(tried.model, size, probe):
        yield passes
