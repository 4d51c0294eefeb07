"""Which modules are the blocks of a decoder, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule

from sinktrack.errors import MeasurementError, SinktrackError
from sinktrack.models.guard import is_memory, refuse_prompts, refuse_unreadable
from sinktrack.models.parallel import is_apart

Blocks = Iterable[nn.Module | Iterable[nn.Module]] | nn.ModuleDict
_WRITE = "decoder=sinktrack.Decoder(blocks=lambda model: model.{path})"


class Decoder:
    """A PyTorch decoder of your own, for `sinktrack.measure` and the callbacks.

    Args:
        model: the model; without one, the model that is given in training.
        blocks: its blocks in order, a list or ``nn.ModuleDict``, or a function of the model that
            gives them. Where the model holds one evident list, they need not be said. A block that
            is no module of its own is a list of those that run in it, the first of which takes the
            stream, and the last of which gives it back.
        forward: how it is run on tokens ``[B, T]``: ``lambda model, tokens: model(tokens)`` if not
            given. Of what it returns only logits ``[B, T, V]`` are looked at, for the loss in
            causal tests.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        blocks: Blocks | Callable[[Any], Blocks] | None = None,
        forward: Callable[[Any, Tensor], Any] | None = None,
    ) -> None:
        self.model, self._blocks, self._forward = model, blocks, forward

    def of(self, model: Any) -> Decoder:
        """The same with a model, if it has none of its own.

        Raises:
            MeasurementError: there is no model.
        """
        if self.model is not None:
            return self
        if not isinstance(model, nn.Module):
            raise MeasurementError(f"a {type(model).__name__} is no model; give a torch.nn.Module")
        return Decoder(model, blocks=self._blocks, forward=self._forward)

    def run(self, tokens: Tensor) -> Any:
        """One forward pass of ``[B, T]`` tokens.

        Raises:
            MeasurementError: the model does not run on tokens alone.
        """
        assert self.model is not None
        bare = _unwrap(self.model)
        try:
            return bare(tokens) if self._forward is None else self._forward(bare, tokens)
        except (TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError) as e:
            if isinstance(e, SinktrackError):
                raise
            way = (
                "a forward= that runs it"
                if self._forward
                else ("forward=lambda model, tokens: model(tokens, ...) to sinktrack.Decoder")
            )
            raise MeasurementError(
                f"{class_of(bare)} does not run on tokens {tuple(tokens.shape)} "
                f"({type(e).__name__}: {e}); give {way}"
            ) from e
        except RuntimeError as e:
            if is_memory(e):
                raise
            if "bf16" in str(e) or "bfloat16" in str(e).lower():
                raise MeasurementError(
                    f"{class_of(bare)} does not run in the dtype of its weights ({e}); a probe "
                    "runs without the training's autocast: open torch.autocast within forward= of "
                    "sinktrack.Decoder"
                ) from e
            short = ", two as each first token is shown alone" if tokens.shape[1] == 2 else ""
            raise MeasurementError(
                f"{class_of(bare)} does not run on tokens {tuple(tokens.shape)}{short} ({e})"
            ) from e

    def blocks(self) -> dict[int, nn.Module]:
        """The blocks by number.

        Raises:
            MeasurementError: there are none, or they cannot be found.
        """
        assert self.model is not None
        bare = _unwrap(self.model)
        if self._blocks is None:
            listed: Any = _evident(bare)
        elif callable(self._blocks) and not isinstance(self._blocks, nn.Module):
            try:
                listed = self._blocks(bare)
            except AttributeError as error:
                raise MeasurementError(f"blocks= of sinktrack.Decoder: {error}") from error
        else:
            listed = self._blocks
        values = list(listed.values()) if isinstance(listed, nn.ModuleDict) else list(listed)
        values = [_joined(value) for value in values]
        if not values or not all(isinstance(value, nn.Module) for value in values):
            raise MeasurementError(
                "blocks= of sinktrack.Decoder gave no list of modules; give all blocks in order, "
                "such as model.layers"
            )
        blocks = {number: _unwrap(value) for number, value in enumerate(values)}
        if len({id(block) for block in blocks.values()}) < len(blocks):
            raise MeasurementError(
                "one module stands at several depths among the blocks: blocks that share all of "
                "their weights are not supported; give each depth a module of its own, whose "
                "parameters may be shared"
            )
        return blocks


class Several(nn.ModuleList):
    """A block that is no module of its own: those that run in it, in order."""


