"""Models that no process holds whole, in real trainings over two processes."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sinktrack import MeasurementError, measure
from sinktrack.models.parallel import is_apart, takes_every_process
from tests.helpers import models
from tests.helpers.commands import two_processes
from tests.helpers.trainings import PROBE

FOLLOWED = """
    import datetime
    from sinktrack import measure
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))

    def follow(make, name, tracked, whole):
        # four steps; what they leave, and the weights by their names in the model
        torch.manual_seed(rank if name.startswith("fsdp") else 0)
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tracker = SinkTracker(PROBE, out / name, every=2, on_error="raise")
        if tracked:
            tracker.step(0, model)
        for step in range(1, 5):
            tokens = torch.randint(models.VOCABULARY, (4, 16))
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            if tracked and step == 2:  # gradients are still there
                tracker.step(step, model)
            optimizer.zero_grad()
            if tracked and step != 2:
                tracker.step(step, model)
            if step == 3:  # leaves whole weights in the root unit
                with torch.no_grad():
                    model(tokens)
                if tracked:
                    tracker.probe_now(3, model)
        random = torch.get_rng_state()
        return {"weights": whole(model), "random": random}

    def compare(make, build, name, whole):
        found = [follow(make, name, tracked, whole) for tracked in (False, True)]
        assert_identical(*found)
        if rank == 0:
            alone = build().eval()
            loaded = alone.load_state_dict(found[0]["weights"], strict=False)
            assert not loaded.unexpected_keys, loaded
            live = to_json(measure(alone, PROBE).to_record(4, "callback", {}))
            records = Run.read(out / name).records
            assert [record["step"] for record in records] == [0, 2, 3, 4], name
            for key in live.keys() - {"seconds", "versions"}:
                assert records[-1][key] == live[key], (name, key)

    def short(build):
        return lambda: build(num_hidden_layers=2, use_cache=False)

    from sinktrack.records.run import to_json
