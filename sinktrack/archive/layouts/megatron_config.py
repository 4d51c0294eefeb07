"""From the arguments that Megatron saved to the configuration of a Hugging Face model.

Megatron-LM saves its command line's arguments, Megatron Bridge its model's configuration; the names
differ in a few places. Whatever makes the model another one than Hugging Face's is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from transformers import AutoConfig

from sinktrack.archive.layouts import megatron_gpt
from sinktrack.archive.layouts.megatron_arguments import BEYOND, on, refuse, vocabulary
from sinktrack.archive.layouts.megatron_names import DENSE, GPT, MOE, dense_blocks
from sinktrack.errors import ArchiveError

Arguments = Mapping[str, Any]

_BALANCED_BY = "moe_router_load_balancing_type"
_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")
"""By losses alone, which leave the router's choice as it is."""
_CHOOSING = ("sinkhorn", "quantile_balancing")
"""Which have a choice of their own."""
_SUBLAYERS = {"*": "attention", "-": "mlp", "E": "mlp", "G": "delta_net"}
"""What the symbols of a hybrid model's pattern stand for, as far as that is read."""
_UNREAD = {"M": "Mamba's mixer", "D": "DSA", "+": "latent attention"}
_DELTA_NET = ("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim",
              "linear_num_key_heads", "linear_num_value_heads")  # fmt: skip
_STACKS = ("hybrid_stack_spec", "mamba_stack_spec", "get_default_hybrid_stack_spec",
           "get_default_mamba_stack_spec", "transformer_engine_hybrid_stack_spec",
           "transformer_engine_mamba_stack_spec")  # fmt: skip
"""Megatron's own specifications of a hybrid model, by the names of what makes them."""
_MANY = 2**14
"""More blocks or heads than any model has: arguments come from strangers."""
_FREE = {
    "vocab_size", "max_position_embeddings", "mlp_only_layers", "decoder_sparse_step",
    "pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters",
}  # fmt: skip
"""What may differ from a configuration given by hand, or is compared in another way."""


@dataclass(frozen=True)
class Seen:
    """What the arguments leave open and the tensors show."""

    rows: int
    """Of the embedding, padding included."""
    norm: int | None
    """Width of the queries' norm, if there is one."""
    positions: int | None = None
    """Rows of the embedding of positions, if there is one."""


def make(arguments: Arguments, seen: Seen, vouched: bool = False) -> Any:
    """The configuration of the Hugging Face model that computes the same.

    Args:
        arguments: as Megatron saved them.
        seen: what the tensors show.
        vouched: may they hold names that are not known here?

    Raises:
        ArchiveError: an argument is missing, or no architecture known here has such a model.
    """
    _refuse(arguments, vouched)
    fields = _fields(arguments, seen)
    try:
        if fields["model_type"] == GPT:
            return megatron_gpt.MegatronGptConfig(**fields)
        return AutoConfig.for_model(**fields)
    except Exception as error:
        raise ArchiveError(
            f"the saved arguments describe no {fields['model_type']}: {error}"
        ) from error


def compare(given: Any, arguments: Arguments, seen: Seen) -> None:
    """Check a configuration given by hand against what was saved.

    Raises:
        ArchiveError: they disagree; names the first field and both values.
    """
    if given.model_type not in (*DENSE, *MOE, GPT):
        raise ArchiveError(
            f"the configuration given is of {given.model_type}; Megatron checkpoints are read as "
            f"{', '.join((*DENSE, *MOE, GPT))}"
        )
    if given.vocab_size > seen.rows:
        raise ArchiveError(
            f"the configuration given has vocab_size {given.vocab_size}, the checkpoint an "
            f"embedding of {seen.rows} rows"
        )
    if not arguments:
        return
    _refuse(arguments, vouched=True)
    original = "original_max_position_embeddings"
    if arguments.get(original) is None:  # see _yarn
        arguments = {**arguments, original: (given.rope_parameters or {}).get(original)}
    wanted = _fields(arguments, seen)
    pairs = [(name, getattr(given, name, None), value) for name, value in wanted.items()]
    pairs += [
        (f"rope_parameters.{name}", (given.rope_parameters or {}).get(name), value)
        for name, value in (wanted["rope_parameters"] or {}).items()
    ]
    pairs.append(
        ("dense blocks", dense_blocks(given), dense_blocks(make(arguments, seen, vouched=True)))
    )
    for name, ours, saved in pairs:
        if name not in _FREE and ours != saved:
            raise ArchiveError(
                f"the configuration given and the checkpoint disagree: {name} is {short(ours)} "
                f"there, the saved arguments say {short(saved)}; which is right is for you to say"
            )


