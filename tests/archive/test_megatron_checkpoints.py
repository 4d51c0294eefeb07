"""Megatron's checkpoints, saved by Megatron-Core itself, read without it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import GPT2Config

from sinktrack import ArchiveError, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.follow import lack
from sinktrack.archive.huggingface import load
from sinktrack.archive.layouts.megatron_arguments import BEYOND, INERT, MAPPED, OFF
from sinktrack.archive.source import Checkpoint
from sinktrack.archive.source import open as open_source
from sinktrack.archive.storage import dcp, pickles
from sinktrack.archive.storage.files import Files
from sinktrack.demo import AGREEMENT, largest_difference
from sinktrack.records.run import to_json
from tests.helpers.commands import environment
from tests.helpers.paths import ROOT, SCRIPTS
from tests.helpers.reference import check_slices

pytest.importorskip("megatron.core")

from tests.helpers.megatron_checkpoints import (
    BLOCKS,
    FAMILIES,
    FAMILIES_READ,
    PADDED,
    PROBE,
    TOKENS,
    VOCABULARY,
)

SPLIT = ("qwen3_moe", "deepseek_v3", "gpt_oss", "hybrid")
TYPES = dict.fromkeys(FAMILIES, "megatron_gpt") | {name: name for name in FAMILIES_READ}
TYPES["qwen3_moe_mixed"] = "qwen3_moe"
TYPES["latent_epsilon"] = "megatron_mla"
RUNS = {  # by directory: processes, layout, how blocks and experts are keyed
    "one": (1, "", [(family, "stacked") for family in FAMILIES]),
    "keyed": (1, "", [(family, "single") for family in (*SPLIT, "plain_experts")]),
    "tensors": (2, "tp2 sp ep2", [(family, "stacked") for family in SPLIT]),
    "stages": (2, "pp2", [(family, "stacked") for family in SPLIT]),
    "objects": (2, "pp2", [("qwen3_moe", "object")]),
}
SAVED = [f"{run}/{family}-{keys}" for run, (*_, cases) in RUNS.items() for family, keys in cases]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of the runs saved."""
    out = tmp_path_factory.mktemp("megatron")
    script = ROOT / "tests/helpers/megatron_checkpoints.py"
    started = []
    for name, (processes, layout, cases) in RUNS.items():
        command = [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={processes}", str(script), str(out / name), layout,
            *map(":".join, cases),
        ]  # fmt: skip
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment() | {"OMP_NUM_THREADS": "1"},
            )
        )
    for process in started:
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text[-4000:]
    return out


def only(archive: Path, **options: Any) -> Checkpoint:
    (checkpoint,) = discover(archive, **options)
    return checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_megatron(family: str, saved: Path) -> None:
    archive = saved / "one" / f"{family}-stacked"
    checkpoint = only(archive)
    tokens = checkpoint.tokens
    if not checkpoint.files.exists("common.pt"):  # since 0.19 they are found with the weights
        tokens = vars(open_source(checkpoint))["tokens"]
    assert (checkpoint.step, tokens) == (10, 320 * 64)
    model = load(checkpoint)
    assert model.config.model_type == TYPES[family]
    assert model.config.vocab_size == VOCABULARY < PADDED
    with torch.no_grad():
        ours = model(TOKENS).logits
    theirs = torch.load(archive / "logits.pt")[..., :VOCABULARY]
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        (f"{run}/{{}}-{keys}", family)
        for run, (*_, cases) in RUNS.items()
        for family, keys in cases
        if run in ("keyed", "tensors", "stages")
    ],
)
def test_every_layout_reads_the_same(family: str, layout: str, saved: Path) -> None:
    ours = open_source(only(saved / layout.format(family)))
    plain = open_source(only(saved / "one" / f"{family}-stacked"))
    assert ours.config.to_dict() == plain.config.to_dict()
    assert ours.names() == plain.names()
    for name in plain.names():
        one, other = ours.slice(name), plain.slice(name)
        assert one.get_shape() == other.get_shape() == list(other[...].shape)
        assert one.get_dtype() == other.get_dtype() == "F32"
        assert torch.equal(one[...], other[...]), name


@pytest.mark.parametrize("family", SPLIT)
def test_parts_of_a_tensor(family: str, saved: Path) -> None:
    source = open_source(only(saved / "one" / f"{family}-stacked"))
    check_slices(source, source)


@pytest.mark.parametrize("where", SAVED)
def test_online_and_offline_agree(where: str, saved: Path, tmp_path: Path) -> None:
    """What Megatron's own model gave in the processes that saved it, against the scan."""
    online = to_json(torch.load(saved / where / "record.pt", weights_only=False))
    (offline,) = scan(saved / where, probe=PROBE, run=tmp_path)
    assert offline["model"] == online["model"] | {"type": offline["model"]["type"]}
    known = offline["model"]["type"] != "megatron_gpt"
    assert online["weights"] == offline["weights"] or (online["weights"] is None and not known)
    assert offline["weights"] is not None
    for record in (online, offline):
        del record["model"], record["weights"]
        record.pop("missing", None)  # live, total effects are
        for sink in record["sinks"]:
            sink.pop("total_effects", None)
    # Shares of a random model are up to 20 and of both signs: rounding weighs twice.
    assert largest_difference(online, offline) <= 2 * AGREEMENT


