"""A tiny model of every family of transformers that is measured exactly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

from sinktrack import Probe
from tests.helpers import models

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=20, seed=3)


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
    "sarvam_moe": {}, "sarvam_mla": LATENT | {"head_dim": 4},
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
    "apertus1p5_text": {}, "exaone": {}, "lara_mini": {},
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


SLOW = {"granitemoehybrid"}
OTHERWISE = {
    "aria_text", "dbrx", "doge", "glm4_moe_lite", "granitemoe", "granitemoeshared",
    "recurrent_gemma",
}  # fmt: skip
"""Families whose code in transformers 5.12.1 is not that of 5.23: experts in one call, a forward
that fails at these sizes, attention of their own."""


def tiny(family: str, changes: dict[str, Any]) -> Any:
    """A model of the family from those of our arguments that its configuration knows."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    if family in OTHERWISE and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(f"an older transformers builds {family} otherwise; the outcomes are of 5.23")
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
