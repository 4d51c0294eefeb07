"""Trains Megatron-Core models with and without the callback, and lets probes fail.

A script to run under torchrun: ``megatron_training.py OUT CASE...`` writes what fails in each case
to ``OUT/RANK.json``. A case is a function of this module, or a model and a layout to train.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_models as models
import pytest
import torch
import torch.distributed as dist
from megatron_models import PROBE, VOCABULARY, megatron_cpu
from test_callbacks import assert_identical

from sinktrack import MeasurementError, Probe, ProbeError, Run, measure
from sinktrack.callbacks.megatron import SinkTrackMegatron


def train(case: str, tracker: SinkTrackMegatron | None) -> dict[str, Any]:
    """Six iterations of Megatron's own training step; everything that they leave behind."""
    from megatron.core.distributed import DistributedDataParallel as DDP
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.moe_utils import (
        MoEAuxLossAutoScaler,
        get_moe_layer_wise_logging_tracker,
    )

    name, text = case.split(":")
    sizes, changes = models.layout(text)
    overlap = "overlap" in text
    megatron_cpu.start(**sizes)
    get_moe_layer_wise_logging_tracker().clear()
    settings = models.config(name, **changes, attention_dropout=0.1, hidden_dropout=0.1)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=overlap,
        overlap_param_gather=overlap,
        overlap_grad_reduce=overlap,
    )
    chunks = [DDP(settings, ddp, chunk) for chunk in models.build(settings)]
    settings.finalize_model_grads_func = finalize_model_grads
    if overlap:
        settings.no_sync_func = [chunk.no_sync for chunk in chunks]
        settings.no_sync_func = (
            settings.no_sync_func[0] if len(chunks) == 1 else settings.no_sync_func
        )
    options = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        clip_grad=0.0,
        use_distributed_optimizer=overlap,
        overlap_param_gather=overlap,
    )
    optimizer = get_megatron_optimizer(options, chunks)
    for chunk in chunks:
        chunk.train()
    generator = torch.Generator().manual_seed(dist.get_rank() // 2 if "tp2" in text else 0)
    torch.manual_seed(5)
    losses = []

    def step(iterator: Any, chunk: Any) -> Any:
        tokens = next(iterator)
        positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        output = chunk(tokens, positions, None, labels=tokens)
        return output, lambda values: (values.float().mean(), {"loss": values.detach().mean()})

    for iteration in range(1, 7):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batches = [torch.randint(VOCABULARY, (2, 16), generator=generator) for _ in range(2)]
        found = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(batches) for _ in chunks],
            model=chunks,
            num_microbatches=2,
            seq_length=16,
            micro_batch_size=2,
            forward_only=False,
        )
        losses += [float(one["loss"]) for one in found]
        assert optimizer.step()[0]
        if tracker is not None:
            tracker.step(iteration, chunks)
    if overlap:  # the last step's weights would be gathered in the next forward pass
        for chunk in chunks:
            chunk.disable_forward_pre_hook()
            assert not any(part._forward_pre_hooks for part in chunk.module.modules())
            chunk.enable_forward_pre_hook()
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return {
        "losses": losses,
        "weights": [chunk.state_dict() for chunk in chunks],
        "buffers": [dict(chunk.named_buffers()) for chunk in chunks],
        "training": [[module.training for module in chunk.modules()] for chunk in chunks],
        "optimizer": [copy.deepcopy(part.optimizer.state_dict()["state"]) for part in parts],
        "trackers": {
            key: value["values"] for key, value in get_moe_layer_wise_logging_tracker().items()
        },
        "scale": MoEAuxLossAutoScaler.main_loss_backward_scale,
        "random": torch.get_rng_state(),
        "chunks": chunks,
    }


