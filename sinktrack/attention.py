"""Exact attention to position zero (P0), without a ``T x T`` matrix.

One fused attention call gives the block's output and the log-sum-exp of every query's scores; the
probability on P0 is then ``exp(scale * q_i . k_0 - logsumexp_i)``.

Accuracy against softmax in float64 of the same inputs, with ``s`` the largest of the scores' sums
of absolute terms ``scale * sum_d |q_d k_d|``, which bounds what rounding can do to a score:

* float32: ``1e-6 + 2**-22 * s`` at most; 1e-6 for the scores of ordinary models.
* bfloat16 and float16: products of two such numbers are exact in float32, so the scores are as good
  as in float32, and only the fused kernel's own exponential adds to that. The CPU kernel evaluates
  it for these types to about ``2**-14`` relative, so ``2**-13`` absolute bounds the probability.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sinktrack.errors import MeasurementError

_CHUNK_SCORES = 2**22
"""Scores held at a time where no fused call returns a log-sum-exp (16 MiB in float32)."""
_NOTHING = -80.0
"""Log-probability of a masked key at most; float32 has no smaller normal ``exp``."""


class Attended(NamedTuple):
    """Who attends to P0 in one attention call."""

    p0: Tensor
    """``[B, H, T]`` float32: probability of query ``i`` on key 0; 0 where P0 is out of sight."""
    visible: Tensor
    """``[B or 1, T]`` bool: may query ``i`` see P0?"""
    sink: Tensor | None
    """``[B, H, T]`` float32: probability on a learned sink logit, which has no position."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Attended]:
    """Attend causally and return the exact probability on P0 beside the output.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, G, T, D]``; each of the ``G`` groups serves ``H / G`` neighbouring heads.
        value: ``[B, G, T, Dv]``.
        scale: factor on the scores.
        mask: ``[B or 1, H or 1, T, T]``, causality included: boolean, true where a query may see a
            key, or a number to add to the scaled score. None is plain causal.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        sinks: ``[H]`` learned logits that join the denominator of every query (gpt-oss).

    Returns:
        The output ``[B, H, T, Dv]`` in the dtype of the values, and the attention to P0.

    Raises:
        MeasurementError: shapes that do not fit together, as with a key cache.
    """
    heads, length = query.shape[1:3]
    if key.shape[2] != length or key.shape[:3] != value.shape[:3] or heads % key.shape[1]:
        raise MeasurementError(
            f"attention over queries {tuple(query.shape)}, keys {tuple(key.shape)} and values "
            f"{tuple(value.shape)}: the probe needs as many keys as queries (no cache) and a whole "
            "number of query heads per key head"
        )
    if mask is not None and length > 1 and _sees_later(mask):
        raise MeasurementError("attention that is not causal has no P0 sink")
    first = key[:, :, 0].float().repeat_interleave(heads // key.shape[1], dim=1)
    score = torch.einsum("bhtd,bhd->bht", query.float(), first).mul_(scale)
    if softcap is not None:
        score = torch.tanh(score / softcap) * softcap
        output, lse = _chunked(query, key, value, scale, mask, softcap)
    else:
        output, lse = _fused(query, key, value, scale, mask)
    visible = torch.ones(1, length, dtype=torch.bool, device=query.device)
    if mask is not None:
        column = mask[..., 0]
        if column.dtype == torch.bool:
            seen = column
        else:
            seen = column > torch.finfo(column.dtype).min / 2
            score = score + column.masked_fill(~seen, 0.0)
        visible = seen[:, 0]
        score = score.masked_fill(~seen, -torch.inf)
    sink = None
    if sinks is not None:  # one more term of the denominator, after the fact
        total = torch.logaddexp(lse, sinks.float()[:, None])
        output = output * (lse - total).exp_().unsqueeze(-1).to(output.dtype)
        sink = (sinks.float()[:, None] - total).exp_()
        lse = total
    return output, Attended(score.sub_(lse).exp_(), visible, sink)


def _sees_later(mask: Tensor) -> bool:
    """Does the mask let a query see a later key?"""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool(seen.triu(1).any())


def read_scores(scores: Tensor) -> Attended:
    """Attention to P0 from the scores ``[B, H, T, T]`` of a model that holds them anyway.

    Args:
        scores: scaled, with biases and mask added, as they enter the softmax.

    Raises:
        MeasurementError: not causal, or heads that differ in which queries see P0.
    """
    column = scores[..., 0]
    visible = column > torch.finfo(scores.dtype).min / 2
    if not bool((visible == visible[:, :1]).all()):
        raise MeasurementError("its heads differ in which queries see P0; not supported")
    wide = scores.float()
    total = wide.logsumexp(-1)
    past = torch.ones(wide.shape[-2:], dtype=torch.bool, device=wide.device).tril()
    if bool(((wide - total[..., None]).masked_fill_(past, -torch.inf) > _NOTHING).any()):
        raise MeasurementError("attention that is not causal has no P0 sink")
    p0 = (column.float() - total).exp_().masked_fill_(~visible, 0.0)
    return Attended(p0, visible[:, 0], None)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, T, Dv]`` and log-sum-exp ``[B, H, T]`` from the device's fused kernel."""
    device, dtype, width = query.device.type, query.dtype, value.shape[-1]
    half = dtype in (torch.bfloat16, torch.float16)
    wide = value  # latent attention: the kernels want values as wide as the keys
    if width < query.shape[-1]:
        wide = pad(value, (0, query.shape[-1] - width))
    if width > query.shape[-1]:
        return _chunked(query, key, value, scale, mask)
    if device == "cpu" and (half or dtype == torch.float32):
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, wide, 0.0, mask is None, attn_mask=_additive(mask, dtype), scale=scale
        )
    elif device == "cuda" and half and mask is None and query.shape[-1] <= 256:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            query, *_repeat(query, key, wide), 0.0, True, False, scale=scale
        )[:2]
    else:
        return _chunked(query, key, value, scale, mask)
    return output[..., :width], lse[..., : query.shape[2]]


def _chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by a few queries at a time, for any device, dtype and soft cap."""
    key, value = _repeat(query, key, value)
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, heads, length, value.shape[-1])
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    rows = max(1, _CHUNK_SCORES // (batch * heads * length))
    wide = torch.promote_types(query.dtype, torch.float32)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        scores = query[:, :, start:stop].to(wide) @ key[:, :, :stop].to(wide).mT * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is None:
            seen = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device)
            scores = scores.masked_fill_(~seen.tril(start), -torch.inf)
        elif mask.dtype == torch.bool:
            scores = scores.masked_fill_(~mask[:, :, start:stop, :stop], -torch.inf)
        else:
            scores = scores + mask[:, :, start:stop, :stop]
        total = scores.logsumexp(-1, keepdim=True)
        lse[:, :, start:stop] = total[..., 0]
        weights = (scores - total).exp_().to(value.dtype)
        output[:, :, start:stop] = weights @ value[:, :, :stop]
    return output, lse


def _repeat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype == dtype:
        return mask
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
