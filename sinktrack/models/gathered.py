"""A live model that several processes hold in parts, put together one block at a time.

transformers' tensor and expert parallelism leave each process a part of the heads, widths or
experts, ``FullyShardedDataParallel`` (FSDP1) leaves it a piece of one long vector, and DeepSpeed's
ZeRO-3 of each weight. What such a process computes is a part of the truth, and FSDP1 and ZeRO-3
keep state of the training in the very modules that a probe would run. So no module of the training
runs: each block's weights are gathered into a copy of the model, made from its configuration, which
is measured as a checkpoint is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sinktrack.errors import MeasurementError
from sinktrack.models.huggingface import Decoder, decoder

_TRANSPARENT = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""The one child of a wrapper that stands in a module's place; it adds nothing to its function."""
_KNOWN = (
    "torch.", "transformers.", "accelerate.", "deepspeed.", "lightning.", "wandb.", "sinktrack.",
)  # fmt: skip
"""Whose hooks and forwards serve the training, and are no part of the model."""
_OF_THE_TRAINING = {"training", "gradient_checkpointing", "num_experts", "max_seq_len_cached"}
"""Plain attributes of modules that differ without another function; expert parallelism sets
``num_experts`` to a process' own."""


class Gathered:
    """The model's copy, whose blocks have weights only inside of `block`.

    Every process makes one, of the same model, and enters the same blocks in the same order.

    Args:
        model: as it is wrapped for training, the outermost FSDP1 unit included.

    Raises:
        MeasurementError: the copy would not be the model: what differs is named. No process has
            waited for another by then.
    """

    def __init__(self, model: nn.Module) -> None:
        own = _bare(model)
        self._live: dict[str, tuple[nn.Module, FullyShardedDataParallel | None]] = {}
        self._walk(model, own, None)
        self._units = [m for m in model.modules() if isinstance(m, FullyShardedDataParallel)]
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.model = _empty(own)
        self._check()
        self.decoder: Decoder = decoder(self.model)
        self._targets = dict(self.model.named_parameters(remove_duplicate=False))
        paths = {module: path for path, module in self.model.named_modules()}
        self._paths = {index: f"{paths[block]}." for index, block in self.decoder.blocks.items()}

    @property
    def base(self) -> PreTrainedModel:
        """The model without its language head, which a probe does not need."""
        base: PreTrainedModel = self.model.base_model
        return base

    def load_surroundings(self, tokens: Tensor) -> None:
        """Gather what the base model has outside of its blocks; ``tokens`` makes no difference."""
        for module in self._sharded:
            module.reshard()  # what a forward pass gathered may be rounded
        outermost = self._units[:1]
        with _whole(outermost[0] if outermost else None):
            pass  # the first that is used takes itself for the root
        base = next(path for path, module in self.model.named_modules() if module is self.base)
        prefix, blocks = f"{base}." if base else "", tuple(self._paths.values())
        own = [name for name in self._targets if name.startswith(prefix)]
        self._set_buffers()
        self._gather([name for name in own if not name.startswith(blocks)])

    @contextmanager
    def block(self, index: int, last: int | None = None) -> Iterator[nn.Module]:
        """The block with its weights, which are freed on leaving; ``last`` is of no use."""
        own = [name for name in self._targets if name.startswith(self._paths[index])]
        try:
            self._gather(own)
            yield self.decoder.blocks[index]
        finally:
            for name in own:
                self._put(name, self._targets[name])

    def _walk(
        self, module: nn.Module, own: nn.Module, unit: FullyShardedDataParallel | None,
        path: str | None = None,
    ) -> None:  # fmt: skip
        """Note the modules within ``own`` by their names in it, and the FSDP1 unit of each."""
        if isinstance(module, FullyShardedDataParallel):
            unit = module
        if module is own:
            path = ""
        wrapper = next((name for name in _TRANSPARENT if name in module._modules), None)
        if path is not None and wrapper is None:
            self._live[path] = module, unit
        for name, child in module._modules.items():
            if child is not None:
                inner = f"{path}.{name}" if path else name
                self._walk(child, own, unit, path if path is None or wrapper else inner)

    def _check(self) -> None:
        """Compare the copy with the model: modules, attributes, and what was changed by hand."""
        copied = dict(self.model.named_modules(remove_duplicate=False))
        wanted = {path: type(module) for path, module in copied.items()}
        classes = {path: _class(module) for path, (module, _) in self._live.items()}
        for path in sorted(wanted.keys() | classes.keys()):
            if wanted.get(path) is not classes.get(path):
                raise MeasurementError(
                    f"{path or 'the model'} is {_name(classes.get(path))}, by its configuration "
                    f"{_name(wanted.get(path))}: {_ADVICE}"
                )
        for path, module in copied.items():
            live, unit = self._live[path]
            where = path or type(live).__name__
            functions = [vars(live).get("forward"), *live._forward_hooks.values(),
                         *live._forward_pre_hooks.values()]  # fmt: skip
            for function in functions:
                origin = _origin(function)
                if function is not None and not origin.startswith(_KNOWN):
                    raise MeasurementError(
                        f"{where} has a forward or a hook from {origin}, which its copy would "
                        f"lack: {_ADVICE}"
                    )
            for name, value in vars(module).items():
                other = vars(live).get(name)
                plain = isinstance(value, bool | int | float | str) and not name.startswith("_")
                if plain and name not in _OF_THE_TRAINING and other != value:
                    raise MeasurementError(
                        f"{where}.{name} is {other!r}, by its configuration {value!r}: {_ADVICE}"
                    )
            if unit is None:
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        self._compare(f"{path}.{name}", live._parameters.get(name), parameter)

    def _compare(self, name: str, found: Tensor | None, wanted: Tensor) -> Tensor:
        if getattr(getattr(found, "ds_status", None), "name", "") == "INFLIGHT":
            raise MeasurementError(f"{name} is being gathered by DeepSpeed; probe between steps")
        shape = None if found is None else tuple(getattr(found, "ds_shape", found.shape))
        if found is None or shape != tuple(wanted.shape):
            raise MeasurementError(
                f"{name} has shape {shape}, by its configuration {tuple(wanted.shape)}: give the "
                f"model as it is wrapped for training, with its outermost FSDP unit, or {_SCAN}"
            )
        return found

    def _gather(self, names: list[str]) -> None:
        """Put whole weights in their places, by one FSDP1 unit after the other."""
        units: dict[FullyShardedDataParallel | None, list[str]] = {}
        for name in names:
            units.setdefault(self._live[name.rpartition(".")[0]][1], []).append(name)
        for unit, of in units.items():
            with _whole(unit):
                found = {name: self._found(name) for name in of}
                with _joined(found.values()) as joined:
                    for name, parameter in found.items():
                        value = parameter.detach()
                        if isinstance(value, DTensor):
                            value = value.full_tensor()
                        passing = unit is not None or id(parameter) in joined
                        self._put(name, value.clone() if passing else value)

    def _found(self, name: str) -> Tensor:
        path, _, own = name.rpartition(".")
        return self._compare(name, self._live[path][0]._parameters.get(own), self._targets[name])

    def _put(self, name: str, value: Tensor) -> None:
        path, _, own = name.rpartition(".")
        module = self.model.get_submodule(path)
        module._parameters[own] = nn.Parameter(value, requires_grad=False)

    def _set_buffers(self) -> None:
        """Those of the model; made anew where FSDP1 rounds them for its mixed precision."""
        (live, _), units = self._live[""], self._units
        device = units[0].compute_device if units else next(live.parameters()).device
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    unset = torch.nan if buffer.is_floating_point() else 0
                    module._buffers[name] = torch.full_like(buffer, unset, device=device)
        self.model.initialize_weights()
        for path, module in self.model.named_modules(remove_duplicate=False):
            for name, buffer in module._buffers.items():
                own = self._live[path][0]._buffers.get(name)
                if buffer is None or own is None:
                    continue
                if name not in module._non_persistent_buffers_set or own.dtype == buffer.dtype:
                    module._buffers[name] = own.detach().to(buffer, copy=True)


