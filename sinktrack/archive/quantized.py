"""Weights of few bits with scales beside them, read as the numbers that they stand for.

FP8: a value of 8 bits times the scale of its block, its row or its tensor (``weight_scale_inv`` of
DeepSeek-V3 and Qwen3, ``weight_scale`` of compressed-tensors, FBGEMM and ModelOpt). MXFP4, of
gpt-oss: two values of 4 bits in a byte, and an exponent for every 32. That activations are rounded,
too, where such a model is served is not imitated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinktrack.archive.foreign import some
from sinktrack.archive.source import Source
from sinktrack.archive.storage.slices import DTYPES, NAMES, Index, Slice
from sinktrack.errors import ArchiveError

_EIGHT = ("F8_E4M3", "F8_E5M2")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What four bits stand for in E2M1."""
_GROUP = 32
"""Values to a scale in MXFP4."""
_MODELOPT = "hf_quant_config.json"
"""What ModelOpt says of its weights in place of ``config.json``, or beside it."""
_ACTIVATIONS = (
    "activation_scale", "input_scale", "input_scale_ub", "output_scale", ".k_scale", ".v_scale",
    ".q_scale", ".prob_scale",
)  # fmt: skip
"""Of activations and of the cache of keys and values: no weight is made with them."""
Blocks = tuple[int, int]


def applied(source: Source) -> Source:
    """The same weights with their scales applied; the source itself if its configuration has none.

    Raises:
        ArchiveError: a scale or a weight is without the other, or their shapes do not fit.
    """
    settings = getattr(source.config, "quantization_config", None)
    settings = settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})
    if not settings and _holds_eight(source) and source.files.exists(_MODELOPT):
        said = source.files.read_json(_MODELOPT).get("quantization")
        settings = {"quant_method": "modelopt"} | (said if isinstance(said, dict) else {})
    method = settings.get("quant_method")
    transforms = settings.get("transform_config") or {}
    if not isinstance(transforms, dict) or any(transforms.values()):
        raise ArchiveError(
            f"{source.files.location}: the quantization_config of config.json has a "
            "transform_config (such as a Hadamard rotation at run time), which is not applied "
            "here; scan the model before quantization"
        )
    if method == "mxfp4":
        slices, kind = _mxfp4(source), "mxfp4"
    elif (blocks := _said(source, settings)) is not None:
        slices, kind = _fp8(source, blocks)
    else:
        return source
    return _Dequantized(source, slices, kind) if any(slices.values()) else source


def _holds_eight(source: Source) -> bool:
    """Whether a weight has 8 bits; else nobody needs to be asked for another file."""
    return any(source.slice(name).get_dtype() in _EIGHT for name in source.names())


class _Dequantized:
    """A source some of whose tensors are made of several.

    Args:
        source: what is stored.
        made: by name what is made of it, or None for what is left out.
        kind: what the weights are stored as.
    """

    def __init__(self, source: Source, made: Mapping[str, Slice | None], kind: str) -> None:
        self.files, self._source, self._made = source.files, source, made
        self.config = copy.deepcopy(source.config)
        self.config.__dict__.pop("quantization_config", None)
        self.quantized = kind
        """What the weights are stored as, for the record."""
        self.tokens = getattr(source, "tokens", None)

    def names(self) -> list[str]:
        """Of all tensors but scales."""
        stored = self._source.names()
        left_out = {name for name, made in self._made.items() if made is None}
        return [name for name in dict.fromkeys([*stored, *self._made]) if name not in left_out]

    def slice(self, name: str) -> Slice:
        """One tensor; nothing of its data is read yet."""
        return self._made.get(name) or self._source.slice(name)