def test_the_command_needs_no_megatron(saved: Path, tmp_path: Path) -> None:
    archive = saved / "tensors" / "qwen3_moe-stacked"
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "import torch.distributed as dist\n"
        "from sinktrack.cli import main\n"
        f"sys.argv = ['sinktrack', 'scan', {str(archive)!r}, '--run', {str(tmp_path / 'run')!r}]\n"
        "try: main()\n"
        "finally: assert not dist.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 measured" in done.stderr and "seeded random tokens" in done.stderr
    record = json.loads((tmp_path / "run" / "records.jsonl").read_text())
    assert (record["step"], record["tokens"], record["source"]) == (10, 20480, "iter_0000010")
    assert record["model"]["type"] == "qwen3_moe" and record["model"]["blocks"] == BLOCKS


# What is in the way


@pytest.fixture
def archive(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "one" / "qwen3_moe-stacked", tmp_path / "archive"))


def arguments(archive: Path) -> argparse.Namespace:
    found: argparse.Namespace = torch.load(archive / "args.pt", weights_only=False)
    return found


def rewrite(archive: Path, **changes: Any) -> None:
    file = archive / "iter_0000010" / "common.pt"
    torch.save({"args": argparse.Namespace(**vars(arguments(archive)) | changes)}, file)


BOMB: list[Any] = []
for _ in range(60):  # of 2^60 elements, if anyone counts them
    BOMB = [BOMB, BOMB]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_bias_linear": True}, "has no self_attention.linear_proj.bias"),
        ({"normalization": "LayerNorm"}, "has no decoder.final_layernorm.bias"),
        ({"normalization": "L2Norm"}, "normalization='L2Norm': not read"),
        ({"position_embedding_type": "learned_absolute"}, "no embedding.position_embeddings"),
        ({"position_embedding_type": "mrope"}, "position_embedding_type='mrope': not read"),
        ({"position_embedding_type": "yarn"}, "YaRN of which yarn_rotary_scaling_factor, .* was"),
        ({"yarn_rotary_scaling_factor": 8.0}, "type='rope' with yarn_rotary_scaling_factor=8.0"),
        ({"attention_output_gate": True}, "the configuration says 192 rows"),
        ({"add_qkv_bias": True}, "has no self_attention.linear_qkv.bias"),
        ({"no_rope_freq": "2"}, "no_rope_freq='2'"),
        ({"softmax_type": "other"}, "softmax_type='other': not read"),
        ({"moe_router_score_function": "other"}, "score_function='other' is not"),
        ({"moe_router_enable_expert_bias": True}, "without a sigmoid router"),
        (
            {
                "moe_router_topk_scaling_factor": 2,
                "moe_router_group_topk": 2,
                "moe_router_num_groups": 3,
            },
            "8 experts in 3 groups",
        ),
        ({"activation_func": {"_target_": "torch.tanh"}}, "activation_func='tanh': not read"),
        (
            {
                "swiglu": False,
                "gated_linear_unit": False,
                "bias_gelu_fusion": None,
                "bias_activation_fusion": None,
            },
            "do not say whether it is exact",
        ),
        ({"swiglu": False, "gated_linear_unit": False}, "the configuration says 16 rows"),
        ({"swiglu": False, "gated_linear_unit": False, "bias_gelu_fusion": True}, "approximation"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p=True"),
        ({"rotary_percent": 1.5}, "rotary_percent=1.5"),
        ({"window_size": (127, 5)}, "window_size="),
        ({"softmax_type": "learnable"}, "no self_attention.core_attention.softmax_offset"),
        ({"moe_expert_capacity_factor": 1.5}, "moe_expert_capacity_factor=1.5"),
        ({"moe_shared_expert_intermediate_size": 16}, "no mlp.shared_experts.linear_fc1"),
        ({"qk_layernorm": False}, "holds decoder.layers.self_attention.k_layernorm.weight"),
        ({"num_layers": 5}, "the configuration has 5 blocks"),
        ({"num_experts": 9, "num_moe_experts": 9}, "the configuration says 9 rows"),
        ({"num_query_groups": 4}, "the configuration says 192 rows"),
        ({"moe_ffn_hidden_size": 12}, "the configuration says 24 rows"),
        ({"moe_layer_freq": [0, 1, 1, 1]}, "block 0 has no mlp.linear_fc1"),
        ({"hidden_size": None}, "hidden_size=None; give .* --hf-config"),
        ({"num_layers": 2**40}, "num_layers="),
        ({"num_query_groups": "2"}, "num_query_groups='2'"),
        ({"rotary_base": [1]}, "rotary_base="),
        ({"window_size": BOMB}, "window_size="),
        ({"use_mup": True}, "use_mup=True"),
        ({"mup_embedding_mult": 12.0}, "mup_embedding_mult=12.0"),
        ({"retro_add_retriever": True}, "retro_add_retriever=True"),
        ({"moe_router_force_biased": 0.1}, "moe_router_force_biased=0.1"),
        ({"moe_router_force_biased": 0.0}, "moe_router_force_biased=0.0"),
        ({"moe_mlp_glu_interleave_size": 32}, "moe_mlp_glu_interleave_size=32"),
        ({"enable_mhc_connections": True}, "enable_mhc_connections=True"),
        ({"hybrid_layer_pattern": "*-M-"}, "M .Mamba's mixer. is not computed here; measure it li"),
        ({"hybrid_override_pattern": "*+"}, "[+] .latent attention. is not computed here; measure"),
        ({"experimental_attention_variant": "gated_delta_net"}, "variant='gated_delta_net'"),
        ({"linear_attention_freq": 2}, "linear_attention_freq=2"),
        ({"hybrid_layer_pattern": "*-*D"}, "D .DSA. is not computed here; measure it live"),
        ({"hybrid_layer_pattern": "*?"}, "[?] .unknown. is not computed here"),
        ({"hybrid_layer_pattern": "|/*"}, "say hybrid_layer_pattern='|/[*]'"),
        ({"hybrid_layer_pattern": 7}, "say hybrid_layer_pattern=7"),
        ({"hybrid_layer_pattern": "*-*E"}, "no decoder.final_norm.weight"),
        ({"is_hybrid_model": True}, "hybrid one whose pattern was not saved"),
        ({"hybrid_attention_ratio": 0.1}, "hybrid one whose pattern was not saved"),
        ({"spec": ["mine", "spec"]}, "spec="),
        ({"spec": ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]}, "spec="),
        ({"spec": []}, "spec="),
        ({"moe_router_load_balancing_type": "quantile_balancing"}, "no mlp.router.qb_beta"),
        ({"moe_router_load_balancing_type": "other"}, "balances by 'other'"),
        ({"moe_router_load_balancing_type": ["aux_loss", "other"]}, "balances by 'other'"),
        ({"moe_router_load_balancing_type": ["sinkhorn"]}, "balances by 'sinkhorn'"),
        ({"moe_router_load_balancing_type": BOMB}, "balances by "),
        ({"attention_of_tomorrow": True}, "hold 'attention_of_tomorrow': True, which is not known"),
        ({"scale_of_tomorrow": 1.0}, "hold 'scale_of_tomorrow': 1.0, which is not known here"),
    ],
)
def test_another_architecture_is_refused(
    changes: dict[str, Any], message: str, archive: Path
) -> None:
    rewrite(archive, **changes)
    with pytest.raises(ArchiveError, match=message):
        open_source(only(archive))


