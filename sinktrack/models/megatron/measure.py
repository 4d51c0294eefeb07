"""Measure a Megatron-Core model on all the processes that hold it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sinktrack.collect import Collector
from sinktrack.errors import MeasurementError, SinktrackError, require
from sinktrack.measurement import Measurement, assemble
from sinktrack.metrics import ALONE, METRICS
from sinktrack.metrics.total_effect import Ablations, is_affordable
from sinktrack.models.ablated import ablate
from sinktrack.models.guard import probe_context
from sinktrack.models.megatron.context import ready, synced
from sinktrack.models.megatron.digest import Vectors, digest, vectors
from sinktrack.models.megatron.fresh import fresh
from sinktrack.models.megatron.passes import Passes, why_not
from sinktrack.models.megatron.processes import processes
from sinktrack.models.megatron.shards import Shard, merge
from sinktrack.models.passes import dear
from sinktrack.probe import Probe


def measure_chunks(
    model: Any, probe: Probe, batch_size: int | None, in_training: bool = False
) -> Measurement:
    """`sinktrack.measure` for a Megatron-Core model; every process must call it.

    Raises:
        ProbeError, MeasurementError: on every process, whichever found the reason.
    """
    require("megatron.core", "megatron")
    from sinktrack.models.megatron import hooks as megatron

    started = time.perf_counter()
    all_of = processes()

    def prepare() -> megatron.Chunks:
        parts = megatron.chunks(model)
        probe.check(_vocabulary(parts), getattr(parts.bare[0], "max_sequence_length", None))
        return parts

    parts = all_of.all_or_none(prepare)
    layout, bare, config = parts.layout, nn.ModuleList(parts.bare), parts.config
    replies = all_of.gather((probe.digest, layout.dense or layout.experts, dict(parts.kinds)))
    if len({each for each, _, _ in replies}) > 1:
        raise MeasurementError("the processes hold different probes; give each the same one")
    some = tuple(rank for rank, (_, reports, _) in enumerate(replies) if reports)
    kinds: dict[int, str] = {}
    for _, _, held in replies:
        kinds |= held
    if kinds.keys() != set(range(parts.count)):
        raise MeasurementError(
            f"the processes hold blocks {sorted(kinds)} of a model of {parts.count}; not supported"
        )

    size = batch_size or probe.sequences
    batches = probe.batches(size)
    first = list(probe.first_tokens()[:, None].split(max(size, 256)))
    planned = _schedule(parts, batches), _schedule(parts, first)
    collected, singles = (
        Shard(layout, [length for _, length in plan], parts.count, metrics)
        for plan, metrics in zip(planned, (METRICS, ALONE), strict=True)
    )

    own: list[Vectors] = []

    def passes() -> None:
        taps = []
        with synced(parts), probe_context(bare, size, probe), ready(parts):
            fresh(parts, all_of)
            for shard, plan in zip((collected, singles), planned, strict=True):
                with megatron.watch(parts, shard) as tap:
                    _forward(parts, plan)
                taps.append(tap)
            if layout.dense:
                own.append(vectors(parts, probe.first_tokens()))
        for tap in taps:  # not before: the others are in all passes
            if tap.failure is not None:
                raise tap.failure
        for shard in (collected, singles):
            shard.settle()

    def experts() -> None:
        with probe_context(bare, size, probe):
            for (block, number), routing in collected.routed.items():
                layer = parts.blocks[block]
                if isinstance(layer, FSDPModule):
                    layer.unshard()
                if layout.experts:
                    writes = megatron.expert_writes(layer.mlp, routing)
                    collected.add_experts(block, number, writes)
        collected.routed.clear()

    def ablated(merged: Collector, alone: Collector) -> Ablations | str:
        """The total effects, on this process alone, or why they cannot be had."""
        tokens = probe.tokens.numel()
        if in_training and not is_affordable(parts.count, tokens, whole=True):
            return dear(tokens)
        if reason := why_not(model):
            return reason.replace("causal tests", "total effects")
        effects = Ablations(probe.first_tokens())
        try:
            with probe_context(bare, size, probe), ready(parts):
                ablate(Passes(parts), effects, merged, alone, size * probe.length)
        except (MemoryError, RuntimeError, SinktrackError) as error:
            return str(error) or type(error).__name__
        return effects

    def whole(shares: list[Any]) -> Measurement | None:
        if not shares:
            return None
        merged, alone = (merge([each[of] for each in shares]) for of in (0, 1))
        return assemble(
            merged,
            alone,
            torch.cat([batch[:, 0] for batch in batches]),
            [kinds[block] for block in range(parts.count)],
            {value.dtype for value in bare.parameters() if value.is_floating_point()},
            ablated(merged, alone),
            model={
                "type": type(parts.bare[0]).__name__.removeprefix("FSDP"),
                "blocks": parts.count,
                "heads": parts.config.num_attention_heads,
                "experts": parts.config.num_moe_experts,
            },
            probe=probe.digest,
            weights=digest(
                [one for *_, of in shares for one in of], probe.first_tokens(), parts.count, config
            ),
            seconds=time.perf_counter() - started,
        )

    all_of.all_or_none(passes)
    _share_inputs(collected)
    all_of.all_or_none(experts)
    shares = all_of.gather_to_rank0((collected, singles, own), some)
    with synced(parts):  # process 0 runs more passes
        measured = all_of.all_or_none(lambda: whole(shares))
    result: Measurement = all_of.from_first(measured)
    return result


def _share_inputs(shard: Shard) -> None:
    """What enters the experts at P0, from the process that holds P0 to those that hold experts."""
    from megatron.core import parallel_state as state

    layout = shard.layout
    if not shard.routed:
        return
    groups = []
    if layout.sequence_parallel and layout.tp_size > 1:
        groups.append(state.get_tensor_model_parallel_group())
    if layout.cp_size > 1:
        groups.append(state.get_context_parallel_group())
    for group in groups:
        tensors = [value for r in shard.routed.values() for value in (r.inputs, r.gates)]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.broadcast(flat, group=group, group_src=0)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _vocabulary(found: Any) -> int | None:
    return getattr(found.bare[0], "vocab_size", None)


def _schedule(found: Any, batches: list[Tensor]) -> list[tuple[Tensor, int]]:
    """Microbatches and the length that counts of each, 0 for one that only fills a schedule.

    Interleaved pipelines want whole groups of microbatches.
    """
    multiple = found.config.microbatch_group_size_per_vp_stage if len(found.bare) > 1 else 1
    planned = []
    for _, group in itertools.groupby(batches, lambda tokens: tokens.shape):
        alike = [(tokens, tokens.shape[1]) for tokens in group]
        planned += alike + [(alike[0][0], 0)] * (-len(alike) % multiple)
    return planned


def _forward(found: Any, planned: list[tuple[Tensor, int]]) -> None:
    """Run microbatches through the model's own schedule, those of one shape together."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    device = next(found.bare[0].parameters()).device
    for shape, group in itertools.groupby((tokens for tokens, _ in planned), lambda x: x.shape):
        padded = [found.layout.padded(tokens) for tokens in group]
        length = padded[0].shape[1]
        positions = found.layout.queries(length)
        held = [tokens[:, positions].to(device) for tokens in padded]
        ids = positions.to(device).expand(shape[0], -1)

        def step(iterator: Iterator[Tensor], chunk: nn.Module, ids: Tensor = ids) -> Any:
            return chunk(next(iterator), ids, None), lambda output, **_: None

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(held) for _ in found.bare],
            model=list(found.bare),
            num_microbatches=len(held),
            seq_length=length,
            micro_batch_size=shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