@dataclass(frozen=True)
class _Scaled:
    """FP8 values with a scale for each block of rows and columns."""

    values: Slice
    scales: Slice
    grid: tuple[int, ...]
    """The scales' shape, with as many dimensions as the values."""
    blocks: Blocks
    dtype: str

    def get_shape(self) -> list[int]:
        """Of the values."""
        return self.values.get_shape()

    def get_dtype(self) -> str:
        """That the model is to be in."""
        return self.dtype

    def __getitem__(self, index: Index) -> Tensor:
        """A part of it, or with ``...`` all, in float32; of a leading slice only its rows."""
        rows, rest = _rows(index, self.get_shape()[0])
        values = self.values[rows].to(torch.float32)
        scales = self.scales[...].reshape(self.grid)
        scales = _exponents(scales) if scales.dtype == torch.uint8 else scales.to(torch.float32)
        (tall, wide), start = self.blocks, 0
        if values.ndim > 2:
            scales = scales[rows]
        elif isinstance(rows, slice):
            start = rows.start
        height, width = values.shape[-2:]
        for row in range(start // tall, -(-(start + height) // tall)):
            low, high = max(row * tall - start, 0), min((row + 1) * tall - start, height)
            factors = scales[..., row, :].repeat_interleave(wide, -1)[..., :width]
            values[..., low:high, :] *= factors[..., None, :]
        return values[rest]


@dataclass(frozen=True)
class _Packed:
    """MXFP4 matrices of experts, ``[E, in, out]`` as the model has them."""

    blocks: Slice
    """uint8 ``[E, out, in / 32, 16]``."""
    scales: Slice
    """uint8 ``[E, out, in / 32]``: exponents, 127 too large."""
    dtype: str

    def get_shape(self) -> list[int]:
        """As the model has them."""
        experts, out, groups, _ = self.blocks.get_shape()
        return [experts, groups * _GROUP, out]

    def get_dtype(self) -> str:
        """That the model is to be in."""
        return self.dtype

    def __getitem__(self, index: Index) -> Tensor:
        """A part, or with ``...`` all, in float32; of a leading slice only its experts."""
        rows, rest = _rows(index, self.get_shape()[0])
        packed, table = self.blocks[rows], torch.tensor(_FP4)
        values = torch.stack([table[(packed & 15).int()], table[(packed >> 4).int()]], -1)
        values = values.flatten(-2) * _exponents(self.scales[rows])[..., None]
        return values.flatten(-2).transpose(1, 2).contiguous()[rest]


def _rows(index: Index, size: int) -> tuple[Any, Any]:
    """Which leading rows to read, and what to take of these."""
    first, *others = (index or (...,)) if isinstance(index, tuple) else (index,)
    if isinstance(first, slice) and first.step in (None, 1):
        low, high, _ = first.indices(size)
        return slice(low, max(low, high)), (slice(None), *others)
    return ..., index


def _exponents(stored: Tensor) -> Tensor:
    return torch.exp2(stored.to(torch.float32) - 127)


def _said(source: Source, settings: Mapping[str, Any]) -> Blocks | str | None:
    """The same as `_blocks`, of settings of any shape."""
    try:
        return _blocks(settings)
    except (AttributeError, TypeError) as error:
        raise ArchiveError(
            f"{source.files.location}: the quantization_config of config.json is not as it should "
            f"be ({error}); the checkpoint is damaged"
        ) from error


def _blocks(settings: Mapping[str, Any]) -> Blocks | str | None:
    """What FP8 weights share a scale, by the configuration: a block, or else all or a row.

    None where they are not quantized in a way that is read.
    """
    method, blocks = settings.get("quant_method"), None
    if method == "fp8":
        blocks = settings.get("weight_block_size", (128, 128))
    elif method == "fbgemm_fp8" or (
        method == "modelopt" and settings.get("quant_algo") in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
    ):
        return "none"  # of a row, or of all
    elif method == "compressed-tensors" and settings.get("format") == "float-quantized":
        groups = [group.get("weights") for group in (settings.get("config_groups") or {}).values()]
        eight = {"type": "float", "num_bits": 8, "symmetric": True}
        if not groups or any(
            not isinstance(one, Mapping)
            or any(one.get(name) != value for name, value in eight.items())
            or one.get("strategy") not in ("tensor", "channel", "block")
            for one in groups
        ):
            return None
        sizes = {tuple(one.get("block_structure") or ()) for one in groups}
        if len(sizes) > 1:
            return None
        blocks = next(iter(sizes)) or None
    else:
        return None
    if blocks is None:
        return "none"
    if len(blocks) != 2 or not all(type(size) is int and size > 0 for size in blocks):
        raise ArchiveError(f"config.json has weight_block_size {str(blocks)[:80]}")
    return blocks[0], blocks[1]


def _fp8(source: Source, blocks: Blocks | str) -> tuple[dict[str, Slice | None], str]:
    """Of all FP8 weights the numbers, and what they are stored as."""
    stored = {name: source.slice(name) for name in source.names()}
    slices: dict[str, Slice | None] = {}
    kinds = set()
    for name, values in stored.items():
        if name.endswith(_ACTIVATIONS):
            slices[name] = None
        if values.get_dtype() not in _EIGHT or "scale" in name.rpartition(".")[2]:
            continue
        stem = name.removesuffix("weight")
        beside = (f"{name}_scale_inv", f"{name}_scale", f"{stem}scale", f"{stem}qscale_weight")
        scale = next((one for one in beside if one in stored), None)
        if scale is None:
            raise ArchiveError(
                f"{source.files.location}: {name} is stored as {values.get_dtype()} and has no "
                f"scale beside it ({beside[0]}); copy the checkpoint again, or where its numbers "
                "were cast without scales, save them in bfloat16 and remove quantization_config "
                "from config.json"
            )
        slices[name] = _scaled(source, name, values, stored[scale], blocks)
        slices[scale] = None
        kinds.add(str(DTYPES[values.get_dtype()]).removeprefix("torch."))
    if alone := [
        name for name in stored
        if name.endswith(("weight_scale_inv", "weight_scale")) and name not in slices
    ]:  # fmt: skip
        raise ArchiveError(
            f"{source.files.location}: {some(alone)} has no weight of 8 bits beside it; copy the "
            "checkpoint again"
        )
    if not kinds:
        raise ArchiveError(
            f"{source.files.location}: no 8-bit weight is there, though config.json says so: "
            "remove quantization_config"
        )
    return slices, " and ".join(sorted(kinds))


def _scaled(source: Source, name: str, values: Slice, scales: Slice, blocks: Blocks | str) -> Slice:
    """Values and their scales, once their shapes are seen to fit."""
    shape, grid = values.get_shape(), scales.get_shape()
    if scales.get_dtype() not in ("F32", "BF16", "F16", "F8_E8M0", "U8"):
        raise ArchiveError(f"{source.files.location}: {name} has scales of {scales.get_dtype()}")
    if len(shape) >= 2:
        *lead, rows, columns = shape
        single = [*lead, 1, 1]
        if math.prod(grid) == math.prod(single) and grid in ([], [1], [1, 1], lead, single):
            return _Scaled(values, scales, tuple(single), (rows, columns), _dtype(source))
        if grid in ([*lead, rows], [*lead, rows, 1]) and blocks == "none":
            return _Scaled(values, scales, (*lead, rows, 1), (1, columns), _dtype(source))
        if not isinstance(blocks, str):
            tall, wide = blocks
            if grid == [*lead, -(-rows // tall), -(-columns // wide)]:
                return _Scaled(values, scales, tuple(grid), blocks, _dtype(source))
    said = "none" if isinstance(blocks, str) else f"blocks of {list(blocks)}"
    raise ArchiveError(
        f"{source.files.location}: {name} of shape {shape} has scales of shape {grid}, config.json "
        f"says {said}"
    )


def _mxfp4(source: Source) -> dict[str, Slice | None]:
    """Of all experts the matrices that their blocks and scales are."""
    stored = set(source.names())
    slices: dict[str, Slice | None] = {}
    for name in sorted(stored):
        own, _, part = name.rpartition("_")
        if part not in ("blocks", "scales"):
            continue
        if not {f"{own}_blocks", f"{own}_scales"} <= stored:
            other = "scales" if part == "blocks" else "blocks"
            raise ArchiveError(
                f"{source.files.location}: {name} is without {own}_{other}; copy the checkpoint "
                "again"
            )
        if own in stored:
            raise ArchiveError(f"{source.files.location}: {own} stands beside its {part}")
        blocks, scales = source.slice(f"{own}_blocks"), source.slice(f"{own}_scales")
        shape, grid = blocks.get_shape(), scales.get_shape()
        kinds = {blocks.get_dtype(), scales.get_dtype()}
        if len(shape) != 4 or shape[3] != _GROUP // 2 or grid != shape[:3] or kinds != {"U8"}:
            raise ArchiveError(
                f"{source.files.location}: {own} has blocks of shape {shape} and scales of shape "
                f"{grid}, {' and '.join(sorted(kinds))}; wanted U8 [experts, rows, groups, 16] and "
                "the same without the last"
            )
        slices[own] = _Packed(blocks, scales, _dtype(source))
        slices[name] = None
    return slices


def _dtype(source: Source) -> str:
    """That the model is in once scales are applied, by its configuration."""
    said = getattr(source.config.get_text_config(decoder=True), "dtype", None)
    name = NAMES.get(said, "") if isinstance(said, torch.dtype) else ""
    return name if name in ("F32", "BF16", "F16") else "BF16"