def _refuse(arguments: Arguments, vouched: bool = False) -> None:
    refuse(arguments, vouched)
    _refuse_stack(arguments)
    balancing = _given(arguments, _BALANCED_BY, "none")
    for kind in balancing if isinstance(balancing, list) else [balancing]:
        if kind not in _BALANCING and balancing not in _CHOOSING:
            raise ArchiveError(
                f"the model's router balances by {short(kind)}, which no architecture here has"
            )
    positions = _given(arguments, "position_embedding_type", "rope")
    if positions != "yarn" and arguments.get("yarn_rotary_scaling_factor") is not None:
        raise ArchiveError(  # which Megatron scales every rotary embedding by
            f"the saved arguments say position_embedding_type={short(positions)} with "
            f"yarn_rotary_scaling_factor={short(arguments['yarn_rotary_scaling_factor'])}: not read"
        )
    scores = ("softmax", "sigmoid", "sqrtsoftplus", None)
    if arguments.get("moe_router_score_function") not in scores:
        raise ArchiveError(
            f"moe_router_score_function={short(arguments['moe_router_score_function'])} is not read"
        )


def _refuse_stack(arguments: Arguments) -> None:
    """Refuse specifications and hybrid models of which not all is known."""
    sublayers = _sublayers(arguments)
    for name in ("experimental_attention_variant", "linear_attention_freq"):
        value = arguments.get(name)
        other = sublayers is None or (name[0] == "e" and value != "gated_delta_net")
        if value is not None and other:
            raise ArchiveError(
                f"the model was trained with {name}={short(value)}, which Megatron checkpoints are "
                "not read with"
            )
    for name in ("spec", "hybrid_stack_spec", "mamba_stack_spec"):
        saved = arguments.get(name)
        path = saved.get("_target_") if isinstance(saved, Mapping) else saved
        parts = path if isinstance(path, list | tuple) else [path]
        ours = str(parts[0]).startswith("megatron.") if parts else False
        known = ours and str(parts[-1]).rpartition(".")[2] in _STACKS and sublayers is not None
        if saved is not None and not known:
            raise ArchiveError(
                f"the model was trained with {name}={short(saved)}, which Megatron checkpoints are "
                "not read with"
            )
    if sublayers is not None and arguments.get("qk_l2_norm") is True:
        raise ArchiveError(
            "a hybrid model with qk_l2_norm=True, which versions of Megatron differ in: not read"
        )
    ratios = _first(arguments, "hybrid_attention_ratio"), _first(arguments, "hybrid_mlp_ratio")
    if sublayers is None and (any(ratios) or arguments.get("is_hybrid_model") is True):
        raise ArchiveError(
            "the model is a hybrid one whose pattern was not saved, as of Mamba's mixers; measure "
            "it live, with SinkTrackMegatron"
        )


def _pattern(arguments: Arguments) -> str | None:
    """The sublayers of a hybrid model, a symbol each; None of any other model."""
    saved = _first(arguments, "hybrid_layer_pattern", "hybrid_override_pattern")
    if saved is None:
        return None
    pattern = saved.split("/")[0].replace("|", "") if isinstance(saved, str) else ""
    if not 0 < len(pattern) <= _MANY:
        raise ArchiveError(f"the saved arguments say hybrid_layer_pattern={short(saved)}")
    return pattern


