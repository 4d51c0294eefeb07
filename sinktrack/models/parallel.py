"""Whether the processes of a training hold its model whole, each by itself."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard


def takes_every_process(model: nn.Module) -> bool:
    """Must every process call `sinktrack.measure`, since none holds the whole model?"""
    return is_apart(model) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def has_units(blocks: Iterable[nn.Module]) -> bool:
    """Are there units of FSDP2 in a block, whose weights are gone before it is over?"""
    return any(
        isinstance(module, FSDPModule)
        for block in blocks
        for module in block.modules()
        if module is not block
    )


def computed_in(model: nn.Module) -> set[torch.dtype]:
    """The dtypes that the parameters have in a forward pass: FSDP2 may cast what it gathers."""
    found: set[torch.dtype] = set()
    todo: list[tuple[nn.Module, torch.dtype | None]] = [(model, None)]
    while todo:
        module, cast = todo.pop()
        if isinstance(module, FSDPModule):
            cast = module._get_fsdp_state()._mp_policy.param_dtype
        own = module.parameters(recurse=False)
        found |= {cast or value.dtype for value in own if value.is_floating_point()}
        todo += [(child, cast) for child in module.children()]
    return found


def is_apart(model: nn.Module) -> bool:
    """Is the model in parts that its own forward pass does not show whole?

    True for FSDP1, ZeRO-3, tensor, expert and pipeline parallelism. Not for FSDP2 alone: its
    forward passes gather whole weights.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return True
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) or hasattr(module, "_pp_stage"):
            return True
    parts = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    if not parts:
        return False
    under_fsdp2 = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for parameter in module.parameters()
    }
    meshes = {parameter.device_mesh for parameter in parts}
    return len(meshes) > 1 or any(
        id(parameter) not in under_fsdp2 or not _is_fsdp2s(parameter) for parameter in parts
    )


def _is_fsdp2s(parameter: DTensor) -> bool:
    """Sharded over all processes, or within replicas (HSDP)."""
    *replicas, last = parameter.placements
    return len(replicas) < 2 and isinstance(last, Shard) and all(p.is_replicate() for p in replicas)
