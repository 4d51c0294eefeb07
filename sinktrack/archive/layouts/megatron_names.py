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
LATENT = ("deepseek_v3", "megatron_mla")
MOE = ("qwen3_moe", "mixtral", "olmoe", *LATENT)
GPT = "megatron_gpt"
"""What any combination of Megatron's features is read as."""
_MODEL = ("decoder.", "embedding.", "output_layer.")


def pieces(stored: Mapping[str, Stored], config: Any) -> dict[str, Piece]:
    """Every tensor that a model of ``config`` needs, by its Hugging Face name.

    Raises:
        ArchiveError: a tensor is missing, has another shape than the configuration says, or the
            checkpoint holds one that this architecture has no place for.
    """
    by_name = dict(_Finder(stored, config).all())
    used = {piece.stored.name for piece in by_name.values() if isinstance(piece.stored, Stored)}
    left = {
        name
        for name in set(stored) - used
        if name.startswith(_MODEL) and not name.endswith("_extra_state")
    }
    foreign.refuse(left, config.model_type)
    return by_name


def dense_blocks(config: Any) -> set[int]:
    """The blocks without experts."""
    blocks = range(config.num_hidden_layers)
    if config.model_type in DENSE:
        return set(blocks)
    if config.model_type == GPT:
        return set(blocks if config.num_local_experts is None else config.dense_layers)
    if config.model_type in LATENT:
        return set(blocks[: config.first_k_dense_replace])
    if config.model_type == "qwen3_moe":
        every = config.decoder_sparse_step
        return {b for b in blocks if b in config.mlp_only_layers or (b + 1) % every}
    return set()