def test_arguments_of_tomorrow_that_are_off(archive: Path, tmp_path: Path) -> None:
    config = open_source(only(archive)).config
    off: dict[str, Any] = {
        "one_of_tomorrow": None,
        "another": False,
        "third": [],
        "_private": 1,
        "fourth": "",
    }
    rewrite(archive, **off)
    assert open_source(only(archive)).config.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path / "hf")
    rewrite(archive, our_own_option=7)
    with pytest.raises(ArchiveError, match="our_own_option.* with --hf-config"):
        open_source(only(archive))
    assert open_source(only(archive, hf_config=tmp_path / "hf")).config.num_hidden_layers == BLOCKS
    rewrite(archive, use_mup=True)
    with pytest.raises(ArchiveError, match="use_mup"):
        open_source(only(archive, hf_config=tmp_path / "hf"))


def test_arguments_of_megatron_lm_that_change_nothing(archive: Path) -> None:
    """Of core 0.16, which no package has, and of ModelOpt, which adds its own where installed."""
    config = open_source(only(archive)).config
    rewrite(
        archive,
        **{
            "inference_max_batch_size": 8, "enable_gloo_process_groups": True,
            "langrl_inference_server_type": "inplace_megatron", "disable_chunked_prefill": True,
            "hybrid_attention_ratio": 0.0, "hybrid_mlp_ratio": 0.0, "retro_attention_gate": 1,
            "export_model_type": "GPTModel", "export_kv_cache_quant": "none",
            "export_real_quant_cfg": "None", "export_num_medusa_heads": 0,
            "finetune_data_split": "train", "kitchen_recipe_number": None,
        },
    )  # fmt: skip
    assert open_source(only(archive)).config.to_dict() == config.to_dict()
    rewrite(archive, kitchen_recipe_number=3)
    with pytest.raises(ArchiveError, match="kitchen_recipe_number=3"):
        open_source(only(archive))


