"""Set-ups of training: the probe changes no bit of any of them, and its numbers are right."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinktrack import Decoder, MeasurementError, Probe, Run, measure
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.collect import Collector
from sinktrack.interventions.replay import replaying
from sinktrack.metrics import METRICS
from sinktrack.models.huggingface import decoder, watch
from tests.helpers import models, torch_models
from tests.helpers.commands import two_processes
from tests.helpers.paths import ROOT
from tests.helpers.reference import check_exact
from tests.helpers.trainings import PROBE, assert_identical, train


def reentrant(model: Any, value: bool) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": value})
    return model


def wrapped_blocks(model: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    model.config.use_cache = False  # a recomputed block would append its keys a second time
    block = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, block))
    return model


def half(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: torch.autocast("cpu", dtype)


SETUPS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "gradient checkpointing": (lambda model: reentrant(model, False), {}),
    "reentrant gradient checkpointing": (lambda model: reentrant(model, True), {}),
    "activation checkpoint wrapper": (wrapped_blocks, {}),
    "bf16 weights": (lambda model: model.to(torch.bfloat16), {}),
    "fp16 autocast with loss scaling": (
        lambda model: model,
        {"context": half(torch.float16), "scaler": lambda: torch.amp.GradScaler("cpu")},
    ),
}


@pytest.mark.parametrize("family", [models.llama, models.mixtral])
@pytest.mark.parametrize("name", SETUPS)
def test_bit_identical_and_right(name: str, family: Any, tmp_path: Path) -> None:
    change, options = SETUPS[name]
    results: list[dict[str, Any]] = []
    tracker = SinkTracker(PROBE, tmp_path, every=3, on_error="raise")
    last: Any = None
    for followed in (None, tracker):
        torch.manual_seed(1)
        last = change(family(attention_dropout=0.1).train())
        made = {key: make() if key == "scaler" else make for key, make in options.items()}
        results.append(train(last, followed, **made))
    assert_identical(results[0], results[1])
    record = tracker.probe_now(12, last)
    plain = family()
    weights = {
        k.replace("_checkpoint_wrapped_module.", ""): v for k, v in results[0]["weights"].items()
    }
    plain = plain.to(next(last.parameters()).dtype)
    plain.load_state_dict(weights)
    alone = measure(plain, PROBE)
    assert record is not None
    assert torch.equal(record.p0_attention, alone.p0_attention)
    assert torch.equal(record.p0_norm, alone.p0_norm)
    assert Run.read(tmp_path).steps == [3, 6, 9, 12]


@pytest.mark.distributed
def test_accelerate_over_two_processes(tmp_path: Path) -> None:
    two_processes(
        tmp_path,
        """
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from sinktrack import measure
        for precision in ("no", "bf16"):
            found = []
            for tracked in (False, True):
                AcceleratorState._reset_state(reset_partial_state=False)
                accelerator = Accelerator(cpu=True, mixed_precision=precision)
                rank = accelerator.process_index
                torch.manual_seed(rank)
                plain = models.mixtral(attention_dropout=0.1).train()
                optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
                model, optimizer = accelerator.prepare(plain, optimizer)
                tracker = SinkTracker(PROBE, out / precision, every=5, on_error="raise")
                for step in range(1, 11):
                    tokens = torch.randint(models.VOCABULARY, (4, 16))
                    output = model(tokens, labels=tokens)
                    unused = sum(p.sum() for p in model.parameters()) * 0
                    accelerator.backward(output.loss + unused)
                    optimizer.step()
                    optimizer.zero_grad()
                    if tracked:
                        tracker.step(step, model)
                found.append({"weights": plain.state_dict(), "random": torch.get_rng_state()})
            assert_identical(*found)
            if rank == 0:
                whole = models.mixtral()
                whole.load_state_dict(found[0]["weights"])
                live, last = measure(whole, PROBE), Run.read(out / precision).records[-1]
                assert last["step"] == 10 and last["weights"] == live.weights
                assert last["p0_attention"] == live.p0_attention.tolist()
        """,
    )


@pytest.mark.distributed
@pytest.mark.parametrize("reshard", [True, None])
def test_what_fsdp2_casts_is_recorded_as_it_is_computed(
    reshard: bool | None, tmp_path: Path
) -> None:
    two_processes(
        tmp_path,
        f"""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from sinktrack import measure
        for dtype in (torch.bfloat16, None):
            model = models.qwen3_moe()
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            for block in model.model.layers:
                fully_shard(block, mp_policy=policy)
            fully_shard(model, mp_policy=policy, reshard_after_forward={reshard})
            for _ in range(2):
                assert measure(model, PROBE).dtype == ("bfloat16" if dtype else "float32")
        """,
    )


@pytest.mark.parametrize("target", ["attention", "all"])
def test_low_rank_adapters_measure_as_the_merged_model(target: str) -> None:
    peft = pytest.importorskip("peft")
    names = ["q_proj", "v_proj", "o_proj"] if target == "attention" else "all-linear"
    torch.manual_seed(3)
    adapted = peft.get_peft_model(
        models.llama(attention_bias=True),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=names, lora_dropout=0.1),
    ).train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    found = measure(adapted, PROBE)
    merged = copy.deepcopy(adapted).merge_and_unload()
    whole = measure(merged, PROBE)
    torch.testing.assert_close(found.p0_attention, whole.p0_attention, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.p0_norm, whole.p0_norm, atol=0, rtol=1e-5)
    leaves = []
    for model in (adapted.eval(), merged.eval()):
        inner, collected = decoder(model), Collector(METRICS)
        with torch.no_grad(), watch(inner, collected):
            inner.model(PROBE.tokens, use_cache=False)
        leaves.append(
            {(x.kind, x.block, x.index): x.write for x in collected.writes.contributions()}
        )
    assert leaves[0].keys() == leaves[1].keys()
    for key, write in leaves[0].items():
        torch.testing.assert_close(write, leaves[1][key], atol=1e-4, rtol=1e-4)


@pytest.fixture
def adapted_experts() -> Any:
    """Low-rank adapters of parameters, which is how PEFT adapts experts that are one tensor."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    return peft.get_peft_model(
        models.qwen3_moe(),
        peft.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
        ),
    )


