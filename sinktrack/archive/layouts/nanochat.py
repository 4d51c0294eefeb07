"""nanochat's checkpoints: ``model_000500.pt`` and ``meta_000500.json``, many in one directory.

Read as transformers' ``nanochat`` family, which is the model of its first releases (October 2025).
What later ones added (value embeddings, scales of the residual stream, smeared keys) has no place
there and is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sinktrack.archive import huggingface
from sinktrack.archive.discover import file_checkpoint
from sinktrack.archive.layouts.pieces import Finder, Piece, PieceSource, Stored
from sinktrack.archive.source import Checkpoint, unwrapped
from sinktrack.archive.storage import torch_file
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

_FILE = re.compile(r"model_([0-9]{1,18})\.pt")
_SIZES = {
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
    "n_kv_head": "num_key_value_heads", "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
}  # fmt: skip


def find(files: Files) -> list[Checkpoint]:
    """One for each file of weights that has its ``meta_`` beside it."""
    there = {entry.name for entry in files.entries() if not entry.directory}
    return [
        file_checkpoint(files, "nanochat", name, int(match[1]))
        for name in sorted(there)
        if (match := _FILE.fullmatch(name)) and f"meta_{match[1]}.json" in there
    ]


def open(checkpoint: Checkpoint) -> PieceSource:
    """A checkpoint's weights under the names of transformers' nanochat.

    Raises:
        ArchiveError: a file is damaged, or the model is of a later release.
    """
    files, name = checkpoint.files, checkpoint.file or ""
    match = _FILE.fullmatch(name)
    meta = files.read_json(f"meta_{match[1] if match else ''}.json")
    tree = torch_file.tensors(torch_file.read(files, name))
    stored: dict[str, Stored] = {own: tree[name] for own, name in unwrapped(tree).items()}
    finder = Finder(stored)
    try:
        config = huggingface.config(checkpoint.config) if checkpoint.config else _config(meta)
        pieces = dict(_pieces(finder, config, stored))
        finder.nothing_left("nanochat of transformers (the model of the first releases)", *_buffers)
    except ArchiveError as error:
        raise ArchiveError(f"{files.path(name)}: {error}") from error
    return PieceSource(files, config, files, pieces, _tokens(meta))


_buffers = ("cos", "sin")


def _config(meta: Mapping[str, Any]) -> Any:
    sizes = meta.get("model_config")
    if not isinstance(sizes, Mapping) or not all(type(sizes.get(name)) is int for name in _SIZES):
        raise ArchiveError(f"its meta file has no model_config with {', '.join(_SIZES)}")
    if more := set(sizes) - set(_SIZES):
        raise ArchiveError(
            f"its model_config has {', '.join(sorted(more))}, of a later release of nanochat than "
            "transformers' family holds; measure it while it trains, as a decoder of your own"
        )
    values = {new: sizes[name] for name, new in _SIZES.items()}
    values |= {
        "intermediate_size": 4 * values["hidden_size"],
        "rms_norm_eps": torch.finfo(torch.float32).eps,  # of torch's rms_norm without one
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    return huggingface.made_config("nanochat", values)


def _pieces(
    finder: Finder[Any], config: Any, stored: Mapping[str, Stored]
) -> Iterator[tuple[str, Piece]]:
    hidden, width = config.hidden_size, config.hidden_size // config.num_attention_heads
    rows = config.vocab_size
    heads = {"q": config.num_attention_heads} | dict.fromkeys("kv", config.num_key_value_heads)
    yield _padded(finder, stored, "model.embed_tokens", "transformer.wte", rows, hidden)
    yield _padded(finder, stored, "lm_head", "lm_head", rows, hidden)
    for block in range(config.num_hidden_layers):
        at, own = f"model.layers.{block}", f"transformer.h.{block}"
        for name, count in heads.items():
            yield finder.renamed(
                f"{at}.self_attn.{name}_proj", f"{own}.attn.c_{name}", count * width, hidden
            )
        yield finder.renamed(f"{at}.self_attn.o_proj", f"{own}.attn.c_proj", hidden, hidden)
        yield finder.renamed(f"{at}.mlp.fc1", f"{own}.mlp.c_fc", 4 * hidden, hidden)
        yield finder.renamed(f"{at}.mlp.fc2", f"{own}.mlp.c_proj", hidden, 4 * hidden)


def _padded(
    finder: Finder[Any], stored: Mapping[str, Stored], name: str, own: str, rows: int, hidden: int
) -> tuple[str, Piece]:
    """A table of which the rows behind the vocabulary are padding."""
    tensor = stored.get(f"{own}.weight")
    there = tensor.shape[0] if tensor is not None and len(tensor.shape) == 2 else rows
    table = finder.take(f"{own}.weight", shape=(max(rows, there), hidden))
    return f"{name}.weight", Piece(table, rows=((0, rows),))


def _tokens(meta: Mapping[str, Any]) -> int | None:
    step, batch = meta.get("step"), meta.get("total_batch_size")
    if batch is None and isinstance(meta.get("user_config"), Mapping):
        batch = meta["user_config"].get("total_batch_size")
    tokens = step * batch if type(step) is int and type(batch) is int else 0
    return tokens if tokens > 0 else None
