"""Trains Megatron-Core models with and without the callback, and lets probes fail.

A script to run under torchrun: ``megatron_training.py OUT CASE...`` writes what fails in each case
to ``OUT/RANK.json``. A case is a function of this module, or a model and a layout to train.
"""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import json
import logging
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_cpu
import numpy as np
import pytest
import torch
import torch.distributed as dist

from sinktrack import MeasurementError, Probe, ProbeError, Run, measure
from sinktrack.callbacks.megatron import SinkTrackMegatron
from sinktrack.demo import largest_difference
from sinktrack.interventions import run_causal_tests
from sinktrack.interventions.knockout import AttentionKnockout
from sinktrack.interventions.patching import Patch, Term
from sinktrack.interventions.replay import Edit, replaying
from tests.helpers import megatron_models as models
from tests.helpers.megatron_models import PROBE, VOCABULARY
from tests.helpers.trainings import assert_identical


def train(
    case: str, tracker: SinkTrackMegatron | None, weights: list[Any] | None = None
) -> dict[str, Any]:
    """Six iterations of Megatron's own training step; everything that they leave behind.

    With ``weights`` they are those that follow a resume. As in Megatron's loops, the hooks that
    gather parameters are off until the first of them is over.
    """
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
    if weights is not None:
        for chunk, saved in zip(chunks, weights, strict=True):
            chunk.load_state_dict(saved)
    settings.finalize_model_grads_func = finalize_model_grads
    if overlap:
        for chunk in chunks:
            chunk.disable_forward_pre_hook(param_sync=False)
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

    first = 1 if weights is None else 7
    for iteration in range(first, first + 6):
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
        if overlap and iteration == first:
            for chunk in chunks:
                chunk.enable_forward_pre_hook()
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


def stale(out: Path) -> None:
    """Every record under overlapped gathering is that of training without it, also the first."""
    for name in ("llama", "deepseek"):
        layout = "ep2" if name == "deepseek" else ""
        found = []
        for text in (layout, f"{layout} overlap"):
            here = out / f"{name}-{text.replace(' ', '-')}"
            tracker = SinkTrackMegatron(PROBE, here, every=1, on_error="raise")
            left = train(f"{name}:{text}", tracker)
            train(f"{name}:{text}", tracker, left["weights"])
            found.append(here)
        if dist.get_rank() == 0:
            plain, overlapped = (Run.read(here).records for here in found)
            assert [record["step"] for record in overlapped] == list(range(1, 13))
            for one, other in zip(plain, overlapped, strict=True):
                assert largest_difference(one, other) < 1e-6, one["step"]
            for one, other in itertools.pairwise(plain):
                assert max(abs(np.subtract(one["p0_norm"], other["p0_norm"]))) > 1e-4


def apart(out: Path) -> None:
    """Replicas that differ are no model: refused, and not mended behind the training's back."""
    from megatron.core.distributed import DistributedDataParallel as DDP
    from megatron.core.distributed import DistributedDataParallelConfig

    overlapped = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_param_gather=True, overlap_grad_reduce=True
    )
    for text, settings in (
        ("", None),
        ("", DistributedDataParallelConfig()),
        ("", overlapped),
        ("ep2", None),
        ("cp2", None),
    ):
        chunks = small("llama" if text == "cp2" else "deepseek", text)
        if settings is not None:
            chunks = [DDP(chunk.config, settings, chunk) for chunk in chunks]
        if settings is overlapped:
            chunks[0].disable_forward_pre_hook(param_sync=False)
        weight = next(p for name, p in chunks[0].named_parameters() if "linear_proj" in name)
        with torch.no_grad():
            weight[0, 0] += dist.get_rank() * 1e-3
        before = weight.clone()
        with pytest.raises(MeasurementError, match="0, 1 hold different weights of the same"):
            measure(chunks, PROBE)
        assert torch.equal(weight, before)
        with torch.no_grad():
            weight[0, 0] -= weight[0, 0]
        assert measure(chunks, PROBE) is not None


