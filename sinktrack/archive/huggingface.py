"""What transformers makes of a checkpoint: its configuration, its tokenizer, the whole model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sinktrack.archive.files import Files
from sinktrack.archive.source import DTYPES, Checkpoint, Source, fitting, open
from sinktrack.errors import ArchiveError, one_line

_LARGEST = 64 * 2**20
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
        model = empty(source)
        largest = max(weight.numel() for weight in model.state_dict().values())
        weights = {name: fitting(source, name, largest) for name in source.names()}
        model, found = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=weights,
            dtype=model.dtype,
            output_loading_info=True,
        )
    except ArchiveError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ArchiveError(f"{where} cannot be loaded: {one_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, found[kind])):
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ArchiveError(
                f"{where}: {len(names)} weights {kind.removesuffix('_keys')} ({listed}); the "
                "checkpoint does not fit its config.json"
            )
    return model.to(device).eval()


def empty(source: Source) -> Any:
    """The model on the meta device, in the dtype it was saved in and in evaluation mode.

    Raises:
        ArchiveError: quantized, or transformers cannot build it.
    """
    config = source.config
    if getattr(config, "quantization_config", None):
        raise ArchiveError(
            "quantized weights are not supported; scan the model before quantization"
        )
    dtype = getattr(config, "dtype", None)
    if dtype is None:
        stored = (DTYPES[source.slice(name).get_dtype()] for name in source.names())
        dtype = next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ArchiveError(f"a {config.model_type} cannot be built: {error}") from error
    return model.eval()


def config(files: Files) -> Any:
    """The configuration that ``config.json`` describes.

    Raises:
        ArchiveError: it is missing, damaged, or not known to transformers.
    """
    kind = files.read_json("config.json").get("model_type")
    where = files.path("config.json")
    failure = f"{where}: transformers does not know how to build model_type {kind!r}"
    return _made(AutoConfig, files, ["config.json"], failure)


def config_of(checkpoint: Checkpoint) -> Any:
    """The configuration beside a checkpoint's weights, or the one given in its place.

    Raises:
        ArchiveError: there is none, or it is damaged or not known to transformers.
    """
    if checkpoint.config is None and not checkpoint.files.exists("config.json"):
        raise ArchiveError(
            f"{checkpoint.files.location} holds no config.json, as sharded checkpoints do not; "
            "give the configuration of the model with --hf-config"
        )
    return config(checkpoint.config or checkpoint.files)


def tokenizer(files: Files) -> Any | None:
    """The tokenizer beside a checkpoint or in its ``tokenizer`` directory, or None.

    Raises:
        ArchiveError: it cannot be read.
    """
    if not files.exists("tokenizer.json"):
        files = files.at("tokenizer")
    if not files.exists("tokenizer.json"):
        return None
    names = [name for name in _TOKENIZER if files.exists(name)]
    return _made(AutoTokenizer, files, names, f"the tokenizer of {files.location} cannot be read")


def vocabulary(checkpoint: Checkpoint) -> int:
    """The size of the vocabulary, from the model's configuration.

    Raises:
        ArchiveError: it cannot be read.
    """
    return int(open(checkpoint).config.get_text_config(decoder=True).vocab_size)


def _made(auto: Any, files: Files, names: list[str], failure: str) -> Any:
    """From small files, copied to a place of ours: remote ones, and none that a link could swap."""
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            (Path(directory) / name).write_bytes(files.whole(name, _LARGEST))
        try:
            return auto.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise ArchiveError(f"{failure}: {one_line(error)}") from error