def identical(case: str, out: Path) -> None:
    """Training is the same with and without the callback; the record is that of the weights."""
    plain = train(case, None)
    tracker = SinkTrackMegatron(PROBE, out, every=2, early=True, on_error="raise")
    tracked = train(case, tracker)
    chunks = tracked.pop("chunks")
    plain.pop("chunks")
    assert_identical(plain, tracked)
    if case.startswith("deepseek"):
        assert any("expert_bias" in name for held in tracked["weights"] for name in held)
        assert tracked["trackers"]["load_balancing_loss"].any()
    last = measure(chunks, PROBE)
    if dist.get_rank() == 0:
        run = Run.read(out)
        assert run.steps == [1, 2, 4, 6]
        assert run.records[-1]["p0_attention"] == last.p0_attention.tolist()
        assert run.records[-1]["model"]["blocks"] == 4


def small(name: str = "deepseek", text: str = "") -> Any:
    sizes, changes = models.layout(text)
    megatron_cpu.start(**sizes)
    return models.build(models.config(name, **changes))


class Manager:
    """How Megatron Bridge and Megatron-LM take a callback and call it, by their source."""

    def __init__(self, callback: Any) -> None:
        events = ("on_train_start", "on_train_step_end", "on_train_end", "on_checkpoint_save")
        self.methods = {name: getattr(callback, name) for name in events}
        assert all(method.__func__ for method in self.methods.values())

    def fire(self, event: str, context: Any) -> None:
        self.methods[event](context)


def bridge(out: Path) -> None:
    """Megatron Bridge: counts a step after its event, and names no model where it saves."""
    from megatron.core import num_microbatches_calculator as calculator

    chunks = small()
    calculator.unset_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(0, None, 8, 2, 1)
    counts = SimpleNamespace(step=10, consumed_train_samples=80)
    state = SimpleNamespace(
        train_state=counts, cfg=SimpleNamespace(model=SimpleNamespace(seq_length=16))
    )
    manager = Manager(SinkTrackMegatron(PROBE, out, every=5, on_error="raise"))
    context = SimpleNamespace(state=state, model=chunks, user_state={})
    manager.fire("on_train_start", context)
    for step in range(10, 17):
        manager.fire("on_train_step_end", context)
        counts.step, counts.consumed_train_samples = step + 1, 8 * (step + 1)
        if counts.step == 13:
            manager.fire("on_checkpoint_save", SimpleNamespace(state=state, user_state={}))
    manager.fire("on_train_end", context)
    records = Run.read(out).records
    assert [record["step"] for record in records] == [10, 13, 15, 17]
    assert all(record["tokens"] == record["step"] * 8 * 16 for record in records)


def megatron_lm(out: Path) -> None:
    """Megatron-LM: no step in the context, the first one from its arguments."""
    chunks = small()
    arguments = SimpleNamespace(iteration=4, curr_iteration=9)
    module = SimpleNamespace(get_args=lambda: arguments)
    sys.modules["megatron.training.global_vars"] = module  # type: ignore[assignment]
    try:
        callback = SinkTrackMegatron(PROBE, out, every=3, on_error="raise")
        manager = Manager(callback)
        context = SimpleNamespace(model=chunks, user_state={})
        for event in ["on_train_start", *["on_train_step_end"] * 3, "on_train_end"]:
            manager.fire(event, context)
        assert Run.read(out).steps == [6, 7]
        callback.non_loss_data_func(chunks)
        assert Run.read(out).steps == [6, 7, 9]
    finally:
        del sys.modules["megatron.training.global_vars"]