def _sublayers(arguments: Arguments) -> list[str] | None:
    """What each block of a hybrid model is.

    Raises:
        ArchiveError: one of them is not read here.
    """
    pattern = _pattern(arguments)
    for symbol in pattern or "":
        if symbol not in _SUBLAYERS:
            raise ArchiveError(
                f"the model was trained with hybrid_layer_pattern={short(pattern)}, of which "
                f"{symbol} ({_UNREAD.get(symbol, 'unknown')}) is not computed here; measure it "
                "live, with SinkTrackMegatron"
            )
    return None if pattern is None else [_SUBLAYERS[symbol] for symbol in pattern]


def _blocks(arguments: Arguments) -> int:
    pattern = _pattern(arguments)
    return _number(arguments, "num_layers", most=_MANY) if pattern is None else len(pattern)


def _activation(arguments: Arguments) -> tuple[str, bool]:
    """The activation of the MLPs by transformers' name, and whether they are gated.

    Megatron-LM saves flags, Megatron Bridge a function's name.
    """
    saved = arguments.get("activation_func")
    if isinstance(saved, Mapping):
        saved = str(saved.get("_target_")).rpartition(".")[2]
    gated = True in (arguments.get("swiglu"), arguments.get("gated_linear_unit"))
    if not isinstance(saved, str):
        if arguments.get("quick_geglu") is True:
            saved, gated = "quick_gelu", True
        elif arguments.get("squared_relu") is True:
            saved, gated = "squared_relu", False
        elif gated:
            saved = "silu"
        else:
            saved = "gelu" if arguments.get("swiglu") is False else None
    known = {
        "silu": "silu", "gelu": "gelu", "relu": "relu", "squared_relu": "relu2",
        "quick_gelu": "quick_gelu", "fast_gelu": "gelu_fast",
    }  # fmt: skip
    if saved not in known:
        raise ArchiveError(f"the saved arguments say activation_func={short(saved)}: not read")
    if saved != "gelu":
        return known[saved], gated
    fused = _first(arguments, "bias_gelu_fusion", "bias_activation_fusion")
    experts = _first(arguments, "num_experts", "num_moe_experts")
    if (
        not isinstance(fused, bool)
        or arguments.get("use_te_activation_func") is True
        or (fused and experts is not None)
    ):
        raise ArchiveError(
            "the model's MLPs have a GELU, and the saved arguments do not say whether it is exact "
            "or the approximation by a tanh that Megatron's fused one is"
        )
    return "gelu_pytorch_tanh" if fused else "gelu", gated


