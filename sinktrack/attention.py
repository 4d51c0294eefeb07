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

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from sinktrack.errors import MeasurementError

_CHUNK_SCORES = 2**22
"""Scores held at a time where no fused call returns a log-sum-exp (16 MiB in float32)."""
_CACHED_SCORES = 2**18
"""The same of a sum over the keys alone, which the cache of a core holds."""
_NOTHING = -80.0
"""Log-probability of a masked key at most; float32 has no smaller normal ``exp``."""


_MASKED = -5000.0
"""Log-probability below which a score is a mask's, also where the mask was scaled or is finite."""


@dataclass(frozen=True)
class Attended:
    """Who attends to P0 in one attention call, of ``H`` heads and ``G`` key heads."""

    p0: Tensor
    """``[B, H, T]`` float32: probability of query ``i`` on key 0; 0 where P0 is out of sight."""
    visible: Tensor
    """``[B or 1, T]`` bool: may query ``i`` see P0?"""
    sink: Tensor | None
    """``[B, H, T]`` float32: probability on a learned sink logit, which has no position."""
    keys: Tensor
    """``[B or 1, T]``: how many keys query ``i`` sees; where heads differ, their harmonic mean."""
    value: Tensor | None
    """``[B, G, T, Dv]``: the value vectors; None where they are not shown."""
    mixing: Callable[[], Tensor]
    """Computes ``[B, H, T]`` float32: ``sum_j A_ij^2`` of query ``i`` over the keys."""
    onto: Callable[[Tensor], Tensor]
    """Computes ``[B, H, T]`` float32: probability of query ``i`` on a set of keys, ``[B, T]``
    bool, its own included."""
    second_key: Attended | None = None
    """The same for another key of each sequence, where one was asked for."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    second_key: Tensor | None = None,
    allow_future_keys: bool = False,
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
        second_key: ``[B]`` int64, a further key of each sequence to tell the attention to.
        allow_future_keys: may the mask let a query see later keys?

    Returns:
        The output ``[B, H, T, Dv]`` in the dtype of the values, and the attention to P0; nan for a
        head whose queries or keys are not finite, whatever the output.

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
    if mask is not None and not allow_future_keys and _sees_later(mask):
        raise MeasurementError("attention that is not causal has no P0 sink")
    squares: Tensor | None
    if softcap is not None:
        output, lse, squares = _chunked(query, key, value, scale, mask, softcap, allow_future_keys)
    else:
        output, lse, squares = _fused(query, key, value, scale, mask, allow_future_keys)
    own = lse

    def mixing() -> Tensor:
        squared = squares
        if squared is None:
            squared = _squares(query, key, value, own, scale, mask, allow_future_keys)
        return squared * (own - lse).mul_(2).exp_()

    def onto(keys: Tensor) -> Tensor:
        marked = keys[:, None, :, None].float().expand(-1, key.shape[1], -1, 1)
        wide = query.float(), key.float(), marked
        if softcap is not None:
            received, *_ = _chunked(*wide, scale, mask, softcap, allow_future_keys)
        else:
            received, *_ = _fused(*wide, scale, mask, allow_future_keys)
        return received[..., 0] * (own - lse).exp()

    sink = None
    if sinks is not None:  # one more term of the denominator, after the fact
        total = torch.logaddexp(lse, sinks.float()[:, None])
        output = output * (lse - total).exp_().unsqueeze(-1).to(output.dtype)
        sink = (sinks.float()[:, None] - total).exp_()
        lse = total

    def on(keys: Tensor, sink: Tensor | None = None) -> Attended:
        rows = torch.arange(len(key), device=key.device)
        chosen = key[rows, :, keys].float().repeat_interleave(heads // key.shape[1], dim=1)
        score = torch.einsum("bhtd,bhd->bht", query.float(), chosen).mul_(scale)
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        if mask is None:
            visible = torch.arange(length, device=key.device) >= keys[:, None, None]
        else:
            rows = rows[: max(len(mask), len(keys))]
            column = mask.expand(len(rows), -1, -1, -1)[rows, :, :, keys]
            visible = column if column.dtype == torch.bool else _is_seen(column)
            if column.dtype != torch.bool:
                score = score + column
        score = score.masked_fill(~visible, -torch.inf)
        p0 = score.sub_(lse).exp_()
        keys_seen = _visible_keys(mask if mask is None else _seen_of(mask), query)
        return Attended(p0, visible[:, 0], sink, keys_seen, value, mixing, onto)

    attended = on(torch.zeros(1, dtype=torch.int64, device=key.device), sink)
    if second_key is not None:
        attended = replace(attended, second_key=on(second_key.to(key.device)))
    return output, attended


def edit_mask(
    mask: Tensor | None, change: Callable[[Tensor], Tensor | None], like: Tensor
) -> Tensor | None:
    """Change which keys the queries see.

    Args:
        mask: as `attend` takes it.
        change: gets ``[B or 1, H or 1, T, T]`` bool; returns another, or None to leave it.
        like: ``[B, H, T, D]``, the queries.

    Returns:
        The mask to attend with: ``mask`` itself where nothing was changed; else bool, or of the
        dtype of a ``mask`` of numbers, with its lowest at hidden keys.
    """
    if mask is None:
        length = like.shape[2]
        seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=like.device).tril()
    else:
        seen = _seen_of(mask)
    wanted = change(seen)
    if wanted is None or mask is None or mask.dtype == torch.bool:
        return mask if wanted is None else wanted
    return mask.masked_fill(~seen, 0.0).masked_fill(~wanted, torch.finfo(mask.dtype).min)


def _visible_keys(seen: Tensor | None, like: Tensor) -> Tensor:
    """``[B or 1, T]``: how many keys each query sees; the heads' harmonic mean."""
    if seen is None:
        return torch.arange(1, like.shape[2] + 1, device=like.device)[None]
    return 1 / (1 / seen.sum(-1).clamp(min=1)).mean(1)


