"""Run a Hugging Face decoder block by block, each with whatever the model calls it with."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sinktrack.errors import SinktrackError
from sinktrack.models.huggingface import Decoder, prepared


class CannotWalk(SinktrackError):
    """The blocks cannot be run one by one: something happens between them."""


class Walk:
    """One batch on its way through the blocks of a decoder.

    The model's own forward runs first with blocks that hand on what they get. It shows what each is
    called with (masks, position embeddings), and that nothing else happens on the way from one to
    the next. Weights of blocks are not needed for that.

    Args:
        found: the decoder.
        base: its model without the language head.
        tokens: int64 ``[B, T]``, on the model's device.

    Raises:
        CannotWalk: the model does more than to call its blocks one after the other.
    """

    def __init__(self, found: Decoder, base: nn.Module, tokens: Tensor) -> None:
        self._blocks = found.blocks
        for in_tuple in (False, True):  # blocks return the stream, or a tuple that begins with it
            self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
            try:
                with prepared(found):
                    self._rehearse(base, tokens, in_tuple)
                break
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                    ValueError) as error:  # fmt: skip
                failure: Exception = error
        else:
            name = type(found.model).__name__
            raise CannotWalk(
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

    def step(self, index: int) -> None:
        """Go through one block; they come in order."""
        args, kwargs = self._calls.pop(index)
        if args:
            args = (self.stream, *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": self.stream}
        output = self._blocks[index](*args, **kwargs)
        self.stream = output[0] if isinstance(output, tuple) else output
