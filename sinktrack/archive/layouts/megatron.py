"""Megatron's distributed checkpoints (``torch_dist``), of Megatron-LM and of Megatron Bridge.

``iter_NNNNNNN/`` holds ``.metadata`` and ``*.distcp`` (see ``dcp``), ``metadata.json``, which is
written last. The arguments are in ``common.pt``; since megatron-core 0.19 in an object among the
``*.distcp``; and of Bridge in ``run_config.yaml``. Read without Megatron, whatever the parallel
layout was.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from typing import Any

import torch

from sinktrack.archive import huggingface
from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.layouts import megatron_config
from sinktrack.archive.layouts.megatron_arguments import refuse
from sinktrack.archive.layouts.megatron_names import pieces
from sinktrack.archive.layouts.pieces import PieceSource
from sinktrack.archive.source import Checkpoint
from sinktrack.archive.storage import dcp, pickles
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError, require

_LARGEST_COMMON_STATE = 64 * 2**20
_COMMON_STATE = "common_state/shard_0_1"
_LARGEST_YAML = 2**20
_ADVICE = "load it in Megatron and save it again with --ckpt-format torch_dist"


def _codecs_encode(text: str, encoding: str) -> bytes:
    """How old pickles hold bytes."""
    return text.encode(encoding)


_ADMITTED: dict[str, pickles.Build | None] = pickles.dtypes() | {
    "argparse.Namespace": None,
    "types.SimpleNamespace": None,
    "collections.OrderedDict": lambda *_: {},
    "collections.defaultdict": lambda *_: {},
    "builtins.set": lambda *values: list(*values),
    "pathlib.PosixPath": lambda *parts: "/".join(parts),
    "signal.Signals": None,
    "torch.Size": lambda sizes: tuple(sizes),
    "torch.device": None,
    "torch._utils._rebuild_tensor_v2": None,
    "torch.storage.UntypedStorage": None,
    "numpy.dtype": None,
    "numpy.ndarray": None,
    "_codecs.encode": _codecs_encode,
    "megatron.*": None,
} | {
    f"torch.{kind}Storage": None
    for kind in ("Byte", "Int", "Long", "Half", "BFloat16", "Float", "Double", "Bool")
} | {
    f"numpy.{core}.multiarray.{name}": None
    for core in ("core", "_core") for name in ("scalar", "_reconstruct")
}  # fmt: skip


def find(files: Files) -> list[Checkpoint]:
    """The directory itself, if it is Megatron's; one that is still being written is none yet."""
    names = {entry.name for entry in files.entries()}
    if "metadata.json" in names and ".metadata" not in names:
        is_ours = "sharded_backend" in files.read_json("metadata.json")
    else:
        is_ours = "metadata.json" in names or _other_format(names) is not None
    if is_ours:
        tokens = files.once(_tokens, "common.pt", "train_state.pt", "run_config.yaml")
        return [replace(checkpoint_at(files, "megatron"), tokens=tokens)]
    return []


def open(checkpoint: Checkpoint) -> PieceSource:
    """A checkpoint's weights under Hugging Face's names.

    Raises:
        ArchiveError: another format, a damaged file, an architecture that is not known here, or a
            configuration given by hand that the checkpoint contradicts.
    """
    files = checkpoint.files
    if other := _other_format({entry.name for entry in files.entries()}):
        raise ArchiveError(f"{files.location} is {other}, which is not read; {_ADVICE}")
    backend = files.read_json("metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise ArchiveError(
            f"{files.location} is of format {backend!r}, which is not read; {_ADVICE}"
        )
    contents = dcp.read_contents(
        files.whole(".metadata", dcp.LARGEST_METADATA), files.path(".metadata"), {_COMMON_STATE}
    )
    stored = contents.tensors
    given = huggingface.config(checkpoint.config) if checkpoint.config is not None else None
    place = contents.objects.get(_COMMON_STATE)
    arguments = _arguments(files)
    if not arguments and place is not None and not files.exists("common.pt"):
        arguments = _common_state(files, place)
    try:
        seen = _seen(stored)
        config = _configuration(files, given, arguments, seen)
        by_name = pieces(stored, config)
    except (ArchiveError, TypeError, ValueError, KeyError) as error:
        raise ArchiveError(f"{files.location}: {error}") from error
    return PieceSource(files, config, files, by_name, _count(arguments))


def _configuration(files: Files, given: Any, arguments: dict[str, Any], seen: Any) -> Any:
    """The one given by hand; else by the arguments, or where they do not say enough, that of the
    model in ``hf`` beside them, which Megatron Bridge writes where it is asked to save both.

    Raises:
        ArchiveError: there is none, or the checkpoint contradicts it.
    """
    beside = files.at("hf")
    if given is None and not arguments:
        raise ArchiveError(
            "neither common.pt nor common_state holds arguments; give the configuration of the "
            "Hugging Face model with --hf-config"
        )
    if given is None:
        try:
            return megatron_config.make(arguments, seen)
        except ArchiveError:
            refuse(arguments)  # nobody vouches for what is not known
            if not beside.exists("config.json"):
                raise
            given = huggingface.config(beside)
    megatron_config.compare(given, arguments, seen)
    return given


