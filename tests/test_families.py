"""Every family of transformers that we name: measured exactly, or refused by name.

The outcome is kept in ``docs/families.md``; ``FAMILIES=write pytest tests/test_families.py`` writes
it anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from reference import TOGETHER, check_attention, check_exact
from transformers import CONFIG_MAPPING

from sinktrack import MeasurementError, Probe, measure

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=20, seed=3)
TABLE = Path(__file__).parent.parent / "docs" / "families.md"
SHARED: dict[str, Any] = models.small(
    head_dim=8, moe_intermediate_size=16, num_experts=8, n_routed_experts=8, num_local_experts=8,
    num_experts_per_tok=2, shared_expert_intermediate_size=16, shared_intermediate_size=16,
    n_shared_experts=1, n_group=2, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
    qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, moe_num_experts=8, moe_k=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, sliding_window=6,
    intermediate_size_mlp=48, word_embed_proj_dim=32, ffn_dim=48,
)  # fmt: skip
LATENT = {"num_key_value_heads": 4}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2}
ALTERNATING = {"layer_types": ["conv", "full_attention"] * 2}
GPT = {
    "vocab_size": 65,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 48,
    "rotary_dim": 4,
    "initializer_range": 0.2,
}
FALCON = {
    "vocab_size": 65,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
EXACT: dict[str, dict[str, Any]] = {
    # mixtures of experts
    "qwen2_moe": {}, "qwen3_moe": {}, "qwen3_next": {}, "qwen3_5_moe_text": {}, "olmoe": {},
    "flex_olmo": {}, "mixtral": {}, "gpt_oss": {}, "deepseek_v2": LATENT, "glm4_moe": {},
    "granitemoe": {}, "granitemoeshared": {}, "granitemoe_swa": {}, "phimoe": {},
    "ernie4_5_moe": {}, "dots1": {}, "minimax_m2": {}, "hunyuan_v1_moe": {}, "llama4_text": {},
    "minimax_m3_vl_text": {}, "kolibri1": {}, "lfm3": {}, "glm_moe_dsa": LATENT,
    "axk1": LATENT | {"head_dim": 4}, "axk2": LATENT | {"head_dim": 4},
    "bailing_hybrid": LATENT | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "kimi_linear": LATENT | {"layer_types": ["linear_attention", "full_attention"] * 2,
                             "linear_num_heads": 2, "linear_head_dim": 8},
    "deepseek_v3": LATENT | {"head_dim": 4}, "afmoe": {}, "glm4_moe_lite": LATENT,
    "deepseek_v32": LATENT, "aria_text": {}, "cohere2_moe": {}, "exaone_moe": {}, "flint": {},
    "hy_v3": {}, "laguna": {}, "mellum": {}, "mimo_v2_flash": {}, "solar_open": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "lfm2_moe": ALTERNATING | {"num_dense_layers": 1},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "moe"],
                   "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8},
    "dbrx": {"vocab_size": 65, "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64,
             "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
             "initializer_range": 0.2},
    # dense
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {},
    "gemma3_text": {}, "gpt2": {}, "gpt_neox": {}, "opt": {}, "olmo": {}, "olmo2": {}, "olmo3": {},
    "phi": {}, "phi3": {}, "smollm3": {}, "cohere": {}, "cohere2": {}, "stablelm": {},
    "starcoder2": {}, "seed_oss": {}, "arcee": {}, "exaone4": {}, "apertus": {},
    "qwen3_5_text": {}, "hunyuan_v1_dense": {}, "ernie4_5": {}, "gpt_bigcode": {}, "helium": {},
    "granite": {}, "granite_swa": {}, "nemotron": {}, "glm": {}, "glm4": {}, "biogpt": {},
    "bitnet": {}, "cwm": {}, "gpt_neox_japanese": {}, "hyperclovax": {}, "internlm3": {},
    "jais2": {}, "ministral": {}, "ministral3": {}, "nanochat": {}, "persimmon": {},
    "vaultgemma": {}, "recurrent_gemma": {}, "olmo_hybrid": {}, "lfm2": ALTERNATING,
    "minicpm3": LATENT, "youtu": LATENT | {"head_dim": 4}, "iquestcoder": {}, "ctrl": {},
    "modernbert-decoder": {}, "phi4_multimodal": {
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
                          "num_hidden_layers": 1, "crop_size": 28, "image_size": 28},
        "audio_config": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
                         "num_blocks": 1, "ext_pw_out_channel": 16, "nemo_conv_channels": 16,
                         "depthwise_separable_out_channel": 16},
    },
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]}, "bloom": {}, "gptj": GPT, "codegen": GPT,
    "falcon": FALCON,
    "mpt": {"vocab_size": 65, "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64,
            "initializer_range": 0.2},
    "gpt_neo": {"vocab_size": 65, "hidden_size": 32, "num_layers": 4, "num_heads": 4,
                "attention_types": [[["global", "local"], 2]], "window_size": 6,
                "max_position_embeddings": 64, "initializer_range": 0.2},
}  # fmt: skip
PARTLY: dict[str, tuple[str, dict[str, Any]]] = {
    "jetmoe": ("its attention heads are routed like experts", {}),
    "openai-gpt": ("its output is not its input plus writes", {}),
    "zaya": ("is added to its residual stream", {"num_experts_per_tok": 1}),
}
"""Attention and norms are exact; what writes the P0 state cannot be told."""
SLOW = {"granitemoehybrid"}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": ("its attention was not seen", {}),
    "doge": ("attention over queries", {}),
    "xglm": ("its attention was not seen", {}),
    "diffllama": ("something is added to what its heads attend to", {}),
    "longcat_flash": ("attends more than once", LATENT | {
        "num_layers": 4, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2,
        "zero_expert_num": 2, "head_dim": 4}),
    "falcon_h1": ("FalconH1Mixer beside its attention", {
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64}),
    "inkling_text": ("learned position biases", {}),
    "deepseek_v4": ("no residual stream", {}),
    "bert": ("attention that is not causal", {}),
    "cpmant": ("attention that is not causal", {}),
    "rwkv": ("in eval mode RwkvForCausalLM divides its weights", {}),
    "hy_v4": ("no residual stream", {}),
    "hrm_text": ("runs more than once in a pass of the model", {}),
    "inkling2_text": ("learned position biases", {}),
    "zamba": ("ZambaMambaMixer beside its attention", {}),
    "zamba2": ("Zamba2MambaMixer beside its attention", {"layer_types": ["mamba", "hybrid"] * 2}),
}  # fmt: skip


def tiny(family: str, changes: dict[str, Any]) -> Any:
    """A model of the family from those of our arguments that its configuration knows."""
    config = CONFIG_MAPPING[family]
    if "vocab_size" in changes:  # its configuration has names of its own
        return models.build(config(**{k: v for k, v in changes.items() if hasattr(config(), k)}))
    known = {name: value for name, value in SHARED.items() if hasattr(config(), name)}
    if isinstance(getattr(config, "head_dim", None), property):
        known.pop("head_dim", None)
    return models.build(config(**{**known, "num_hidden_layers": 4, **changes}))


def minutes(families: Iterable[str]) -> list[Any]:
    """The same, those marked that take a minute where a kernel's package is missing."""
    return [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in families]


