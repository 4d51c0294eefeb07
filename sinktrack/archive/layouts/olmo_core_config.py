"""From the experiment that OLMo-core saved to the configuration of a Hugging Face model.

Every value of its ``model`` must be known here: whatever would make the model another one than
Hugging Face's is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from reprlib import repr as short
from typing import Any

from transformers import AutoConfig, Olmo3Config

from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError, one_line

_LARGEST = {"n_layers": 2**14, "block.attention.n_heads": 2**14}
"""More than any model has; other sizes are below 2^26."""
_SIZES = {
    "d_model": "hidden_size",
    "vocab_size": "vocab_size",
    "n_layers": "num_hidden_layers",
    "block.attention.n_heads": "num_attention_heads",
    "block.attention.n_kv_heads": "num_key_value_heads",
    "block.feed_forward.hidden_size": "intermediate_size",
    "block.feed_forward_moe.hidden_size": "intermediate_size",
    "block.feed_forward_moe.num_experts": "num_experts",
    "block.feed_forward_moe.router.top_k": "num_experts_per_tok",
}
_ROUTER = "block.feed_forward_moe.router"
_NORMS = ("block.layer_norm", "block.attention.qk_norm", "lm_head.layer_norm")
_VALUES: dict[str, tuple[Any, ...]] = {
    "name": ("default", "moe"),
    "block.name": ("reordered_norm", "moe_reordered_norm"),
    "block.attention.name": ("default",),
    "block.attention.type": ("attention",),
    "block.attention.rope.name": ("default",),
    "block.attention.rope.partial_rotary_factor": (1.0,),
    "block.feed_forward.name": ("default",),
    "block.feed_forward.activation": ("silu",),
    "block.feed_forward_moe.name": ("dropless",),
    "block.feed_forward_moe.router.name": ("default",),
    "block.feed_forward_moe.router.gating_function": ("softmax",),
    "block.feed_forward_moe.router.normalize_expert_weights": (1.0,),
    "lm_head.name": ("default",),
} | {f"{norm}.name": ("rms", "fused_rms") for norm in _NORMS}  # fmt: skip
"""What these may be, beside what is off."""
_FREE = re.compile(
    r"(.*\.)?(_CLASS_|dtype|full_precision|elementwise_affine|dropout|backend|use_flash)"
    r"|(init|embedding_init)_\w+|freeze_params|lm_head\.loss_implementation"
    r"|block\.feed_forward_moe\.(lb_loss_\w+|z_loss_weight|scale_loss_by_num_layers)"
    r"|block\.feed_forward_moe\.router\.jitter_eps"
)
"""How it was initialized, trained and computed: nothing that changes the function."""
_KINDS = {"default reordered_norm": "olmo2", "moe moe_reordered_norm": "flex_olmo"}
_WINDOW, _ENDS = "block.attention.sliding_window", ("first", "last")
_READ = (
    "tie_word_embeddings", "block.attention.rope.theta", f"{_WINDOW}.pattern",
    *(f"{_WINDOW}.force_full_attention_on_{which}_layer" for which in _ENDS),
    *(f"{norm}.eps" for norm in _NORMS),
)  # fmt: skip


_COMPARED = (
    "model_type", *dict.fromkeys(_SIZES.values()), "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "layer_types", "sliding_window", "norm_topk_prob",
)  # fmt: skip


def compare(given: Any, files: Files) -> None:
    """Check a configuration given by hand against the experiment, where that is known here.

    Raises:
        ArchiveError: they disagree; names the first field and both values.
    """
    try:
        saved = read(files)
    except ArchiveError:  # not saved, or with scaled RoPE: the given one is all there is
        return
    for name in _COMPARED:
        ours, theirs = (_alike(getattr(one, name, None)) for one in (given, saved))
        if ours != theirs:
            raise ArchiveError(
                f"{files.path('config.json')} and the configuration given disagree: {name} is "
                f"{short(theirs)} there, {short(ours)} in yours; which is right is for you to say"
            )


def _alike(value: Any) -> Any:
    """RoPE's parameters of each kind of attention as one, where all are equal.

    Which of both forms a configuration has depends on transformers' version.
    """
    inner = [own for own in value.values() if isinstance(own, dict)] if type(value) is dict else []
    if inner and all(own == inner[0] for own in inner):
        outer = {name: own for name, own in value.items() if not isinstance(own, dict)}
        return inner[0] if outer in ({}, inner[0]) else value
    return value


def read(files: Files) -> Any:
    """The configuration of the Hugging Face model that computes the same.

    Raises:
        ArchiveError: there is no ``config.json``, or its model is none that is known here.
    """
    saved = files.read_json("config.json") if files.exists("config.json") else {}
    model = saved.get("model")
    if not isinstance(model, dict):
        raise ArchiveError(
            f"{files.location} holds no config.json that describes the model of an experiment; "
            "give the configuration of the Hugging Face model with --hf-config"
        )
    try:
        return AutoConfig.for_model(**_fields(dict(_flat(model))))
    except Exception as error:
        raise ArchiveError(f"{files.path('config.json')}: {one_line(error)}") from error


def _flat(tree: Mapping[str, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Values that are not off, by their path."""
    if depth > 8:
        raise ArchiveError(f"{path} lies too deep")
    for name, value in tree.items():
        name = "attention" if name == "sequence_mixer" else name  # releases from 3.0 on
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name}.", depth + 1)
        elif value is not None and value is not False:
            yield f"{path}{name}", value


