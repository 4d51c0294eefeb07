"""Run a Hugging Face decoder block by block, each with whatever the model calls it with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sinktrack.collect import Collector
from sinktrack.errors import SinktrackError
from sinktrack.events import Editor, Observer, Write
from sinktrack.metrics.total_effect import SLOTS, Ablations
from sinktrack.models.huggingface import Decoder, prepared, watch


class BlockwiseUnsupported(SinktrackError):
    """The blocks cannot be run one by one: something happens between them."""


class BlockwiseForward:
    """One batch on its way through the blocks of a decoder.

    The model's own forward runs first with blocks that hand on what they get. It shows what each is
    called with (masks, position embeddings), and that nothing else happens on the way from one to
    the next. Weights of blocks are not needed for that.

    Args:
        found: the decoder.
        base: its model without the language head.
        tokens: int64 ``[B, T]``, on the model's device.

    Raises:
        BlockwiseUnsupported: the model does more than to call its blocks one after the other.
    """

    def __init__(self, found: Decoder, base: nn.Module, tokens: Tensor) -> None:
        self._blocks = found.blocks
        for in_tuple in (False, True):  # blocks return the stream, or a tuple that begins with it
            self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
            try:
                with prepared(found):
                    self._rehearse(base, tokens, in_tuple)
                self.in_tuple = in_tuple
                break
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                    ValueError) as error:  # fmt: skip
                failure: Exception = error
        else:
            name = type(found.model).__name__
            raise BlockwiseUnsupported(
                f"the blocks of {name} cannot be run one by one: {failure}"
            ) from failure
        args, kwargs = self._calls[0]
        self.stream: Tensor = args[0] if args else kwargs["hidden_states"]
        """``[B, T, D]``: the residual stream at the input of the next block."""

    def _rehearse(self, base: nn.Module, tokens: Tensor, in_tuple: bool) -> None:
        handed: list[Any] = []

        def stand_in(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                stream = args[0] if args else kwargs["hidden_states"]
                if len(self._calls) != index or (handed and stream is not handed[0]):
                    raise ValueError(f"block {index} does not get what the one before returns")
                handed[:] = [stream]
                self._calls[index] = (args, kwargs)
                return (stream,) if in_tuple else stream

            return forward

        own = {index: vars(block).get("forward") for index, block in self._blocks.items()}
        try:
            for index, block in self._blocks.items():
                block.forward = stand_in(index)
            base(input_ids=tokens, use_cache=False)
        finally:
            for index, block in self._blocks.items():
                if own[index] is None:
                    delattr(block, "forward")
                else:
                    block.forward = own[index]  # type: ignore[assignment]
        if len(self._calls) != len(self._blocks):
            raise ValueError(f"of {len(self._blocks)} blocks {len(self._calls)} were called")

    @property
    def shared(self) -> str | None:
        """What is handed to blocks to be filled on the way, if anything is: then none of them can
        be run without those before."""
        for args, kwargs in self._calls.values():
            for name, value in (*enumerate(args), *kwargs.items()):
                if isinstance(value, dict | list | set) and not value:
                    return str(name)
        return None

    def step(self, index: int) -> None:
        """Go through one block; they come in order."""
        args, kwargs = self._calls.pop(index)
        if args:
            args = (self.stream, *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": self.stream}
        output = self._blocks[index](*args, **kwargs)
        self.stream = output[0] if isinstance(output, tuple | list) else output


class AblatedForward:
    """Single-token sequences and their edited copies on the way through the blocks.

    A block runs once over the unedited sequences with fresh copies of them, and once over the
    copies that lack something of an earlier block.

    Args:
        found: the decoder.
        base: its model without the language head.
        ablations: what the copies lack.
        most: rows that go through a block at once; copies of one block always do.

    Raises:
        BlockwiseUnsupported: as of `BlockwiseForward`.
    """

    def __init__(self, found: Decoder, base: nn.Module, ablations: Ablations, most: int) -> None:
        self._found, self._base, self.ablations = found, base, ablations
        self._count = len(ablations.tokens)
        self._most = max(1, most // self._count) * self._count
        device = base.get_input_embeddings().weight.device  # type: ignore[operator]
        self._tokens = ablations.tokens.to(device)
        self._fresh = self._walk(self._count * (1 + SLOTS))
        self._stream = self._fresh.stream[: self._count]

    def _walk(self, rows: int) -> BlockwiseForward:
        tokens = self._tokens.repeat(rows // self._count)[:, None]
        return BlockwiseForward(self._found, self._base, tokens)

    def step(self, index: int, collected: Collector, alone: Collector) -> None:
        """Go through one block; they come in order.

        Args:
            index: of the block.
            collected: of the probe's pass, which has been at its input.
            alone: of the pass of single first tokens.

        Raises:
            BlockwiseUnsupported: as of `BlockwiseForward`.
            MeasurementError: what else is in a batch makes a difference.
        """
        ablations, count = self.ablations, self._count
        ablations.enter(index, self._stream, collected, alone)
        begun = self._stream[:count].repeat(1 + SLOTS, 1, 1)
        begun = self._through(index, begun, self._fresh)
        used = count * (1 + ablations.leave())
        older = [
            self._through(index, rows, self._walk(len(rows)))
            for rows in self._stream[count:].split(self._most)
            if len(rows)
        ]
        self._stream = torch.cat([begun[:count], *older, begun[count:used]])

    def _through(self, index: int, stream: Tensor, walk: BlockwiseForward) -> Tensor:
        walk.stream = stream
        one = replace(self._found, blocks={index: self._found.blocks[index]})
        self.ablations.open = walk is self._fresh
        with watch(one, Observer(), _Ablating(self.ablations)):
            walk.step(index)
        return walk.stream


class _Ablating(Editor):
    """Hands the writes to ablations."""

    def __init__(self, ablations: Ablations) -> None:
        self._ablations = ablations

    def write(self, block: int, write: Write) -> Tensor | None:
        return self._ablations.write(block, write)
