"""Where Megatron keeps each tensor that Hugging Face's modules want.

Megatron stacks the blocks of a model into one tensor per kind, and the experts below them (or keys
each on its own); it holds queries, keys and values in one matrix, a query group's after another's,
gate and up projection in one, and puts a norm's weight with the linear layer that follows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from sinktrack.archive import foreign
from sinktrack.archive.layouts.pieces import Piece
from sinktrack.archive.storage.dcp import Span, Stored
from sinktrack.errors import ArchiveError

DENSE = ("llama", "qwen2", "qwen3")
MOE = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3")
_MODEL = ("decoder.", "embedding.", "output_layer.")


def pieces(stored: Mapping[str, Stored], config: Any) -> dict[str, Piece]:
    """Every tensor that a model of ``config`` needs, by its Hugging Face name.

    Raises:
        ArchiveError: a tensor is missing, has another shape than the configuration says, or the
            checkpoint holds one that this architecture has no place for.
    """
    found = dict(_Finder(stored, config).all())
    used = {piece.stored.name for piece in found.values()}
    left = {
        name
        for name in set(stored) - used
        if name.startswith(_MODEL) and not name.endswith("_extra_state")
    }
    foreign.refuse(left, config.model_type)
    return found


def dense_blocks(config: Any) -> set[int]:
    """The blocks without experts."""
    blocks = range(config.num_hidden_layers)
    if config.model_type in DENSE:
        return set(blocks)
    if config.model_type == "deepseek_v3":
        return set(blocks[: config.first_k_dense_replace])
    if config.model_type == "qwen3_moe":
        every = config.decoder_sparse_step
        return {b for b in blocks if b in config.mlp_only_layers or (b + 1) % every}
    return set()


class _Finder:
    def __init__(self, stored: Mapping[str, Stored], config: Any) -> None:
        self.stored, self.config = stored, config

    def all(self) -> Iterator[tuple[str, Piece]]:
        config = self.config
        vocabulary = ((0, config.vocab_size),)
        yield "model.embed_tokens.weight", self._top("embedding.word_embeddings.weight", vocabulary)
        yield "model.norm.weight", self._top("decoder.final_layernorm.weight")
        if not config.tie_word_embeddings:
            yield "lm_head.weight", self._top("output_layer.weight", vocabulary)
        dense = dense_blocks(config)
        for block in range(config.num_hidden_layers):
            for name, piece in self._block(block, block in dense):
                yield f"model.layers.{block}.{name}", piece

    def _block(self, block: int, dense: bool) -> Iterator[tuple[str, Piece]]:
        first = ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
        second = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        yield "input_layernorm.weight", self._of(block, *first)
        yield "post_attention_layernorm.weight", self._of(block, *second)
        yield "self_attn.o_proj.weight", self._of(block, "self_attention.linear_proj.weight")
        attention = self._latent if self.config.model_type == "deepseek_v3" else self._grouped
        for name, piece in attention(block):
            yield f"self_attn.{name}", piece
        if dense:
            for name, piece in self._gated(block, "mlp", self.config.intermediate_size):
                yield f"mlp.{name}_proj.weight", piece
        else:
            yield from self._experts(block)

    def _grouped(self, block: int) -> Iterator[tuple[str, Piece]]:
        """Query groups one after another: the group's queries, its key, its value."""
        config = self.config
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        each = heads // groups
        kinds = ["weight"] + ["bias"] * bool(self._has(block, "self_attention.linear_qkv.bias"))
        for kind in kinds:
            for name, start, count in (("q", 0, each), ("k", each, 1), ("v", each + 1, 1)):
                rows = tuple(
                    (first * width, (first + count) * width)
                    for first in range(start, groups * (each + 2), each + 2)
                )
                yield (
                    f"{name}_proj.{kind}",
                    self._of(
                        block,
                        f"self_attention.linear_qkv.{kind}",
                        rows=rows,
                        height=(heads + 2 * groups) * width,
                    ),
                )
        if config.model_type in ("qwen3", "qwen3_moe", "olmoe"):
            whole = config.model_type == "olmoe"
            for name, count in (("q", heads), ("k", groups)):
                yield (
                    f"{name}_norm.weight",
                    self._of(
                        block,
                        f"self_attention.{name}_layernorm.weight",
                        height=width * (count if whole else 1),
                    ),
                )

    def _latent(self, block: int) -> Iterator[tuple[str, Piece]]:
        low_rank = {"q": "q_a_proj", "kv": "kv_a_proj_with_mqa"}
        if self.config.q_lora_rank is None:
            yield "q_proj.weight", self._of(block, "self_attention.linear_q_proj.weight")
            del low_rank["q"]
        for kind, down in low_rank.items():
            at = f"self_attention.linear_{kind}"
            norm = (f"{at}_up_proj.layer_norm_weight", f"self_attention.{kind}_layernorm.weight")
            yield f"{down}.weight", self._of(block, f"{at}_down_proj.weight")
            yield f"{kind}_a_layernorm.weight", self._of(block, *norm)
            yield f"{kind}_b_proj.weight", self._of(block, f"{at}_up_proj.weight")

    def _experts(self, block: int) -> Iterator[tuple[str, Piece]]:
        config = self.config
        mixtral = config.model_type == "mixtral"
        names = {"gate": "w1", "up": "w3", "down": "w2"} if mixtral else {}
        at = "block_sparse_moe" if mixtral else "mlp"
        narrow = config.intermediate_size if config.model_type in ("mixtral", "olmoe") else None
        count = config.num_local_experts
        yield f"{at}.gate.weight", self._of(block, "mlp.router.weight", height=count)
        if config.model_type == "deepseek_v3":
            bias = self._of(block, "mlp.router.expert_bias", height=count)
            yield "mlp.gate.e_score_correction_bias", bias
            width = config.n_shared_experts * config.moe_intermediate_size
            for name, piece in self._gated(block, "mlp.shared_experts", width):
                yield f"mlp.shared_experts.{name}_proj.weight", piece
        for expert in range(count):
            width = narrow or config.moe_intermediate_size
            for name, piece in self._gated(block, "mlp.experts.experts", width, expert):
                yield f"{at}.experts.{expert}.{names.get(name, f'{name}_proj')}.weight", piece

    def _gated(
        self, block: int, at: str, width: int, expert: int | None = None
    ) -> Iterator[tuple[str, Piece]]:
        """Gate and up projection, in one matrix or in two, and the down projection."""
        lead: tuple[int, ...] = ()
        if expert is not None:
            if self._has(block, f"{at}.linear_fc2.weight"):
                lead = (expert,)
            else:
                at = f"{at}.{expert}"
        if self._has(block, f"{at}.linear_fc1.weight_w"):
            for name, half in (("gate", "w"), ("up", "v")):
                yield name, self._of(block, f"{at}.linear_fc1.weight_{half}", height=width)
        else:
            for name, rows in (("gate", (0, width)), ("up", (width, 2 * width))):
                fused = f"{at}.linear_fc1.weight"
                yield name, self._of(block, fused, lead=lead, rows=(rows,), height=2 * width)
        yield "down", self._of(block, f"{at}.linear_fc2.weight", lead=lead)

    def _has(self, block: int, name: str) -> Stored | None:
        stacked = self.stored.get(f"decoder.layers.{name}")
        return stacked or self.stored.get(f"decoder.layers.{block}.{name}")

    def _of(
        self,
        block: int,
        *names: str,
        lead: tuple[int, ...] = (),
        rows: tuple[Span, ...] = (),
        height: int | None = None,
    ) -> Piece:
        """A part of the first of these tensors that is there, of one block."""
        found = next(filter(None, (self._has(block, name) for name in names)), None)
        if found is None:
            raise ArchiveError(f"block {block} has no {' nor '.join(names)}")
        if not found.name.startswith(f"decoder.layers.{block}."):
            lead = (block, *lead)
            if found.shape[:1] != (self.config.num_hidden_layers,):
                raise ArchiveError(
                    f"{found.name} has shape {list(found.shape)}, the configuration has "
                    f"{self.config.num_hidden_layers} blocks"
                )
        if lead and len(found.shape) <= len(lead):
            raise ArchiveError(f"{found.name} has shape {list(found.shape)}, too few dimensions")
        return self._piece(found, lead, rows, height)

    def _top(self, name: str, rows: tuple[Span, ...] = ()) -> Piece:
        found = self.stored.get(name)
        if found is None:
            raise ArchiveError(f"the checkpoint has no {name}")
        return self._piece(found, (), rows, None)

    def _piece(
        self, found: Stored, lead: tuple[int, ...], rows: tuple[Span, ...], height: int | None
    ) -> Piece:
        left = found.shape[len(lead) :]
        if not left or math.prod(left) == 0:
            raise ArchiveError(f"{found.name} has shape {list(found.shape)}")
        if any(index >= size for index, size in zip(lead, found.shape, strict=False)):
            raise ArchiveError(f"{found.name} has shape {list(found.shape)}, wanted {list(lead)}")
        rows = rows or ((0, left[0]),)
        if height not in (None, left[0]) or rows[-1][1] > left[0]:
            raise ArchiveError(
                f"{found.name} has shape {list(found.shape)}, the configuration says "
                f"{height or rows[-1][1]} rows"
            )
        return Piece(found, lead, rows)