def _fields(arguments: Arguments, seen: Seen) -> dict[str, Any]:
    heads = _number(arguments, "num_attention_heads", most=_MANY)
    hidden = _number(arguments, "hidden_size")
    width = hidden // heads
    if arguments.get("kv_channels") is not None:
        width = _number(arguments, "kv_channels")
    kind = _model_type(arguments, seen.norm is not None and seen.norm > width)
    if kind == GPT:
        return _gpt(arguments, seen, width)
    fields: dict[str, Any] = {
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": vocabulary(arguments, seen.rows),
        "hidden_size": hidden,
        "intermediate_size": _number(arguments, "ffn_hidden_size"),
        "num_hidden_layers": _number(arguments, "num_layers", most=_MANY),
        "num_attention_heads": heads,
        "rms_norm_eps": _first(arguments, "norm_epsilon", "layernorm_epsilon"),
        "max_position_embeddings": _number(arguments, "max_position_embeddings", "seq_length"),
        "tie_word_embeddings": _tied(arguments),
        "attention_bias": False,
        "rope_parameters": _rope(arguments),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind in ("mixtral", "qwen2"):  # these have no such field
        del fields["attention_bias"]
    if kind == "deepseek_v3":
        fields["num_key_value_heads"] = heads
        fields |= _latent_attention(arguments)
    else:
        fields["num_key_value_heads"] = _groups(arguments, heads)
        if kind == "olmoe" and width * heads != hidden:
            raise ArchiveError(f"heads of width {width}; OLMoE has {hidden // heads}")
        if kind != "olmoe":
            fields["head_dim"] = width
    if kind in MOE:
        fields |= _experts(arguments, kind)
    if kind == "deepseek_v3" and fields["rms_norm_eps"] != 1e-6:  # all that it has for latents
        fields["model_type"] = megatron_gpt.MLA
    return fields


def _groups(arguments: Arguments, heads: int) -> int:
    grouped = arguments.get("group_query_attention") is not False
    if grouped and arguments.get("num_query_groups") is not None:
        return _number(arguments, "num_query_groups", most=heads)
    return heads


def _model_type(arguments: Arguments, whole_norm: bool) -> str:
    normed = arguments.get("qk_layernorm") is True
    experts = _first(arguments, "num_experts", "num_moe_experts")
    latent = arguments.get("multi_latent_attention") is True
    beyond = on(arguments, BEYOND)
    if (activation := _activation(arguments)) != ("silu", True):
        name, gated = activation
        beyond |= {"activation": f"{name}, {'gated' if gated else 'not gated'}"}
    if experts is not None and arguments.get(_BALANCED_BY) in _CHOOSING:
        beyond[_BALANCED_BY] = arguments[_BALANCED_BY]
    for name, value in beyond.items():
        if latent or whole_norm:
            raise ArchiveError(
                f"the model was trained with {name}={short(value)} and "
                f"{'latent attention' if latent else 'norms over all queries at once'}: not read"
            )
        return GPT
    if latent:
        if experts is None:
            raise ArchiveError("latent attention without experts: not read")
        return "deepseek_v3"
    if whole_norm:  # over all heads at once
        if experts is None:
            raise ArchiveError("norms over all queries at once in a model without experts: unknown")
        return "olmoe"
    biased = arguments.get("add_qkv_bias") is True
    if experts is None:
        kinds = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}
        return kinds.get((biased, normed), GPT)
    if biased or _router(arguments):
        return GPT
    if normed:
        return "qwen3_moe"
    return GPT if arguments.get("moe_router_pre_softmax") or _dense(arguments) else "mixtral"


def _router(arguments: Arguments) -> dict[str, Any]:
    """What is on of a router and its experts beyond the softmax of the best."""
    return {
        name: value
        for name, off in (
            ("moe_router_score_function", "softmax"), ("moe_router_enable_expert_bias", False),
            ("moe_router_topk_scaling_factor", None), ("moe_router_num_groups", None),
            ("moe_shared_expert_intermediate_size", None),
        )
        if (value := arguments.get(name, off)) not in (off, None)
    }  # fmt: skip


def _experts(arguments: Arguments, kind: str) -> dict[str, Any]:
    width = _number(arguments, "moe_ffn_hidden_size", "ffn_hidden_size")
    fields: dict[str, Any] = {
        "num_local_experts": _number(arguments, "num_experts", "num_moe_experts"),
        "num_experts_per_tok": _number(arguments, "moe_router_topk"),
    }
    fields["intermediate_size" if kind in ("mixtral", "olmoe") else "moe_intermediate_size"] = width
    if kind == "deepseek_v3":
        return fields | _sigmoid_router(arguments, width)
    for name, value in _router(arguments).items():
        raise ArchiveError(f"{kind} has no {name}={short(value)}")
    if kind != "mixtral":
        fields["norm_topk_prob"] = arguments.get("moe_router_pre_softmax") is not True
    dense = _dense(arguments)
    if dense and kind != "qwen3_moe":
        raise ArchiveError(f"{kind} has experts in every block; blocks {dense} have none")
    if kind == "qwen3_moe":
        fields |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    return fields