def test_adapters_of_experts_measure_as_the_merged_model(adapted_experts: Any) -> None:
    """PEFT sets these parameters anew in each pass, which changes no bit of them."""
    before = {name: value.clone() for name, value in adapted_experts.named_parameters()}
    found = [measure(adapted_experts.train(), PROBE) for _ in range(2)][-1]
    after = dict(adapted_experts.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    whole = measure(adapted_experts.merge_and_unload(), PROBE)
    torch.testing.assert_close(found.p0_attention, whole.p0_attention, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.p0_norm, whole.p0_norm, atol=0, rtol=1e-5)
    assert found.norm_ratio.tolist() != measure(models.qwen3_moe(), PROBE).norm_ratio.tolist()


def test_adapters_of_a_layer_with_a_bias() -> None:
    peft = pytest.importorskip("peft")
    model = models.llama(attention_bias=True)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"])
    )
    assert measure(adapted, PROBE).p0_attention.tolist() == (
        measure(models.llama(attention_bias=True), PROBE).p0_attention.tolist()
    )


@pytest.mark.parametrize("change", ["one number", "two rows in each other's place"])
def test_a_change_of_adapted_experts_is_seen(adapted_experts: Any, change: str) -> None:
    experts = next(
        module for module in adapted_experts.modules() if "down_proj" in module._parameters
    )

    def spoil(*_: Any) -> None:
        with torch.no_grad():
            weight = experts._parameters["down_proj"].data
            if change == "one number":
                weight[2, 1, 0].mul_(1.5)
            else:
                weight[2, :, :2] = weight[2, :, :2].flip(-1)

    adapted_experts.base_model.model.model.layers[2].register_forward_hook(spoil)
    with pytest.raises(MeasurementError, match="changed .*down_proj, which cannot be put back"):
        measure(adapted_experts, PROBE)


