"""Megatron's GPT as a model of transformers, for what no family there computes.

It has what Megatron lets one combine: biases, LayerNorm, activations, learned positions, partial,
interleaved or absent rotary embeddings, windows by block, sink logits, gated attention, and every
router with shared experts, in whole blocks or as a hybrid model's sublayers, gated delta nets among
them. Only the forward pass of a probe: no cache, no padding, no training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM

TYPE = "megatron_gpt"
MLA = "megatron_mla"


class MegatronGptConfig(PreTrainedConfig):  # type: ignore[misc]
    """What a `MegatronGptForCausalLM` computes."""

    model_type = TYPE

    vocab_size: int = 1
    hidden_size: int = 1
    intermediate_size: int = 1
    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    num_key_value_heads: int = 1
    head_dim: int = 1
    max_position_embeddings: int = 1
    tie_word_embeddings: bool = False
    norm: str = "RMSNorm"
    norm_eps: float = 1e-5
    hidden_act: str = "silu"
    gated: bool = True
    """Are the MLPs gated?"""
    gate_offset: float = 0.0
    """Added to what the gate is multiplied with."""
    clamp: float | None = None
    """The gate's upper limit before its activation, and both limits of what it is multiplied
    with."""
    linear_bias: bool = False
    qkv_bias: bool = False
    qk_norm: str | None = None
    """``norm``, ``l2`` (without weights) or None."""
    attention_gate: bool = False
    sinks: str | None = None
    """``learned``, ``zero`` or None: a logit per head that takes part in the softmax."""
    positions: str = "rope"
    """``rope``, ``learned`` or ``none``."""
    rope_parameters: dict[str, Any] | None = None
    rotary_interleaved: bool = False
    position_factor: float = 1.0
    """What positions are divided by."""
    no_rope_layers: list[int] | None = None
    """Blocks without rotary embeddings."""
    sliding_window: int | None = None
    """Keys that a query sees, its own included."""
    layer_types: list[str] | None = None
    sublayers: list[str] | None = None
    """Of a hybrid model: each block is an ``attention``, a ``delta_net`` or an ``mlp`` alone."""
    linear_conv_kernel_dim: int = 1
    linear_key_head_dim: int = 1
    linear_value_head_dim: int = 1
    linear_num_key_heads: int = 1
    linear_num_value_heads: int = 1
    num_local_experts: int | None = None
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 1
    shared_intermediate_size: int | None = None
    shared_gate: bool = False
    dense_layers: list[int] | None = None
    """Blocks without experts."""
    gates_on_input: bool = False
    """Is what enters a routed expert multiplied with its gate, not what leaves it?"""
    score: str = "softmax"
    """``softmax``, ``chosen_softmax`` (over the chosen experts alone), ``sigmoid`` or
    ``sqrtsoftplus``."""
    score_bias: bool = False
    """Are experts chosen by score plus bias?"""
    logit_bias: bool = False
    """Are they chosen by logit less bias?"""
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int | None = None


class _Rotary(nn.Module):
    """Cosine and sine ``[1, T, d]`` of each position's angles, without what YaRN scales later."""

    def __init__(self, config: MegatronGptConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        settings, scale = self.config.rope_parameters or {}, 1.0
        if settings["rope_type"] == "default":
            width = int(self.config.head_dim * settings.get("partial_rotary_factor", 1.0))
            steps = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
            frequencies = 1.0 / settings["rope_theta"] ** (steps / width)
        else:
            make = ROPE_INIT_FUNCTIONS[settings["rope_type"]]
            frequencies, scale = make(self.config, positions.device)
        angles = positions[..., None] / self.config.position_factor * frequencies
        if self.config.rotary_interleaved:
            angles = angles.repeat_interleave(2, -1)
        else:
            angles = torch.cat((angles, angles), -1)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``x`` ``[B, H, T, d]`` with its first dimensions turned."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    return torch.cat((turned * cos[:, None] + other * sin[:, None], rest), -1)


def _norm(config: MegatronGptConfig, width: int) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "RMSNorm" else nn.LayerNorm
    return kind(width, eps=config.norm_eps)


class MegatronGptAttention(nn.Module):
    """Causal softmax attention of query groups."""

    is_causal = True

    def __init__(self, config: MegatronGptConfig, block: int) -> None:
        super().__init__()
        self.config, self.block, width = config, block, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        inside, bias = config.hidden_size, config.linear_bias or config.qkv_bias
        self.q_proj = nn.Linear(inside, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(inside, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(inside, config.num_key_value_heads * width, bias=bias)
        if config.attention_gate:
            self.gate_proj = nn.Linear(inside, config.num_attention_heads * width, bias=bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm == "norm":
            self.q_norm, self.k_norm = _norm(config, width), _norm(config, width)
        elif config.qk_norm == "l2":
            self.q_norm, self.k_norm = (
                nn.RMSNorm(width, eps=config.norm_eps, elementwise_affine=False) for _ in range(2)
            )
        if config.sinks == "learned":
            self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))
        self.o_proj = nn.Linear(config.num_attention_heads * width, inside, bias=config.linear_bias)

    def forward(self, stream: Tensor, mask: Any, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        """What it adds to a stream ``[B, T, D]``."""
        config = self.config
        heads = (*stream.shape[:2], -1, config.head_dim)
        q, k, v = (linear(stream).view(heads) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if turns is not None:
            q, k = (_rotated(x, *turns, config.rotary_interleaved) for x in (q, k))
        given: dict[str, Any] = {}
        if config.sinks is not None:
            zero = torch.zeros(config.num_attention_heads, dtype=q.dtype, device=q.device)
            given["s_aux"] = self.sinks if config.sinks == "learned" else zero
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            config._attn_implementation, eager_attention_forward
        )
        mixed, _ = attend(self, q, k, v, mask, scaling=config.head_dim**-0.5, **given)
        mixed = mixed.reshape(*stream.shape[:2], -1)
        if config.attention_gate:
            mixed = (mixed * self.gate_proj(stream).float().sigmoid()).to(mixed.dtype)
        result: Tensor = self.o_proj(mixed)
        return result


def eager_attention_forward(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, s_aux: Any = None
) -> tuple[Tensor, None]:
    """Attention written out; with sink logits as one more key, of value zero.

    Named so that transformers 5.12, which looks for the word, lets it be replaced.
    """
    groups = module.num_key_value_groups
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if mask is None:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask
    if s_aux is not None:
        logits = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat((scores, logits), -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2).contiguous(), None


class MegatronGptDeltaNet(nn.Module):
    """A gated delta net: a state per head that forgets, and learns what it does not predict."""

    def __init__(self, config: MegatronGptConfig) -> None:
        super().__init__()
        self.config, inside = config, config.hidden_size
        self.heads, self.groups = config.linear_num_value_heads, config.linear_num_key_heads
        keys = self.groups * config.linear_key_head_dim
        values = self.heads * config.linear_value_head_dim
        for name, width in (("q", keys), ("k", keys), ("v", values)):
            setattr(self, f"{name}_proj", nn.Linear(inside, width, bias=False))
            kernel = config.linear_conv_kernel_dim
            setattr(self, f"{name}_conv", nn.Conv1d(width, width, kernel, groups=width, bias=False))
        self.z_proj = nn.Linear(inside, values, bias=False)
        self.b_proj = nn.Linear(inside, self.heads, bias=False)
        self.a_proj = nn.Linear(inside, self.heads, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.norm = _norm(config, config.linear_value_head_dim)
        self.o_proj = nn.Linear(values, inside, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """What it adds to a stream ``[B, T, D]``."""
        batch, length, _ = stream.shape
        q, k, v = (self._mixed(name, stream).view(batch, length, n, -1) for name, n in
                   (("q", self.groups), ("k", self.groups), ("v", self.heads)))  # fmt: skip
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        q, k = (x.repeat_interleave(self.heads // self.groups, 2) for x in (q, k))
        q, k, v = (x.float() for x in (q, k, v))
        kept = (-self.A_log.exp() * F.softplus(self.a_proj(stream).float() + self.dt_bias)).exp()
        rate = self.b_proj(stream).sigmoid().float()
        state = q.new_zeros(batch, self.heads, k.shape[-1], v.shape[-1])
        read = []
        for t in range(length):
            state = state * kept[:, t, :, None, None]
            missed = v[:, t] - (k[:, t, :, None] @ state)[:, :, 0]
            state = state + k[:, t, ..., None] * (rate[:, t, :, None] * missed)[:, :, None]
            read.append((q[:, t, :, None] * k.shape[-1] ** -0.5 @ state)[:, :, 0])
        mixed = torch.stack(read, 1).to(stream.dtype)
        gate = F.silu(self.z_proj(stream).view_as(mixed).float())
        result: Tensor = self.o_proj((self.norm(mixed) * gate).to(stream.dtype).flatten(2))
        return result

    def _mixed(self, name: str, stream: Tensor) -> Tensor:
        """Queries, keys or values, of a position and those just before it."""
        wanted = getattr(self, f"{name}_proj")(stream).mT
        before = F.pad(wanted, (self.config.linear_conv_kernel_dim - 1, 0))
        result: Tensor = F.silu(getattr(self, f"{name}_conv")(before)).mT
        return result


def _activated(config: MegatronGptConfig, x: Tensor) -> Tensor:
    """The activation of what a first projection gives, ``[..., F]`` or, gated, ``[..., 2 F]``."""
    activation = ACT2FN[config.hidden_act]
    if not config.gated:
        result: Tensor = activation(x)
        return result
    gate, up = x.chunk(2, -1)
    if config.clamp is not None:
        gate, up = gate.clamp(max=config.clamp), up.clamp(-config.clamp, config.clamp)
    gated: Tensor = activation(gate) * (up + config.gate_offset)
    return gated


class MegatronGptMLP(nn.Module):
    """A dense MLP, or shared experts."""

    def __init__(self, config: MegatronGptConfig, width: int, bias: bool) -> None:
        super().__init__()
        self.config = config
        if config.gated:
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        up = self.up_proj(x)
        if self.config.gated:
            up = torch.cat((self.gate_proj(x), up), -1)
        result: Tensor = self.down_proj(_activated(self.config, up))
        return result


class MegatronGptExperts(nn.Module):
    """Routed experts, which transformers' conversion fills and a scan reads one by one."""

    is_transposed = False

    def __init__(self, config: MegatronGptConfig) -> None:
        super().__init__()
        self.config, hidden = config, config.hidden_size
        experts, width = config.num_local_experts or 0, config.moe_intermediate_size
        first = f"{'gate_' * config.gated}up_proj"
        shapes = {first: (width * (1 + config.gated), hidden), "down_proj": (hidden, width)}
        for name, (rows, columns) in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(experts, rows, columns)))
            if config.linear_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.empty(experts, rows)))
        self._first = first

    def _apply_gate(self, x: Tensor) -> Tensor:
        return _activated(self.config, x)

    def _linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        bias = getattr(self, f"{name}_bias", None)
        weight = getattr(self, name)[expert]
        return F.linear(x, weight, None if bias is None else bias[expert])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Args: ``[n, D]``; ``[n, K]`` int; ``[n, K]``."""
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, place = (top_k_index == expert).nonzero(as_tuple=True)
            rows, gates = hidden_states[tokens], top_k_weights[tokens, place, None]
            if self.config.gates_on_input:
                rows, gates = (rows * gates).to(rows.dtype), torch.ones_like(gates)
            up = self._linear(self._first, expert, rows)
            written = self._linear("down_proj", expert, self._apply_gate(up)) * gates
            total.index_add_(0, tokens, written.to(total.dtype))
        return total


class MegatronGptRouter(nn.Module):
    """Chooses the experts of a token ``[n, D]``, and their weights."""

    def __init__(self, config: MegatronGptConfig) -> None:
        super().__init__()
        self.config, experts = config, config.num_local_experts or 0
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(experts)) if config.linear_bias else None
        if config.score_bias:
            self.e_score_correction_bias = nn.Buffer(torch.zeros(experts, dtype=torch.float32))
        if config.logit_bias:
            self.logit_bias = nn.Buffer(torch.zeros(experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """int64 and float ``[n, K]``."""
        config, count = self.config, self.config.num_experts_per_tok
        logits = F.linear(x, self.weight, self.bias)
        scores = logits
        if config.score == "sigmoid":
            scores = logits.float().sigmoid().type_as(logits)
        elif config.score == "sqrtsoftplus":
            scores = F.softplus(logits.float()).sqrt().type_as(logits)
        elif config.score == "softmax":
            scores = logits.softmax(-1, dtype=torch.float32).type_as(logits)
        ranked = scores + self.e_score_correction_bias if config.score_bias else scores
        if config.logit_bias:
            ranked = logits.float() - self.logit_bias
        if config.topk_group:
            groups = ranked.unflatten(-1, (config.n_group, -1))
            best = groups.topk(count // config.topk_group, -1)[0].sum(-1)
            kept = best.topk(config.topk_group, -1)[1]
            out = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, False)
            ranked = groups.masked_fill(out[..., None], -torch.inf).flatten(-2)
        index = ranked.topk(count, -1)[1]
        weights = scores.gather(-1, index)
        if config.score == "chosen_softmax":
            weights = weights.softmax(-1, dtype=torch.float32).type_as(logits)
        elif config.score in ("sigmoid", "sqrtsoftplus") and count > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return index, weights * config.routed_scaling_factor


class MegatronGptMoE(nn.Module):
    """Routed experts, and shared ones beside them."""

    def __init__(self, config: MegatronGptConfig) -> None:
        super().__init__()
        self.gate, self.experts = MegatronGptRouter(config), MegatronGptExperts(config)
        width = config.shared_intermediate_size
        self.shared_experts = self.shared_expert_gate = None
        if width:
            self.shared_experts = MegatronGptMLP(config, width, False)
            if config.shared_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` to ``[B, T, D]``."""
        rows = x.reshape(-1, x.shape[-1])
        routed: Tensor = self.experts(rows, *self.gate(rows)).view(x.shape)
        if self.shared_experts is None:
            return routed
        shared = self.shared_experts(x)
        if self.shared_expert_gate is not None:
            shared = shared * self.shared_expert_gate(x).sigmoid()
        total: Tensor = routed + shared
        return total


class MegatronGptDecoderLayer(nn.Module):
    """A block."""

    def __init__(self, config: MegatronGptConfig, block: int) -> None:
        super().__init__()
        only = config.sublayers[block] if config.sublayers else None
        self.self_attn = self.delta_net = self.mlp = None
        if only in (None, "attention"):
            self.self_attn = MegatronGptAttention(config, block)
        if only == "delta_net":
            self.delta_net = MegatronGptDeltaNet(config)
        if only in (None, "mlp"):
            dense = config.num_local_experts is None or block in (config.dense_layers or ())
            self.mlp = (
                MegatronGptMLP(config, config.intermediate_size, config.linear_bias)
                if dense
                else MegatronGptMoE(config)
            )
        if self.mlp is None or only is None:
            self.input_layernorm = _norm(config, config.hidden_size)
        if self.mlp is not None:
            self.post_attention_layernorm = _norm(config, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, mask: Any, turns: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The stream ``[B, T, D]`` behind it."""
        if self.self_attn is not None:
            attended = self.self_attn(self.input_layernorm(hidden_states), mask, turns)
            hidden_states = hidden_states + attended
        if self.delta_net is not None:
            hidden_states = hidden_states + self.delta_net(self.input_layernorm(hidden_states))
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class MegatronGptPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers asks of every model."""

    config_class = MegatronGptConfig
    base_model_prefix = "model"
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "logit_bias"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MegatronGptDecoderLayer,
        "attentions": MegatronGptAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        pass  # each is read from a checkpoint


class MegatronGptModel(MegatronGptPreTrainedModel):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: MegatronGptConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            MegatronGptDecoderLayer(config, block) for block in range(config.num_hidden_layers)
        )
        self.norm = _norm(config, config.hidden_size)
        self.rotary = _Rotary(config)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        """Args: ``[B, T]``. What else it is called with is for models with a cache."""
        config = self.config
        stream = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if config.positions == "learned":
            stream = stream + self.embed_positions(positions)
        turns = self.rotary(positions, stream.dtype) if config.positions == "rope" else None
        no_mask = no_cache = None  # by place: the cache's name differs between versions
        kinds = config.layer_types or ["full_attention"] * len(self.layers)
        make = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        masks = {
            kind: make[kind](config, stream, no_mask, no_cache, position_ids=positions)
            for kind in set(kinds) & make.keys()
        }
        for block, (layer, kind) in enumerate(zip(self.layers, kinds, strict=True)):
            turned = None if block in (config.no_rope_layers or ()) else turns
            stream = layer(stream, masks.get(kind), turned)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(stream))


class MegatronGptForCausalLM(MegatronGptPreTrainedModel):
    """With the output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MegatronGptConfig) -> None:
        super().__init__(config)
        self.model = MegatronGptModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **given: Any) -> CausalLMOutputWithPast:
        """Args: ``[B, T]``."""
        return CausalLMOutputWithPast(
            logits=self.lm_head(self.model(input_ids, **given).last_hidden_state)
        )


class MegatronMlaConfig(DeepseekV3Config):  # type: ignore[misc]
    """What a `MegatronMlaForCausalLM` computes."""

    model_type = MLA


class MegatronMlaForCausalLM(DeepseekV3ForCausalLM):  # type: ignore[misc]
    """DeepSeek-V3, whose latents are normed with the same epsilon as all else."""

    config_class = MegatronMlaConfig

    def __init__(self, config: MegatronMlaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            for norm in (
                layer.self_attn.kv_a_layernorm,
                getattr(layer.self_attn, "q_a_layernorm", None),
            ):
                if norm is not None:
                    norm.variance_epsilon = config.rms_norm_eps


def _merged(source: list[str], target: str) -> WeightConverter:
    operations: list[Any] = [MergeModulelist(dim=0)]
    if len(source) > 1:
        operations.append(Concatenate(dim=1))
    return WeightConverter(source_patterns=source, target_patterns=target, operations=operations)


AutoConfig.register(TYPE, MegatronGptConfig)
AutoModelForCausalLM.register(MegatronGptConfig, MegatronGptForCausalLM)
AutoConfig.register(MLA, MegatronMlaConfig)
AutoModelForCausalLM.register(MegatronMlaConfig, MegatronMlaForCausalLM)
register_checkpoint_conversion_mapping(
    TYPE,
    [
        _merged([f"mlp.experts.*.{name}.{kind}" for name in names], f"mlp.experts.{target}{end}")
        for kind, end in (("weight", ""), ("bias", "_bias"))
        for names, target in (
            (["gate_proj", "up_proj"], "gate_up_proj"),
            (["only_proj"], "up_proj"),  # an MLP that is not gated
            (["down_proj"], "down_proj"),
        )
    ],
)
register_checkpoint_conversion_mapping(MLA, get_checkpoint_conversion_mapping("deepseek_v3"))