def refusals(out: Path) -> None:
    """What cannot be right is refused by name; a model is as before."""

    def refused(match: str, chunks: Any, probe: Probe = PROBE) -> None:
        with pytest.raises((MeasurementError, ProbeError), match=match):
            measure(chunks, probe)
        assert not any(module._forward_hooks for chunk in chunks for module in chunk.modules())

    for name, value, match in (
        ("fp8", "hybrid", "fp8=hybrid: its scaling state"),
        ("moe_latent_size", 8, "latent space"),
        ("cuda_graph_impl", "local", "replayed graph"),
    ):
        chunks = small()
        setattr(chunks[0].config, name, value)
        refused(match, chunks)

    class FullyShardedDataParallel(type(chunks[0]).__mro__[2]):  # type: ignore[misc]
        def __init__(self, module: Any) -> None:
            super().__init__(module.config)
            self.module = module

    refused(
        "FullyShardedDataParallel: Megatron's own FSDP is not supported",
        [FullyShardedDataParallel(small()[0])],
    )

    chunks = small()
    chunks[0].position_embedding_type = "mrope"
    refused("multimodal rotary embeddings", chunks)
    changes: list[tuple[Callable[[Any], None], str]] = [
        (lambda layer: delattr(layer, "mlp"), "block 2 .*no attention with an MLP behind it"),
        (lambda layer: setattr(layer, "cross_attention", layer.mlp), "another sequence"),
        (lambda layer: delattr(layer.self_attention, "core_attention"), "has no core_attention"),
    ]
    for change, match in changes:
        chunks = small()
        change(chunks[0].decoder.layers[2])
        refused(match, chunks)

    chunks = small()
    chunks[0].decoder.layers[2].self_attention.linear_proj = torch.nn.Identity()
    refused("block 2 .*linear_proj is a Identity without a weight", chunks)

    chunks = small("llama")
    chunks[0].decoder.layers[1].self_attention.core_attention.softmax_scale *= 1.1
    core = chunks[0].decoder.layers[1].self_attention.core_attention
    own = core.forward
    core.forward = lambda query, *args, **kwargs: own(query * 2, *args, **kwargs)
    refused("block 1 .*core attention differs from causal softmax attention", chunks)

    chunks = small("llama")
    layer = chunks[0].decoder.layers[3]
    layer.register_forward_hook(lambda module, args, output: (output[0] * 1.5, output[1]))
    with pytest.raises(MeasurementError, match="block 3 .*is not its input plus what its attent"):
        measure(chunks, PROBE)

    chunks = small("llama")
    with torch.no_grad():
        chunks[0].decoder.layers[1].mlp.linear_fc1.weight[0, 0] = torch.nan
    refused("not finite at the input of block 2", chunks)
    refused("beyond the model's vocabulary", small(), Probe.random(VOCABULARY + 40, 4, 16))


def failing_alone(out: Path) -> None:
    """A probe that fails on one process fails on all, none waits, and training goes on."""
    rank = dist.get_rank()
    other = Probe.random(VOCABULARY, sequences=4, length=16, seed=rank)
    chunks = small("deepseek", "ep2")
    with pytest.raises(MeasurementError, match="the processes hold different probes"):
        measure(chunks, other)
    for text in ("ep2", "pp2", "tp2 sp", "cp2"):
        chunks = small("llama" if text == "cp2" else "deepseek", text)
        wrong = chunks[0].decoder.layers[1].self_attention.core_attention
        scale = wrong.softmax_scale
        if rank == 1:
            wrong.softmax_scale = scale * 2
            own = wrong.forward

            def changed(*args: Any, core: Any = wrong, own: Any = own, **kwargs: Any) -> Any:
                core.softmax_scale /= 2
                try:
                    return own(*args, **kwargs)
                finally:
                    core.softmax_scale *= 2

            wrong.forward = changed
        tracker = SinkTrackMegatron(PROBE, out / text.replace(" ", "-"), every=1)
        assert tracker.step(1, chunks) is None
        with pytest.raises(MeasurementError, match="core attention differs") as error:
            measure(chunks, PROBE)
        assert ("process 1 failed" in str(error.value)) == (rank == 0)
        if rank == 1:
            wrong.forward, wrong.softmax_scale = own, scale
        assert (tracker.step(2, chunks) is not None) == (rank == 0)
        if rank == 0:
            assert Run.read(out / text.replace(" ", "-")).steps == [2]


def main(out: str, *cases: str) -> None:
    megatron_cpu.start()
    failures: dict[str, str | None] = {}
    for case in cases:
        path = Path(out) / case.replace(":", "-").replace(" ", "-")
        try:
            if ":" in case:
                identical(case, path)
            else:
                globals()[case](path)
            failures[case] = None
        except BaseException:
            failures[case] = traceback.format_exc()
    (Path(out) / f"{dist.get_rank()}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
