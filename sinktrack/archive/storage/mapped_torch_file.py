"""A file that torch saved of tensors by name, mapped by torch's weights-only loading."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.slices import NAMES, Index
from sinktrack.errors import ArchiveError

_LARGEST_PICKLE = 64 * 2**20


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
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
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
    values = loaded.items() if isinstance(loaded, dict) else ()
    if packed := {key: v for key, v in values if isinstance(v, Tensor) and _is_packed(v)}:
        key, value = min(packed.items(), key=lambda item: str(item[0]))
        raise ArchiveError(
            f"quantized weights are not supported: {files.path(name)} holds {key} as "
            f"{value.dtype}; scan the model before quantization"
        )
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and _is_plain(value) for key, value in loaded.items()
    ):
        raise ArchiveError(f"{files.path(name)} does not hold tensors by name, and nothing else")
    return loaded


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