def _gpt(arguments: Arguments, seen: Seen, width: int) -> dict[str, Any]:
    """Those of `megatron_gpt`, which is what Megatron's arguments can combine."""
    heads = _number(arguments, "num_attention_heads", most=_MANY)
    blocks, pattern = _blocks(arguments), _pattern(arguments)
    activation, gated = _activation(arguments)
    norm = _given(arguments, "normalization", "RMSNorm")
    softmax = _given(arguments, "softmax_type", "vanilla")
    positions = _given(arguments, "position_embedding_type", "none" if pattern else "rope")
    for name, value, known in (
        ("normalization", norm, ("RMSNorm", "LayerNorm")),
        ("softmax_type", softmax, ("vanilla", "off-by-one", "learnable")),
        ("position_embedding_type", positions, ("rope", "yarn", "learned_absolute", "none")),
    ):
        if value not in known:
            raise ArchiveError(f"the model was trained with {name}={short(value)}: not read")
    clamp = arguments.get("activation_func_clamp_value")
    window, kinds = _windows(arguments, blocks)
    turned = positions in ("rope", "yarn")
    fields: dict[str, Any] = {
        "model_type": GPT,
        "vocab_size": vocabulary(arguments, seen.rows),
        "hidden_size": _number(arguments, "hidden_size"),
        "intermediate_size": _number(arguments, "ffn_hidden_size"),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": _groups(arguments, heads),
        "head_dim": width,
        "max_position_embeddings": _number(arguments, "max_position_embeddings", "seq_length"),
        "tie_word_embeddings": _tied(arguments),
        "norm": norm,
        "norm_eps": float(_first(arguments, "norm_epsilon", "layernorm_epsilon")),
        "hidden_act": activation,
        "gated": gated,
        "gate_offset": float(_given(arguments, "glu_linear_offset", 0.0)) if gated else 0.0,
        "clamp": float(clamp) if gated and clamp is not None else None,
        "linear_bias": arguments.get("add_bias_linear") is True,
        "qkv_bias": arguments.get("add_qkv_bias") is True,
        "qk_norm": None,
        "attention_gate": arguments.get("attention_output_gate") is True,
        "sinks": {"vanilla": None, "off-by-one": "zero", "learnable": "learned"}[softmax],
        "positions": {"learned_absolute": "learned", "none": "none"}.get(positions, "rope"),
        "rope_parameters": _turns(arguments, positions) if turned else None,
        "rotary_interleaved": arguments.get("rotary_interleaved") is True,
        "position_factor": 1.0,
        "no_rope_layers": _without_rope(arguments, blocks),
        "sliding_window": window,
        "layer_types": _hybrid_kinds(arguments, kinds),
        "sublayers": _sublayers(arguments),
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if turned:
        factor = _first(
            arguments, "rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor"
        )
        fields["position_factor"] = 1.0 if factor is None else float(factor)
    if positions == "learned_absolute":
        if seen.positions is None:
            raise ArchiveError("there is no embedding.position_embeddings.weight")
        fields["max_position_embeddings"] = seen.positions
    if arguments.get("qk_layernorm") is True:
        fields["qk_norm"] = "l2" if arguments.get("qk_l2_norm") is True else "norm"
    elif arguments.get("qk_l2_norm") is True:
        fields["qk_norm"] = "l2"
    experts = _first(arguments, "num_experts", "num_moe_experts") is not None
    if experts if pattern is None else "E" in pattern:
        fields |= _any_router(arguments)
    if "G" in (pattern or ""):
        if activation != "silu":  # it is theirs too
            raise ArchiveError(f"gated delta nets with the activation {activation}: not read")
        fields |= {name: _number(arguments, name) for name in _DELTA_NET}
        if fields["linear_num_value_heads"] % fields["linear_num_key_heads"]:
            raise ArchiveError("gated delta nets whose heads share no keys evenly: not read")
    return fields


def _hybrid_kinds(arguments: Arguments, kinds: list[str] | None) -> list[str] | None:
    """The blocks' kinds; those of a hybrid model that are an MLP are transformers' ``moe``, experts
    or not."""
    sublayers = _sublayers(arguments)
    if sublayers is None:
        return kinds
    kinds = kinds or ["full_attention"] * len(sublayers)
    others = {"mlp": "moe", "delta_net": "linear_attention"}
    return [others.get(of, kind) for kind, of in zip(kinds, sublayers, strict=True)]


def _any_router(arguments: Arguments) -> dict[str, Any]:
    score = _given(arguments, "moe_router_score_function", "softmax")
    biased = arguments.get("moe_router_enable_expert_bias") is True
    experts = _number(arguments, "num_experts", "num_moe_experts")
    count = _number(arguments, "moe_router_topk", most=experts)
    balanced = arguments.get(_BALANCED_BY)
    if balanced in _CHOOSING and (grouped := arguments.get("moe_router_group_topk")):
        raise ArchiveError(f"{balanced} with moe_router_group_topk={short(grouped)}: not read")
    factor = arguments.get("moe_router_topk_scaling_factor") or 1.0
    if balanced == "sinkhorn":  # of which, outside of training, these scores alone are left
        factor, score = 1.0, "sigmoid" if count == 1 else "softmax"
    elif score == "softmax" and arguments.get("moe_router_pre_softmax") is not True:
        score = "chosen_softmax"
    if biased and (balanced in _CHOOSING or score not in ("sigmoid", "sqrtsoftplus")):
        raise ArchiveError("moe_router_enable_expert_bias without a sigmoid router: not read")
    groups = {"n_group": 1, "topk_group": None}
    if arguments.get("moe_router_group_topk"):
        groups = {
            "n_group": _number(arguments, "moe_router_num_groups", most=experts),
            "topk_group": _number(arguments, "moe_router_group_topk", most=count),
        }
        if experts % groups["n_group"]:  # type: ignore[operator]
            raise ArchiveError(f"{experts} experts in {groups['n_group']} groups: not read")
    shared = arguments.get("moe_shared_expert_intermediate_size")
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": count,
        "moe_intermediate_size": _number(arguments, "moe_ffn_hidden_size", "ffn_hidden_size"),
        "shared_intermediate_size": shared or None,
        "shared_gate": bool(shared) and arguments.get("moe_shared_expert_gate") is True,
        "dense_layers": _dense(arguments),
        "gates_on_input": arguments.get("moe_apply_probs_on_input") is True,
        "score": score,
        "score_bias": biased,
        "logit_bias": balanced == "quantile_balancing",
        "routed_scaling_factor": float(factor),
        **groups,
    }


