"""Fresh weights: what several processes hold of the same parameter is the same before a probe.

With a distributed optimizer a process updates its share of each parameter and gathers the others'.
Where that overlaps with the next forward pass, the weights are stale in between, and Megatron's
hooks, which gather, are off until the first iteration is over.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sinktrack.errors import MeasurementError
from sinktrack.models.fp8 import plain
from sinktrack.models.megatron.processes import Processes

Holders = tuple[int, ...]
"""Ranks of the processes that hold the same parameters."""


def fresh(found: Any, all_of: Processes) -> None:
    """Gather what an optimizer's step left to the next forward pass; every process calls.

    Raises:
        MeasurementError: replicas hold different weights, and no gathering is due.
    """
    if all_of.size == 1:
        return
    for wrapped in found.models:
        for group in _bucket_groups(wrapped):
            if getattr(group, "param_gather_handle", None) is not None:  # on its way: wait for it
                group.start_param_sync(force_sync=True)
    groups = all_of.all_or_none(lambda: _groups(found))
    different = _different(groups, all_of)
    if different and all(all_of.gather(_stale(found))):
        for wrapped in found.models:
            with torch.no_grad():
                wrapped.start_param_sync(force_sync=True)
        different = _different(groups, all_of)
    if different:
        raise MeasurementError(
            "the data-parallel processes "
            + "; ".join(", ".join(map(str, holders)) for holders in sorted(different))
            + " hold different weights of the same parameters; so there is no one model to measure"
        )


def _bucket_groups(wrapped: Any) -> list[Any]:
    return [
        group
        for name in ("bucket_groups", "expert_parallel_bucket_groups")
        for group in getattr(wrapped, name, [])
    ]


def _groups(found: Any) -> dict[Holders, list[Tensor]]:
    """This process's parameters, by who holds the same; those that FSDP shards are left out."""
    from megatron.core import parallel_state as state

    dense = state.get_data_parallel_group(with_context_parallel=True)
    experts = state.get_expert_data_parallel_group()
    ranks = {
        True: tuple(dist.get_process_group_ranks(dense)),
        False: tuple(dist.get_process_group_ranks(experts)),
    }
    groups: defaultdict[Holders, list[Tensor]] = defaultdict(list)
    for chunk in found.bare:
        for parameter in chunk.parameters():
            if not isinstance(parameter, DTensor):
                groups[ranks[getattr(parameter, "allreduce", True)]].append(parameter)
    return {holders: held for holders, held in groups.items() if len(holders) > 1}


def _different(groups: dict[Holders, list[Tensor]], all_of: Processes) -> set[Holders]:
    """The groups whose processes hold different bits."""
    digests = all_of.all_or_none(
        lambda: {holders: _digest(parameters) for holders, parameters in groups.items()}
    )
    seen: defaultdict[Holders, set[str]] = defaultdict(set)
    for reply in all_of.gather(digests):
        for holders, digest in reply.items():
            seen[holders].add(digest)
    return {holders for holders, values in seen.items() if len(values) > 1}


def _digest(parameters: list[Tensor]) -> str:
    """Of the sums over every parameter's bits, which a step changes: one transfer for all."""
    sums = [_bits(parameter).sum(dtype=torch.int64) for parameter in parameters]
    return hashlib.sha256(torch.stack(sums).cpu().numpy().tobytes()).hexdigest()


def _bits(parameter: Tensor) -> Tensor:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    number = plain(parameter.detach())
    return number.view(integer[number.element_size()])


def _stale(found: Any) -> bool:
    """Is a gathering due that no hook of Megatron's would start?

    Then an iteration has left gradients, and buckets were not gathered after it. Without any, as
    before the first iteration, weights that differ are nothing that training would mend.
    """
    for wrapped in found.models:
        settings = getattr(wrapped, "ddp_config", None)
        if not getattr(settings, "overlap_param_gather", False):
            return False
        groups = _bucket_groups(wrapped)
        if all(group.param_gather_dispatched for group in groups):
            return False
        if not any(bool(bucket.grad_data.any()) for group in groups for bucket in group.buckets):
            return False
    return True
