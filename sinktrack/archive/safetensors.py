"""Hugging Face model directories: ``config.json`` and safetensors, sharded or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sinktrack.archive.discover import Checkpoint, read_json
from sinktrack.errors import ArchiveError


def load(checkpoint: Checkpoint, device: str = "cpu") -> Any:
    """The model in the dtype it was saved in, in evaluation mode. Nothing is ever unpickled.

    Raises:
        ArchiveError: a file is missing or damaged, a weight is missing or has another shape, or
            transformers does not know the architecture; names the file.
    """
    path = checkpoint.path
    config = _config(path)
    for file in _files(path):
        _check(file)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ArchiveError(f"{path} cannot be loaded: {_first_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, found[kind])):
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ArchiveError(
                f"{path}: {len(names)} weights {kind.removesuffix('_keys')} ({listed}); the "
                "checkpoint does not fit its config.json"
            )
    return model.to(device).eval()


def tokenizer(path: Path) -> Any | None:
    """The tokenizer beside a checkpoint, or None."""
    if not (path / "tokenizer.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ArchiveError(f"{path} has a tokenizer that cannot be read: {error}") from error


def vocabulary(path: Path) -> int:
    """The size of the vocabulary, from a checkpoint's ``config.json``.

    Raises:
        ArchiveError: it cannot be read.
    """
    return int(_config(path).get_text_config(decoder=True).vocab_size)


def _config(path: Path) -> Any:
    kind = read_json(path / "config.json").get("model_type")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ArchiveError(
            f"{path / 'config.json'}: transformers does not know how to build model_type {kind!r}: "
            f"{_first_line(error)}"
        ) from error


def _files(path: Path) -> list[Path]:
    """The weight files that the checkpoint names."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return [path / "model.safetensors"]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ArchiveError(f"{index} has no weight_map; the checkpoint is damaged")
    shards = sorted({str(name) for name in names.values()})
    for shard in shards:
        if Path(shard).name != shard:
            raise ArchiveError(f"{index} names {shard!r}, which is not a file of its directory")
    return [path / shard for shard in shards]


def _check(file: Path) -> None:
    if not file.is_file():
        raise ArchiveError(f"{file} is missing; is the checkpoint still being written?")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ArchiveError(
            f"{file} is truncated or damaged ({error}); copy the checkpoint again"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
