"""What transformers makes of a checkpoint: its configuration, its tokenizer, the whole model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sinktrack.archive.files import Files
from sinktrack.archive.source import Checkpoint, Slice, fitting, open
from sinktrack.errors import ArchiveError, first_line

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def load(checkpoint: Checkpoint, device: str = "cpu") -> Any:
    """The whole model in the dtype it was saved in, in evaluation mode. Nothing is ever unpickled.

    Raises:
        ArchiveError: a file is missing or damaged, a weight is missing or has another shape, or
            transformers does not know the architecture; names the file.
    """
    source = open(checkpoint)
    where = checkpoint.files.location
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(source.config, trust_remote_code=False)
        largest = max(weight.numel() for weight in empty.state_dict().values())
        weights = {name: fitting(source, name, largest) for name in source.names()}
        model, found = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict=weights,
            dtype=empty.config.dtype or _dtype(weights),
            output_loading_info=True,
        )
    except ArchiveError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ArchiveError(f"{where} cannot be loaded: {first_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, found[kind])):
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ArchiveError(
                f"{where}: {len(names)} weights {kind.removesuffix('_keys')} ({listed}); the "
                "checkpoint does not fit its config.json"
            )
    return model.to(device).eval()


def config(files: Files) -> Any:
    """The configuration that ``config.json`` describes.

    Raises:
        ArchiveError: it is missing, damaged, or not known to transformers.
    """
    kind = files.read_json("config.json").get("model_type")
    with tempfile.TemporaryDirectory() as directory:
        _copy(files, ("config.json",), directory)
        try:
            return AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise ArchiveError(
                f"{files.path('config.json')}: transformers does not know how to build model_type "
                f"{kind!r}: {first_line(error)}"
            ) from error


def tokenizer(files: Files) -> Any | None:
    """The tokenizer beside a checkpoint or in its ``tokenizer`` directory, or None.

    Raises:
        ArchiveError: it cannot be read.
    """
    if not files.exists("tokenizer.json"):
        files = files.at("tokenizer")
    if not files.exists("tokenizer.json"):
        return None
    with tempfile.TemporaryDirectory() as directory:
        _copy(files, [name for name in _TOKENIZER if files.exists(name)], directory)
        try:
            return AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise ArchiveError(
                f"{files.location} has a tokenizer that cannot be read: {first_line(error)}"
            ) from error


def vocabulary(checkpoint: Checkpoint) -> int:
    """The size of the vocabulary, from the model's configuration.

    Raises:
        ArchiveError: it cannot be read.
    """
    return int(open(checkpoint).config.get_text_config(decoder=True).vocab_size)


def _dtype(weights: dict[str, Slice]) -> Any:
    from sinktrack.archive.safetensors import DTYPES

    dtypes = (DTYPES[weight.get_dtype()] for weight in weights.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


def _copy(files: Files, names: tuple[str, ...] | list[str], directory: str) -> None:
    """Small files to a place of ours: remote ones, and none that a link could swap meanwhile."""
    for name in names:
        size = files.size(name)
        if size > 64 * 2**20:
            raise ArchiveError(f"{files.path(name)} is larger than 64 MiB")
        (Path(directory) / name).write_bytes(files.read(name, 0, size))