def _windows(arguments: Arguments, blocks: int) -> tuple[int | None, list[str] | None]:
    """How many keys a query sees, and in which blocks."""
    window = arguments.get("window_size")
    if window is None:
        return None, None
    left, right = window if isinstance(window, list | tuple) and len(window) == 2 else (None, None)
    if (left, right) in ((-1, -1), (-1, 0)):
        return None, None
    every = arguments.get("window_attn_skip_freq")
    skipped: list[bool] = []
    if every is None:
        skipped = [False] * blocks
    elif type(every) is int and every > 0:
        skipped = [(block + 1) % every == 0 for block in range(blocks)]
    elif isinstance(every, list) and len(every) == blocks:
        skipped = [not one for one in every]
    if type(left) is not int or left < 0 or right != 0 or not skipped:
        raise ArchiveError(
            f"the saved arguments say window_size={short(window)}, "
            f"window_attn_skip_freq={short(every)}: not read"
        )
    return left + 1, ["full_attention" if one else "sliding_attention" for one in skipped]


def _without_rope(arguments: Arguments, blocks: int) -> list[int]:
    """The blocks without rotary embeddings, by ``no_rope_freq``: every N-th, or a flag a block."""
    every = arguments.get("no_rope_freq")
    if every is None:
        return []
    if type(every) is int and every > 0:
        return [block for block in range(blocks) if (block + 1) % every == 0]
    if isinstance(every, list) and len(every) == blocks:
        return [block for block in range(blocks) if every[block]]
    raise ArchiveError(f"the saved arguments say no_rope_freq={short(every)}")


