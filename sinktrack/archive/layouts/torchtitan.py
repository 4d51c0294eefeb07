"""torchtitan's checkpoints: ``step-N/`` with ``.metadata``, written last, and ``*.distcp``.

A ``torch.distributed.checkpoint`` (see ``dcp``) of the model, under the names of torchtitan 0.2 or
0.3, beside the optimizer and others. It says nothing of the architecture: that has to be given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from sinktrack.archive import huggingface
from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.layouts.megatron_names import dense_blocks
from sinktrack.archive.layouts.pieces import Finder, Piece, PieceSource, metadata
from sinktrack.archive.source import Checkpoint
from sinktrack.archive.storage.dcp import Stored
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

FAMILIES = ("llama", "qwen3", "qwen3_moe")
_OTHERS = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")
"""What is beside the model's own weights."""
_EMBEDDING = "tok_embeddings.weight"


def find(files: Files) -> list[Checkpoint]:
    """The directory itself, if it is a checkpoint of this kind and not one of Megatron's."""
    names = {entry.name for entry in files.entries()}
    megatron = {"metadata.json", "common.pt"} & names or files.name.startswith("iter_")
    return [checkpoint_at(files, "torchtitan")] if ".metadata" in names and not megatron else []


def open(checkpoint: Checkpoint) -> PieceSource:
    """A checkpoint's weights under Hugging Face's names.

    Raises:
        ArchiveError: no configuration was given, it is of a family that is not known here, it does
            not fit the checkpoint, or a file is damaged.
    """
    files = checkpoint.files
    stored = metadata(files)
    if _EMBEDDING not in stored:
        raise ArchiveError(
            f"{files.location} is a torch.distributed.checkpoint, but not of torchtitan: it has no "
            f"{_EMBEDDING} but {', '.join(sorted(stored)[:3]) or 'no tensor at all'}"
        )
    config = huggingface.config_of(checkpoint)
    if config.model_type not in FAMILIES:
        raise ArchiveError(
            f"{files.location}: the configuration given is of {config.model_type}; checkpoints of "
            f"torchtitan are read as {', '.join(FAMILIES)}, others compute otherwise than Hugging "
            "Face's models"
        )
    names = _Names(stored, config)
    try:
        pieces = dict(names.all())
        names.finder.nothing_left(config.model_type, *_OTHERS)
    except ArchiveError as error:
        raise ArchiveError(f"{files.location}: {error}") from error
    biases = PieceSource(files, config, files, {b.name: Piece(b) for b in names.biases})
    for name in biases.names():
        if biases.slice(name)[...].count_nonzero():
            raise ArchiveError(
                f"{files.location}: experts were chosen with the bias {name}, which "
                f"{config.model_type} has no place for"
            )
    return PieceSource(files, config, files, pieces)


class _Names:
    """Where torchtitan keeps what Hugging Face's modules want."""

    def __init__(self, stored: dict[str, Stored], config: Any) -> None:
        self.stored, self.config, self.finder = stored, config, Finder(stored)
        self.take, self.renamed = self.finder.take, self.finder.renamed
        self.hidden = config.hidden_size
        self.biases: list[Stored] = []  # of the experts, where the family has none

    def all(self) -> Iterator[tuple[str, Piece]]:
        rows, dense = self.config.vocab_size, dense_blocks(self.config)
        yield self.renamed("model.embed_tokens", "tok_embeddings", rows, self.hidden)
        yield self.renamed("model.norm", "norm", self.hidden)
        head = ("lm_head.weight", "output.weight")
        if not self.config.tie_word_embeddings or any(name in self.stored for name in head):
            yield "lm_head.weight", Piece(self.take(*head, shape=(rows, self.hidden)))
        for block in range(self.config.num_hidden_layers):
            for name, piece in self._block(f"layers.{block}", block in dense):
                yield f"model.layers.{block}.{name}", piece

    def _block(self, at: str, dense: bool) -> Iterator[tuple[str, Piece]]:
        yield self.renamed("input_layernorm", f"{at}.attention_norm", self.hidden)
        yield self.renamed("post_attention_layernorm", f"{at}.ffn_norm", self.hidden)
        for name, piece in self._grouped(f"{at}.attention"):
            yield f"self_attn.{name}", piece
        width = self.config.intermediate_size
        mlp = self.finder.gated("mlp", f"{at}.feed_forward", self.hidden, width)
        yield from mlp if dense else self._experts(f"{at}.moe")

    def _grouped(self, at: str) -> Iterator[tuple[str, Piece]]:
        config, width = self.config, self.config.head_dim
        heads = {"q": config.num_attention_heads} | dict.fromkeys("kv", config.num_key_value_heads)
        for name, count in heads.items():
            own = (f"{at}.qkv_linear.w{name}.weight", f"{at}.w{name}.weight")
            stored = self.take(*own, shape=(count * width, self.hidden))
            pairs = config.model_type == "llama" and name != "v"
            yield f"{name}_proj.weight", Piece(stored, turned=self._apart if pairs else None)
            if config.model_type != "llama" and name != "v":
                yield self.renamed(f"{name}_norm", f"{at}.{name}_norm", width)
        yield self.renamed("o_proj", f"{at}.wo", self.hidden, heads["q"] * width)

    def _apart(self, rows: Tensor) -> Tensor:
        """Hugging Face has the first of all rotary pairs of a head, then the second of each."""
        heads = rows.view(-1, self.config.head_dim // 2, 2, rows.shape[1])
        return heads.transpose(1, 2).reshape(rows.shape)

    def _experts(self, at: str) -> Iterator[tuple[str, Piece]]:
        count, width = self.config.num_local_experts, self.config.moe_intermediate_size
        bias = (f"{at}.expert_bias_E", f"{at}.expert_bias")
        yield self.renamed("mlp.gate", f"{at}.router.gate", count, self.hidden)
        if any(name in self.stored for name in bias):
            self.biases.append(self.take(*bias, shape=(count,)))
        for name, own in (("gate", "w1_EFD"), ("up", "w3_EFD"), ("down", "w2_EDF")):
            sizes = (self.hidden, width) if name == "down" else (width, self.hidden)
            names = (f"{at}.routed_experts.inner_experts.{own}", f"{at}.experts.{own[:2]}")
            stored = self.take(*names, shape=(count, *sizes))
            for expert in range(count):
                yield f"mlp.experts.{expert}.{name}_proj.weight", Piece(stored, (expert,))