def edited(out: Path) -> None:
    """Edits of a pass are what plain hooks in the model's own forward do."""
    for name in ("qwen", "learnable"):
        edited_as(name)


def edited_more(out: Path) -> None:
    for name in ("gpt", "gate"):
        edited_as(name)


def edited_as(name: str) -> None:
    first = torch.zeros(PROBE.sequences, dtype=torch.long)
    rows = torch.arange(PROBE.sequences)
    chunks = small(name)
    (chunk,) = chunks
    chunk.eval()
    layer = chunk.decoder.layers[1]
    with replaying(chunks, PROBE) as replay:
        plain, at = replay.plain({1, 2}), replay.position
        assert set(replay.kept) == {1, 2}
        expert = next(iter(replay_experts(replay, 1)), None)
        edits = {
            "mlp": Patch([Term("mlp", 1)], first, "zero"),
            "head": Patch([Term("head", 1, 2)], first, "zero"),
            "state": Patch([Term("state", 2)], at, first),
            "alone": AttentionKnockout(at, (1, 2), lambda row, at, n: torch.arange(n) == at),
        }
        if expert is not None:
            edits["expert"] = Patch([Term("expert", 1, expert)], first, "zero")
        found = dict(zip(edits, replay.run(list(edits.values()), loss=True), strict=True))

    def no_mlp(module: Any, args: Any, output: Any) -> Any:
        added = output[0] if output[1] is None else output[0] + output[1]
        added = added.clone()
        added[0] = 0
        return added, None

    def no_head(module: Any, args: Any) -> Any:
        mixed = args[0].clone()
        mixed[0].unflatten(-1, (4, -1))[:, 2] = 0
        return (mixed, *args[1:])

    def other_state(module: Any, args: Any, kwargs: Any) -> Any:
        stream = (args[0] if args else kwargs["hidden_states"]).clone()
        stream[at, rows] = stream[0].clone()
        return (stream, *args[1:]) if args else (), kwargs | (
            {} if args else {"hidden_states": stream}
        )

    def own_value(core: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Who sees itself alone takes its own value, less what a sink logit takes."""
        query, key, value = args[:3]
        groups = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(groups, 2) for x in (key, value))
        mixed = value[at, rows]
        if (offset := getattr(core, "softmax_offset", None)) is not None:
            score = (query[at, rows] * key[at, rows]).sum(-1) * query.shape[-1] ** -0.5
            mixed = mixed * torch.sigmoid(score - offset)[..., None]
        output = output.clone()
        output[at, rows] = mixed.flatten(1)
        return output

    def no_expert(module: Any, args: Any, output: Any) -> Any:
        gates = output[0].clone()
        gates[: PROBE.sequences, expert] = 0
        return gates, output[1]

    core = layer.self_attention.core_attention
    later = chunk.decoder.layers[2]
    hooks = {
        "mlp": lambda: layer.mlp.register_forward_hook(no_mlp),
        "head": lambda: layer.self_attention.linear_proj.register_forward_pre_hook(no_head),
        "state": lambda: later.register_forward_pre_hook(other_state, with_kwargs=True),
        "alone": lambda: core.register_forward_hook(own_value, with_kwargs=True),
        "expert": lambda: layer.mlp.router.register_forward_hook(no_expert),
    }
    if name == "gate":  # its heads are gated before they are projected
        del found["head"]
    for kind, outcome in {"plain": plain, **found}.items():
        handle = hooks[kind]() if kind != "plain" else None
        with torch.no_grad():
            positions = torch.arange(PROBE.length).expand(PROBE.sequences, -1)
            logits = chunk(PROBE.tokens, positions, None)
        if handle is not None:
            handle.remove()
            assert not torch.allclose(outcome.loss, plain.loss, atol=1e-4), (name, kind)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].mT, PROBE.tokens[:, 1:], reduction="none"
        ).double()
        message = f"{name} {kind}"
        assert float((outcome.loss - loss[:, 1:].mean(1)).abs().max()) < 1e-5, message
        assert float((outcome.p0_loss - loss[:, 0]).abs().max()) < 1e-5, message


def replay_experts(replay: Any, block: int) -> list[int]:
    """The experts that P0 of all sequences is routed to in a block; any of them last."""
    found: list[int] = []

    class Chosen(Edit):
        def write(self, number: int, write: Any, rows: torch.Tensor) -> None:
            if number == block and write.routed is not None:
                found.extend(write.routed.index[:, 0].flatten().unique().tolist())

    replay.run([Chosen()])
    return found


def causal(out: Path) -> None:
    """Training stays the same with causal tests, and where they cannot be, all are told why."""
    processes = dist.get_world_size()
    with (
        pytest.MonkeyPatch.context() as patch,
        Path(f"{out}-{dist.get_rank()}.log").open("w") as stream,
    ):
        patch.setattr("sinktrack.metrics.phases.EPSILON", 0.165)  # a sink from block 1 on
        patch.setattr("sinktrack.metrics.phases.GOES_ON", 0.16)
        handler = logging.StreamHandler(stream)
        logging.getLogger("sinktrack").addHandler(handler)
        for text in ("",) if processes == 1 else ("overlap", "ep2"):
            here, name = out / (text or "alone"), "qwen" if text == "ep2" else "gpt"
            plain = train(f"{name}:{text}", None)
            tracker = SinkTrackMegatron(PROBE, here, every=3, causal_every=1)
            tracked = train(f"{name}:{text}", tracker)
            chunks = tracked.pop("chunks")
            plain.pop("chunks")
            assert_identical(plain, tracked)
            said = Path(stream.name).read_text()
            if text == "ep2":
                assert "expert parallelism spreads it" in said or dist.get_rank()
            else:
                assert "failed" not in said, said
            if dist.get_rank() == 0:
                run = Run.read(here)
                assert run.steps == [3, 6]
                assert all(("causal" in record) == (text != "ep2") for record in run.records)
                tested = [record["causal"]["necessity"] for record in run.records if text != "ep2"]
                assert all(tested) or text == "ep2"
            if text == "overlap":  # one process fails within the tests: none waits for it
                if dist.get_rank() == 1:
                    patch.setattr("sinktrack.models.megatron.passes._added", None)
                measured = measure(chunks, PROBE)
                with pytest.raises(Exception, match="process 1 failed|not callable"):
                    run_causal_tests(chunks, PROBE, measured)
        logging.getLogger("sinktrack").removeHandler(handler)


causal_over_two = causal


def small(name: str = "deepseek", text: str = "") -> Any:
    sizes, changes = models.layout(text)
    megatron_cpu.start(**sizes)
    return models.build(models.config(name, **changes))


class Manager:
    """How Megatron Bridge and Megatron-LM take a callback and call it, by their source."""

    def __init__(self, callback: Any) -> None:
        events = (
            "on_train_start", "on_train_step_start", "on_train_step_end", "on_train_end",
            "on_checkpoint_save", "on_log",
        )  # fmt: skip
        self.methods = {name: getattr(callback, name) for name in events}
        assert all(method.__func__ for method in self.methods.values())

    def fire(self, event: str, context: Any) -> None:
        self.methods[event](context)


def batch_of(size: int) -> None:
    from megatron.core import num_microbatches_calculator as calculator

    calculator.unset_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(0, None, size, 2, 1)


class Bridge:
    """Megatron Bridge's loop: counts a step after its event."""

    def __init__(self, callback: Any, step: int, **checkpoint: Any) -> None:
        batch_of(8)
        self.counts = SimpleNamespace(step=step, consumed_train_samples=8 * step)
        self.state = SimpleNamespace(
            train_state=self.counts,
            async_calls_queue=SimpleNamespace(call_idx=-1) if checkpoint["async_save"] else None,
            cfg=SimpleNamespace(
                model=SimpleNamespace(seq_length=16),
                checkpoint=SimpleNamespace(**checkpoint),
                train=SimpleNamespace(exit_interval=None),
            ),
        )
        self.manager = Manager(callback)
        self.chunks = small()
        self.context = SimpleNamespace(state=self.state, model=self.chunks, user_state={})

    def fire(self, event: str) -> None:
        self.manager.fire(event, self.context)

    def iterate(self) -> None:
        self.fire("on_train_step_start")
        with torch.no_grad():
            next(self.chunks[0].parameters()).add_(1e-3)
        self.fire("on_train_step_end")
        self.skip()

    def skip(self) -> None:
        self.counts.step += 1
        self.counts.consumed_train_samples += 8

    def saved(self) -> None:
        context = SimpleNamespace(state=self.state, model=self.chunks, user_state={})
        self.manager.fire("on_checkpoint_save", context)


def bridge(out: Path) -> None:
    """Megatron Bridge: a save that nothing foretold, too; skipped iterations; tokens."""
    callback = SinkTrackMegatron(PROBE, out, every=5, on_error="raise")
    loop = Bridge(callback, 10, save=None, save_interval=None, async_save=False)
    loop.fire("on_train_start")
    for _ in range(3):
        loop.iterate()
    loop.saved()
    loop.skip()
    for _ in range(3):
        loop.iterate()
    loop.fire("on_train_end")
    records = Run.read(out).records
    assert [record["step"] for record in records] == [10, 13, 15, 17]
    assert all(record["tokens"] == record["step"] * 8 * 16 for record in records)


def bridge_async(out: Path) -> None:
    """A save that is announced later is of the weights that were there when it began."""
    callback = SinkTrackMegatron(PROBE, out, every=10, on_error="raise")
    loop = Bridge(callback, 0, save="there", save_interval=4, async_save=True)
    loop.fire("on_train_start")
    wanted = {}
    for _ in range(7):
        loop.iterate()
        if loop.counts.step == 4:
            wanted = measure(loop.chunks, PROBE).to_record(4, "", {}, None)
            loop.state.async_calls_queue.call_idx += 1
    loop.saved()
    assert Run.read(out).steps == [0, 4]
    loop.state.async_calls_queue.call_idx += 1  # a signal, say: it exits, and waits for the writer
    loop.saved()
    records = Run.read(out).records
    assert [record["step"] for record in records] == [0, 4, 7]
    assert records[1]["p0_norm"] == wanted["p0_norm"].tolist()
    loop.fire("on_train_end")
    assert Run.read(out).steps == [0, 4, 7]


class MegatronLM:
    """Megatron-LM's loop, with its global arguments."""

    def __init__(self, iteration: int, **arguments: Any) -> None:
        batch_of(8)
        self.arguments = SimpleNamespace(
            **{
                "iteration": iteration, "curr_iteration": 0, "seq_length": 16, "eval_interval": 4,
                "consumed_train_samples": 8 * iteration, "iterations_to_skip": [], "save": "there",
                "save_interval": 6, "non_persistent_save_interval": None, "exit_interval": None,
                "train_iters": 12, "skip_train": False,
            }
            | arguments
        )  # fmt: skip
        self.chunks = small()
        module = SimpleNamespace(get_args=lambda: self.arguments)
        sys.modules["megatron.training.global_vars"] = module  # type: ignore[assignment]

    def train(self, callback: Any, evaluate: Any, counted: bool = False) -> None:
        """``counted``: are the samples counted before the event, or after it?"""
        arguments = self.arguments
        context = SimpleNamespace(model=self.chunks, user_state={})
        manager = Manager(callback) if callback is not None else None
        iteration = arguments.iteration
        if manager:
            manager.fire("on_train_start", context)
        while iteration < arguments.train_iters:
            if iteration + 1 in arguments.iterations_to_skip:
                arguments.consumed_train_samples += 8
                iteration += 1
                continue
            arguments.curr_iteration = iteration
            if manager:
                manager.fire("on_train_step_start", context)
            arguments.consumed_train_samples += 8 * counted
            if manager:
                manager.fire("on_train_step_end", context)
            arguments.consumed_train_samples += 8 * (not counted)
            iteration += 1
            if iteration % arguments.eval_interval == 0 and evaluate:
                evaluate(self.chunks)
        if manager:
            manager.fire("on_train_end", context)
        if evaluate:  # validation, and test
            evaluate(self.chunks)
            evaluate(self.chunks)


def megatron_lm(out: Path) -> None:
    """Megatron-LM: the iteration is its own, whatever it skips; each checkpoint has a record."""
    cases: list[tuple[str, int, dict[str, Any], list[int], list[int]]] = [
        ("plain", 0, {}, [0, 5, 6, 10, 12], [4, 8, 12]),
        ("resumed", 4, {}, [5, 6, 10, 12], [8, 12]),
        ("skips", 0, {"iterations_to_skip": [4, 5]}, [0, 6, 10, 12], [8, 12]),
        ("skips first", 0, {"iterations_to_skip": [1, 2]}, [0, 5, 6, 10, 12], [4, 8, 12]),
        ("skips last", 0, {"iterations_to_skip": [11, 12]}, [0, 5, 6, 10, 12], [4, 8, 12]),
        ("skips after", 0, {"iterations_to_skip": [9, 10, 11, 12]}, [0, 5, 6, 12], [4, 8, 12]),
        ("odd", 0, {"train_iters": 7, "save": None}, [0, 5, 7], [4, 7]),
        ("local", 0, {"non_persistent_save_interval": 4}, [0, 4, 5, 6, 8, 10, 12], [4, 8, 12]),
        ("done", 12, {}, [12], [12]),
        ("none", 0, {"train_iters": 0}, [0], [0]),
    ]
    try:
        for name, start, arguments, wanted, evaluated in cases:
            for counted in (False, True):
                here = out / f"{name}-{counted}"
                tracker = SinkTrackMegatron(PROBE, here, every=5, on_error="raise")
                MegatronLM(start, **arguments).train(tracker, None, counted)
                steps = Run.read(here).records
                assert [record["step"] for record in steps] == wanted, name
                assert all(record["tokens"] == record["step"] * 8 * 16 for record in steps), name
            tracker = SinkTrackMegatron(PROBE, out / f"{name}-evaluated", on_error="raise")
            MegatronLM(start, **arguments).train(None, tracker.non_loss_data_func)
            steps = Run.read(out / f"{name}-evaluated").records
            assert [record["step"] for record in steps] == evaluated, name
            assert all(record["tokens"] == record["step"] * 8 * 16 for record in steps), name
        tracker = SinkTrackMegatron(PROBE, out / "evaluation", on_error="raise")
        loop = MegatronLM(8, skip_train=True)
        loop.arguments.curr_iteration = 8
        tracker.non_loss_data_func(loop.chunks)
        tracker.non_loss_data_func(loop.chunks)
        assert Run.read(out / "evaluation").steps == [8]
    finally:
        del sys.modules["megatron.training.global_vars"]
    with pytest.raises(RuntimeError, match="is for megatron.training"):
        tracker.non_loss_data_func(loop.chunks)


def ramped(out: Path) -> None:
    """Megatron-LM saves before a batch grows, which no interval foretells."""
    from megatron.core import num_microbatches_calculator as calculator

    tracker = SinkTrackMegatron(PROBE, out, every=100, on_error="raise")
    try:
        loop = MegatronLM(0)
        calculator.unset_num_microbatches_calculator()
        if (
            "step_batch_size_schedule"
            in inspect.signature(calculator.init_num_microbatches_calculator).parameters
        ):  # since 0.19, in place of the other
            calculator.init_num_microbatches_calculator(
                0, None, None, 2, 1, step_batch_size_schedule="0:4 8:8 24:16"
            )
        else:
            calculator.init_num_microbatches_calculator(0, [4, 4, 16], 8, 2, 1)
        context, saved = SimpleNamespace(model=loop.chunks, user_state={}), []
        before = calculator.get_num_microbatches()
        for iteration in range(7):
            calculator.update_num_microbatches(
                loop.arguments.consumed_train_samples, consistency_check=False
            )
            if calculator.get_num_microbatches() != before and iteration:
                saved.append(iteration)
            before = calculator.get_num_microbatches()
            loop.arguments.curr_iteration = iteration
            tracker.on_train_step_start(context)
            tracker.on_train_step_end(context)
            loop.arguments.consumed_train_samples += before * 2
    finally:
        del sys.modules["megatron.training.global_vars"]
    assert saved and Run.read(out).steps == sorted({*saved, 6})  # 6 is the interval's


def logged(out: Path) -> None:
    """Megatron opens W&B on the last process and logs with its iteration as the step."""
    import wandb

    tracker = SinkTrackMegatron(PROBE, out / "run", every=2, early=True, on_error="raise")
    last = dist.get_rank() == dist.get_world_size() - 1
    if last:
        wandb.init(mode="offline", dir=out, project="training", settings={"console": "off"})
    try:
        loop = MegatronLM(0, eval_interval=3, train_iters=6)

        def row(name: str, step: int) -> None:
            if last:
                wandb.log({name: float(step)}, step)

        manager = Manager(tracker)
        context = SimpleNamespace(model=loop.chunks, user_state={})
        said: list[str] = []
        manager.fire("on_train_start", context)
        for iteration in range(6):
            loop.arguments.curr_iteration = iteration
            manager.fire("on_train_step_start", context)
            manager.fire("on_train_step_end", context)
            loop.arguments.consumed_train_samples += 8
            context.log_fragments = [" grad norm: 0.1 |"]  # fired on all; the last process prints
            manager.fire("on_log", context)
            said.append("".join(context.log_fragments[1:]))
            row("loss", iteration + 1)
            row("learning-rate", iteration + 1)
            if (iteration + 1) % 3 == 0:
                row("lm loss validation before", iteration + 1)
                tracker.non_loss_data_func(loop.chunks)
                row("lm loss validation", iteration + 1)
        manager.fire("on_train_end", context)
        row("validation at the end", 6)
        row("test at the end", 6)
        said_by = [None] * dist.get_world_size()
        dist.all_gather_object(said_by, said)
        if dist.get_rank() == 0:
            rates = {one["step"]: one["sink_rate"] for one in Run.read(out / "run").records}
            lines = [f" P0 sink rate at {step}: {rates.get(step, 0):.4f} |" for step in range(1, 7)]
            lines[2] = lines[4] = ""  # at 3 an evaluation comes later, 5 is not due
            assert said_by == [lines] * len(said_by)
    finally:
        del sys.modules["megatron.training.global_vars"]
        if last:
            wandb.finish()
    dist.barrier()


def kept(out: Path) -> None:
    """What a process keeps does not grow with the records, that of W&B's run least of all."""
    import wandb

    alone = dist.get_world_size() == 1
    rank = dist.get_rank()
    tracker = SinkTrackMegatron(PROBE, out / "run", every=1, on_error="raise")
    chunks = small("deepseek")
    shown: list[int] = []
    if rank == dist.get_world_size() - 1:
        run = wandb.init(mode="offline", dir=out, project="training", settings={"console": "off"})
        run.log = lambda data, **_: shown.extend(  # W&B would keep rows itself
            [data["sinktrack/step"]] if data else []
        )

    def lists() -> int:
        gc.collect()
        return sum(type(one) is list for one in gc.get_objects())

    counted = []
    for step in range(10):
        tracker.step(step, chunks)
        if step in (3, 9):
            counted.append(lists())
    assert counted[1] - counted[0] < 20, counted  # a record holds some fifty
    if rank == dist.get_world_size() - 1:
        assert shown == list(range(10))
        past = tracker.tracker._past
        assert past is not None and len(past) == 10
        assert run.config["sinktrack"]["every"] == 1
        wandb.finish()
    elif not alone:
        assert tracker.tracker._past is None
    dist.barrier()


def without_sublayers(layer: Any) -> None:
    from megatron.core.transformer.identity_op import IdentityOp

    layer.self_attention, layer.mlp = IdentityOp(), IdentityOp()


def refusals(out: Path) -> None:
    """What cannot be right is refused by name; a model is as before."""

    def refused(match: str, chunks: Any, probe: Probe = PROBE) -> None:
        with pytest.raises((MeasurementError, ProbeError), match=match):
            measure(chunks, probe)
        assert not any(module._forward_hooks for chunk in chunks for module in chunk.modules())

    for name, value, match in (
        (
            "fp4",
            "e2m1",
            "fp4=e2m1 is not supported in training: probes without it .*; scan the checkpoints",
        ),
        ("moe_latent_size", 8, "latent space"),
        ("cuda_graph_impl", "local", "replayed graph"),
        (
            "moe_router_force_biased",
            -0.5,
            "moe_router_force_biased=-0.5 is not supported in training: routing by",
        ),
        ("moe_expert_rank_capacity_factor", 1.0, "what is dropped depends on"),
        ("enable_mhc_connections", True, "several residual streams"),
        ("experimental_attention_variant", "dsa", "variant=dsa: attention that is not causal"),
    ):
        chunks = small()
        setattr(chunks[0].config, name, value)
        refused(match, chunks)

    chunks = small()
    chunks[0].config.fp8, chunks[0].config.fp8_recipe = "e4m3", "mxfp8"
    refused("fp8_recipe=mxfp8 is not supported in training", chunks)

    class FullyShardedDataParallel(type(chunks[0]).__mro__[2]):  # type: ignore[misc]
        def __init__(self, module: Any) -> None:
            super().__init__(module.config)
            self.module = module

    refused(
        "FullyShardedDataParallel: Megatron's own FSDP is not supported",
        [FullyShardedDataParallel(small()[0])],
    )

    chunks = small()
    chunks[0].config.num_layers = 5
    refused(r"the processes hold blocks \[0, 1, 2, 3\] of a model of 5", chunks)

    chunks = small()
    core = chunks[0].decoder.layers[1].self_attention.core_attention
    core.__class__ = type("DSAttention", (type(core),), {})
    refused("block 1 .*DSAttention attends to the keys that it chooses", chunks)

    chunks = small("llama")
    chunks[0].config.hidden_size = 2 * chunks[0].config.hidden_size
    refused("block 0 .*stream of width .* hidden_size", chunks)

    chunks = small()
    chunks[0].position_embedding_type = "mrope"
    refused("multimodal rotary embeddings", chunks)
    changes: list[tuple[Callable[[Any], None], str]] = [
        (without_sublayers, "block 2 .*has neither attention nor an MLP"),
        (lambda layer: setattr(layer, "cross_attention", layer.mlp), "another sequence"),
        (lambda layer: delattr(layer.self_attention, "core_attention"), "has no core_attention"),
    ]
    for change, match in changes:
        chunks = small()
        change(chunks[0].decoder.layers[2])
        refused(match, chunks)

    chunks = small("llama")
    chunks[0].decoder.layers[1].self_attention.core_attention.softmax_scale *= 1.1
    core = chunks[0].decoder.layers[1].self_attention.core_attention
    own = core.forward
    core.forward = lambda query, *args, **kwargs: own(query * 2, *args, **kwargs)
    refused("block 1 .*core attention differs from causal softmax attention", chunks)

    chunks = small("llama")
    with torch.no_grad():
        chunks[0].decoder.layers[1].mlp.linear_fc1.weight[0, 0] = torch.nan
    refused("not finite at the input of block 2", chunks)
    refused("beyond the model's vocabulary", small(), Probe.random(VOCABULARY + 40, 4, 16))


class Wrapped(torch.nn.Module):
    """A projection as an adapter of Megatron Bridge has it: its weight is another module's."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        return self.inner(x)


def untold(out: Path) -> None:
    """Where writes cannot be told apart, attention and norms stand, on every process' layout."""
    alone = dist.get_world_size() == 1

    def scaled(module: Any, args: Any, output: Any) -> Any:
        return output[0] * 1.5, output[1]

    def rescale(layer: Any) -> None:
        layer.register_forward_hook(scaled)

    def between(layer: Any) -> None:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"hidden_states": kwargs["hidden_states"] * 2}),
            with_kwargs=True,
        )

    def wrap(layer: Any) -> None:
        layer.self_attention.linear_proj = Wrapped(layer.self_attention.linear_proj)

    cases: list[tuple[str, int, Callable[[Any], None], str]] = [
        (
            "",
            3,
            rescale,
            r"block 3 \(TransformerLayer\): its output is not its input plus what its",
        ),
        ("", 2, wrap, r"block 2 .*: linear_proj is a Wrapped without a weight.* merge them first"),
        ("", 2, between, "writes before block 2 make .* not 1"),
    ]
    if not alone:
        cases = [("pp2", *cases[0][1:]), ("tp2 ep2", *cases[1][1:])]
    for text, number, change, reason in cases:
        chunks = small("deepseek", text)
        plain = measure(chunks, PROBE)
        for layer in chunks[0].decoder.layers:
            if layer.layer_number - 1 == number:
                change(layer)
        found = measure(chunks, PROBE)
        same = number + 1 if change is not between else number
        assert torch.equal(found.p0_attention[:same], plain.p0_attention[:same])
        assert torch.equal(found.p0_norm[:same], plain.p0_norm[:same])
        assert plain.localization.shares and not found.localization.shares
        record = found.to_record(1, "", {}, None)
        for name in ("depth", "shares", "top_components"):
            assert record[name] is None and re.search(reason, record["missing"][name])
        if change is not between:
            assert re.search(reason, record["missing"]["mlp_write_ratio"])


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


