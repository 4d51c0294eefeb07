"""Tiny Megatron-Core models whose weights are the same under every layout, and what runs them.

As a script, under torchrun: ``megatron_models.py OUT CASE...`` measures cases and saves what it
finds in the file OUT, on process 0.
"""

from __future__ import annotations

import re
import sys
import traceback
import zlib
from typing import Any
from unittest.mock import patch

import megatron_cpu
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sinktrack import Probe, measure
from sinktrack.metrics.localization import Projections

VOCABULARY = 64
PROBE = Probe.random(VOCABULARY, sequences=5, length=15, seed=3)

MOE: dict[str, Any] = {
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_token_dispatcher_type": "allgather",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
}
GATED: dict[str, Any] = {
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}
DEEPSEEK: dict[str, Any] = GATED | {
    **MOE,
    "moe_shared_expert_intermediate_size": 16,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 1.5,
}
MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "rope_type": "rope",
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": GATED | {"num_query_groups": 2},
    "qwen": GATED | MOE | {"num_query_groups": 2, "qk_layernorm": True},
    "deepseek": DEEPSEEK,
}
FEATURES: dict[str, dict[str, Any]] = {
    "mla": DEEPSEEK | MLA,
    "windows": GATED | {"window_size": (5, 0), "window_attn_skip_freq": 2},
    "off-by-one": GATED | {"softmax_type": "off-by-one"},
    "learnable": GATED | {"softmax_type": "learnable"},
    "gate": GATED | {"attention_output_gate": True, "num_query_groups": 2},
    "capacity": GATED | MOE | {"moe_expert_capacity_factor": 0.5},
    "biases": {"add_qkv_bias": True, "apply_query_key_layer_scaling": True,
               "attention_softmax_in_fp32": True},
    "mtp": GATED | MOE | {"mtp_num_layers": 1},
    "recomputed": DEEPSEEK | {"recompute_granularity": "selective",
                              "recompute_modules": ["core_attn", "mlp", "moe"]},
    "fully recomputed": DEEPSEEK | {"recompute_granularity": "full", "recompute_num_layers": 1,
                                    "recompute_method": "uniform"},
    "jitter": GATED | MOE | {"moe_input_jitter_eps": 0.1},
    "bf16": DEEPSEEK | {"bf16": True, "params_dtype": torch.bfloat16},
}  # fmt: skip


def config(name: str, **changes: Any) -> Any:
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    found = (MODELS | FEATURES)[name] | changes
    kind = MLATransformerConfig if found.get("multi_latent_attention") else TransformerConfig
    if "multi_latent_attention" not in found:
        found["kv_channels"] = 8
    return kind(
        **{
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 48,
            "use_cpu_initialization": True,
            "bias_dropout_fusion": False,
            "bias_activation_fusion": False,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
            "apply_rope_fusion": False,
            "pipeline_dtype": torch.float32,
            **found,
        }
    )


class Norm:
    """Megatron's torch norm, which refuses sequence parallelism for its gradients' sake."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        made = kind(hidden_size, eps=eps)
        for parameter in made.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return made


class PlainAttention(torch.nn.Module):
    """Causal attention for what the local one refuses: latent heads and context parallelism."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any
    ) -> torch.Tensor:
        from megatron.core import parallel_state as state

        size, rank = (
            state.get_context_parallel_world_size(),
            state.get_context_parallel_rank(),
        )
        keys = mine = torch.arange(len(query))
        if size > 1:
            chunks = torch.arange(len(query) * size).chunk(2 * size)
            held = [torch.cat([chunks[r], chunks[-1 - r]]) for r in range(size)]
            keys, mine = torch.cat(held), held[rank]
            gathered = []
            for tensor in (key, value):
                parts = [torch.empty_like(tensor) for _ in range(size)]
                group = state.get_context_parallel_group()
                dist.all_gather(parts, tensor.contiguous(), group=group)
                gathered.append(torch.cat(parts))
            key, value = gathered
        repeats = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(repeats, 2) for x in (key, value))
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * self.softmax_scale
        self.probabilities = scores.masked_fill(keys > mine[:, None], -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,kbhd->qbhd", self.probabilities, value)
        return mixed.flatten(2)


def on_cpu(spec: Any, settings: Any) -> None:
    """Put in norms and attention for layouts that Megatron's own ones refuse."""
    spec.layer_norm = Norm
    for layer in spec.layer_specs:
        parts = layer.submodules
        parts.input_layernorm, parts.pre_mlp_layernorm = Norm, Norm
        attention = parts.self_attention.submodules
        for name in ("q_layernorm", "k_layernorm"):
            if settings.qk_layernorm:
                setattr(attention, name, Norm)
        if settings.multi_latent_attention or settings.context_parallel_size > 1:
            attention.core_attention = PlainAttention


def build(settings: Any) -> list[Any]:
    """The chunks that this process holds, with weights that do not depend on the layout."""
    from megatron.core import parallel_state as state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )

    stages = settings.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for stage in range(stages):
        virtual = stage if stages > 1 else None
        spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, vp_stage=virtual)
        on_cpu(spec, settings)
        last = state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual)
        ahead = None
        if settings.mtp_num_layers and last:
            ahead = get_gpt_mtp_block_spec(settings, spec, use_transformer_engine=False)
        ends = {"ignore_virtual": False, "vp_stage": virtual}
        chunks.append(
            GPTModel(
                settings,
                spec,
                vocab_size=VOCABULARY,
                max_sequence_length=128,
                pre_process=state.is_pipeline_first_stage(**ends),
                post_process=state.is_pipeline_last_stage(**ends),
                position_embedding_type="learned_absolute" if settings.add_bias_linear else "rope",
                share_embeddings_and_output_weights=False,
                mtp_block_spec=ahead,
                vp_stage=virtual,
            )
        )
    for chunk in chunks:
        fill(chunk)
    return chunks


