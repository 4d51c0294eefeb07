"""Unsharded checkpoints of OLMo's first trainer: ``stepN-unsharded/model.pt`` and ``config.yaml``.

Read are OLMo 1, whose norms have no weights, and OLMo 2 (``norm_after``); its own linear layers
hold queries, keys and values, and both halves of a gated MLP, one below the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sinktrack.archive import huggingface, yaml_file
from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.layouts.pieces import Finder, Piece, PieceSource, Stored
from sinktrack.archive.source import Checkpoint, unwrapped
from sinktrack.archive.storage import torch_file
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

_CONFIG = "config.yaml"
_PLAIN = {
    "block_type": ("sequential",), "activation_type": ("swiglu",), "include_bias": (False,),
    "bias_for_layer_norm": (False, None), "alibi": (False,), "rope": (True,),
    "multi_query_attention": (False, None), "scale_logits": (False,), "embedding_layer_norm":
    (False,), "scale_emb_init": (False, True), "block_group_size": (1,),
}  # fmt: skip
"""What the models have that are read; left out it is so, but for ``rope`` and the activation."""


def find(files: Files) -> list[Checkpoint]:
    """The directory itself: weights with the trainer's configuration, and none of Hugging Face."""
    there = {entry.name for entry in files.entries()}
    known = _CONFIG in there and "model.pt" in there and "config.json" not in there
    return [checkpoint_at(files, "olmo")] if known else []


def open(checkpoint: Checkpoint) -> PieceSource:
    """A checkpoint's weights under Hugging Face's names.

    Raises:
        ArchiveError: a file is damaged, or the model is neither OLMo 1 nor OLMo 2.
    """
    files = checkpoint.files
    tree = torch_file.read(files, "model.pt")
    tensors = torch_file.tensors(tree)
    stored: dict[str, Stored] = {own: tensors[name] for own, name in unwrapped(tensors).items()}
    sizes = yaml_file.read(files, _CONFIG).get("model")
    try:
        if not isinstance(sizes, dict):
            raise ArchiveError(f"{_CONFIG} describes no model")
        config = _config(sizes)
        finder = Finder(stored)
        pieces = dict(_pieces(finder, stored, config))
        finder.nothing_left(config.model_type)
    except ArchiveError as error:
        raise ArchiveError(f"{files.location}: {error}") from error
    return PieceSource(files, config, files, pieces)


def _config(sizes: Mapping[str, Any]) -> Any:
    for name, plain in _PLAIN.items():
        if sizes.get(name, plain[0]) not in plain:
            raise ArchiveError(
                f"{_CONFIG} has {name} {sizes[name]}, which neither OLMo 1 nor OLMo 2 of "
                "transformers has"
            )
    newer = bool(sizes.get("norm_after"))
    norm = sizes.get("layer_norm_type", "default")
    normed = bool(sizes.get("attention_layer_norm"))
    affine = sizes.get("layer_norm_with_affine", True)
    if (newer, norm, normed, affine) not in (
        (False, "default", False, False), (True, "rms", True, True)
    ):  # fmt: skip
        raise ArchiveError(
            f"{_CONFIG} has norm_after {newer}, layer_norm_type {norm}, attention_layer_norm "
            f"{normed} and layer_norm_with_affine {affine}: neither OLMo 1 nor OLMo 2"
        )
    width, heads = sizes["d_model"], sizes["n_heads"]
    middle = sizes.get("mlp_hidden_size") or sizes.get("mlp_ratio", 4) * width
    values = {
        "vocab_size": sizes.get("embedding_size") or sizes["vocab_size"], "hidden_size": width,
        "intermediate_size": middle // 2, "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": heads, "num_key_value_heads": sizes.get("n_kv_heads") or heads,
        "max_position_embeddings": sizes["max_sequence_length"],
        "tie_word_embeddings": sizes.get("weight_tying", True),
        "rope_parameters": {
            "rope_type": "default", "rope_theta": float(sizes.get("rope_theta", 10000))
        },
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    eps = sizes.get("layer_norm_eps", 1e-5)
    if newer:
        if sizes.get("clip_qkv"):
            raise ArchiveError(f"{_CONFIG} has clip_qkv, which OLMo 2 of transformers has not")
        return huggingface.made_config("olmo2", values | {"rms_norm_eps": eps})
    if eps != 1e-5:
        raise ArchiveError(f"{_CONFIG} has layer_norm_eps {eps}; OLMo 1 of transformers has 1e-5")
    return huggingface.made_config("olmo", values | {"clip_qkv": sizes.get("clip_qkv")})


def _pieces(
    finder: Finder[Any], stored: Mapping[str, Stored], config: Any
) -> Iterator[tuple[str, Piece]]:
    hidden, rows, middle = config.hidden_size, config.vocab_size, config.intermediate_size
    width, newer = hidden // config.num_attention_heads, config.model_type == "olmo2"
    few = config.num_key_value_heads * width
    yield finder.renamed("model.embed_tokens", "transformer.wte", rows, hidden)
    if not config.tie_word_embeddings:
        yield finder.renamed("lm_head", "transformer.ff_out", rows, hidden)
    if newer:
        yield finder.renamed("model.norm", "transformer.ln_f", hidden)
    for block in range(config.num_hidden_layers):
        at, own = f"model.layers.{block}", f"transformer.blocks.{block}"
        qkv = finder.take(f"{own}.att_proj.weight", shape=(hidden + 2 * few, hidden))
        ends = {
            "q": (0, hidden),
            "k": (hidden, hidden + few),
            "v": (hidden + few, hidden + 2 * few),
        }
        for name, span in ends.items():
            yield f"{at}.self_attn.{name}_proj.weight", Piece(qkv, rows=(span,))
        yield finder.renamed(f"{at}.self_attn.o_proj", f"{own}.attn_out", hidden, hidden)
        gated = finder.take(f"{own}.ff_proj.weight", shape=(2 * middle, hidden))
        yield f"{at}.mlp.up_proj.weight", Piece(gated, rows=((0, middle),))
        yield f"{at}.mlp.gate_proj.weight", Piece(gated, rows=((middle, 2 * middle),))
        yield finder.renamed(f"{at}.mlp.down_proj", f"{own}.ff_out", hidden, middle)
        if newer:
            yield finder.renamed(f"{at}.self_attn.q_norm", f"{own}.q_norm", hidden)
            yield finder.renamed(f"{at}.self_attn.k_norm", f"{own}.k_norm", few)
            yield finder.renamed(f"{at}.post_attention_layernorm", f"{own}.attn_norm", hidden)
            yield finder.renamed(f"{at}.post_feedforward_layernorm", f"{own}.ff_norm", hidden)