class Around(torch.nn.Module):
    """A wrapper of somebody's own, under a name of its own."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "bare": lambda model: model,
    "in a module": Around,
    "in modules": lambda model: Around(torch.nn.ModuleDict({"first": Around(model)})),
    "in parallel": torch.nn.DataParallel,
    "compiled": torch.compile,
    "compiled in a module": lambda model: Around(torch.compile(model)),
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_model_is_found_in_what_is_around_it(wrap: str) -> None:
    wanted, found = measure(models.llama(), PROBE), measure(WRAPPED[wrap](models.llama()), PROBE)
    assert torch.equal(found.p0_attention, wanted.p0_attention)


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning", "PromptEncoder"])
def test_a_learned_prompt_is_refused(kind: str, wrap: str) -> None:
    peft = pytest.importorskip("peft")
    prompt = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = WRAPPED[wrap](peft.get_peft_model(models.llama(), prompt))
    with pytest.raises(MeasurementError, match="a prompt that PEFT learned stands before"):
        measure(model, PROBE)
    with pytest.raises(MeasurementError, match="a prompt that PEFT learned stands before"):
        decoder(model)
    with (
        pytest.raises(MeasurementError, match="a prompt that PEFT learned stands before"),
        replaying(model, PROBE),
    ):
        pass


def test_a_prompt_in_every_block_is_refused() -> None:
    peft = pytest.importorskip("peft")
    prompt = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    model = peft.get_peft_model(models.llama(), prompt)
    with pytest.raises(MeasurementError, match="a prompt that PEFT learned stands before"):
        measure(Around(model), PROBE)
    inner = model.get_base_model()  # what was put into it tells
    for entry in (inner, Decoder(model, blocks=inner.model.layers)):
        with pytest.raises(MeasurementError, match="a prompt that PEFT learned stands before"):
            measure(entry, PROBE)


def test_a_module_of_several_models_is_refused() -> None:
    several = torch.nn.ModuleDict({"policy": models.llama(), "reference": models.llama()})
    with pytest.raises(MeasurementError, match="ModuleDict holds 2 transformers models"):
        measure(several, PROBE)
    with pytest.raises(MeasurementError, match="Linear is not a transformers model"):
        measure(torch.nn.Linear(2, 2), PROBE)


@pytest.mark.parametrize("pattern", [[0] * 4, [0, 1, 0, 1], [0, 1, 2, 2]])
def test_one_module_at_several_depths_is_refused(pattern: list[int]) -> None:
    model = models.llama()
    layers = [model.model.layers[index] for index in pattern]
    model.model.layers = torch.nn.ModuleList(layers)
    with pytest.raises(MeasurementError, match=r"blocks \d.* are one module \(LlamaDecoderLayer"):
        measure(model, PROBE)


def test_depths_that_share_their_parameters_are_exact() -> None:
    model = models.llama()
    first = dict(model.model.layers[0].named_parameters())
    for layer in model.model.layers[1:]:
        for name, module in layer.named_modules():
            for key in module._parameters:
                module._parameters[key] = first.get(f"{name}.{key}")
    check_exact(model, PROBE)


def test_blocks_that_run_in_a_loop_are_refused() -> None:
    model = models.llama()
    block = model.model.layers[1]

    class Twice(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return block(block(*args, **kwargs), *args[1:], **kwargs)

    model.model.layers[2].forward = Twice().forward
    with pytest.raises(MeasurementError, match="block 1 .*runs more than once in a pass"):
        measure(model, PROBE)


def test_quantized_weights_are_refused() -> None:
    model = models.llama()
    projection = model.model.layers[0].self_attn.o_proj
    weight = (projection.weight * 100).round().to(torch.int8)
    projection.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(MeasurementError, match=r"layers.0.*o_proj.weight is stored as torch.int8"):
        measure(model, PROBE)


def test_bitsandbytes_is_refused() -> None:
    quantized = pytest.importorskip("bitsandbytes")
    model = models.llama()
    layer = model.model.layers[1].mlp
    linear = quantized.nn.Linear8bitLt(32, 48, bias=False, has_fp16_weights=False)
    linear.load_state_dict(layer.up_proj.state_dict())
    layer.up_proj = linear.to("cpu")
    if linear.weight.dtype != torch.int8:
        pytest.skip("this bitsandbytes does not quantize on a CPU")
    with pytest.raises(MeasurementError, match="quantized weights are not supported"):
        measure(model, PROBE)


def test_partitioned_parameters_of_no_model_of_transformers_are_refused() -> None:
    """ZeRO-3 leaves placeholders with a `ds_id`."""
    model = torch_models.Net(torch_models.KINDS["plain"])
    weight: Any = next(model.parameters())
    weight.data, weight.ds_id = torch.empty(0), 7
    with pytest.raises(MeasurementError, match=r"no process holds the whole of .*ZeRO-3"):
        measure(model, PROBE)


@given(st.integers(1, 9), st.sampled_from([models.llama, models.mixtral, models.deepseek_v3]))
@settings(max_examples=20, deadline=None)
def test_a_split_probe_measures_the_same(size: int, family: Any) -> None:
    model, probe = family(), Probe.random(models.VOCABULARY, sequences=7, length=12, seed=1)
    whole, split = measure(model, probe), measure(model, probe, batch_size=size)
    for name in ("p0_attention_by_sequence", "p0_norm", "norm_ratio", "direction_consistency"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name), atol=1e-6, rtol=1e-6)
    for one, other in zip(split.localization.shares, whole.localization.shares, strict=True):
        assert abs(one.share - other.share) < 1e-5


def test_a_probe_too_large_for_memory(tmp_path: Path) -> None:
    """In a process with little memory left: a clear failure, nothing touched, training goes on."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import resource, sys
            sys.path.insert(0, {str(ROOT)!r})
            from tests.callbacks.test_setups import *
            torch.set_num_threads(1)
            model = models.llama(attention_dropout=0.1, max_position_embeddings=8192).train()
            before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
            probe = Probe.random(models.VOCABULARY, sequences=512, length=4096)
            tracker = SinkTracker(probe, {str(tmp_path / "run")!r}, every=1)
            pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            limit = pages + 256 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                measure(model, probe)
            except MeasurementError as error:
                print(error)
            assert_identical(before, (model.state_dict(), torch.get_rng_state()))
            assert all(module.training for module in model.modules())
            assert tracker.step(1, model) is None
            small = SinkTracker(PROBE, {str(tmp_path / "small")!r}, every=5, on_error="raise")
            train(model, small)
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "out of memory with 512 sequences of 4096 tokens at once" in done.stdout
    assert "probe_batch_size of a callback) to 256 or less" in done.stdout
    assert "training goes on" in done.stderr
    assert Run.read(tmp_path / "small").steps == [5, 10]


