"""nanoGPT's ``ckpt.pt``: weights, sizes and step in one file, read as GPT-2.

Its linear layers lie the other way round than GPT-2's. Without biases (``bias=False``) those that
Hugging Face's GPT-2 has are zero, which is the same function. The activation is GELU itself, as
nanoGPT computes it since April 2023; no tensor shows that older ones took the approximation by
tanh: give their configuration with ``--hf-config``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from sinktrack.archive import huggingface
from sinktrack.archive.discover import file_checkpoint
from sinktrack.archive.layouts.pieces import Finder, Piece, PieceSource, Stored, Zeros
from sinktrack.archive.source import Checkpoint, unwrapped
from sinktrack.archive.storage import torch_file
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

_FILE = "ckpt.pt"


def find(files: Files) -> list[Checkpoint]:
    """The file, if it is nanoGPT's; the directory holds one, written anew each time."""
    if not files.exists(_FILE):
        return []
    try:
        step = files.once(_step, _FILE)
    except ArchiveError as error:
        return [file_checkpoint(files, "nanogpt", _FILE, 0, reason=str(error))]
    return [] if step is None else [file_checkpoint(files, "nanogpt", _FILE, step)]


def _step(files: Files) -> int | None:
    tree = torch_file.read(files, _FILE)
    if not isinstance(tree, Mapping) or not isinstance(tree.get("model_args"), Mapping):
        return None
    step = tree.get("iter_num")
    return step if type(step) is int and step >= 0 else 0


def open(checkpoint: Checkpoint) -> PieceSource:
    """A checkpoint's weights under GPT-2's names.

    Raises:
        ArchiveError: the file is damaged, or holds another model than nanoGPT's.
    """
    files = checkpoint.files
    tree = torch_file.read(files, _FILE)
    stored = torch_file.tensors(tree.get("model"))
    stored = {own: stored[name] for own, name in unwrapped(stored).items()}
    arguments = tree["model_args"]
    try:
        config = huggingface.config(checkpoint.config) if checkpoint.config else _config(arguments)
        finder = Finder(stored)
        pieces = dict(_pieces(finder, stored, config))
        finder.nothing_left("nanoGPT", "lm_head.", *_masks(config.n_layer))
    except ArchiveError as error:
        raise ArchiveError(f"{files.path(_FILE)}: {error}") from error
    return PieceSource(files, config, files, pieces)


def _config(arguments: Mapping[Any, Any]) -> Any:
    names = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
             "block_size": "n_positions", "vocab_size": "vocab_size"}  # fmt: skip
    if not all(type(arguments.get(name)) is int for name in names):
        raise ArchiveError(f"model_args lacks one of {', '.join(names)}")
    values = {new: arguments[name] for name, new in names.items()}
    return huggingface.made_config("gpt2", values | {"activation_function": "gelu"})


def _masks(blocks: int) -> list[str]:
    """Causal masks, which nanoGPT saves for PyTorch 1."""
    return [f"transformer.h.{block}.attn.bias" for block in range(blocks)]


def _pieces(
    finder: Finder[Any], stored: Mapping[str, Stored], config: Any
) -> Iterator[tuple[str, Piece]]:
    width = config.n_embd
    sizes = {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width),
             "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}  # fmt: skip
    yield finder.renamed("transformer.wte", "transformer.wte", config.vocab_size, width)
    yield finder.renamed("transformer.wpe", "transformer.wpe", config.n_positions, width)
    norms = {"transformer.ln_f": width}
    for block in range(config.n_layer):
        at = f"transformer.h.{block}"
        norms |= {f"{at}.ln_1": width, f"{at}.ln_2": width}
        for name, shape in sizes.items():
            weight = finder.take(f"{at}.{name}.weight", shape=shape)
            yield f"{at}.{name}.weight", Piece(weight, turned=Tensor.t)
            yield _bias(finder, stored, f"{at}.{name}.bias", shape[0], weight)
    for name, size in norms.items():
        yield finder.renamed(name, name, size)
        yield _bias(finder, stored, f"{name}.bias", size, stored[f"{name}.weight"])


def _bias(
    finder: Finder[Any], stored: Mapping[str, Stored], name: str, size: int, like: Stored
) -> tuple[str, Piece]:
    if name in stored:
        return name, Piece(finder.take(name, shape=(size,)))
    return name, Piece(Zeros(like.dtype, (size,)))