class _Finder:
    def __init__(self, stored: Mapping[str, Stored], config: Any) -> None:
        self.stored, self.config = stored, config
        self.gpt = config.model_type == GPT

    def all(self) -> Iterator[tuple[str, Piece]]:
        config = self.config
        vocabulary = ((0, config.vocab_size),)
        yield "model.embed_tokens.weight", self._top("embedding.word_embeddings.weight", vocabulary)
        last = f"decoder.final_{'norm' if self.gpt and config.sublayers else 'layernorm'}"
        yield "model.norm.weight", self._top(f"{last}.weight")
        if self.gpt and config.norm == "LayerNorm":
            yield "model.norm.bias", self._top(f"{last}.bias")
        if self.gpt and config.positions == "learned":
            positions = self._top("embedding.position_embeddings.weight")
            yield "model.embed_positions.weight", positions
        if not config.tie_word_embeddings:
            yield "lm_head.weight", self._top("output_layer.weight", vocabulary)
        dense = dense_blocks(config)
        for block in range(config.num_hidden_layers):
            for name, piece in self._block(block, block in dense):
                yield f"model.layers.{block}.{name}", piece

    def _block(self, block: int, dense: bool) -> Iterator[tuple[str, Piece]]:
        only = self.config.sublayers[block] if self.gpt and self.config.sublayers else None
        if only in (None, "attention"):
            yield from self._attention(block)
        if only == "delta_net":
            yield from self._delta_net(block)
        if only in (None, "mlp"):
            yield from self._feed_forward(block, dense)

    def _norm(self, block: int, name: str, *stored: str) -> Iterator[tuple[str, Piece]]:
        for kind in ("weight", "bias")[: 1 + (self.gpt and self.config.norm == "LayerNorm")]:
            yield f"{name}.{kind}", self._of(block, *(f"{own}{kind}" for own in stored))

    def _attention(self, block: int) -> Iterator[tuple[str, Piece]]:
        own = ("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        yield from self._norm(block, "input_layernorm", *own)
        for kind in self._kinds():
            yield f"self_attn.o_proj.{kind}", self._of(block, f"self_attention.linear_proj.{kind}")
        attention = self._latent if self.config.model_type in LATENT else self._grouped
        for name, piece in attention(block):
            yield f"self_attn.{name}", piece

    def _delta_net(self, block: int) -> Iterator[tuple[str, Piece]]:
        at, config = "self_attention", self.config
        yield from self._norm(block, "input_layernorm", f"{at}.in_proj.layer_norm_",
                              "input_layernorm.")  # fmt: skip
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        heads = config.linear_num_value_heads
        values = heads * config.linear_value_head_dim
        for name, stored, height in (
            ("q", "query", keys), ("k", "key", keys), ("v", "value", values), ("z", "z", values),
            ("b", "beta", heads), ("a", "alpha", heads),
        ):  # fmt: skip
            for made, of in (("proj", "in_proj"), ("conv", "conv1d"))[: 1 + (name in "qkv")]:
                piece = self._of(block, f"{at}.{of}.weight.{stored}", height=height)
                yield f"delta_net.{name}_{made}.weight", piece
        for name in ("dt_bias", "A_log"):
            yield f"delta_net.{name}", self._of(block, f"{at}.{name}", height=heads)
        yield from self._norm(block, "delta_net.norm", f"{at}.out_norm.")
        yield "delta_net.o_proj.weight", self._of(block, f"{at}.out_proj.weight")

    def _feed_forward(self, block: int, dense: bool) -> Iterator[tuple[str, Piece]]:
        own = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        yield from self._norm(block, "post_attention_layernorm", *own)
        if dense:
            for kind in self._kinds():
                for name, piece in self._mlp(block, "mlp", self.config.intermediate_size, kind):
                    yield f"mlp.{name}_proj.{kind}", piece
        else:
            yield from self._experts(block)

    def _kinds(self) -> tuple[str, ...]:
        """What linear layers have: biases, too?"""
        return ("weight", "bias") if self.gpt and self.config.linear_bias else ("weight",)

    def _grouped(self, block: int) -> Iterator[tuple[str, Piece]]:
        """Query groups one after another: the group's queries, its key, its value."""
        config = self.config
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        each = heads // groups
        parts = [("q", each), ("k", 1), ("v", 1)]
        if self.gpt and config.attention_gate:
            parts.insert(1, ("gate", each))
        period = sum(count for _, count in parts)
        biased = self._has(block, "self_attention.linear_qkv.bias") is not None
        if self.gpt:
            biased = config.linear_bias or config.qkv_bias
        kinds = ["weight", "bias"][: 1 + biased]
        for kind in kinds:
            start = 0
            for name, count in parts:
                rows = tuple(
                    (first * width, (first + count) * width)
                    for first in range(start, groups * period, period)
                )
                start += count
                yield (
                    f"{name}_proj.{kind}",
                    self._of(
                        block,
                        f"self_attention.linear_qkv.{kind}",
                        rows=rows,
                        height=groups * period * width,
                    ),
                )
        if self.gpt and config.sinks == "learned":
            yield (
                "sinks",
                self._of(block, "self_attention.core_attention.softmax_offset", height=heads),
            )
        if self.gpt and config.qk_norm == "norm":
            for name in ("q", "k"):
                for kind in ("weight", "bias")[: 1 + (config.norm == "LayerNorm")]:
                    own = f"self_attention.{name}_layernorm.{kind}"
                    yield f"{name}_norm.{kind}", self._of(block, own, height=width)
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
        if self.gpt:
            yield from self._any_experts(block, count)
            return
        if config.model_type in LATENT:
            bias = self._of(block, "mlp.router.expert_bias", height=count)
            yield "mlp.gate.e_score_correction_bias", bias
            width = config.n_shared_experts * config.moe_intermediate_size
            for name, piece in self._gated(block, "mlp.shared_experts", width):
                yield f"mlp.shared_experts.{name}_proj.weight", piece
        for expert in range(count):
            width = narrow or config.moe_intermediate_size
            for name, piece in self._gated(block, "mlp.experts.experts", width, expert):
                yield f"{at}.experts.{expert}.{names.get(name, f'{name}_proj')}.weight", piece

    def _any_experts(self, block: int, count: int) -> Iterator[tuple[str, Piece]]:
        config = self.config
        if config.linear_bias:
            yield "mlp.gate.bias", self._of(block, "mlp.router.bias", height=count)
        if config.score_bias:
            bias = self._of(block, "mlp.router.expert_bias", height=count)
            yield "mlp.gate.e_score_correction_bias", bias
        if config.logit_bias:
            yield "mlp.gate.logit_bias", self._of(block, "mlp.router.qb_beta", height=count)
        if width := config.shared_intermediate_size:
            for name, piece in self._mlp(block, "mlp.shared_experts", width):
                yield f"mlp.shared_experts.{name}_proj.weight", piece
        if config.shared_gate:
            yield (
                "mlp.shared_expert_gate.weight",
                self._of(block, "mlp.shared_experts.gate_weight", height=1),
            )
        width = config.moe_intermediate_size
        for expert in range(count):
            for kind in self._kinds():
                for name, piece in self._mlp(block, "mlp.experts.experts", width, kind, expert):
                    own = "only" if name == "up" and not config.gated else name
                    yield f"mlp.experts.{expert}.{own}_proj.{kind}", piece

    def _mlp(
        self, block: int, at: str, width: int, kind: str = "weight", expert: int | None = None
    ) -> Iterator[tuple[str, Piece]]:
        """As `_gated`, and for MLPs without a gate."""
        if not self.gpt or self.config.gated:
            yield from self._gated(block, at, width, expert, kind)
            return
        at, lead = self._expert(block, at, expert)
        yield "up", self._of(block, f"{at}.linear_fc1.{kind}", lead=lead, height=width)
        yield "down", self._of(block, f"{at}.linear_fc2.{kind}", lead=lead)

    def _expert(self, block: int, at: str, expert: int | None) -> tuple[str, tuple[int, ...]]:
        """Where an expert is: in a tensor of all, or under a name of its own."""
        if expert is None:
            return at, ()
        if self._has(block, f"{at}.linear_fc2.weight"):
            return at, (expert,)
        return f"{at}.{expert}", ()

    def _gated(
        self, block: int, at: str, width: int, expert: int | None = None, kind: str = "weight"
    ) -> Iterator[tuple[str, Piece]]:
        """Gate and up projection, in one matrix or in two, and the down projection."""
        at, lead = self._expert(block, at, expert)
        if self._has(block, f"{at}.linear_fc1.{kind}_w"):
            for name, half in (("gate", "w"), ("up", "v")):
                own = f"{at}.linear_fc1.{kind}_{half}"
                yield name, self._of(block, own, lead=lead, height=width)
        else:
            for name, rows in (("gate", (0, width)), ("up", (width, 2 * width))):
                fused = f"{at}.linear_fc1.{kind}"
                yield name, self._of(block, fused, lead=lead, rows=(rows,), height=2 * width)
        yield "down", self._of(block, f"{at}.linear_fc2.{kind}", lead=lead)

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
        tensor = next(filter(None, (self._has(block, name) for name in names)), None)
        if tensor is None:
            raise ArchiveError(f"block {block} has no {' nor '.join(names)}")
        if not tensor.name.startswith(f"decoder.layers.{block}."):
            lead = (block, *lead)
            if tensor.shape[:1] != (self.config.num_hidden_layers,):
                raise ArchiveError(
                    f"{tensor.name} has shape {list(tensor.shape)}, the configuration has "
                    f"{self.config.num_hidden_layers} blocks"
                )
        if lead and len(tensor.shape) <= len(lead):
            raise ArchiveError(f"{tensor.name} has shape {list(tensor.shape)}, too few dimensions")
        return self._piece(tensor, lead, rows, height)

    def _top(self, name: str, rows: tuple[Span, ...] = ()) -> Piece:
        tensor = self.stored.get(name)
        if tensor is None:
            raise ArchiveError(f"the checkpoint has no {name}")
        return self._piece(tensor, (), rows, None)

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