def test_every_argument_of_this_megatron_is_known() -> None:
    """Each is mapped, refused or inert: what a new version adds fails here first."""
    from megatron.core.transformer import MLATransformerConfig

    kinds = (MAPPED, INERT, OFF.keys(), BEYOND.keys())
    known = MAPPED | INERT | OFF.keys() | BEYOND.keys()
    assert len(known) == sum(map(len, kinds))
    names = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    if importlib.util.find_spec("megatron.training") is not None:  # since 0.17 in the package
        from megatron.training.arguments import add_megatron_arguments

        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        names |= {action.dest for action in parser._actions if action.dest != "help"}
    assert {name for name in names if not name.startswith("_")} <= known


LATENT = "deepseek_v3"


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmoe", {"moe_router_load_balancing_type": "sinkhorn"}, "type='sinkhorn' and norms over"),
        (LATENT, {"moe_router_load_balancing_type": "sinkhorn"}, "type='sinkhorn' and latent att"),
        (LATENT, {"moe_apply_probs_on_input": True}, "probs_on_input=True and latent attention"),
        (
            "hybrid",
            {"hybrid_layer_pattern": "*-**"},
            "block 3 has no self_attention.linear_qkv.layer",
        ),
        ("hybrid", {"hybrid_layer_pattern": "*-*"}, "holds decoder.layers.3.mlp.experts.experts.l"),
        ("hybrid", {"hybrid_layer_pattern": "*-*EE"}, "block 4 has no"),
        ("hybrid", {"hybrid_layer_pattern": "*-*-"}, "block 3 has no mlp.linear_fc1"),
        ("hybrid", {"hybrid_layer_pattern": "+-+E"}, r"[+] .latent attention. is not computed"),
        (
            "hybrid",
            {"experimental_attention_variant": "dsa"},
            "experimental_attention_variant='dsa'",
        ),
        ("hybrid", {"qk_l2_norm": True}, "hybrid model with qk_l2_norm=True"),
        ("hybrid", {"spec": ["mine", "hybrid_stack_spec"]}, r"spec=\['mine', 'hybrid_stack_spec'"),
        ("qwen3_moe", {"moe_layer_freq": "2"}, "moe_layer_freq='2'"),
        ("mixtral", {"moe_layer_freq": 2}, "block 1 has no mlp.linear_fc1"),
        ("olmoe", {"moe_layer_freq": 2}, r"blocks \[1, 3\] have none"),
        ("olmoe", {"window_size": (5, 0)}, r"window_size=\(5, 0\) and norms over all queries"),
        ("olmoe", {"moe_router_topk_scaling_factor": 2.0}, "olmoe has no moe_router_topk_scaling"),
        (LATENT, {"add_bias_linear": True}, "add_bias_linear=True and latent attention"),
        (LATENT, {"rotary_percent": 0.5}, "rotary_percent=0.5 and latent attention"),
        ("olmoe", {"kv_channels": 4}, "heads of width 4; OLMoE has"),
        ("olmoe", {"num_experts": None, "num_moe_experts": None}, "without experts: unknown"),
        (LATENT, {"moe_router_score_function": "softmax"}, "only DeepSeek-V3, which has 'sigmoid'"),
        (LATENT, {"num_experts": None, "num_moe_experts": None}, "attention without experts: not"),
        (LATENT, {"moe_layer_freq": [1, 0, 1, 1]}, r"come first; here they are \[1\]"),
        (LATENT, {"moe_router_group_topk": 2, "moe_router_topk": 2}, "by 1 scores each, by 2"),
        (LATENT, {"moe_shared_expert_intermediate_size": 7}, "shared experts of width 7"),
        (LATENT, {"moe_router_topk": 1, "moe_router_group_topk": None}, "here one is chosen"),
        (LATENT, {"rope_type": "linear"}, "rope_type='linear'"),
        (LATENT, {"rope_type": "yarn", "mscale": 2.0, "mscale_all_dim": 0.0}, "mscale=2.0 and no"),
        (LATENT, {"q_lora_rank": None}, "no self_attention.linear_q_proj.weight"),
    ],
)
def test_what_a_family_does_not_have_is_refused(
    family: str, changes: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    archive = Path(shutil.copytree(saved / "one" / f"{family}-stacked", tmp_path / "archive"))
    rewrite(archive, **changes)
    with pytest.raises(ArchiveError, match=message):
        open_source(only(archive))


def test_latent_attention_without_yarn(saved: Path, tmp_path: Path) -> None:
    archive = Path(shutil.copytree(saved / "one" / f"{LATENT}-stacked", tmp_path / "archive"))
    rewrite(archive, rope_type="rope", mscale_all_dim=0.0)
    found = open_source(only(archive)).config.rope_parameters
    assert found == {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moe_router_pre_softmax": True}, {"norm_topk_prob": False}),
        ({"rotary_base": 70000}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}),
        ({"vocab_size": None}, {"vocab_size": PADDED}),
        ({"tokenizer_type": "NullTokenizer"}, {"vocab_size": VOCABULARY + 1}),
        ({"norm_epsilon": 1e-5}, {"rms_norm_eps": 1e-5}),
        (
            {"rotary_percent": 0.5, "num_experts": 8},
            {"model_type": "megatron_gpt", "num_experts_per_tok": 2},
        ),
        ({"moe_router_score_function": "sigmoid"}, {"score": "sigmoid", "score_bias": False}),
        (
            {"window_size": [127, 0]},
            {"sliding_window": 128, "layer_types": ["sliding_attention"] * 4},
        ),
        ({"window_size": [-1, 0]}, {"model_type": "megatron_gpt", "sliding_window": None}),
    ],
)
def test_arguments_reach_the_configuration(
    changes: dict[str, Any], expected: dict[str, Any], archive: Path
) -> None:
    rewrite(archive, **changes)
    config = open_source(only(archive)).config
    assert {name: getattr(config, name) for name in expected} == expected