def _fields(model: dict[str, Any]) -> dict[str, Any]:
    for path, value in model.items():
        known = path in _SIZES or path in _READ or _FREE.fullmatch(path)
        if not known and value not in _VALUES.get(path, ()):
            raise ArchiveError(
                f"the model was trained with {path}={short(value)}, which is not known here; if a "
                "Hugging Face model has it, give its configuration with --hf-config"
            )
    kind = _KINDS.get(f"{model.get('name')} {model.get('block.name')}", "")
    layers, windows = _size(model, "n_layers"), model.get(f"{_WINDOW}.pattern")
    epsilons = {_number(model, f"{norm}.eps") for norm in _NORMS}
    if not kind or len(epsilons) > 1 or (windows is not None and kind == "flex_olmo"):
        raise ArchiveError(
            f"a {short(model.get('name'))} model of {short(model.get('block.name'))} blocks with "
            f"epsilons {sorted(epsilons)} and windows {short(windows)} is not known here"
        )
    rope: dict[str, Any] = {"rope_theta": _number(model, "block.attention.rope.theta")}
    rope["rope_type"] = "default"
    fields = {field: _size(model, path) for path, field in _SIZES.items() if path in model}
    fields.setdefault("num_key_value_heads", _size(model, "block.attention.n_heads"))
    if kind == "flex_olmo":
        fields["norm_topk_prob"] = f"{_ROUTER}.normalize_expert_weights" in model
    elif windows is not None:
        kind, fields = "olmo3", fields | _windows(model, windows, layers)
        by_kind = {"sliding_attention": rope, "full_attention": dict(rope)}
        if "rope_theta" not in Olmo3Config(rope_parameters=by_kind).rope_parameters:
            rope = by_kind  # else one for all blocks is read: in 5.12
    return fields | {
        "model_type": kind,
        "rms_norm_eps": epsilons.pop(),
        "rope_parameters": rope,
        "tie_word_embeddings": bool(model.get("tie_word_embeddings")),
        "max_position_embeddings": 2**20,  # it has no bound
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _windows(model: dict[str, Any], pattern: Any, layers: int) -> dict[str, Any]:
    """A pattern is repeated over the blocks; -1 is full attention."""
    first, last = (f"{_WINDOW}.force_full_attention_on_{which}_layer" in model for which in _ENDS)
    if not isinstance(pattern, list) or {type(size) for size in pattern} != {int}:
        raise ArchiveError(f"{_WINDOW}.pattern={short(pattern)}")
    sizes = [pattern[(block - first) % len(pattern)] for block in range(layers)]
    if first:
        sizes[0] = -1
    if last:
        sizes[-1] = -1
    widths = set(sizes) - {-1}
    if len(widths) > 1 or any(width < 1 for width in widths):
        raise ArchiveError(f"{_WINDOW}.pattern={short(pattern)}: olmo3 has one width of windows")
    kinds = ["full_attention" if size == -1 else "sliding_attention" for size in sizes]
    return {"layer_types": kinds} | ({"sliding_window": widths.pop()} if widths else {})


def _size(model: dict[str, Any], path: str) -> int:
    value = _number(model, path)
    if type(value) is not int or not 0 < value <= _LARGEST.get(path, 2**26):
        raise ArchiveError(f"its model has {path}={short(value)}")
    return value


def _number(model: dict[str, Any], path: str) -> int | float:
    value = model.get(path)
    if not isinstance(value, int | float):
        raise ArchiveError(f"its model has {path}={short(value)}")
    return value
