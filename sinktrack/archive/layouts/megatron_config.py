"""From the arguments that Megatron saved to the configuration of a Hugging Face model.

Megatron-LM saves its command line's arguments, Megatron Bridge its model's configuration; the names
differ in a few places. Whatever makes the model another one than Hugging Face's is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from transformers import AutoConfig

from sinktrack.archive.layouts.megatron_arguments import refuse
from sinktrack.archive.layouts.megatron_names import DENSE, MOE, dense_blocks
from sinktrack.errors import ArchiveError

Arguments = Mapping[str, Any]

_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")
"""By losses alone, which leave the router's choice as it is."""
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
    if given.model_type not in DENSE + MOE:
        raise ArchiveError(
            f"the configuration given is of {given.model_type}; Megatron checkpoints are read as "
            f"{', '.join(DENSE + MOE)}"
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
        for name, value in wanted["rope_parameters"].items()
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
    activation = arguments.get("activation_func")
    if isinstance(activation, Mapping):
        activation = str(activation.get("_target_")).rpartition(".")[2]
    gated = _first(arguments, "swiglu", "gated_linear_unit")
    if gated is not True or (isinstance(activation, str) and activation != "silu"):
        raise ArchiveError(
            f"the model's MLP is not SwiGLU (gated {short(gated)}, "
            f"activation {short(activation or 'silu')})"
        )
    balancing = _given(arguments, "moe_router_load_balancing_type", "none")
    for kind in balancing if isinstance(balancing, list) else [balancing]:
        if kind not in _BALANCING:
            raise ArchiveError(
                f"the model's router balances by {short(kind)}, which no architecture here has"
            )


def _fields(arguments: Arguments, seen: Seen) -> dict[str, Any]:
    heads = _number(arguments, "num_attention_heads", most=_MANY)
    hidden = _number(arguments, "hidden_size")
    width = hidden // heads
    if arguments.get("kv_channels") is not None:
        width = _number(arguments, "kv_channels")
    kind = _model_type(arguments, seen.norm is not None and seen.norm > width)
    fields: dict[str, Any] = {
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": _vocabulary(arguments, seen.rows),
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
        fields["num_key_value_heads"] = heads
        grouped = arguments.get("group_query_attention") is not False
        if grouped and arguments.get("num_query_groups") is not None:
            fields["num_key_value_heads"] = _number(arguments, "num_query_groups", most=heads)
        if kind == "olmoe" and width * heads != hidden:
            raise ArchiveError(f"heads of width {width}; OLMoE has {hidden // heads}")
        if kind != "olmoe":
            fields["head_dim"] = width
    if kind in MOE:
        fields |= _experts(arguments, kind)
    return fields


def _model_type(arguments: Arguments, whole_norm: bool) -> str:
    normed = arguments.get("qk_layernorm") is True
    kind = "qwen3" if normed else "llama"
    if arguments.get("add_qkv_bias") is True and not normed:
        kind = "qwen2"
    experts = _first(arguments, "num_experts", "num_moe_experts")
    if arguments.get("multi_latent_attention") is True:
        return "deepseek_v3"
    if whole_norm:  # over all heads at once
        if experts is None:
            raise ArchiveError("norms over all queries at once in a model without experts: unknown")
        return "olmoe"
    if experts is None:
        return kind
    if kind == "qwen2":
        raise ArchiveError("experts together with biases of the queries (add_qkv_bias): unknown")
    return "qwen3_moe" if normed else "mixtral"


def _experts(arguments: Arguments, kind: str) -> dict[str, Any]:
    width = _number(arguments, "moe_ffn_hidden_size", "ffn_hidden_size")
    fields: dict[str, Any] = {
        "num_local_experts": _number(arguments, "num_experts", "num_moe_experts"),
        "num_experts_per_tok": _number(arguments, "moe_router_topk"),
    }
    fields["intermediate_size" if kind in ("mixtral", "olmoe") else "moe_intermediate_size"] = width
    if kind == "deepseek_v3":
        return fields | _sigmoid_router(arguments, width)
    before = arguments.get("moe_router_pre_softmax") is True
    for name, off in (
        ("moe_router_score_function", "softmax"), ("moe_router_enable_expert_bias", False),
        ("moe_router_topk_scaling_factor", None), ("moe_router_num_groups", None),
        ("moe_shared_expert_intermediate_size", None),
    ):  # fmt: skip
        if arguments.get(name, off) not in (off, None):
            raise ArchiveError(f"{kind} has no {name}={short(arguments[name])}")
    if kind == "mixtral" and before:
        raise ArchiveError("mixtral's router takes its softmax over the chosen experts alone")
    if kind != "mixtral":
        fields["norm_topk_prob"] = not before
    dense = _dense(arguments)
    if dense and kind != "qwen3_moe":
        raise ArchiveError(f"{kind} has experts in every block; blocks {dense} have none")
    if kind == "qwen3_moe":
        fields |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    return fields


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
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": float(base)}
    if arguments.get("multi_latent_attention") is True:
        return found | _yarn(arguments)
    factor = arguments.get("scale_factor")  # Megatron Bridge's Llama 3.1
    if _first(arguments, "use_rope_scaling", "rope_scaling") is True:
        factor = _given(arguments, "rope_scaling_factor", 8.0)
    if factor is not None:
        found |= {
            "rope_type": "llama3",
            "factor": float(factor),
            "low_freq_factor": _given(arguments, "low_freq_factor", 1.0),
            "high_freq_factor": _given(arguments, "high_freq_factor", 4.0),
            "original_max_position_embeddings": _given(arguments, "old_context_len", 8192),
        }
    return found


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
    blocks, every = (
        _number(arguments, "num_layers", most=_MANY),
        _given(arguments, "moe_layer_freq", 1),
    )
    if type(every) is int and every > 0:
        return [block for block in range(blocks) if block % every]
    if isinstance(every, list) and len(every) == blocks:
        return [block for block in range(blocks) if not every[block]]
    raise ArchiveError(f"the saved arguments say moe_layer_freq={short(every)}")


def _vocabulary(arguments: Arguments, rows: int) -> int:
    """Without padding, where that was saved."""
    saved = arguments.get("vocab_size")
    if type(saved) is int and arguments.get("tokenizer_type") == "NullTokenizer":
        saved += 1  # its end of a document
    return saved if type(saved) is int and 0 < saved <= rows else rows


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
    found = _first(arguments, *names)
    if type(found) is not int or not 0 < found <= most:
        raise ArchiveError(
            f"the saved arguments say {names[0]}={short(found)}; give the configuration of the "
            "Hugging Face model with --hf-config"
        )
    return found