@pytest.mark.parametrize("family", minutes(EXACT))
def test_exact(family: str) -> None:
    check_exact(tiny(family, EXACT[family]), PROBE)


@pytest.mark.parametrize("family", PARTLY)
def test_what_can_be_had_is_exact(family: str) -> None:
    reason, changes = PARTLY[family]
    model = tiny(family, changes)
    found = measure(model, PROBE)
    for name in ("shares", "share_sum", "depth", "mlp_write_ratio"):
        assert reason in found.missing[name] and found.values[name] is None
    assert found.localization.shares == ()
    check_attention(found, model, PROBE)


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family: str) -> None:
    reason, changes = REFUSED[family]
    with pytest.raises(MeasurementError, match=rf"block \d .*{reason}"):
        measure(tiny(family, changes), PROBE)


def test_a_refused_model_keeps_its_weights() -> None:
    """In eval mode RWKV divides some of them, and notes that it did."""
    model = tiny("rwkv", {}).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MeasurementError):
        measure(model, PROBE)
    model(PROBE.tokens)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_without_softmax_attention_is_refused() -> None:
    model = tiny("jamba", {})  # of its first four blocks none attends
    with pytest.raises(MeasurementError, match="no block has softmax attention"):
        measure(model, PROBE)


def test_the_table_is_up_to_date() -> None:
    notes = dict.fromkeys(TOGETHER, "its routed experts are reported together, as one MLP")
    rows = [f"| {family} | exact | {notes.get(family, '')} |" for family in EXACT]
    rows += [f"| {family} | without shares | {reason} |" for family, (reason, _) in PARTLY.items()]
    rows += [f"| {family} | refused | {reason} |" for family, (reason, _) in REFUSED.items()]
    text = "\n".join(
        [
            "# Model families",
            "",
            "Tiny random models of each family in transformers 5.23 against the family's own",
            "eager attention (within 1e-6) and residual stream: the parts of every block make",
            "what it adds at P0, and heads and experts equal plain loops over the weights (within",
            "2e-5 of the P0 norm).",
            "Families that are not listed are measured where the same checks hold at run time, and",
            "refused by name where they do not.",
            "",
            "Vision-language models (Gemma 3, Llava, Mistral 3, Qwen2-VL, Qwen2.5-VL, Qwen3-VL and",
            "its MoE) are exact live, by their text decoder and on text alone. PaliGemma reads",
            "both ways and is refused.",
            "",
            "| family | | why |",
            "|---|---|---|",
            *sorted(rows),
            "",
        ]
    )
    if os.environ.get("FAMILIES") == "write":
        TABLE.write_text(text)
    assert TABLE.read_text() == text
