"""Tiny checkpoints by torchtitan and OLMo-core themselves, with the logits of their own models.

    pip install torchtitan==0.3.0 ai2-olmo-core==3.0.0
    python scripts/foreign_checkpoints.py tests/data/checkpoints

The tests read them without either package. On a CPU experts cannot run as they are (bfloat16 in
torchtitan, Triton in OLMo-core); they are computed one by one in float32, from the same weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn import functional

VOCABULARY, HIDDEN, BLOCKS, HEADS, GROUPS = 24, 16, 3, 4, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "tie_word_embeddings": False,
}


def torchtitan_models() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Configurations of torchtitan's models, and of Hugging Face's."""
    from torchtitan.models import llama3, qwen3
    from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.moe import GroupedExperts

    def one_by_one(self: Any, tokens: Tensor, counts: Tensor) -> Tensor:
        experts = zip(self.w1_EFD, self.w2_EDF, self.w3_EFD, strict=True)
        parts = zip(tokens.split(counts.tolist()), experts, strict=True)
        return torch.cat(
            [(functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T for x, (w1, w2, w3) in parts]
        )

    GroupedExperts.forward = one_by_one

    def whole(kind: Any, layers: Any) -> Any:
        for layer in layers:
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
        return kind.Config(
            dim=HIDDEN,
            vocab_size=VOCABULARY,
            tok_embeddings=Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=HIDDEN),
            norm=RMSNorm.Config(normalized_shape=HIDDEN, eps=layers[0].ffn_norm.eps),
            lm_head=Linear.Config(in_features=HIDDEN, out_features=VOCABULARY),
            layers=layers,
        )

    shared = {"n_layers": BLOCKS, "dim": HIDDEN, "n_heads": HEADS, "n_kv_heads": GROUPS,
              "attn_backend": "flex"}  # fmt: skip
    llama = llama3._build_llama3_layers(
        **shared,
        hidden_dim=24,
        rope=ComplexRoPE.Config(dim=4, max_seq_len=64, theta=5e5, scaling="llama"),
    )
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    moe = qwen3._build_qwen3_moe_layers(
        **shared,
        head_dim=8,
        moe_hidden_dim=8,
        num_experts=4,
        top_k=2,
        moe_comm_backend="standard",
        rope=CosSinRoPE.Config(dim=8, max_seq_len=64, theta=1e6),
    )
    return {
        "llama": (
            whole(llama3.Llama3Model, llama),
            {"head_dim": 4, "intermediate_size": 24, "rms_norm_eps": 1e-5,
             "max_position_embeddings": 131072, "rope_parameters": scaled},
        ),
        "qwen3_moe": (
            whole(qwen3.Qwen3Model, moe),
            {"head_dim": 8, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2,
             "norm_topk_prob": True, "rms_norm_eps": 1e-6,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ),
    }  # fmt: skip


def olmo_core_models() -> dict[str, Any]:
    """Configurations of OLMo-core's models."""
    from olmo_core import ops
    from olmo_core.nn.attention import AttentionBackendName, SlidingWindowAttentionConfig
    from olmo_core.nn.moe.parallel_mlp import ParallelDroplessMLP
    from olmo_core.nn.transformer import TransformerConfig

    def counted(experts: Tensor, count: int) -> Tensor:
        return functional.one_hot(experts, count).sum(dim=-2)

    def one_by_one(self: Any, x: Tensor, scores: Tensor, experts: Tensor, _: Tensor) -> Tensor:
        flat, order = x.flatten(0, -2), experts.flatten().argsort(stable=True)
        rows = order // experts.shape[-1]
        counts = torch.bincount(experts.flatten(), minlength=self.mlp.num_experts)
        written = self.mlp(flat[rows], counts) * scores.flatten()[order, None]
        return torch.zeros_like(flat).index_add(0, rows, written).view_as(x)

    ops.batched_histc, ParallelDroplessMLP.forward = counted, one_by_one
    shared = {"d_model": HIDDEN, "vocab_size": VOCABULARY, "n_layers": BLOCKS, "n_heads": HEADS,
              "qk_norm": True, "rope_theta": 500000, "layer_norm_eps": 1e-6}  # fmt: skip
    windows = SlidingWindowAttentionConfig(pattern=[4, 4, -1])
    return {
        "olmo3": TransformerConfig.llama_like(
            **shared,
            n_kv_heads=GROUPS,
            block_name="reordered_norm",
            hidden_size_multiple_of=16,
            attn_backend=AttentionBackendName.torch,
            sliding_window=windows,
        ),
        "flex_olmo": TransformerConfig.llama_like_moe(
            **shared,
            num_experts=4,
            top_k=2,
            expert_hidden_size=8,
            reordered_norm=True,
            dropless=True,
        ),
    }


def randomized(model: nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            norm = parameter.ndim == 1 and len(parameter) <= HIDDEN * 2
            parameter.normal_(1.0, 0.1) if norm else parameter.normal_(0.0, 0.3)
        for name, buffer in model.named_buffers():
            if "expert" in name:
                buffer.zero_()
    return model.eval()


def write(out: Path) -> None:
    tokens = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    for name, (config, ours) in torchtitan_models().items():
        from torchtitan.components.checkpointer.base import ModelWrapper

        place, model = out / f"torchtitan-{name}", randomized(config.build())
        with torch.no_grad():
            logits = model(tokens, positions=torch.arange(12).expand(2, 12))
        state = ModelWrapper(model).state_dict() | {"train_state": {"step": 10}}
        save(state, checkpoint_id=place / "step-10", no_dist=True)
        (place / "hf").mkdir()
        (place / "hf" / "config.json").write_text(json.dumps(SIZES | ours | {"model_type": name}))
        save_file({"tokens": tokens, "logits": logits}, place / "logits.safetensors")
    for name, config in olmo_core_models().items():
        from olmo_core.distributed.checkpoint import save_model_and_optim_state

        place, model = out / f"olmo_core-{name}", randomized(config.build(init_device="cpu"))
        with torch.no_grad():
            logits = model(tokens)
        save_model_and_optim_state(place / "step10" / "model_and_optim", model)
        experiment = json.dumps({"run_name": name, "model": config.as_config_dict()})
        (place / "step10" / "config.json").write_text(experiment)
        save_file({"tokens": tokens, "logits": logits}, place / "logits.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
