"""Is the model under taps the model in training? A few tokens go through both."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sinktrack.errors import MeasurementError
from sinktrack.events import Editor, Observer
from sinktrack.models.guard import restore_on_exit
from sinktrack.models.huggingface import Decoder, configs, foreign, is_experts, watch

TOKENS = 64
"""Of the probe's first sequence, at most."""
_APART = {torch.float64: 2**-10, torch.float32: 2**-10, torch.float16: 2**-5,
          torch.bfloat16: 2**-2}  # fmt: skip
"""How far two computations of the same attention may be apart, in parts of its output: scores of
some tens, rounded to the dtype, move the probabilities by as much."""


class Rehearsal(Observer):
    """What the attention of every block puts out, as in training and under taps.

    Each block gets the same input both times, so that nothing but its own rounding is between the
    two. Compared is what the modules that transformers names as the family's attention return;
    where it names none, what the block adds to the stream, unless experts do (a token that rounding
    sends to another expert would tell nothing).

    Args:
        found: the decoder.
    """

    with_mixing = True  # as a measurement's passes

    def __init__(self, found: Decoder) -> None:
        self._found = found
        self._inputs: dict[int, Tensor] = {}
        self._own: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._tapped: defaultdict[int, list[Tensor]] = defaultdict(list)

    @contextmanager
    def as_in_training(self) -> Iterator[None]:
        """Keep what a forward pass shows that runs the model's own attention.

        Kernels that need half precision or a GPU give way to the family's eager attention.

        Raises:
            MeasurementError: its own attention is not what transformers made it.
        """
        own = configs(self._found.model) if self._found.interface else []
        before = [(config, config._attn_implementation) for config in own]

        def undo() -> None:
            for config, implementation in before:
                config._attn_implementation_internal = implementation

        with restore_on_exit(undo):
            for config, implementation in before:
                if implementation != "sdpa":
                    config._attn_implementation_internal = "eager"
            self._refuse_foreign({implementation for _, implementation in before})
            with self._noting(self._own, self._note_input):
                yield

    @contextmanager
    def under_taps(self) -> Iterator[None]:
        """The same for a pass that is measured."""
        with watch(self._found, self, _Fed(self._inputs)), self._noting(self._tapped, None):
            yield

    def untold(self, block: int, reason: str) -> None:
        """What is written does not matter here."""

    def check(self) -> None:
        """Compare the two.

        Raises:
            MeasurementError: they differ by more than rounding; names the first block.
        """
        for block, own in sorted(self._own.items()):
            tapped = self._tapped[block]
            if not own and not tapped:  # no module puts it out
                continue
            apart = max(map(_apart, tapped, own)) if len(tapped) == len(own) else torch.inf
            if apart > _allowed(self._inputs[block]):
                name = type(self._found.blocks[block]).__name__
                raise MeasurementError(
                    f"block {block} ({name}): what its attention puts out in training is "
                    f"{apart:.1g} of it apart from softmax attention with the same weights, so "
                    "another model would be measured: a function or a module of its attention was "
                    "replaced, or its probabilities are changed after the softmax; measure with "
                    "transformers' own attention"
                )

    def _refuse_foreign(self, implementations: set[str]) -> None:
        """Refuse functions that somebody replaced, if the model runs them."""
        runs: list[tuple[str, str]] = []
        if "sdpa" in implementations:
            runs.append(("torch.nn.functional", "scaled_dot_product_attention"))
        if implementations - {"sdpa"}:
            eager = "eager_attention_forward"
            runs += [(kind.__module__, eager) for kind in self._found.attentions]
        for module, name in runs:
            function = getattr(sys.modules.get(module), name, None)
            if function is not None and (origin := foreign(function)):
                raise MeasurementError(
                    f"{name} of {module} is a function of {origin}, and what it computes is not "
                    "known here; put the original back"
                )

    def _note_input(self, block: int, stream: Tensor) -> None:
        self._inputs[block] = stream.clone()

    @contextmanager
    def _noting(
        self, into: dict[int, list[Tensor]], begin: Callable[[int, Tensor], None] | None
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for index, block in self._found.blocks.items():
                if begin is not None:
                    hook = block.register_forward_pre_hook(
                        _entering(index, begin), with_kwargs=True
                    )
                    stack.callback(hook.remove)
                attentions = [
                    module
                    for module in block.modules()
                    if isinstance(module, self._found.attentions)
                ]
                for module in attentions:
                    hook = module.register_forward_hook(_leaving(into[index]))
                    stack.callback(hook.remove)
                if not attentions and not any(map(is_experts, block.modules())):
                    hook = block.register_forward_hook(self._adding(index, into[index]))
                    stack.callback(hook.remove)
            yield

    def _adding(self, block: int, into: list[Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple | list) else output
            before = self._inputs.get(block)
            if isinstance(stream, Tensor) and before is not None and stream.shape == before.shape:
                into.append(stream - before)

        return hook


class _Fed(Editor):
    """Every block gets what it got in training."""

    def __init__(self, inputs: dict[int, Tensor]) -> None:
        self._inputs = inputs

    def state(self, block: int, stream: Tensor) -> Tensor | None:
        """That input."""
        return self._inputs.get(block)


def _entering(block: int, begin: Callable[[int, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs.get("hidden_states")
        if isinstance(stream, Tensor):
            begin(block, stream)

    return hook


def _leaving(into: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple | list) else output
        if isinstance(output, Tensor):
            into.append(output.clone())

    return hook


def _allowed(like: Tensor) -> float:
    apart = _APART.get(like.dtype, 2**-10)
    if like.is_cuda and torch.get_float32_matmul_precision() != "highest":
        return max(apart, 2**-5)
    return apart


def _apart(tapped: Tensor, own: Tensor) -> float:
    """The largest distance of two rows over the row's norm, or over the mean one where more."""
    if tapped.shape != own.shape:
        return torch.inf
    left, right = tapped.flatten(0, -2).float(), own.flatten(0, -2).float()
    if not bool(right.isfinite().all()):
        return 0.0  # refused elsewhere, with its place
    norms = right.norm(dim=-1)
    scale = torch.maximum(norms, norms.square().mean().sqrt())
    apart = ((left - right).norm(dim=-1) / scale.clamp(min=1e-30)).max()
    return float(apart.nan_to_num(nan=torch.inf))