def fill(chunk: Any) -> None:
    """Give every parameter its share of a tensor that its name over the whole model determines."""
    from megatron.core import parallel_state as state

    numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
    named = [*chunk.named_parameters(), *chunk.named_buffers()]
    with torch.no_grad():
        for name, value in named:
            if not value.is_floating_point() or "tokens_per_expert" in name:
                continue
            if match := re.search(r"layers\.(\d+)\.", name):
                name = name.replace(match[0], f"layers.{numbers[int(match[1])]}.", 1)
            size, rank = (
                state.get_tensor_model_parallel_world_size(),
                state.get_tensor_model_parallel_rank(),
            )
            if match := re.search(r"local_experts\.(\d+)\.", name):
                held = chunk.config.num_moe_experts // state.get_expert_model_parallel_world_size()
                expert = int(match[1]) + held * state.get_expert_model_parallel_rank()
                name = name.replace(match[0], f"local_experts.{expert}.", 1)
                size, rank = (
                    state.get_expert_tensor_parallel_world_size(),
                    state.get_expert_tensor_parallel_rank(),
                )
            value.copy_(_share(name, value, size, rank, chunk.config))


def _share(name: str, value: Any, size: int, rank: int, settings: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    dim = value.partition_dim if getattr(value, "tensor_model_parallel", False) else None
    if "softmax_offset" in name:
        dim = 0
    shape = list(value.shape)
    if dim is not None:
        shape[dim] *= size
    whole = torch.randn(shape, generator=generator) * _scale(name)
    if value.ndim == 1 and "norm" in name and "bias" not in name:
        whole += 1
    if dim is None:
        return whole
    if "linear_fc1" in name and settings.gated_linear_unit:
        halves: torch.Tensor = whole.unflatten(0, (2, -1)).chunk(size, 1)[rank]
        return halves.flatten(0, 1)
    return whole.chunk(size, dim)[rank]


def _scale(name: str) -> float:
    """Large enough that attention is not uniform, and that the P0 state grows over the blocks."""
    if "expert_bias" in name:
        return 0.3
    return 0.6 if "linear_proj" in name else 0.3 if "weight" in name else 0.1


SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


SPLITS: dict[str, dict[str, Any]] = {
    "first3": {"num_layers_in_first_pipeline_stage": 3},
    "ends": {"account_for_embedding_in_pipeline_split": True,
             "account_for_loss_in_pipeline_split": True},
    "E|ttttL": {"pipeline_model_parallel_layout": "E|ttttL"},
    "Etttt|L": {"pipeline_model_parallel_layout": "Etttt|L"},
}  # fmt: skip
"""How blocks, the embedding and the head are spread over two stages."""


def layout(text: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Sizes for `megatron_cpu.start`, and what a configuration says of them, of ``tp2 sp ep2``."""
    words = text.split()
    sizes = {SIZES[word[:-1]]: int(word[-1]) for word in words if word[:-1] in SIZES}
    changes: dict[str, Any] = sizes | {"sequence_parallel": "sp" in words}
    for word in SPLITS.keys() & set(words):
        changes |= SPLITS[word]
    if "expert_tensor_parallel_size" not in sizes:
        sizes["expert_tensor_parallel_size"] = changes["expert_tensor_parallel_size"] = 1
    return sizes, changes


def plain(chunk: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """What the forward pass computes, read off and multiplied out by plain loops."""
    inputs: list[torch.Tensor] = []
    matrices: dict[Any, torch.Tensor] = {}
    heads: dict[Any, torch.Tensor] = {}
    experts: dict[Any, torch.Tensor] = {}
    sequences = len(tokens)
    handles = []

    def hook(module: Any, function: Any) -> None:
        handles.append(module.register_forward_hook(function, with_kwargs=True))

    for block, layer in enumerate(chunk.decoder.layers):
        attention = layer.self_attention
        core = attention.core_attention

        def enter(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            inputs.append((args[0] if args else kwargs["hidden_states"]).transpose(0, 1))
            inputs.append(output[0].transpose(0, 1))

        def softmax(_: Any, args: Any, kwargs: Any, output: Any, block: int = block) -> None:
            matrices[block] = output

        def attend(core: Any, args: Any, kwargs: Any, output: Any, block: int = block) -> None:
            matrices[block] = core.probabilities

        def project(linear: Any, args: Any, kwargs: Any, output: Any, block: int = block) -> None:
            count = chunk.config.num_attention_heads
            parts = args[0][0].unflatten(1, (count, -1)).mean(0)
            width = parts.shape[1]
            for head in range(count):
                columns = linear.weight[:, head * width : (head + 1) * width]
                heads[block, head] = columns @ parts[head]

        def route(router: Any, args: Any, kwargs: Any, output: Any, block: int = block) -> None:
            probabilities, chosen = output
            mlp = chunk.decoder.layers[block].mlp
            for b in range(sequences):
                for expert in chosen[b].nonzero()[:, 0].tolist():
                    of = mlp.experts.local_experts[expert]
                    gate, up = (of.linear_fc1.weight @ mlp.seen[0, b]).chunk(2)
                    write = of.linear_fc2.weight @ (F.silu(gate) * up) * probabilities[b, expert]
                    before = experts.get((block, expert), torch.zeros(()))
                    experts[block, expert] = before + write / sequences

        def keep(mlp: Any, args: Any, kwargs: Any) -> None:
            mlp.seen = args[0] if args else kwargs["hidden_states"]

        hook(layer, enter)
        if hasattr(core, "scale_mask_softmax"):
            hook(core.scale_mask_softmax, softmax)
        else:
            hook(core, attend)
        hook(attention.linear_proj, project)
        if hasattr(layer.mlp, "router"):
            handles.append(layer.mlp.register_forward_pre_hook(keep, with_kwargs=True))
            hook(layer.mlp.router, route)
    chunk.eval()
    with torch.no_grad():
        positions = torch.arange(tokens.shape[1]).expand(sequences, -1)
        chunk(tokens, positions, None, labels=tokens)
    for handle in handles:
        handle.remove()
    states = torch.stack([*inputs[::2], inputs[-1]]).double()
    found = {"matrices": matrices, "heads": heads, "experts": experts}
    detached = {of: {k: value.detach() for k, value in x.items()} for of, x in found.items()}
    return detached | {"states": states.detach()}


def measured(chunks: list[Any], **options: Any) -> tuple[Any, dict[Any, torch.Tensor]]:
    """A measurement and every part of every write in it, by kind, block and index.

    Phases begin lower than they do, and any block reads, so that these models have them.
    """
    leaves: dict[Any, torch.Tensor] = {}

    def spy(*args: Any) -> Any:
        leaves.update({(x.kind, x.block, x.index): x.write for x in args[3]})
        return Projections(*args)

    with (
        patch("sinktrack.metrics.localization.Projections", spy),
        patch("sinktrack.metrics.localization.READ", 0),
        patch("sinktrack.metrics.phases.EPSILON", 0.15),
        patch("sinktrack.metrics.phases.GOES_ON", 0.12),
    ):
        return measure(chunks, PROBE, **options), leaves


def main(out: str, *cases: str) -> None:
    """Each case is a model's name, a colon and a layout."""
    from megatron.core.distributed import (
        DistributedDataParallelConfig,
        TorchFullyShardedDataParallel,
    )
    from megatron.core.transformer.module import Float16Module

    results: dict[str, Any] = {}
    for case in cases:
        name, text = case.split(":")
        sizes, changes = layout(text)
        megatron_cpu.start(**sizes)
        settings = config(name, **changes)
        chunks = build(settings)
        if settings.bf16:
            chunks = [Float16Module(settings, chunk) for chunk in chunks]
        if "fsdp" in text:
            settings.transformer_impl = "local"
            how = DistributedDataParallelConfig()
            chunks = [TorchFullyShardedDataParallel(settings, how, chunk) for chunk in chunks]
        try:
            if dist.get_world_size() == 1:
                results[case] = (
                    *measured(chunks),
                    plain(getattr(chunks[0], "module", chunks[0]), PROBE.tokens),
                )
            else:
                results[case] = measured(chunks, batch_size=2)
        except Exception:
            results[case] = traceback.format_exc()
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
