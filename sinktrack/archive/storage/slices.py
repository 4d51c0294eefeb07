"""Tensors of files, read where they are indexed, and what their dtypes are called."""

from __future__ import annotations

from types import EllipsisType
from typing import Protocol

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
"""What safetensors calls a dtype, and torch."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The other way round."""
Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


class Slice(Protocol):
    """One tensor of a checkpoint, read where it is indexed."""

    def get_shape(self) -> list[int]:
        """Its size in each dimension."""

    def get_dtype(self) -> str:
        """As safetensors names it: ``F32``, ``BF16``, ..."""

    def __getitem__(self, index: Index) -> Tensor:
        """A part of it, or with ``...`` all; on the CPU, as it is stored.

        What is computed of several stored tensors comes in float32, to be rounded by who asked.

        Raises:
            ArchiveError: the file is damaged.
        """