_SCAN = "measure the saved checkpoints with `sinktrack scan`"
_ADVICE = (
    "a model that no process holds whole is measured as its configuration describes it; "
    f"train with FSDP2 or DDP, or {_SCAN}"
)


def all_or_none(make: Callable[[], Gathered]) -> Gathered:
    """The model's copy, on every process or on none.

    Raises:
        MeasurementError: a process cannot make it; all say why.
    """
    made, reason = None, None
    try:
        made = make()
    except Exception as error:
        reason = str(error) if isinstance(error, MeasurementError) else repr(error)
    reasons = [reason]
    if dist.is_initialized():
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
    for rank, other in enumerate(reasons):
        if other is not None:
            raise MeasurementError(other if reason else f"process {rank}: {other}")
    assert made is not None
    return made


def _bare(model: nn.Module) -> PreTrainedModel:
    """The one model of transformers in what wraps it."""
    for module in model.modules():
        if hasattr(module, "peft_config"):
            raise MeasurementError(f"adapters of PEFT are not measured here: {_ADVICE}")
    models: list[PreTrainedModel] = []
    for module in model.modules():
        within = any(module in outer.modules() for outer in models)
        if isinstance(module, PreTrainedModel) and not within:
            models.append(module)
    if len(models) != 1:
        raise MeasurementError(
            f"{type(model).__name__} holds {len(models)} transformers models, wanted one"
        )
    return models[0]


def _empty(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration, on the meta device."""
    with torch.device("meta"):
        made: PreTrainedModel = _class(model)(copy.deepcopy(model.config))
    return made.eval()


@contextmanager
def _whole(unit: FullyShardedDataParallel | None) -> Iterator[None]:
    """Inside, the unit's own parameters are whole; every process must be here."""
    context: Any = nullcontext()
    if unit is not None:
        context = FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False)
    with context:
        yield


@contextmanager
def _joined(parameters: Iterable[Tensor]) -> Iterator[set[int]]:
    """Inside, weights that DeepSpeed has partitioned are whole; every process must be here.

    Yields the ids of these. Those that it keeps whole are left alone: it would partition them
    afterwards.
    """
    parted = [
        each
        for each in parameters
        if hasattr(each, "ds_status") and each.ds_status.name == "NOT_AVAILABLE"
    ]
    if not parted:
        yield set()
        return
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters(parted):
        yield {id(each) for each in parted}


def _class(module: nn.Module) -> type:
    """Of a module, before FSDP2 made a class of its own of it."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def _name(of: type | None) -> str:
    return "nothing" if of is None else f"{of.__module__}.{of.__qualname__}"


def _origin(function: Any) -> str:
    function = getattr(function, "func", function)  # of a partial
    return f"{getattr(function, '__module__', None) or type(function).__module__}."