def _turns(arguments: Arguments, positions: str) -> dict[str, Any]:
    """Rotary embeddings of a part of a head, or YaRN outside of latent attention."""
    part = float(_given(arguments, "rotary_percent", 1.0))
    if not 0 < part <= 1:
        raise ArchiveError(f"the saved arguments say rotary_percent={short(part)}")
    if positions == "rope":
        return _rope(arguments) | {"partial_rotary_factor": part}
    names = (
        "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "correction_range_round_to_int",
    )  # fmt: skip
    scaling = {name: arguments.get(f"yarn_{name}") for name in names}
    base = arguments.get("rotary_base")
    whole = scaling["correction_range_round_to_int"]
    missing = [
        f"yarn_{name}" for name, value in scaling.items() if value is None and name[0] != "m"
    ]
    plain = part == 1 and _first(
        arguments, "rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor"
    ) in (None, 1)
    if missing or not plain or not isinstance(base, int | float):
        raise ArchiveError(
            f"YaRN of which {', '.join(missing) or 'rotary_base'} was not saved, of a part of a "
            "head, or with interpolated positions: not read"
        )
    factor = float(scaling["rotary_scaling_factor"])  # type: ignore[arg-type]

    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    one, other = scaling["mscale"], scaling["mscale_all_dim"]
    attention = scale(1.0) if one is None or other is None else scale(one) / scale(other)
    return {
        "rope_type": "yarn", "rope_theta": float(base), "factor": factor,
        "original_max_position_embeddings": scaling["original_max_position_embeddings"],
        "beta_fast": float(scaling["beta_fast"]),  # type: ignore[arg-type]
        "beta_slow": float(scaling["beta_slow"]),  # type: ignore[arg-type]
        "truncate": whole is True,
        "attention_factor": attention,
    }  # fmt: skip


def _sigmoid_router(arguments: Arguments, width: int) -> dict[str, Any]:
    for name, wanted in (
        ("moe_router_score_function", "sigmoid"), ("moe_router_enable_expert_bias", True),
        ("qk_layernorm", True),
    ):  # fmt: skip
        if arguments.get(name) != wanted:
            raise ArchiveError(
                f"latent attention with {name}={short(arguments.get(name))}: only "
                f"DeepSeek-V3, which has {wanted!r}, is known here"
            )
    dense = _dense(arguments)
    if dense != list(range(len(dense))):
        raise ArchiveError(f"DeepSeek-V3's dense blocks come first; here they are {dense}")
    groups = arguments.get("moe_router_num_groups") or 1
    chosen = arguments.get("moe_router_group_topk") or 1
    topk = _number(arguments, "moe_router_topk")
    if arguments.get("moe_router_group_topk") and topk // chosen != 2:
        raise ArchiveError(
            f"groups of experts are chosen by {topk // chosen} scores each, by 2 in DeepSeek-V3"
        )
    shared = arguments.get("moe_shared_expert_intermediate_size") or 0
    if shared == 0 or shared % width:
        raise ArchiveError(f"shared experts of width {shared}, not a multiple of {width}")
    if topk < 2:
        raise ArchiveError("DeepSeek-V3 normalizes over the chosen experts; here one is chosen")
    return {
        "n_group": groups,
        "topk_group": chosen,
        "n_shared_experts": shared // width,
        "first_k_dense_replace": len(dense),
        "norm_topk_prob": True,
        "routed_scaling_factor": arguments.get("moe_router_topk_scaling_factor") or 1.0,
    }


