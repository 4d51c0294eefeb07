"""Tiny Megatron-Core models saved as Megatron saves them, with their logits and a measurement.

Run by torchrun: ``megatron_checkpoints.py OUT LAYOUT FAMILY:KEYS...``. ``LAYOUT`` is as in
`megatron_models`; ``KEYS`` is how blocks and experts are keyed, "stacked" or "single", or "object":
stacked, with the common state where megatron-core puts it since 0.19. Writes
``OUT/FAMILY-KEYS/iter_0000010/``, ``args.pt`` and ``record.pt`` beside it and, from one process,
``logits.pt``.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import zlib
from pathlib import Path
from typing import Any

import megatron_cpu
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu

from sinktrack import Probe, measure
from tests.helpers import megatron_hybrid
from tests.helpers.megatron_models import Norm, PlainAttention, layout

VOCABULARY, PADDED, LENGTH, BLOCKS = 65, 80, 16, 4
TOKENS = torch.arange(3 * LENGTH).reshape(3, LENGTH) * 7 % VOCABULARY

PATTERN = "hybrid_layer_pattern"
BASE: dict[str, Any] = {
    "num_layers": BLOCKS, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
    "num_query_groups": 2, "kv_channels": 16, "layernorm_epsilon": 1e-6,
}  # fmt: skip
MOE: dict[str, Any] = {
    "num_moe_experts": 8, "moe_ffn_hidden_size": 16, "moe_router_topk": 2,
    "moe_token_dispatcher_type": "allgather", "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": BASE | {"kv_channels": 8},
    "qwen2": BASE | {"kv_channels": 8, "add_qkv_bias": True},
    "qwen3": BASE | {"qk_layernorm": True},
    "qwen3_moe": BASE | MOE | {"qk_layernorm": True},
    "qwen3_moe_mixed": BASE | MOE | {"qk_layernorm": True, "moe_layer_freq": [0, 1, 1, 0]},
    "mixtral": BASE | MOE | {"kv_channels": 8, "ffn_hidden_size": 16},
    "olmoe": BASE | MOE | {"kv_channels": 8, "num_query_groups": 4, "moe_router_pre_softmax": True},
    "deepseek_v3": BASE | MOE | {
        "multi_latent_attention": True, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4, "v_head_dim": 8, "qk_layernorm": True,
        "moe_layer_freq": [0, 1, 1, 1], "moe_shared_expert_intermediate_size": 32,
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 2.5, "rope_type": "yarn", "rotary_scaling_factor": 4.0,
        "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0,
        "moe_router_topk": 4, "rotary_base": 5000,
    },
}  # fmt: skip
for name in ("num_query_groups", "kv_channels"):
    del FAMILIES["deepseek_v3"][name]
TIED = ("llama", "olmoe", "gpt")
SIGMOID: dict[str, Any] = {
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 1.5,
}  # fmt: skip
PLAIN: dict[str, Any] = {"gated_linear_unit": False, "activation_func": squared_relu}
COMBINED: dict[str, dict[str, Any]] = {
    "glm4_moe": BASE | MOE | SIGMOID | {
        "qk_layernorm": True, "add_qkv_bias": True, "rotary_percent": 0.5,
        "moe_layer_freq": [0, 1, 1, 1], "moe_shared_expert_intermediate_size": 24,
        "moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2,
    },
    "gpt_oss": BASE | MOE | {
        "add_bias_linear": True, "softmax_type": "learnable", "window_size": (5, 0),
        "window_attn_skip_freq": 2, "activation_func": quick_gelu, "glu_linear_offset": 1.0,
        "activation_func_clamp_value": 0.7, "position_embedding_type": "yarn",
    },
    "nemotron": BASE | PLAIN | {"normalization": "LayerNorm", "rotary_percent": 0.5},
    "gpt": BASE | {
        "normalization": "LayerNorm", "gated_linear_unit": False, "activation_func": F.gelu,
        "bias_activation_fusion": True, "add_bias_linear": True, "num_query_groups": 4,
        "position_embedding_type": "learned_absolute",
    },
    "gated_attention": BASE | MOE | {
        "attention_output_gate": True, "softmax_type": "off-by-one", "activation_func": F.gelu,
        "window_size": (3, 0), "window_attn_skip_freq": [1, 0, 0, 1], "no_rope_freq": 2,
        "rotary_interleaved": True, "rotary_seq_len_interpolation_factor": 3,
        "moe_shared_expert_intermediate_size": 16, "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 2.0,
    },
    "plain_experts": BASE | MOE | PLAIN | {
        "normalization": "LayerNorm", "qk_layernorm": True, "add_bias_linear": True,
        "position_embedding_type": "none",
    },
}  # fmt: skip
"""What no family of transformers has."""
HYBRID: dict[str, dict[str, Any]] = {
    "hybrid": BASE | MOE | SIGMOID | {
        PATTERN: "*-*E", "qk_layernorm": True, "moe_shared_expert_intermediate_size": 24,
    },
    "hybrid_windows": BASE | PLAIN | {
        PATTERN: "-**-*-", "window_size": (3, 0), "window_attn_skip_freq": 3, "num_layers": 6,
        "normalization": "LayerNorm", "add_bias_linear": True, "add_qkv_bias": True,
        "no_rope_freq": 3, "attention_output_gate": True, "softmax_type": "off-by-one",
    },
}  # fmt: skip
"""Whose blocks are one sublayer each."""
if importlib.util.find_spec("megatron.core.models.hybrid") is not None:
    HYBRID["hybrid_delta"] = BASE | {
        PATTERN: "*-G-", "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [1, 0, 0, 0], "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "deterministic_mode": True,
    }  # fmt: skip
ROUTERS: dict[str, dict[str, Any]] = {
    "sinkhorn": BASE | MOE | {
        "moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
    },
    "gates_on_input": BASE | MOE | SIGMOID | {
        "moe_router_topk": 1, "moe_apply_probs_on_input": True,
    },
}  # fmt: skip
"""With other choices and gates."""
ROUTERS["latent_epsilon"] = FAMILIES["deepseek_v3"] | {"layernorm_epsilon": 1e-3}
YARN = {
    "yarn_rotary_scaling_factor": 8.0, "yarn_original_max_position_embeddings": 16,
    "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": False,
}  # fmt: skip


def any_combination(seed: int) -> dict[str, Any]:
    """Features that Megatron lets one combine, drawn."""
    draw = random.Random(seed).choice
    experts = draw((False, True))
    found = BASE | {
        "normalization": draw(("RMSNorm", "LayerNorm")), "add_bias_linear": draw((False, True)),
        "add_qkv_bias": draw((False, True)), "qk_layernorm": draw((False, True)),
        "attention_output_gate": draw((False, True)), "kv_channels": draw((8, 12)),
        "num_query_groups": draw((1, 2, 4)), "rotary_percent": draw((1.0, 0.5)),
        "softmax_type": draw(("vanilla", "off-by-one", "learnable")),
        "window_size": draw((None, (4, 0))), "window_attn_skip_freq": draw((None, 2, 3)),
        "position_embedding_type": draw(("rope", "rope", "learned_absolute", "none")),
        "rotary_interleaved": draw((False, True)), "no_rope_freq": draw((None, 2, [1, 0, 0, 1])),
        "gated_linear_unit": draw((True, False)),
        "activation_func": draw((F.silu, F.gelu, squared_relu, quick_gelu)),
        "glu_linear_offset": draw((0.0, 0.5)), "activation_func_clamp_value": draw((None, 0.5)),
    }  # fmt: skip
    if experts:
        found |= MOE | {
            "moe_layer_freq": draw((1, 2)), "moe_router_pre_softmax": draw((False, True)),
            "moe_router_topk": draw((1, 4)),
        }  # fmt: skip
        if draw((False, True)):
            found |= SIGMOID
        if draw((False, True)):
            found |= {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
        if draw((False, True)) and not found["add_bias_linear"]:
            found |= {"moe_shared_expert_intermediate_size": draw((8, 40))}
        if found["moe_router_topk"] == 1:
            found["moe_router_pre_softmax"] = True
    return found


FAMILIES_READ = tuple(FAMILIES)
FAMILIES |= (
    COMBINED | HYBRID | ROUTERS | {f"any_{seed}": any_combination(seed) for seed in range(6)}
)


PROBE = Probe.random(VOCABULARY, sequences=5, length=12)


TURNING = ("position_embedding_type", "rotary_percent")
"""What is said of a model beside its configuration."""
INTERPOLATED = "rotary_seq_len_interpolation_factor"


def build(family: str, sizes: dict[str, Any]) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    chosen = {
        "gated_linear_unit": True, "activation_func": F.silu, "normalization": "RMSNorm",
        "add_bias_linear": False, "bias_activation_fusion": False,
    } | FAMILIES[family]  # fmt: skip
    turning = {name: chosen.pop(name) for name in TURNING if name in chosen}
    interpolated = chosen.pop(INTERPOLATED, None)
    pattern = chosen.pop(PATTERN, None)
    latent = chosen.get("multi_latent_attention")
    config = (MLATransformerConfig if latent else TransformerConfig)(
        **chosen, use_cpu_initialization=True, attention_dropout=0.0,
        hidden_dropout=0.0, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, apply_rope_fusion=False, bias_dropout_fusion=False,
        pipeline_dtype=torch.float32, **sizes,
    )  # fmt: skip
    if turning.get("position_embedding_type") == "yarn":
        for name, value in YARN.items():
            setattr(config, name, value)
    given = {"position_embedding_type": "rope"} | turning | {
        "rotary_base": 5000, "seq_len_interpolation_factor": interpolated,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
        "share_embeddings_and_output_weights": family in TIED,
    }  # fmt: skip
    if pattern is not None:
        model, _, _, called = megatron_hybrid.classes()
        spec = megatron_hybrid.specification(config)
        return model(config, spec, PADDED, 64, **given, **{called: pattern}).eval()
    spec = get_gpt_decoder_block_spec(config, False, normalization=config.normalization)
    spec.layer_norm = Norm
    for layer in spec.layer_specs:
        parts, attention = layer.submodules, layer.submodules.self_attention
        parts.input_layernorm = parts.pre_mlp_layernorm = Norm
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if config.qk_layernorm and hasattr(attention.submodules, name):
                setattr(attention.submodules, name, Norm)
        if latent:
            attention.submodules.core_attention = PlainAttention
        if family == "olmoe":
            attention.module = whole_norm_attention()
    return GPTModel(config, spec, PADDED, 64, **given).eval()


def whole_norm_attention() -> Any:
    """OLMoE's norm of all heads at once, which Megatron-Core itself does not have."""
    from megatron.core.transformer.attention import SelfAttention

    class WholeNorm(SelfAttention):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            width = self.query_projection_size
            self.q_layernorm = Norm(self.config, width, self.config.layernorm_epsilon)
            self.k_layernorm = Norm(self.config, width, self.config.layernorm_epsilon)

        def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
            norms = self.q_layernorm, self.k_layernorm
            self.q_layernorm = self.k_layernorm = None
            q, k, v = super().get_query_key_value_tensors(*args, **kwargs)
            self.q_layernorm, self.k_layernorm = norms
            q, k = (norm(x.flatten(2)).view_as(x) for norm, x in zip(norms, (q, k), strict=True))
            return q, k, v

    return WholeNorm


