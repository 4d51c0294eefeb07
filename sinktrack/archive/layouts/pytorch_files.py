"""Old model directories: ``pytorch_model.bin``, a pickle, read by weights-only loading alone."""

from __future__ import annotations

import pickle
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.layouts.indexed import Indexed
from sinktrack.archive.layouts.safetensors_files import SafetensorsSource
from sinktrack.archive.source import NAMES, Checkpoint, Index, Source
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

WEIGHTS, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_LARGEST_PICKLE = 64 * 2**20
_PART = 64 * 2**20


def find(files: Files) -> list[Checkpoint]:
    """The directory itself, if it holds such weights."""
    if any(files.exists(name) for name in (WEIGHTS, INDEX)):
        return [checkpoint_at(files, "pytorch_files")]
    return []


def open(checkpoint: Checkpoint) -> Source:
    """A checkpoint's weights.

    Raises:
        ArchiveError: ``config.json`` or the weights are missing, damaged or unknown, or hold
            anything but tensors.
    """
    if "transformers_weights" in (checkpoint.config or checkpoint.files).read_json("config.json"):
        return SafetensorsSource(checkpoint)  # names the file, always of that kind
    return PytorchSource(checkpoint)


class PytorchSource(Indexed[Tensor]):
    """Tensors by name, mapped from their files; a remote file is copied to this machine whole."""

    WEIGHTS, INDEX, SUFFIX = WEIGHTS, INDEX, ".bin"

    def __init__(self, checkpoint: Checkpoint, name: str | None = None) -> None:
        local = checkpoint.files.local
        self._copies = None if local else tempfile.TemporaryDirectory()
        super().__init__(checkpoint, name)

    def _look(self, file: str) -> dict[str, Tensor]:
        return load_tensors(self.files, file, self._local(file))

    def _slice(self, file: str, found: Tensor) -> TensorSlice:
        return TensorSlice(found)

    def _local(self, file: str) -> str:
        size = self.files.size(file)
        if self._copies is None:
            return self.files.real_path(file)
        path = Path(self._copies.name) / file
        with path.open("wb") as copy:
            for start in range(0, size, _PART):
                copy.write(self.files.read(file, start, min(start + _PART, size)))
        return str(path)


@dataclass(frozen=True)
class TensorSlice:
    """A tensor that is there already."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        """Its size in each dimension."""
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return NAMES[self.tensor.dtype]

    def __getitem__(self, index: Index) -> Tensor:
        """A part of it, or with ``...`` all."""
        return self.tensor[index]


def load_tensors(files: Files, name: str, path: str) -> dict[str, Tensor]:
    """The tensors of the file ``name``, of which ``path`` is a local copy.

    Raises:
        ArchiveError: it is damaged, or holds anything but tensors.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_zip(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ArchiveError(
            f"{files.path(name)} is damaged, or asks for more than tensors when it is unpickled, "
            "which is never done; convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # a pickle can raise anything
        raise ArchiveError(
            f"{files.path(name)} is truncated or damaged ({type(error).__name__}); copy the "
            "checkpoint again"
        ) from error
    values = found.items() if isinstance(found, dict) else ()
    if packed := {key: v for key, v in values if isinstance(v, Tensor) and _is_packed(v)}:
        key, value = min(packed.items(), key=lambda item: str(item[0]))
        raise ArchiveError(
            f"quantized weights are not supported: {files.path(name)} holds {key} as "
            f"{value.dtype}; scan the model before quantization"
        )
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and _is_plain(value) for key, value in found.items()
    ):
        raise ArchiveError(f"{files.path(name)} does not hold tensors by name, and nothing else")
    return found


def _is_packed(value: Tensor) -> bool:
    """Whether its dtype is one that only quantized weights have, and safetensors has no name of."""
    return value.is_quantized or (value.dtype not in NAMES and value.dtype.itemsize == 1)


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor that holds all its elements, not few of them many times over."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.dtype in NAMES
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _check_zip(path: str) -> None:
    """Refuse what would grow when it is unpacked."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError("compressed")
            if record.filename.endswith(".pkl") and record.file_size > _LARGEST_PICKLE:
                raise pickle.UnpicklingError("large")
