"""Tiny models of real families, with weights large enough that attention is not uniform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

VOCABULARY = 65


def build(config: Any, seed: int = 0) -> Any:
    """A model in evaluation mode whose parameters, norms included, are all random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def small(**changes: Any) -> dict[str, Any]:
    """Arguments that most configurations share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    } | changes


def mixtral(**changes: Any) -> Any:
    return build(
        MixtralConfig(
            **small(intermediate_size=16, num_local_experts=8, num_experts_per_tok=2,
                    sliding_window=None) | changes
        )
    )  # fmt: skip


def qwen3_moe(**changes: Any) -> Any:
    return build(
        Qwen3MoeConfig(
            **small(head_dim=16, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2,
                    mlp_only_layers=[1]) | changes
        )
    )  # fmt: skip


def deepseek_v3(**changes: Any) -> Any:
    return build(
        DeepseekV3Config(
            **small(num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=8,
                    num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1,
                    first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
                    qk_nope_head_dim=8, v_head_dim=8) | changes
        )
    )  # fmt: skip


def llama(**changes: Any) -> Any:
    return build(LlamaConfig(**small() | changes))


def mistral_sliding(**changes: Any) -> Any:
    from transformers import MistralConfig

    return build(MistralConfig(**small(sliding_window=6) | changes))


def gpt2(**changes: Any) -> Any:
    return build(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=128,
                   initializer_range=0.2, **changes)
    )  # fmt: skip


def gpt_neox(**changes: Any) -> Any:
    shared = small()
    shared.pop("num_key_value_heads")
    return build(GPTNeoXConfig(**shared, rotary_pct=0.25, use_parallel_residual=True, **changes))


def save_tokenizer(words: list[str], directory: Path) -> None:
    """A tokenizer of whole words, whose ids are their places; the first stands for all others."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