@pytest.mark.distributed
def test_a_process_that_fails_alone_does_not_stop_the_others(tmp_path: Path) -> None:
    two_processes(
        tmp_path,
        """
        import shutil
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        rank = dist.get_rank()
        model = models.llama().train()
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        other = Probe.random(models.VOCABULARY, sequences=4, length=16, seed=rank)
        same = SinkTracker(PROBE, out / "same", every=2)
        different = SinkTracker(other, out / "different", every=2)
        for step in range(1, 7):
            tokens = torch.randint(models.VOCABULARY, (4, 16))
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0 and step == 3:
                shutil.rmtree(out / "same")
                (out / "same").write_text("no directory any more")
            same.step(step, model)
            different.step(step, model)
        if rank == 0:
            assert Run.read(out / "different").steps == []
        dist.destroy_process_group()
        """,
    )


@pytest.mark.distributed
def test_units_within_blocks(tmp_path: Path) -> None:
    """FSDP2 of every linear layer by itself, whose weights are gone before their block is over."""
    two_processes(
        tmp_path,
        """
        from torch import nn
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from sinktrack import Decoder, measure
        from tests.helpers import planted, torch_models
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        def transformers():
            model = planted.dense()
            planted.head_writer(model, 0, 1)
            planted.reader(model, 1)
            return model, model, planted.probe()
        def own():
            probe = Probe.random(torch_models.VOCABULARY, sequences=4, length=17)
            model = torch_models.reading(torch_models.Kind(), probe.tokens)
            return model, Decoder(model), probe
        for build in (transformers, own):
            _, given, probe = build()
            wanted = measure(given, probe)
            model, given, _ = build()
            for module in list(model.modules()):
                if isinstance(module, nn.Linear):
                    fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
            found = measure(given, probe)
            torch.testing.assert_close(found.p0_norm, wanted.p0_norm)
            shares, heads = (
                [(part.kind, part.block, part.index, round(part.share, 5)) for part in parts]
                for parts in (found.localization.parts, wanted.localization.parts)
            )
            assert shares == heads and any(part[0] == "head" for part in shares)
        dist.destroy_process_group()
        """,
    )