def test_rope_scaling_of_llama_3(saved: Path, tmp_path: Path) -> None:
    archive = Path(shutil.copytree(saved / "one" / "llama-stacked", tmp_path / "archive"))
    rewrite(archive, use_rope_scaling=True, rope_scaling_factor=32.0)
    found = open_source(only(archive)).config.rope_parameters
    assert found == {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip


def test_what_megatron_lm_leaves_to_defaults(saved: Path, tmp_path: Path) -> None:
    """YaRN is what latent attention takes by default; part of it is not among the arguments."""
    archive = Path(shutil.copytree(saved / "one" / "deepseek_v3-stacked", tmp_path / "archive"))
    original = open_source(only(archive)).config
    original.save_pretrained(tmp_path / "hf")
    rewrite(archive, rope_type=None)
    assert open_source(only(archive)).config.rope_parameters == original.rope_parameters
    rewrite(archive, rope_type=None, original_max_position_embeddings=None)
    with pytest.raises(ArchiveError, match="original_max_position_embeddings was not saved; give"):
        open_source(only(archive))
    source = open_source(only(archive, hf_config=tmp_path / "hf"))
    assert source.config.rope_parameters == original.rope_parameters
    (here,) = archive.glob("iter_*")
    shutil.copytree(tmp_path / "hf", here / "hf")  # as Megatron Bridge saves both
    assert open_source(only(archive)).config.rope_parameters == original.rope_parameters
    damaged = json.loads((here / "hf" / "config.json").read_text()) | {"num_hidden_layers": 9}
    (here / "hf" / "config.json").write_text(json.dumps(damaged))
    with pytest.raises(ArchiveError, match="num_hidden_layers is 9 there"):
        open_source(only(archive))
    rewrite(archive, of_tomorrow=3)
    with pytest.raises(ArchiveError, match="hold 'of_tomorrow': 3, which is not known here"):
        open_source(only(archive))


def test_megatron_bridge(archive: Path, saved: Path) -> None:
    """Its configuration is of other names, and tokens are counted in a file of their own."""
    here = archive / "iter_0000010"
    model: dict[str, Any] = {
        name: value
        for name, value in vars(arguments(archive)).items()
        if isinstance(value, int | float | str | list | None)
        and name not in ("num_experts", "norm_epsilon", "swiglu", "padded_vocab_size")
        and not name.startswith(("untie", "group_query", "consumed"))
    }
    model |= {
        "_target_": "megatron.bridge.models.qwen.qwen_provider.Qwen3MoEModelProvider",
        "share_embeddings_and_output_weights": False,
        "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
        "params_dtype": {"_call_": False, "_target_": "torch.bfloat16"},
    }
    (here / "run_config.yaml").write_text(yaml.safe_dump({"model": model, "train": {}}))
    torch.save({"iteration": 10}, here / "common.pt")
    state = {
        "step": torch.tensor(10),
        "consumed_train_samples": torch.tensor(77, dtype=torch.int32),
    }
    torch.save(state, here / "train_state.pt")
    checkpoint = only(archive)
    assert checkpoint.tokens == 77 * 64
    ours = open_source(checkpoint)
    theirs = open_source(only(saved / "one" / "qwen3_moe-stacked"))
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.names() == theirs.names()


def test_a_configuration_given_by_hand(archive: Path, tmp_path: Path) -> None:
    config = open_source(only(archive)).config
    config.save_pretrained(tmp_path / "hf")
    assert open_source(only(archive, hf_config=tmp_path / "hf")).config.vocab_size == VOCABULARY

    config.rope_parameters["rope_theta"] = 10000.0
    config.save_pretrained(tmp_path / "other")
    with pytest.raises(ArchiveError, match="rope_theta is 10000.0 there, .* say 5000.0"):
        open_source(only(archive, hf_config=tmp_path / "other"))

    config.vocab_size = PADDED + 1
    config.save_pretrained(tmp_path / "larger")
    with pytest.raises(ArchiveError, match=f"vocab_size {PADDED + 1}, .* of {PADDED} rows"):
        open_source(only(archive, hf_config=tmp_path / "larger"))
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ArchiveError, match="given is of gpt2; Megatron .* read as llama"):
        open_source(only(archive, hf_config=tmp_path / "gpt2"))

    torch.save({"iteration": 10}, archive / "iter_0000010" / "common.pt")
    with pytest.raises(ArchiveError, match="holds arguments; give the .* --hf-config"):
        open_source(only(archive))
    source = open_source(only(archive, hf_config=tmp_path / "hf"))
    assert source.slice("model.norm.weight")[...].shape == (32,)


