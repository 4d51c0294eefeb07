"""Tiny models under torchtitan's names, as releases 0.2 and 0.3 save them.

Written from the model's own state dict by a map of its own, the other way round than the scanner's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from transformers import Qwen3Config

from tests.helpers import models

RENAMED = {
    r"model\.embed_tokens\.": "tok_embeddings.",
    r"model\.norm\.": "norm.",
    r"model\.layers\.": "layers.",
    r"\.input_layernorm\.": ".attention_norm.",
    r"\.post_attention_layernorm\.": ".ffn_norm.",
    r"\.self_attn\.o_proj\.": ".attention.wo.",
    r"\.self_attn\.([qkv])_proj\.": r".attention.w\1.",
    r"\.self_attn\.([qk])_norm\.": r".attention.\1_norm.",
    r"\.mlp\.gate\.weight": ".moe.router.gate.weight",
    r"\.mlp\.experts\.down_proj$": ".moe.experts.w2",
    r"\.mlp\.(?=(gate|up|down)_proj)": ".feed_forward.",
    r"gate_proj\.": "w1.",
    r"up_proj\.": "w3.",
    r"down_proj\.": "w2.",
}
NEWER = {
    r"\.attention\.(w[qkv])\.": r".attention.qkv_linear.\1.",
    r"\.moe\.experts\.(w[13])": r".moe.routed_experts.inner_experts.\1_EFD",
    r"\.moe\.experts\.w2": ".moe.routed_experts.inner_experts.w2_EDF",
}


def weights(model: Any, *, newer: bool) -> dict[str, Tensor]:
    """The state dict of torchtitan's model with these weights."""
    config, found = model.config, {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            at = name.replace("model.", "").replace("mlp.experts.gate_up_proj", "moe.experts.")
            found[f"{at}w1"], found[f"{at}w3"] = (part.clone() for part in value.chunk(2, dim=1))
            continue
        if config.model_type == "llama" and re.search(r"[qk]_proj", name):
            width = config.head_dim
            order = [
                head * width + half * width // 2 + pair
                for head in range(len(value) // width)
                for pair in range(width // 2)
                for half in range(2)
            ]
            value = value[order]
        for pattern, new in RENAMED.items():
            name = re.sub(pattern, new, name)
        found[name] = value.clone()
    if not newer:
        return {name.replace("lm_head", "output"): value for name, value in found.items()}
    for pattern, new in NEWER.items():
        found = {re.sub(pattern, new, name): value for name, value in found.items()}
    return found


def save(state: dict[str, Tensor], directory: Path) -> None:
    """With some of what torchtitan saves beside the weights."""
    name, value = next(iter(state.items()))
    others = {
        "optimizer": {f"state.{name}.exp_avg": torch.ones_like(value)},
        "train_state": {"step": 7, "ntokens_seen": 700},
        "dataloader": {"dp_rank_0": b"position"},
    }
    save_distributed(state | others, checkpoint_id=directory, no_dist=True)


def qwen3(**changes: Any) -> Any:
    return models.build(Qwen3Config(**models.small(head_dim=16) | changes))


FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": models.llama,
    "qwen3": qwen3,
    "qwen3_moe": models.qwen3_moe,
}