def _latent_attention(arguments: Arguments) -> dict[str, Any]:
    return {
        "q_lora_rank": arguments.get("q_lora_rank"),
        "kv_lora_rank": _number(arguments, "kv_lora_rank"),
        "qk_nope_head_dim": _number(arguments, "qk_head_dim"),
        "qk_rope_head_dim": _number(arguments, "qk_pos_emb_head_dim"),
        "v_head_dim": _number(arguments, "v_head_dim"),
        "rope_interleave": True,
    }


def _rope(arguments: Arguments) -> dict[str, Any]:
    base = _first(arguments, "rotary_base")
    if not isinstance(base, int | float):
        raise ArchiveError(f"the saved arguments say rotary_base={short(base)}")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(base)}
    if arguments.get("multi_latent_attention") is True:
        return rope | _yarn(arguments)
    factor = arguments.get("scale_factor")  # Megatron Bridge's Llama 3.1
    if _first(arguments, "use_rope_scaling", "rope_scaling") is True:
        factor = _given(arguments, "rope_scaling_factor", 8.0)
    if factor is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": float(factor),
            "low_freq_factor": _given(arguments, "low_freq_factor", 1.0),
            "high_freq_factor": _given(arguments, "high_freq_factor", 4.0),
            "original_max_position_embeddings": _given(arguments, "old_context_len", 8192),
        }
    return rope


def _yarn(arguments: Arguments) -> dict[str, Any]:
    kind = _given(arguments, "rope_type", "yarn")
    whole = float(_first(arguments, "mscale_all_dim") or 0)
    if kind == "rope" and whole == 0:
        return {}
    if kind != "yarn":
        raise ArchiveError(f"latent attention with rope_type={short(kind)}, mscale_all_dim={whole}")
    mscale = float(_given(arguments, "mscale", 1.0))
    if not whole and mscale != 1:
        raise ArchiveError(f"YaRN with mscale={mscale} and no mscale_all_dim")
    factor = float(_given(arguments, "rotary_scaling_factor", 40))
    original = arguments.get("original_max_position_embeddings")
    if original is None:  # a default of Megatron-Core's, which in old versions was another number
        original = 4096
        if factor != 1 and arguments.get("max_position_embeddings") != original:
            raise ArchiveError(
                "YaRN's original_max_position_embeddings was not saved; give the configuration of "
                "the Hugging Face model with --hf-config"
            )
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": float(_given(arguments, "beta_fast", 32)),
        "beta_slow": float(_given(arguments, "beta_slow", 1)),
        "mscale": mscale,
        "mscale_all_dim": whole,
    }


def _dense(arguments: Arguments) -> list[int]:
    """The blocks without experts, by ``moe_layer_freq``: every N-th, or one flag a block."""
    pattern = _pattern(arguments)
    if pattern is not None:
        return [block for block, symbol in enumerate(pattern) if symbol != "E"]
    blocks, every = _blocks(arguments), _given(arguments, "moe_layer_freq", 1)
    if type(every) is int and every > 0:
        return [block for block in range(blocks) if block % every]
    if isinstance(every, list) and len(every) == blocks:
        return [block for block in range(blocks) if not every[block]]
    raise ArchiveError(f"the saved arguments say moe_layer_freq={short(every)}")


def _tied(arguments: Arguments) -> bool:
    untied = arguments.get("untie_embeddings_and_output_weights")
    if untied is not None:
        return not untied
    return bool(_given(arguments, "share_embeddings_and_output_weights", True))


def _first(arguments: Arguments, *names: str) -> Any:
    """The first of these arguments that was given."""
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


def _given(arguments: Arguments, name: str, default: Any) -> Any:
    value = arguments.get(name)
    return default if value is None else value


def _number(arguments: Arguments, *names: str, most: int = 2**31) -> int:
    value = _first(arguments, *names)
    if type(value) is not int or not 0 < value <= most:
        raise ArchiveError(
            f"the saved arguments say {names[0]}={short(value)}; give the configuration of the "
            "Hugging Face model with --hf-config"
        )
    return value