def test_other_formats_are_refused(archive: Path) -> None:
    here = archive / "iter_0000010"
    (here / "metadata.json").rename(archive / "kept")
    with pytest.raises(ArchiveError, match="fsdp_dtensor.* --ckpt-format torch_dist"):
        open_source(only(archive))
    (here / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    (here / ".metadata").unlink()
    with pytest.raises(ArchiveError, match="'zarr', .* --ckpt-format torch_dist"):
        open_source(only(archive))
    shutil.rmtree(here)
    (here / "mp_rank_00").mkdir(parents=True)
    (here / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"")
    with pytest.raises(ArchiveError, match="legacy.* --ckpt-format torch_dist"):
        open_source(only(archive))


def test_what_is_still_being_written_is_left(archive: Path) -> None:
    shutil.copytree(archive / "iter_0000010", archive / "iter_0000020")
    (archive / "iter_0000020" / "metadata.json").unlink()
    (archive / "iter_0000020" / ".metadata").unlink()
    whole, last = discover(archive)
    assert (whole.step, whole.reason, last.step) == (10, None, 20)
    assert "without .metadata, which is written last" in str(last.reason)


def test_what_is_still_being_copied_is_left(archive: Path) -> None:
    file = sorted((archive / "iter_0000010").glob("*.distcp"))[-1]
    assert not lack(only(archive))
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    assert lack(only(archive))
    with pytest.raises(ArchiveError, match=f"{file.name} is truncated"):
        load(only(archive))
    file.unlink()
    assert lack(only(archive))


def test_names_of_transformer_engine(saved: Path, tmp_path: Path) -> None:
    """It keeps other norms with the linear layer behind them than Megatron's own layers do."""
    renamed = {
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        "self_attention.q_layernorm": "self_attention.linear_q_up_proj.layer_norm",
        "self_attention.kv_layernorm": "self_attention.linear_kv_up_proj.layer_norm",
    }
    for family, names in (
        ("qwen3_moe", list(renamed)[:1]),
        ("deepseek_v3", list(renamed)[1:]),
    ):
        archive = Path(shutil.copytree(saved / "one" / f"{family}-stacked", tmp_path / family))
        file = archive / "iter_0000010" / ".metadata"
        metadata = pickle.loads(file.read_bytes())

        def rename(name: str, names: list[str] = names) -> str:
            for old in names:
                new = renamed[old]
                name = name.replace(f"{old}.weight", f"{new}_weight").replace(old, new)
            return name

        metadata.state_dict_metadata = {
            rename(name): value for name, value in metadata.state_dict_metadata.items()
        }
        metadata.storage_data = {
            dataclasses.replace(index, fqn=rename(index.fqn)): value
            for index, value in metadata.storage_data.items()
        }
        file.write_bytes(pickle.dumps(metadata))
        ours = open_source(only(archive))
        theirs = open_source(only(saved / "one" / f"{family}-stacked"))
        assert ours.names() == theirs.names()
        stored = dcp.read_metadata(file.read_bytes(), "")
        assert any(renamed[name] in key for name in names for key in stored)
        for name in theirs.names():
            assert torch.equal(ours.slice(name)[...], theirs.slice(name)[...])


@pytest.mark.slow
def test_trained_saved_and_scanned(tmp_path: Path) -> None:
    """The script of the documentation, cut short."""
    script = SCRIPTS / "megatron_tiny_moe.py"
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "out"), "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 checkpoints scanned; online and offline agree to" in done.stdout
    assert (tmp_path / "out" / "report.html").exists()


# Untrusted input


class Evil:
    def __init__(self, path: Path, call: Any = os.system) -> None:
        self.path, self.call = path, call

    def __reduce__(self) -> Any:
        return self.call, (f"touch {self.path}",)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "train_state.pt", "__0_0.distcp"])
