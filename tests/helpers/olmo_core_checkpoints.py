"""Tiny models as OLMo-core saves them, written from the model's own state dict.

The map is one of its own, the other way round than the scanner's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from transformers import FlexOlmoConfig

from tests.helpers import models

RENAMED = {
    r"model\.embed_tokens\.": "embeddings.",
    r"model\.norm\.": "lm_head.norm.",
    r"^lm_head\.weight": "lm_head.w_out.weight",
    r"model\.layers\.": "blocks.",
    r"\.self_attn\.o_proj\.": ".attention.w_out.",
    r"\.self_attn\.([qkv])_proj\.": r".attention.w_\1.",
    r"\.self_attn\.([qk])_norm\.": r".attention.\1_norm.",
    r"\.post_attention_layernorm\.": ".attention_norm.",
    r"\.post_feedforward_layernorm\.": ".feed_forward_norm.",
    r"\.mlp\.gate_proj\.": ".feed_forward.w1.",
    r"\.mlp\.up_proj\.": ".feed_forward.w3.",
    r"\.mlp\.down_proj\.": ".feed_forward.w2.",
    r"\.mlp\.gate\.": ".feed_forward_moe.router.",
    r"\.mlp\.experts\.": ".feed_forward_moe.experts.mlp.",
}


def weights(model: Any) -> dict[str, Tensor]:
    """The state dict of OLMo-core's model with these weights."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        for pattern, new in RENAMED.items():
            name = re.sub(pattern, new, name)
        if name.endswith("gate_up_proj"):
            for own, part in zip(("w1", "w3"), value.chunk(2, dim=1), strict=True):
                found[name.replace("gate_up_proj", own)] = part.flatten(0, 1).clone()
        elif name.endswith("mlp.down_proj"):
            columns = [expert.T for expert in value]
            found[name.replace("down_proj", "w2")] = torch.cat(columns).contiguous()
        else:
            found[name] = value.flatten() if "router" in name else value.clone()
    return found


def experiment(model: Any) -> dict[str, Any]:
    """What OLMo-core 3.0 writes of the model."""
    config = model.config
    norm = {"name": "rms", "eps": config.rms_norm_eps, "bias": False, "dtype": "float32"}
    rope = config.rope_parameters
    attention: dict[str, Any] = {
        "name": "default",
        "type": "attention",
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "bias": False,
        "rope": {
            "name": "default",
            "theta": rope.get("full_attention", rope)["rope_theta"],
            "full_precision": True,
            "no_global_rope": False,
            "partial_rotary_factor": 1.0,
        },
        "qk_norm": norm,
        "use_head_qk_norm": False,
        "scalable_softmax": False,
        "attention_sinks": False,
        "dtype": "float32",
    }
    if config.model_type == "olmo3":
        attention["backend"] = "flash_2"
        attention["sliding_window"] = {
            "pattern": [config.sliding_window] * 2 + [-1],
            "force_full_attention_on_first_layer": False,
            "force_full_attention_on_last_layer": True,
        }
    moe = config.model_type == "flex_olmo"
    block: dict[str, Any] = {
        "sequence_mixer": attention,
        "layer_norm": norm,
        "name": "moe_reordered_norm" if moe else "reordered_norm",
    }
    if moe:
        router = {
            "name": "default",
            "top_k": config.num_experts_per_tok,
            "uniform_expert_assignment": False,
            "gating_function": "softmax",
        }
        block["feed_forward_moe"] = {
            "name": "dropless",
            "num_experts": config.num_experts,
            "hidden_size": config.intermediate_size,
            "router": router | ({"normalize_expert_weights": 1.0} if config.norm_topk_prob else {}),
            "lb_loss_weight": 0.01,
            "lb_loss_granularity": "local_batch",
            "z_loss_weight": 0.001,
            "scale_loss_by_num_layers": True,
            "dtype": "float32",
        }
    else:
        block["feed_forward"] = {
            "hidden_size": config.intermediate_size,
            "name": "default",
            "bias": False,
            "activation": "silu",
        }
    return {
        "d_model": config.hidden_size,
        "vocab_size": config.vocab_size,
        "n_layers": config.num_hidden_layers,
        "block": block,
        "lm_head": {
            "name": "default",
            "layer_norm": norm,
            "bias": False,
            "loss_implementation": "default",
        },
        "name": "moe" if moe else "default",
        "dtype": "float32",
        "init_method": "normal",
        "init_seed": 0,
        "init_std": 0.02,
        "tie_word_embeddings": False,
        "_CLASS_": "olmo_core.nn.transformer.config.TransformerConfig",
    }


def save(state: dict[str, Tensor], saved: dict[str, Any] | None, directory: Path) -> None:
    """With an optimizer's state beside the weights."""
    name, value = next(iter(state.items()))
    optimizer = {f"state.{name}.exp_avg": torch.ones_like(value)}
    place = directory / "model_and_optim"
    dcp_save({"model": state, "optim": optimizer}, checkpoint_id=place, no_dist=True)
    if saved is not None:
        text = json.dumps({"run_name": "run", "model": saved, "trainer": {"max_duration": 1}})
        (directory / "config.json").write_text(text)
    (directory / ".metadata.json").write_text('{"version": "v2", "ephemeral": false}')


def flex_olmo(**changes: Any) -> Any:
    sizes = models.small(
        intermediate_size=16, num_experts=8, num_experts_per_tok=2, pad_token_id=None
    )
    return models.build(FlexOlmoConfig(**sizes | changes))