def _is_seen(mask: Tensor) -> Tensor:
    return mask > torch.finfo(mask.dtype).min / 2


def _seen_of(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else _is_seen(mask)


def _sees_later(mask: Tensor) -> bool:
    """Does the mask let a query see a later key?"""
    return bool(_seen_of(mask).triu(1).any())


def read_scores(
    scores: Tensor, second_key: Tensor | None = None, allow_future_keys: bool = False
) -> Attended:
    """Attention to P0 from the scores ``[B, H, T, T]`` of a model that holds them anyway.

    Args:
        scores: scaled, with biases and mask added, as they enter the softmax.
        second_key: as in `attend`.
        allow_future_keys: may a query see later keys?

    Raises:
        MeasurementError: not causal, or heads that differ in which queries see P0.
    """
    wide = scores.float()
    total = wide.logsumexp(-1)
    logs = wide - total[..., None]
    seen = _is_seen(scores) & (logs > _MASKED)
    past = torch.ones(wide.shape[-2:], dtype=torch.bool, device=wide.device).tril()
    ahead = logs.masked_fill_(past, -torch.inf) > _NOTHING
    if not allow_future_keys and bool(ahead.any()):
        raise MeasurementError("attention that is not causal has no P0 sink")

    def on(keys: Tensor) -> Attended:
        column = scores[torch.arange(len(scores), device=scores.device), :, :, keys]
        visible = seen[torch.arange(len(seen), device=seen.device), :, :, keys]
        if not bool((visible == visible[:, :1]).all()):
            raise MeasurementError("its heads differ in which queries see P0; not supported")
        p0 = (column.float() - total).exp_().masked_fill_(~visible, 0.0)
        return Attended(p0, visible[:, 0], None, _visible_keys(seen, scores), None, mixing, onto)

    def mixing() -> Tensor:
        return ((2 * wide).logsumexp(-1) - 2 * total).exp_()

    def onto(keys: Tensor) -> Tensor:
        weights = (wide - total[..., None]).exp()
        return torch.einsum("bhij,bj->bhi", weights, keys.float())

    attended = on(torch.zeros(len(scores), dtype=torch.int64, device=scores.device))
    return (
        attended
        if second_key is None
        else replace(attended, second_key=on(second_key.to(scores.device)))
    )


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    allow_future_keys: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output ``[B, H, T, Dv]`` and log-sum-exp ``[B, H, T]`` from the device's fused kernel.

    Where it has none, as of `_chunked`.
    """
    device, dtype, width = query.device.type, query.dtype, value.shape[-1]
    half = dtype in (torch.bfloat16, torch.float16)
    wide = value  # latent attention: the kernels want values as wide as the keys
    if width < query.shape[-1]:
        wide = pad(value, (0, query.shape[-1] - width))
    if width > query.shape[-1]:
        return _chunked(query, key, value, scale, mask, None, allow_future_keys)
    if device == "cpu" and (half or dtype == torch.float32):
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, wide, 0.0, mask is None, attn_mask=_additive(mask, dtype), scale=scale
        )
    elif device == "cuda" and half and mask is None and query.shape[-1] <= 256:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            query, *_repeat(query, key, wide), 0.0, True, False, scale=scale
        )[:2]
    else:
        return _chunked(query, key, value, scale, mask, None, allow_future_keys)
    finite = _finite(query) & _finite(key).repeat_interleave(query.shape[1] // key.shape[1], 1)
    lse = lse.masked_fill(~finite[..., None], torch.nan)  # the kernels make numbers of nan and inf
    return output[..., :width], lse[..., : query.shape[2]], None


def _squares(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    allow_future_keys: bool,
) -> Tensor:
    """``[B, H, T]``: the sum of squared probabilities, where a fused kernel gave ``lse``."""
    if query.device.type != "cpu" or query.dtype != torch.float32:
        if mask is not None and mask.dtype != torch.bool:
            mask = mask * 2
        _, doubled, _ = _fused(query, key, value, 2 * scale, mask, allow_future_keys)
        return (doubled - 2 * lse).exp_()
    batch, heads, length, _ = query.shape
    groups = key.shape[1]
    each = heads // groups
    minus = torch.cat([query * (2 * scale), lse[..., None] * -2], -1)  # one product for both
    key = torch.cat([key, key.new_ones(*key.shape[:3], 1)], -1)
    result = torch.empty_like(lse)
    rows = min(length, max(16, _CACHED_SCORES // (each * length)))
    room = query.new_empty(each * rows * length)
    for sequence, group, start in product(range(batch), range(groups), range(0, length, rows)):
        stop = min(start + rows, length)
        last = length if allow_future_keys else stop
        own = slice(group * each, (group + 1) * each)
        some = minus[sequence, own, start:stop].flatten(0, 1)
        scores = room[: len(some) * last].view(len(some), last)
        torch.mm(some, key[sequence, group, :last].mT, out=scores)
        scores = scores.view(each, stop - start, last)
        seen = None
        if mask is not None:
            seen = mask[min(sequence, len(mask) - 1), :, start:stop, :last]
            seen = seen[own] if len(seen) > 1 else seen
        if seen is None:
            scores.exp_()[..., start:].tril_()
        elif seen.dtype == torch.bool:
            scores.masked_fill_(~seen, -torch.inf).exp_()
        else:
            scores.add_(seen, alpha=2).exp_()
        result[sequence, own, start:stop] = scores.sum(-1)
    return result


def _finite(value: Tensor) -> Tensor:
    """bool ``[B, H]``; both extremes propagate nan, and need no copy."""
    return value.amax((-2, -1)).isfinite() & value.amin((-2, -1)).isfinite()


def _chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float | None = None,
    allow_future_keys: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """By a few queries at a time, for any device, dtype and soft cap.

    Returns:
        Output ``[B, H, T, Dv]``; of ``[B, H, T]`` float32 the log-sum-exp, and the sum of squared
        probabilities.
    """
    key, value = _repeat(query, key, value)
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, heads, length, value.shape[-1])
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    squares = torch.empty_like(lse)
    rows = max(1, _CHUNK_SCORES // (batch * heads * length))
    wide = torch.promote_types(query.dtype, torch.float32)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        last = length if allow_future_keys else stop
        scores = query[:, :, start:stop].to(wide) @ key[:, :, :last].to(wide).mT * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is None:
            seen = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device)
            scores = scores.masked_fill_(~seen.tril(start), -torch.inf)
        elif mask.dtype == torch.bool:
            scores = scores.masked_fill_(~mask[:, :, start:stop, :last], -torch.inf)
        else:
            scores = scores + mask[:, :, start:stop, :last]
        total = scores.logsumexp(-1, keepdim=True)
        lse[:, :, start:stop] = total[..., 0]
        weights = (scores - total).exp_()
        squares[:, :, start:stop] = torch.linalg.vector_norm(weights, dim=-1).square_()
        output[:, :, start:stop] = weights.to(value.dtype) @ value[:, :, :last]
    return output, lse, squares


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