def _joined(value: Any) -> Any:
    """A block, of the modules that it is given as."""
    if not isinstance(value, list | tuple | nn.ModuleList):
        return value
    return Several(_leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple | nn.ModuleList):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def _unwrap(model: nn.Module) -> nn.Module:
    """Out of torch.compile, Fabric and DDP, in whose own forward all processes would be awaited."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model.get_submodule("_orig_mod")
        elif hasattr(model, "_original_module"):  # as Lightning's Fabric wraps it
            model = model.get_submodule("_original_module")
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def class_of(module: nn.Module) -> str:
    """The name of a module's class, as `_kind` tells it; of a list, those of its modules."""
    if isinstance(module, Several):
        return " and ".join(class_of(item) for item in module)
    return _kind(module).__name__


def _kind(module: nn.Module) -> type[nn.Module]:
    """A module's class as written: without FSDP2's, compilation and activation checkpointing."""
    module = _unwrap(module)
    while isinstance(module, ActivationWrapper):
        module = _unwrap(module.get_submodule("_checkpoint_wrapped_module"))
    of = type(module)
    return of.__mro__[2] if isinstance(module, FSDPModule) else of


def _evident(model: nn.Module) -> list[nn.Module]:
    """The one list of blocks in a model.

    Raises:
        MeasurementError: there is none, or more than one.
    """
    lists: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        inside = any(path == other or path.startswith(f"{other}.") for other in lists)
        if inside or not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            continue
        items = [item for item in module._modules.values() if item is not None]
        if not items:
            continue
        alike = len({_kind(item) for item in items}) == 1  # every other one may be checkpointed
        alike = alike and _runs(items[0])
        if alike and all(next(_unwrap(item).children(), None) is not None for item in items):
            lists[path] = items
    if len(lists) == 1:
        return next(iter(lists.values()))
    seen = " and ".join(f"model.{path} of {len(items)}" for path, items in lists.items())
    path = max(lists, key=lambda path: len(lists[path]), default="layers")
    raise MeasurementError(
        f"{type(model).__name__} is not a transformers model, and which modules are its blocks "
        f"cannot be told ({'lists: ' + seen if lists else 'no list of like modules found'}); name "
        f"them: {_WRITE.format(path=path)}, for measure sinktrack.Decoder(model, "
        f"blocks=model.{path})"
    )


def _runs(module: nn.Module) -> bool:
    """Has it a forward pass of its own?"""
    own = vars(_kind(module)).get("forward") or getattr(_unwrap(module), "forward", None)
    return getattr(own, "__func__", own) is not _kind(nn.Module()).forward


@dataclass
class Found:
    """What a measurement says of a decoder."""

    model: nn.Module
    blocks: Mapping[int, nn.Module]
    kinds: tuple[str, ...] = ()
    most_heads: int | None = None
    experts: int | None = None
    embedding: str | None = None
    """The parameter in which the tokens were looked up, by name."""
    how: list[str] = field(default_factory=list)
    """What computes attention in it."""
    told: bool = False
    """Were experts told apart?"""
    notes: list[str] = field(default_factory=list)
    """What could not be told of the parts of its writes, and why."""
    carries: bool | None = None
    """Does a block return its last write beside the stream? None before that is known."""
    start: int | None = None
    """Which of the tensors of its shape at block 0 is the stream, where there are several."""
    forms: dict[int, int] = field(default_factory=dict)
    """What blocks return: 0 the stream bare, n a tuple of n of which the others are None."""

    @property
    def type(self) -> str:
        """The class's name."""
        return class_of(self.model)

    @property
    def device(self) -> torch.device:
        """Of its first parameter; Keras's models show none until they are asked for them."""
        of = next(self.model.parameters(), None)
        return torch.device("cpu") if of is None else of.device


def found_in(decoder: Decoder) -> Found:
    """What is known of a decoder before it runs; errors as of `sinktrack.measure`."""
    model = decoder.model
    assert model is not None
    model = _unwrap(model)
    blocks = decoder.blocks()
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise MeasurementError(
                f"{name} is DistributedDataParallel inside of the model, whose forward waits for "
                "all processes; give the model that it wraps"
            )
    if is_apart(model):
        raise MeasurementError(
            f"no process holds the whole of {class_of(model)} (FSDP1, ZeRO-3, tensor, expert "
            "or pipeline parallelism); of models that are not transformers only whole ones, DDP "
            "and FSDP2 are supported: measure the saved checkpoints with `sinktrack scan`"
        )
    refuse_unreadable(model)
    refuse_prompts(model.modules())
    devices = {str(value.device): name for name, value in model.named_parameters() if value.ndim}
    if len(devices) > 1:
        where = " and ".join(f"{name} on {device}" for device, name in devices.items())
        raise MeasurementError(
            f"{class_of(model)} is split over devices ({where}); of models that are not "
            "transformers only those on one device are supported: measure a copy on one, or the "
            "saved checkpoints with `sinktrack scan`"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise MeasurementError(
            f"{class_of(model)} holds modules compiled by TorchScript, whose operations cannot be "
            "seen; measure the model that they were made of"
        )
    return Found(model, blocks)
