"""The digest of a Megatron-Core model's weights: that of the same weights in a scan."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_QKV = "self_attention.linear_qkv.bias"
_VECTORS = (
    (_QKV,),
    ("self_attention.q_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight"),
    ("self_attention.k_layernorm.weight", "self_attention.kv_layernorm.weight",
     "self_attention.linear_kv_up_proj.layer_norm_weight"),
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
)  # fmt: skip
"""A block's vectors in the order in which Hugging Face's blocks have them."""


@dataclass
class Vectors:
    """What one process holds of all that the digest is of, on the CPU."""

    rows: dict[int, Tensor] = field(default_factory=dict)
    """Of the embedding, ``[D]`` each, by token."""
    blocks: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    """By block, then by place in a block."""
    tp: int = 0
    """Its tensor-parallel rank: the biases of queries, keys and values are its heads'."""
    known: bool = True
    """Are these all vectors that there are? Else Hugging Face has no such blocks."""


def vectors(found: Any, tokens: Tensor) -> Vectors:
    """This process's share.

    Args:
        found: the `sinktrack.models.megatron.hooks.Chunks`.
        tokens: int64 ``[n]``, those whose embedding counts.
    """
    share = Vectors(tp=found.layout.tp)
    for chunk in found.bare:
        embedding = getattr(getattr(chunk, "embedding", None), "word_embeddings", None)
        if embedding is None or not getattr(chunk, "pre_process", False):
            continue
        first = getattr(embedding, "vocab_start_index", 0)
        if isinstance(embedding.weight, DTensor):
            share.known = False
            continue
        for token in tokens.tolist():
            if 0 <= token - first < len(embedding.weight):
                share.rows[token] = _kept(embedding.weight[token - first])
    for number, layer in found.blocks.items():
        left = {name: p for name, p in layer.named_parameters() if p.ndim == 1}
        if any(isinstance(parameter, DTensor) for parameter in left.values()):
            share.known = False
            continue
        held = share.blocks[number] = {}
        for place, names in enumerate(_VECTORS):
            for name in names:
                if name in left and place not in held:
                    held[place] = _kept(left.pop(name))
        share.known &= not left
    return share


def digest(shares: Sequence[Vectors], tokens: Tensor, count: int, config: Any) -> str | None:
    """Of the whole model, put together; None where no scan could find the same weights.

    Args:
        shares: of the processes.
        tokens: those whose embedding counts.
        count: blocks of the model.
        config: Megatron's, of its attention.
    """
    groups = config.num_query_groups or config.num_attention_heads
    ranks = {share.tp for share in shares}
    rows: dict[int, Tensor] = {}
    blocks: dict[int, dict[int, dict[int, Tensor]]] = {}
    for share in shares:
        rows |= share.rows
        for number, held in share.blocks.items():
            blocks.setdefault(number, {})[share.tp] = held
    whole = all(share.known for share in shares) and set(tokens.tolist()) <= rows.keys()
    whole &= not getattr(config, "attention_output_gate", False)  # its biases are not three
    if not whole or groups % len(ranks) or blocks.keys() != set(range(count)):
        return None
    hasher = hashlib.blake2b(digest_size=16)
    parts = [torch.stack([rows[token] for token in tokens.tolist()])]
    for number in range(count):
        parts += _in_order(blocks[number], groups, config)
    for part in parts:
        hasher.update(f"{part.dtype}{tuple(part.shape)}".encode())
        hasher.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _in_order(held: Mapping[int, dict[int, Tensor]], groups: int, config: Any) -> Iterator[Tensor]:
    """A block's vectors, by tensor-parallel rank before; the biases as three."""
    ranks = sorted(held)
    for place, names in enumerate(_VECTORS):
        if place not in held[ranks[0]]:
            continue
        if names[0] != _QKV:
            yield held[ranks[0]][place]
            continue
        by_group = torch.cat([held[rank][place] for rank in ranks]).view(groups, -1)
        width = config.kv_channels
        queries = by_group.shape[1] - 2 * width
        for part in by_group.split([queries, width, width], 1):
            yield part.reshape(-1)


def _kept(vector: Tensor) -> Tensor:
    return vector.detach().to("cpu", copy=True)