def plain_attention() -> Any:
    """The local core attention takes no width of its own for keys, so not MLA's."""

    class Plain(torch.nn.Module):
        def __init__(self, *_: Any, softmax_scale: float, **__: Any) -> None:
            super().__init__()
            self.scale = softmax_scale

        def forward(self, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [s, b, h, d] -> [b, h, s, d]
            scores = q @ k.transpose(2, 3) * self.scale
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
            return out.permute(2, 0, 1, 3).flatten(2)

    return Plain


def fill(model: Any) -> None:
    """Give every parameter the same random values under every layout, by its global key."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.utils import nested_values

    for shard in nested_values(model.sharded_state_dict()):
        if isinstance(shard, ShardedTensorFactory):
            parts = [p for p in nested_values(shard.build())]
            with torch.no_grad():
                shard.data.copy_(torch.cat([_values(part) for part in parts]).view_as(shard.data))
        elif isinstance(shard, ShardedTensor):
            with torch.no_grad():
                shard.data.copy_(_values(shard))


def _values(shard: Any) -> torch.Tensor:
    """This process's part of a tensor that its key over the whole model determines."""
    generator = torch.Generator().manual_seed(zlib.crc32(shard.key.encode()))
    whole = torch.randn(shard.global_shape, generator=generator)
    sizes = (*[1] * shard.prepend_axis_num, *shard.local_shape)
    part = whole[tuple(slice(o, o + s) for o, s in zip(shard.global_offset, sizes, strict=True))]
    noise = part.reshape(shard.local_shape)
    if "norm" in shard.key:
        return 1 + 0.1 * noise
    return noise * (0.05 if "expert_bias" in shard.key else 0.2)


def arguments(model: Any, family: str) -> argparse.Namespace:
    """What Megatron-LM's command line would have parsed for this model."""
    found = {k: v for k, v in vars(model.config).items() if not callable(v)}
    function, gated = model.config.activation_func, model.config.gated_linear_unit
    flags = {(F.silu, True): "swiglu", (quick_gelu, True): "quick_geglu"}
    flags[squared_relu, False] = "squared_relu"
    flag = flags.get((function, gated), "")
    if not flag and (function, gated) != (F.gelu, False):  # Megatron Bridge can have any
        found["activation_func"] = {"_target_": f"some.module.{function.__name__}"}
    found |= {
        "num_experts": found["num_moe_experts"], "norm_epsilon": found["layernorm_epsilon"],
        "swiglu": flag == "swiglu", "padded_vocab_size": PADDED, "vocab_size": VOCABULARY,
        "untie_embeddings_and_output_weights": not model.share_embeddings_and_output_weights,
        "group_query_attention": True, "position_embedding_type": "rope", "rotary_base": 5000,
        "rotary_percent": 1.0, "max_position_embeddings": 64, "seq_length": 64,
        "consumed_train_samples": 320, "iteration": 10, "use_rope_scaling": False,
        "apply_layernorm_1p": False, "quick_geglu": flag == "quick_geglu",
        "squared_relu": flag == "squared_relu",
        "bias_gelu_fusion": model.config.bias_activation_fusion,
    }  # fmt: skip
    found |= {name: FAMILIES[family][name] for name in (*TURNING, INTERPOLATED)
              if name in FAMILIES[family]}  # fmt: skip
    if PATTERN in FAMILIES[family]:
        home = "hybrid" if megatron_hybrid.classes()[-1] == PATTERN else "mamba"
        found |= {
            megatron_hybrid.classes()[-1]: FAMILIES[family][PATTERN], "is_hybrid_model": True,
            "spec": [f"megatron.core.models.{home}.{home}_layer_specs", f"{home}_stack_spec"],
        }  # fmt: skip
    if not gated and flag != "squared_relu" and function is F.gelu:
        del found["gated_linear_unit"]
    return argparse.Namespace(**found)


def save(model: Any, family: str, out: Path, keys: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    directory = out / "iter_0000010"
    directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = model.sharded_state_dict(metadata={"singleton_local_shards": keys == "single"})
    common = {"args": arguments(model, family), "iteration": 10, "checkpoint_version": 3.0}
    older = keys == "object" and not hasattr(
        dist_checkpointing.serialization, "_legacy_common_state_exists"
    )
    if older:
        common = {
            "common_state": ShardedObject("common_state", common, (1,), (0,), dist.get_rank())
        }
    dist_checkpointing.save(state | common, str(directory))
    if dist.get_rank() == 0:
        if older:
            (directory / "common.pt").unlink()
        torch.save(arguments(model, family), out / "args.pt")
        (out / "latest_checkpointed_iteration.txt").write_text("10")


def main(out: str, text: str, *cases: str) -> None:
    sizes, changes = layout(text)
    megatron_cpu.start(**sizes)
    for case in cases:
        family, _, keys = case.partition(":")
        here = Path(out) / f"{family}-{keys}"
        model = build(family, changes)
        fill(model)
        save(model, family, here, keys)
        measured = measure([model], PROBE)
        if dist.get_rank() == 0:
            torch.save(measured.to_record(10, "callback", {}, None), here / "record.pt")
        if dist.get_world_size() == 1:
            positions = torch.arange(LENGTH).expand(len(TOKENS), LENGTH)
            mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
            with torch.no_grad():
                torch.save(model(TOKENS, positions, mask), here / "logits.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