def windows(out: Path) -> None:
    """A process that fails between what the others exchange leaves none waiting, wherever."""
    from sinktrack.models.megatron import fresh, passes
    from sinktrack.models.megatron import measure as measuring

    rank = dist.get_rank()
    chunks = small("gpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sinktrack.metrics.phases.EPSILON", 0.165)  # a sink from block 1 on
        patch.setattr("sinktrack.metrics.phases.GOES_ON", 0.16)
        measured = measure(chunks, PROBE)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of luck")

    def afterwards(context: Any) -> Any:
        @contextmanager
        def failing(*args: Any, **kwargs: Any) -> Any:
            with context(*args, **kwargs):
                yield
            raise RuntimeError("out of luck")

        return failing

    def fails(run: Callable[[], Any], home: Any, name: str, how: Any = broken) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(home, name, how)
            with pytest.raises((RuntimeError, MeasurementError), match="out of luck") as error:
                run()
        assert ("process 1 failed" in str(error.value)) == (rank == 0), (name, error.value)

    def probe() -> Any:
        return measure(chunks, PROBE)

    for name in ("synced", "probe_context", "ready", "fresh"):
        fails(probe, measuring, name)
    for name in ("synced", "ready"):
        fails(probe, measuring, name, afterwards(getattr(measuring, name)))
    for name in ("_groups", "_digest", "_different", "_bucket_groups"):
        fails(probe, fresh, name)
    for name in ("synced", "probe_context", "ready", "fresh"):
        fails(lambda: run_causal_tests(chunks, PROBE, measured), passes, name)
    assert torch.equal(probe().p0_attention, measured.p0_attention)


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
