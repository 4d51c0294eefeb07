"""OLMo-core's checkpoints: ``stepN/`` with the weights in ``model_and_optim/``.

There lies a ``torch.distributed.checkpoint`` (see ``dcp``) of the model and its optimizer under
OLMo-core's names. ``config.json`` is the experiment's, which OLMo-core writes afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from sinktrack.archive import huggingface
from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.layouts import olmo_core_config
from sinktrack.archive.layouts.pieces import Finder, Piece, PieceSource, metadata
from sinktrack.archive.source import Checkpoint
from sinktrack.archive.storage.dcp import Stored
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

FOLDER = "model_and_optim"
_MODEL = "model."
_FAMILIES = ("olmo2", "olmo3", "flex_olmo")


def find(files: Files) -> list[Checkpoint]:
    """The directory itself; it counts once ``.metadata``, which is written last, is there."""
    return [checkpoint_at(files, "olmo_core")] if files.exists(f"{FOLDER}/.metadata") else []


def open(checkpoint: Checkpoint) -> PieceSource:
    """A checkpoint's weights under Hugging Face's names.

    Raises:
        ArchiveError: the architecture is not saved or not known here, a configuration given by hand
            does not fit the checkpoint, or a file is damaged.
    """
    files, weights = checkpoint.files, checkpoint.files.at(FOLDER)
    given = checkpoint.config
    config = huggingface.config(given) if given else olmo_core_config.read(files)
    if config.model_type not in _FAMILIES:
        raise ArchiveError(
            f"{files.location}: the configuration given is of {config.model_type}; checkpoints of "
            f"OLMo-core are read as {', '.join(_FAMILIES)}"
        )
    if given:
        olmo_core_config.compare(config, files)
        square = config.intermediate_size == config.hidden_size
        if config.model_type == "flex_olmo" and square:
            raise ArchiveError(
                f"{files.location}: experts as wide as the stream, and the configuration does not "
                "say whether they are dropless; scan without --hf-config"
            )
    stored = metadata(weights, _MODEL)
    finder = Finder(stored)
    try:
        pieces = dict(_pieces(finder, stored, config))
        finder.nothing_left(config.model_type)
    except ArchiveError as error:
        raise ArchiveError(f"{files.location}: {error}") from error
    return PieceSource(files, config, weights, pieces)


def _pieces(
    finder: Finder[Stored], stored: dict[str, Stored], config: Any
) -> Iterator[tuple[str, Piece]]:
    rows, hidden = config.vocab_size, config.hidden_size
    yield finder.renamed("model.embed_tokens", "embeddings", rows, hidden)
    yield finder.renamed("model.norm", "lm_head.norm", hidden)
    if not config.tie_word_embeddings or "lm_head.w_out.weight" in stored:
        yield finder.renamed("lm_head", "lm_head.w_out", rows, hidden)
    for block in range(config.num_hidden_layers):
        for name, piece in _block(finder, f"blocks.{block}", config):
            yield f"model.layers.{block}.{name}", piece


def _block(finder: Finder[Stored], at: str, config: Any) -> Iterator[tuple[str, Piece]]:
    hidden, width = config.hidden_size, config.hidden_size // config.num_attention_heads
    yield finder.renamed("post_attention_layernorm", f"{at}.attention_norm", hidden)
    yield finder.renamed("post_feedforward_layernorm", f"{at}.feed_forward_norm", hidden)
    heads = {"q": config.num_attention_heads} | dict.fromkeys("kv", config.num_key_value_heads)
    for name, count in heads.items():
        yield finder.renamed(
            f"self_attn.{name}_proj", f"{at}.attention.w_{name}", count * width, hidden
        )
        if name != "v":
            yield finder.renamed(
                f"self_attn.{name}_norm", f"{at}.attention.{name}_norm", count * width
            )
    yield finder.renamed("self_attn.o_proj", f"{at}.attention.w_out", hidden, hidden)
    if config.model_type == "flex_olmo":
        yield from _experts(finder, f"{at}.feed_forward_moe", config)
    else:
        yield from finder.gated("mlp", f"{at}.feed_forward", hidden, config.intermediate_size)


def _experts(finder: Finder[Stored], at: str, config: Any) -> Iterator[tuple[str, Piece]]:
    """Experts lie one below the other, and the down projection of each on its side."""
    count, width, hidden = config.num_experts, config.intermediate_size, config.hidden_size

    def router(flat: Tensor) -> Tensor:
        return flat.view(count, hidden)

    scores = finder.take(f"{at}.router.weight", shape=(count * hidden,))
    yield "mlp.gate.weight", Piece(scores, turned=router)
    for name, own in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        stored = finder.take(f"{at}.experts.mlp.{own}", shape=(count * width, hidden))
        for expert in range(count):
            rows = ((expert * width, (expert + 1) * width),)
            turned = Tensor.t if name == "down" else None
            yield f"mlp.experts.{expert}.{name}_proj.weight", Piece(stored, (), rows, turned)