def test_nothing_is_executed(name: str, archive: Path, tmp_path: Path) -> None:
    here, trace = archive / "iter_0000010", tmp_path / "trace"
    evil = Evil(trace)
    if name == ".metadata":
        (here / name).write_bytes(pickle.dumps(evil))
    elif name == "__0_0.distcp":  # every chunk of the file becomes such a pickle
        stored = dcp.read_metadata((here / ".metadata").read_bytes(), "")
        torch.save(evil, tmp_path / "evil")
        bad = (tmp_path / "evil").read_bytes()
        data = bytearray((here / name).read_bytes())
        for tensor in stored.values():
            for chunk in tensor.chunks:
                if chunk.file == name and chunk.length >= len(bad):
                    end = chunk.start + chunk.length
                    data[chunk.start : end] = b"\0" * (chunk.length - len(bad)) + bad
        (here / name).write_bytes(data)
    else:
        torch.save({"args": evil, "consumed_train_samples": evil}, here / name)
    with pytest.raises(ArchiveError, match="system" if name != "train_state.pt" else None) as error:
        source = open_source(only(archive))
        for wanted in source.names():
            source.slice(wanted)[...]
        assert only(archive).tokens is None
        raise ArchiveError("never read")
    assert not trace.exists()
    assert name == "train_state.pt" or "was not imported" in str(error.value)


