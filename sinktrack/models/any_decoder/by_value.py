"""Are two tensors one, by their numbers or their memory?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def is_view(value: Tensor, of: Tensor) -> bool:
    """The same numbers in the same memory, perhaps in another shape."""
    return (
        value.dtype == of.dtype
        and value.numel() == of.numel()
        and value.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()
        and value.storage_offset() == of.storage_offset()
    )


def distinct(values: Iterable[Tensor]) -> list[Tensor]:
    """Each object once."""
    return list({id(value): value for value in values}.values())


def close(one: Tensor, two: Tensor, dtype: torch.dtype, factor: float = 4) -> bool:
    """Equal to rounding of the dtype, in parts of the largest."""
    if one.shape != two.shape:
        return False
    if not two.numel():
        return True
    slack = factor * torch.finfo(dtype).eps * float(two.abs().max())
    return bool(((one - two).abs() <= slack).all())


def alike(own: Tensor, other: Tensor) -> bool:
    """Are two computations of attention one but for rounding, at random in low precision?"""
    eps = torch.finfo(other.dtype).eps
    if eps < 1e-4:
        return close(own.float(), other.float(), other.dtype, 64)
    error = torch.linalg.vector_norm(own.float() - other.float())
    return bool(error <= eps / 2 * torch.linalg.vector_norm(own.float()))