def _other_format(names: set[str]) -> str | None:
    """What a directory of these files is, if not ``torch_dist``."""
    if any(name.startswith("mp_rank_") for name in names):
        return "a legacy checkpoint (mp_rank_*), one pickle a process"
    if ".metadata" in names and "metadata.json" not in names:
        return "of format fsdp_dtensor, torch_dcp or another framework's (no metadata.json)"
    return None


def _tokens(files: Files) -> int | None:
    """Samples times their length, where both were saved in files of their own.

    Where they are with the weights they are found in opening those: not here, since the metadata
    of a large model take long to read.
    """
    try:
        arguments = _arguments(files)
        if files.exists("train_state.pt"):
            arguments |= _train_state(files)
    except ArchiveError:  # weights do not depend on it, and opening the checkpoint will say so
        return None
    return _count(arguments)


def _count(arguments: dict[str, Any]) -> int | None:
    samples, length = arguments.get("consumed_train_samples"), arguments.get("seq_length")
    if type(samples) is not int or type(length) is not int:
        return None
    return samples * length if samples * length > 0 else None


def _train_state(files: Files) -> dict[str, Any]:
    """Megatron Bridge's counters."""
    path, data = files.path("train_state.pt"), files.whole("train_state.pt", 2**20)
    _plain_zip(data, path)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return {"consumed_train_samples": state["consumed_train_samples"].item()}
    except Exception as error:
        raise ArchiveError(f"{path} is damaged ({type(error).__name__})") from error


def _arguments(files: Files) -> dict[str, Any]:
    """The model's arguments, as Megatron Bridge or Megatron-LM saved them; empty if they did not.

    Raises:
        ArchiveError: a file is damaged, or imports what it has no need of.
    """
    if files.exists("run_config.yaml"):
        path = files.path("run_config.yaml")
        yaml = require("yaml", "scan")
        try:
            settings = yaml.safe_load(files.whole("run_config.yaml", _LARGEST_YAML))
            return dict(settings["model"])
        except ArchiveError:
            raise
        except Exception as error:
            raise ArchiveError(f"{path} holds no model: {type(error).__name__}: {error}") from error
    if not files.exists("common.pt"):
        return {}
    path, data = files.path("common.pt"), files.whole("common.pt", _LARGEST_COMMON_STATE)
    return _common(data, path)


def _common_state(files: Files, place: dcp.Chunk) -> dict[str, Any]:
    """The same out of the ``.distcp`` files."""
    path = files.path(place.file)
    if place.length > _LARGEST_COMMON_STATE:
        raise ArchiveError(f"{path}: common_state is said to take {place.length} bytes")
    if place.start + place.length > files.size(place.file):
        raise ArchiveError(f"{path} is truncated; copy it again")
    data = files.read(place.file, place.start, place.start + place.length)
    return _common(bytes(data), f"{path} (common_state)")


def _common(data: bytes, path: str) -> dict[str, Any]:
    """The arguments in the common state; it is wrapped in a list where it is an object."""
    common = pickles.load(_plain_zip(data, path), _ADMITTED, path)
    if isinstance(common, list) and len(common) == 1:
        (common,) = common
    saved = common.get("args") if isinstance(common, dict) else None
    return dict(saved.state) if isinstance(saved, pickles.Record) and saved.state else {}


def _plain_zip(data: bytes, path: str) -> bytes:
    """The pickle in what ``torch.save`` wrote, once nothing in it is compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if any(info.compress_type for info in infos) or sum(
                info.file_size for info in infos
            ) > len(data):
                raise ArchiveError(f"{path} is compressed, which torch.save never does")
            return archive.read(next(i for i in infos if i.filename.endswith("/data.pkl")))
    except ArchiveError:
        raise
    except Exception as error:
        raise ArchiveError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def _seen(stored: dict[str, dcp.Stored]) -> megatron_config.Seen:
    embedding = stored.get("embedding.word_embeddings.weight")
    if embedding is None or not embedding.shape:
        raise ArchiveError("there is no embedding.word_embeddings.weight; is this a GPT model?")
    norms = [
        value.shape[-1]
        for name, value in stored.items()
        if name.endswith("self_attention.q_layernorm.weight") and value.shape
    ]
    positions = stored.get("embedding.position_embeddings.weight")
    return megatron_config.Seen(
        embedding.shape[0],
        norms[0] if norms else None,
        positions.shape[0] if positions is not None and positions.shape else None,
    )