@pytest.fixture
def inside(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint of megatron-core 0.19: no common.pt."""
    archive = Path(shutil.copytree(saved / "objects" / "qwen3_moe-object", tmp_path / "inside"))
    assert not (archive / "iter_0000010" / "common.pt").exists()
    return archive


def place(archive: Path) -> tuple[Any, Any, Path]:
    """The metadata, where they say that the common state lies, and that file."""
    here = archive / "iter_0000010"
    metadata = pickle.loads((here / ".metadata").read_bytes())
    info = next(
        value for index, value in metadata.storage_data.items() if "common_state" in index.fqn
    )
    return metadata, info, here / info.relative_path


def test_the_common_state_among_the_tensors(inside: Path, saved: Path, tmp_path: Path) -> None:
    ours = open_source(only(inside))
    theirs = open_source(only(saved / "one" / "qwen3_moe-stacked"))
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.names() == theirs.names()
    for causal in (False, True):
        (record,) = scan(inside, probe=PROBE, run=tmp_path / f"run-{causal}", causal=causal)
        assert record["tokens"] == 320 * 64


def test_a_common_state_that_is_not_data(inside: Path, tmp_path: Path) -> None:
    _, info, file = place(inside)
    trace, data = tmp_path / "trace", bytearray(file.read_bytes())
    torch.save([{"args": Evil(trace)}], tmp_path / "evil")
    bad = (tmp_path / "evil").read_bytes().ljust(info.length, b"\0")
    data[info.offset : info.offset + info.length] = bad
    file.write_bytes(data)
    with pytest.raises(ArchiveError, match="system, which .* was not imported"):
        open_source(only(inside))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 2**40}, "common_state is said to take 1099511627776 bytes"),
        ({"offset": 2**40}, "is truncated; copy it again"),
        ({"offset": 0}, "holds arguments|damaged|imports"),
        ({"length": 0}, "damaged"),
        ({"relative_path": "../../secret"}, "no file of the checkpoint"),
        ({"relative_path": "absent.distcp"}, "absent.distcp"),
        ({"transform_descriptors": ["zstd"]}, "stored compressed"),
    ],
)
def test_a_common_state_that_is_somewhere_else(
    changes: dict[str, Any], message: str, inside: Path
) -> None:
    metadata, info, _ = place(inside)
    for name, value in changes.items():
        setattr(info, name, value)
    (inside / "iter_0000010" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ArchiveError, match=message):
        open_source(only(inside))


def test_a_common_state_that_is_cut_short(inside: Path) -> None:
    _, info, file = place(inside)
    file.write_bytes(file.read_bytes()[: info.offset + info.length - 1])
    with pytest.raises(ArchiveError, match="is truncated; copy it again"):
        open_source(only(inside))
    assert lack(only(inside))


def test_pickles_that_exhaust_memory_or_stack() -> None:
    deep = b"\x80\x04)" + b"\x85" * 300_000 + b"."
    as_key = b"\x80\x04}" + b")" + b"\x85" * 300_000 + b"K\x01s."
    for data in (
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a memo of 2^31 entries
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.",  # a bytearray of 2^48 bytes
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\x00\x00.",  # a string of 2^48 bytes
        as_key,
    ):
        try:
            assert pickles.load(data, {}, "file") is None
        except ArchiveError as error:
            assert str(error).startswith("file is damaged")
    assert pickles.load(deep, {}, "file") is not None


@pytest.mark.parametrize(
    "data",
    [
        b"cbuiltins\neval\n.",
        b"cbuiltins\ngetattr\n.",
        b"\x80\x04\x8c\x08torch.hub\x94\x8c\x04load\x94\x93.",
        b"ctorch\nload\n.",
        b"(S'ls'\nios\nsystem\n.",
        b"\x80\x04cnumpy\nload\n.",
    ],
)
def test_names_that_are_not_admitted(data: bytes) -> None:
    with pytest.raises(ArchiveError, match="imports|damaged"):
        pickles.load(data, pickles.dtypes(), "file")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_metadata(saved: Path, data: st.DataObject) -> None:
    good = (saved / "one" / "mixtral-stacked" / "iter_0000010" / ".metadata").read_bytes()
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 6))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    bad = bad[: data.draw(st.integers(0, len(bad)))] if data.draw(st.booleans()) else bad
    try:
        found = dcp.read_metadata(bytes(bad), "file")
    except ArchiveError:
        return
    for tensor in found.values():
        assert all("/" not in chunk.file for chunk in tensor.chunks)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_chunks(saved: Path, data: st.DataObject) -> None:
    """What is read from a damaged file is an error, or a tensor of the right shape."""
    here = saved / "one" / "mixtral-stacked" / "iter_0000010"
    stored = dcp.read_metadata((here / ".metadata").read_bytes(), "")
    tensor = stored[data.draw(st.sampled_from(sorted(stored)))]

    def fetch(file: str, start: int, length: int) -> bytes:
        with (here / file).open("rb") as opened:
            opened.seek(start)
            got = bytearray(opened.read(length))
        for _ in range(data.draw(st.integers(0, 3))):
            got[data.draw(st.integers(0, len(got) - 1))] = data.draw(st.integers(0, 255))
        return bytes(got)

    try:
        found = dcp.read(tensor, fetch, (0,) if len(tensor.shape) > 2 else ())
    except ArchiveError:
        return
    assert tuple(found.shape) == tensor.shape[1 if len(tensor.shape) > 2 else 0 :]


# torch.distributed.checkpoint as torch itself writes it


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    weights = {name: torch.randn(4, 4096, 64).to(kind) for name, kind in
               (("float", torch.float32), ("bf16", torch.bfloat16))}  # fmt: skip
    save(weights, checkpoint_id=tmp_path, no_dist=True)
    stored = dcp.read_metadata((tmp_path / ".metadata").read_bytes(), ".metadata")
    files = Files(tmp_path)

    def fetch(file: str, start: int, length: int) -> memoryview:
        return files.read(file, start, start + length)

    for name, weight in weights.items():
        before = files.bytes_read
        rows = dcp.read(stored[name], fetch, (2,), [(100, 200), (4000, 4096)])
        wanted = torch.cat([weight[2, 100:200], weight[2, 4000:]])
        assert torch.equal(rows, wanted)
        assert files.bytes_read - before < wanted.nbytes + 5 * 4096
        assert torch.equal(dcp.read(stored[name], fetch), weight)
        before = files.bytes_read  # one row, as of one expert where a chunk holds several
        assert torch.equal(dcp.read(stored[name], fetch, (2, 100)), weight[2, 100])
        assert files.bytes_read - before < 3 * 4096


def test_a_chunk_that_is_missing_or_lies(archive: Path) -> None:
    file = archive / "iter_0000010" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    name = "decoder.layers.self_attention.linear_qkv.weight"
    part = metadata.state_dict_metadata[name]

    def broken(change: Any) -> str:
        copy = pickle.loads(pickle.dumps(metadata))
        change(copy)
        file.write_bytes(pickle.dumps(copy))
        with pytest.raises(ArchiveError) as error:
            open_source(only(archive)).slice("model.layers.1.self_attn.q_proj.weight")[...]
        return str(error.value)

    index = next(i for i in metadata.storage_data if i.fqn == name and i.offset[0] == 1)
    assert "not whole" in broken(lambda m: m.state_dict_metadata[name].chunks.pop(1))
    assert "KeyError" in broken(lambda m: m.storage_data.pop(index))
    for field, value, message in (
        ("relative_path", "../../secret", "no file of the checkpoint"),
        ("length", 16, "fewer bytes than its values"),
        ("length", 2**40, "truncated"),
        ("offset", 2**40, "truncated"),
        ("offset", 0, "damaged|holds"),
        ("transform_descriptors", ["zstd"], "compressed"),
    ):
        import re

        said = broken(lambda m, f=field, v=value: setattr(m.storage_data[index], f, v))
        assert re.search(message, said), said
    assert part.size[0] == BLOCKS


def test_an_offset_that_would_take_forever_to_hash(archive: Path) -> None:
    file = archive / "iter_0000010" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    object.__setattr__(next(iter(metadata.storage_data)), "offset", nested)
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ArchiveError, match="where sizes were expected"):
        open_source(only(archive))


def test_links_out_of_the_archive_are_not_followed(archive: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    file = archive / "iter_0000010" / "__0_0.distcp"
    file.rename(secret)
    file.symlink_to(secret)
    with pytest.raises(ArchiveError, match="leads out of"):
        load(only(archive))


def test_hugging_face_directories_take_a_configuration_too(tmp_path: Path) -> None:
    from tests.helpers import models

    model = models.llama()
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "weights").mkdir()
    save_file(
        {k: v.clone() for k, v in model.state_dict().items()},
        tmp_path / "weights" / "model.safetensors",
        {"format": "pt"},
    )
    source = open_source(only(tmp_path / "weights", hf_config=tmp_path / "hf"))
    assert source.config.model_type == "llama"