"""

pytestmark = pytest.mark.distributed


def run(tmp_path: Path, code: str, count: int = 2) -> None:
    two_processes(tmp_path, textwrap.dedent(FOLLOWED) + textwrap.dedent(code), count)


def test_tensor_and_expert_parallelism_of_transformers(tmp_path: Path) -> None:
    """Training as without the callback, and the record of the whole model to the last digit."""
    from transformers.distributed import DistributedConfig

    if "tp_size" not in inspect.signature(DistributedConfig).parameters:
        pytest.skip("this transformers is asked for it in another way")
    builds = {"llama": models.llama, "mixtral": models.mixtral, "latent": models.deepseek_v3}
    for name, build in builds.items():
        build(num_hidden_layers=2).save_pretrained(tmp_path / "saved" / name)
    run(
        tmp_path,
        """
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig
        sequence = {
            "model.layers.*.input_layernorm": "sequence_parallel",
            "model.layers.*.post_attention_layernorm": "sequence_parallel",
        }
        plans = {
            "llama": {"tp_plan": "auto"},
            "mixtral": {"tp_plan": "auto"},
            "latent": {"tp_plan": "auto"},
            "sequence": {"distributed_config": DistributedConfig(tp_size=2, tp_plan=sequence)},
            "experts": {"distributed_config": DistributedConfig(tp_size=2, ep_size=2)},
            "sharded-experts": {"distributed_config": DistributedConfig(fsdp_size=2, ep_size=2)},
        }
        builds = {"llama": short(models.llama), "latent": short(models.deepseek_v3)}
        for name, plan in plans.items():
            saved = out / "saved" / (name if name in ("llama", "latent") else "mixtral")
            def make():
                found = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, **plan)
                return found.train()
            def whole(model):
                return {
                    key: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
                    for key, value in model.state_dict().items()
                }
            compare(make, builds.get(name, short(models.mixtral)), name, whole)
        """,
    )


@pytest.mark.slow
def test_two_kinds_at_once_over_four_processes(tmp_path: Path) -> None:
    """FSDP2 with replicas, with tensor and with expert parallelism: of transformers and by hand."""
    for name, build in {"llama": models.llama, "mixtral": models.mixtral}.items():
        build(num_hidden_layers=2).save_pretrained(tmp_path / "saved" / name)
    run(
        tmp_path,
        """
        import pytest
        from tests.helpers import torch_models
        from sinktrack import MeasurementError
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel, RowwiseParallel, parallelize_module,
        )
        from tests.helpers.torch_models import Kind, Net
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("one", "other"))

        def whole(model):
            return {
                key: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
                for key, value in model.state_dict().items()
            }

        def shard(model, blocks, mesh):
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return model

        for name in ("llama", "mixtral"):
            build = short(getattr(models, name))
            def by_hand():
                model = build().train()
                return shard(model, model.model.layers, mesh)
            compare(by_hand, build, f"{name} by hand", whole)
            sizes = {
                "tensor": {"fsdp_size": 2, "tp_size": 2},
                "replicas": {"fsdp_size": 2, "dp_replicate_size": 2},
            }
            if name == "mixtral":
                sizes["experts"] = {"fsdp_size": 2, "tp_size": 2, "ep_size": 2}
            for kind, given in sizes.items():
                def make():
                    return AutoModelForCausalLM.from_pretrained(
                        out / "saved" / name, dtype=torch.float32,
                        distributed_config=DistributedConfig(**given),
                    ).train()
                compare(make, build, f"{name} {kind}", whole)

        probe = Probe.random(torch_models.VOCABULARY, sequences=5, length=17)
        for kind in (Kind(qk_norm=True, lambdas=True), Kind(experts="list", shared=True)):
            alone = measure(Net(kind), probe)
            model = Net(kind)
            found = measure(shard(model, model.layers, mesh), probe)
            assert found.weights == alone.weights
            assert torch.equal(found.p0_attention, alone.p0_attention)
            assert found.localization == alone.localization
        model = Net(Kind())
        for block in model.layers:
            parts = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
            parallelize_module(
                block, mesh["other"], parts | {"attention.o": RowwiseParallel()}
            )
        shard(model, model.layers, mesh["one"])
        model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(AssertionError("ran")))
        with pytest.raises(MeasurementError, match="tensor"):
            measure(model, probe)
        dist.barrier()
        """,
        count=4,
    )


@pytest.mark.parametrize("original", [pytest.param(False, marks=pytest.mark.slow), True])
def test_fsdp1(original: bool, tmp_path: Path) -> None:
    """Blocks, or blocks and the embedding, or all as one unit; mixed precision; saved memory."""
    run(
        tmp_path,
        f"""
        original = {original}
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
            apply_activation_checkpointing,
        )
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
        from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy
        half = MixedPrecision(
            param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16
        )
        setups = {{
            "blocks": (False, {{}}),
            "embedding": (True, {{}}),
            "root": (None, {{}}),
            "half": (True, {{"mixed_precision": half}}),
            "gradients": (False, {{"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP}}),
            "replicas": (False, {{"sharding_strategy": ShardingStrategy.NO_SHARD}}),
            "recomputed": (False, {{}}),
        }}
        for name, (embedding, options) in setups.items():
            build = short(models.llama if name == "embedding" else models.mixtral)
            def make():
                plain = build().train()
                block = type(plain.model.layers[0])
                units = {{block}} | ({{torch.nn.Embedding}} if embedding else set())
                policy = None if embedding is None else ModuleWrapPolicy(units)
                model = FSDP(
                    plain, auto_wrap_policy=policy, use_orig_params=original,
                    device_id=torch.device("cpu"), **options,
                )
                if name == "recomputed":
                    apply_activation_checkpointing(
                        model, check_fn=lambda module: isinstance(module, block)
                    )
                return model
            def whole(model):
                with FSDP.summon_full_params(model, writeback=False):
                    return {{
                        key.replace("_fsdp_wrapped_module.", "")
                        .replace("_checkpoint_wrapped_module.", ""): value.detach().clone()
                        for key, value in model.named_parameters()
                    }}
            compare(make, build, f"fsdp-{{name}}", whole)
        """,
    )


def test_what_no_process_holds_whole_is_refused_on_all_alike(tmp_path: Path) -> None:
    """Adapters, a changed forward, and a model without the unit that holds its embedding."""
    run(
        tmp_path,
        """
        import types
        import peft
        import pytest
        from sinktrack import MeasurementError
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy
        def units(model):
            policy = ModuleWrapPolicy({type(models.llama().model.layers[0])})
            device = torch.device("cpu")
            return FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
        adapted = peft.get_peft_model(models.llama(), peft.LoraConfig(target_modules=["q_proj"]))
        changed, alone = models.llama(), models.llama()
        changed.model.layers[1].mlp.forward = lambda x: 2 * x
        if rank == 1:
            alone.model.layers[0].self_attn.scaling *= 2
        refused = {
            "adapters of PEFT": units(adapted),
            r"layers.1.mlp has a forward or a hook from __main__": units(changed),
            "embed_tokens.weight has shape": units(models.llama()).module,
            r"layers.0.self_attn.scaling is": units(alone),
        }
        for reason, model in refused.items():
            with pytest.raises(MeasurementError, match=reason):
                measure(model, PROBE)
            dist.barrier()
        tracker = SinkTracker(PROBE, out / "run", every=1)
        assert tracker.step(1, refused["adapters of PEFT"]) is None
        tokens = torch.randint(models.VOCABULARY, (4, 16))
        units(models.llama())(tokens, labels=tokens).loss.backward()
        """,
    )


def cut(model: Any) -> None:
    """Half of the heads in every block: what one of two processes computes."""
    for block in model.model.layers:
        attention = block.self_attn
        for name, size in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
            projection = getattr(attention, name)
            projection.weight = nn.Parameter(projection.weight[:size])
        attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :16])


def fewer_experts(model: Any) -> None:
    for block in model.model.layers:
        experts = block.mlp.experts
        experts.num_experts = 4
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[:4])
        experts.down_proj = nn.Parameter(experts.down_proj[:4])
        block.mlp.gate.weight = nn.Parameter(block.mlp.gate.weight[:4])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cut, "block 0 .* shows 2 attention heads, by its configuration it has 4"),
        (fewer_experts, "block 0 .* shows 4 experts, by its configuration it has 8"),
        (lambda model: model.model.layers.pop(3), "shows 3 blocks, by its configuration it has 4"),
        (
            lambda model: setattr(model.config, "hidden_size", 64),
            "block 0 .* shows 32 channels, by its configuration it has 64",
        ),
    ],
)
def test_a_part_is_not_taken_for_the_whole(change: Any, reason: str) -> None:
    model = models.mixtral()
    change(model)
    with pytest.raises(MeasurementError, match=reason):
        measure(model, PROBE)


def test_heads_and_experts_may_differ_by_block() -> None:
    """Where transformers says so: in a list, or as overrides of single blocks."""
    pytest.importorskip("transformers.models.step3p7")
    from transformers.models.laguna.modeling_laguna import LagunaForCausalLM
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

    shared = models.small(head_dim=8, moe_intermediate_size=16, num_experts_per_tok=2)
    config = LagunaForCausalLM.config_class(
        **shared, num_experts=8, num_attention_heads_per_layer=[4, 2, 4, 2], pad_token_id=0
    )
    found = measure(models.build(config), PROBE)
    assert found.p0_attention.isnan().sum(-1).tolist() == [0, 2, 0, 2]
    kinds = ["full_attention", "sliding_attention"] * 2
    config = Step3p7TextConfig(
        **shared, layer_types=kinds, num_sliding_attention_heads=8, sliding_window=6
    )
    found = measure(Step3p7TextModel(config).eval(), PROBE)
    assert found.p0_attention.isnan().sum(-1).tolist() == [4, 0, 4, 0]
    assert found.model["heads"] == 8


def test_whole_models_are_not_gathered() -> None:
    for model in (models.llama(), nn.parallel.DataParallel(models.mixtral())):
        assert not is_apart(model) and not takes_every_process(model)
