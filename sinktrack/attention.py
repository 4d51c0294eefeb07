"""Exact attention to position zero (P0), without a ``T x T`` matrix.

One fused attention call gives the block's output and the log-sum-exp of every query's scores; the
probability on P0 is then ``exp(scale * q_i . k_0 - logsumexp_i)``. Where no kernel gives these, or
where squared probabilities are wanted too, scores are made for a few queries at a time.

Accuracy against softmax in float64 of the same inputs, with ``s`` the largest of the scores' sums
of absolute terms ``scale * sum_d |q_d k_d|``, which bounds what rounding can do to a score:

* float32: ``1e-6 + 2**-22 * s`` at most; 1e-6 for the scores of ordinary models.
* bfloat16 and float16: products of two such numbers are exact in float32, so the scores are as good
  as in float32, and only the fused kernel's own exponential adds to that. The CPU kernel evaluates
  it for these types to about ``2**-14`` relative, so ``2**-13`` absolute bounds the probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from sinktrack.errors import MeasurementError

_CHUNK_SCORES = 2**22
"""Scores held at a time where no fused call returns a log-sum-exp (16 MiB in float32)."""
_CACHED_SCORES = 2**20
"""The same on a CPU, whose caches hold them; more of many heads and long sequences."""
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
    with_mixing: bool = False,
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
        with_mixing: will `Attended.mixing` be asked for? Then it costs less.

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
    of = _Scores(scale, mask, softcap, sinks, allow_future_keys)
    wanted = [torch.zeros(1, dtype=torch.int64, device=key.device)]
    if second_key is not None:
        second_key = second_key.to(key.device)
        wanted.append(second_key)
    by_tiles = query.device.type == "cpu" and query.dtype == torch.float32  # a second call is dear
    fused = None
    if softcap is None and not (with_mixing and by_tiles):
        fused = _fused(query, key, value, scale, mask)
    if fused is None:
        output, on, sink, squares = _tiled(query, key, value, of, second_key)
    else:
        output, lse = fused
        output, on, sink, lse = _from_kernel(query, key, output, lse, of, wanted)

    def mixing() -> Tensor:
        if fused is None:
            return squares
        if by_tiles:
            return _tiled(query, key, value, of)[3]
        doubled = mask if mask is None or mask.dtype == torch.bool else mask * 2
        again = _fused(query, key, value, 2 * scale, doubled)
        assert again is not None
        return (again[1] - 2 * lse).exp_().masked_fill_(lse == -torch.inf, 0.0)

    def onto(keys: Tensor) -> Tensor:
        marked = keys[:, None, :, None].float().expand(-1, key.shape[1], -1, 1)
        received, _, _, squared = _tiled(query.float(), key.float(), marked, of)
        return received[..., 0].masked_fill_(squared.isnan(), torch.nan)

    counts = _visible_keys(mask if mask is None else _seen_of(mask), query)
    attended = []
    for keys, probability in zip(wanted, on, strict=True):
        visible = _visible(keys, mask, query)
        probability.masked_fill_(~visible, 0.0)
        attended.append(Attended(probability, visible[:, 0], sink, counts, value, mixing, onto))
    if second_key is not None:
        return output, replace(attended[0], second_key=replace(attended[1], sink=None))
    return output, attended[0]


@dataclass(frozen=True)
class _Scores:
    """What becomes of the products of queries and keys, as `attend` takes it."""

    scale: float
    mask: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    allow_future_keys: bool


def _visible(keys: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """``[B or 1, H or 1, T]`` bool: which queries see a key of each sequence, ``[B or 1]``."""
    if mask is None:
        return torch.arange(like.shape[2], device=like.device) >= keys[:, None, None]
    rows = torch.arange(max(len(mask), len(keys)), device=like.device)
    return _seen_of(mask.expand(len(rows), -1, -1, -1)[rows, :, :, keys])


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
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Output ``[B, H, T, Dv]`` and log-sum-exp ``[B, H, T]`` from the device's fused kernel.

    None where it has none.
    """
    device, dtype, width = query.device.type, query.dtype, value.shape[-1]
    half = dtype in (torch.bfloat16, torch.float16)
    wide = value  # latent attention: the kernels want values as wide as the keys
    if width < query.shape[-1]:
        wide = pad(value, (0, query.shape[-1] - width))
    if width > query.shape[-1]:
        return None
    if device == "cpu" and (half or dtype == torch.float32):
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, wide, 0.0, mask is None, attn_mask=_additive(mask, dtype), scale=scale
        )
    elif device == "cuda" and half and mask is None and query.shape[-1] <= 256:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            query, *_repeat(query, key, wide), 0.0, True, False, scale=scale
        )[:2]
    else:
        return None
    lse = lse[..., : query.shape[2]]
    if mask is not None:  # of a query that sees nothing the kernel says 0
        lse = lse.masked_fill(~_seen_of(mask).any(-1), -torch.inf)
    # the kernels make numbers of nan and inf
    lse = lse.masked_fill(~_finite(query, key)[..., None], torch.nan)
    return output[..., :width], lse


def _from_kernel(
    query: Tensor, key: Tensor, output: Tensor, lse: Tensor, of: _Scores, wanted: list[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor]:
    """What a kernel's output and log-sum-exp tell, as of `_tiled`; and the whole log-sum-exp."""
    sink = None
    if of.sinks is not None:  # one more term of the denominator, after the fact
        total = torch.logaddexp(lse, of.sinks.float()[:, None])
        output = output * (lse - total).exp_().unsqueeze(-1).to(output.dtype)
        sink = (of.sinks.float()[:, None] - total).exp_()
        lse = total
    rows = torch.arange(len(key), device=key.device)
    on = []
    for keys in wanted:
        chosen = key[rows, :, keys].float().repeat_interleave(query.shape[1] // key.shape[1], 1)
        score = torch.einsum("bhtd,bhd->bht", query.float(), chosen).mul_(of.scale)
        if of.mask is not None and of.mask.dtype != torch.bool:
            column = of.mask.expand(len(rows), -1, -1, -1)[rows, :, :, keys]
            score = score + column.to(query.dtype)  # as the kernel takes it
        on.append(score.sub_(lse).exp_())
    return output, on, sink, lse


@torch.no_grad()
def _tiled(
    query: Tensor, key: Tensor, value: Tensor, of: _Scores, second_key: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor]:
    """By a few queries of a few heads at a time, for any device, dtype and soft cap.

    Args:
        query: and the others as `attend` takes them.
        key: see above.
        value: see above.
        of: what becomes of their products.
        second_key: of each sequence, ``[B]``.

    Returns:
        Output ``[B, H, T, Dv]``; float32 ``[B, H, T]`` the probability on P0, and on the second
        key, that on a sink logit, and the sum of squared probabilities.
    """
    batch, heads, length, _ = query.shape
    each = heads // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    scaled, value = (key.to(wide) * of.scale).contiguous(), value.contiguous()
    output = value.new_empty(batch, heads, length, value.shape[-1])
    squares = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    on = [torch.empty_like(squares) for _ in range(1 if second_key is None else 2)]
    lse = None if of.sinks is None else torch.empty_like(squares)
    whole, blind = of.allow_future_keys and of.mask is not None, None
    if of.mask is not None and of.mask.dtype != torch.bool:
        blind = ~_seen_of(of.mask).any(-1)
        whole = whole or bool(blind.any())  # such a query takes the mean of all keys' values
    tiles, most = _tiles(query, each)
    room = torch.empty(most, dtype=wide, device=query.device)
    plain = all(type(x) is Tensor for x in (query, key, value))
    # Who follows a model would ask of every operation.
    with torch._C.DisableTorchFunction() if plain else nullcontext():
        for at, shared in tiles:
            sequences, _, queries = at
            last = length if whole else queries.stop
            keys = scaled[sequences, shared, :last].flatten(0, 1)
            asks = query[at].to(wide)
            flat = room[: asks[..., 0].numel() * last].view(len(keys), -1, last)
            torch.bmm(asks.reshape(len(keys), -1, asks.shape[-1]), keys.mT, out=flat)
            scores = flat.view(*asks.shape[:3], last)
            _look(scores, of, at)
            largest = scores.amax(-1) if of.mask is not None or lse is not None else None
            torch.softmax(flat, -1, out=flat)
            if largest is not None:
                nothing = largest == -torch.inf
                scores.masked_fill_(nothing[..., None], 0.0)
                if lse is not None:
                    lse[at] = torch.where(nothing, largest, largest - scores.amax(-1).log_())
            squares[at] = torch.linalg.vector_norm(scores, dim=-1)
            on[0][at] = scores[..., 0]
            if second_key is not None:
                place = second_key[sequences, None, None, None]
                found = scores.gather(-1, place.clamp(max=last - 1).expand(*asks.shape[:3], 1))
                on[1][at] = found.masked_fill_(place >= last, 0.0)[..., 0]
            values = value[sequences, shared, :last].flatten(0, 1)
            output[at] = torch.bmm(flat.to(value.dtype), values).view(*asks.shape[:3], -1)
    squares.square_()
    if blind is not None:
        squares.masked_fill_(blind, 0.0)
    finite = _finite(query, key)[..., None]
    sink = None
    if of.sinks is not None and lse is not None:
        logits = of.sinks.float()[:, None]
        kept, sink = (lse - logits).sigmoid_(), (logits - lse).sigmoid_()
        output *= kept[..., None].to(output.dtype)
        squares *= kept.square()
        for told in on:
            told *= kept
        sink.masked_fill_(~finite, torch.nan)
    for told in (squares, *on):
        told.masked_fill_(~finite, torch.nan)
    return output, on, sink, squares


def _tiles(
    query: Tensor, each: int
) -> tuple[Iterator[tuple[tuple[slice, slice, slice], slice]], int]:
    """Sequences, heads and queries of tiles, each with its key heads; and the largest's scores.

    Args:
        query: ``[B, H, T, D]``.
        each: how many heads a key head serves.
    """
    batch, heads, length, _ = query.shape
    groups = heads // each
    held = _CACHED_SCORES if query.device.type == "cpu" else _CHUNK_SCORES
    rows = min(length, max(16, min(256 // each, length // 8)), -(-_CHUNK_SCORES // (each * length)))
    pairs = max(1, held // (each * rows * length))
    some, share = (min(batch, pairs // groups), groups) if pairs >= groups else (1, pairs)

    def parts(count: int, at_once: int) -> list[slice]:
        return [slice(at, min(at + at_once, count)) for at in range(0, count, at_once)]

    tiles = (
        ((sequences, slice(shared.start * each, shared.stop * each), queries), shared)
        for sequences, shared, queries in product(
            parts(batch, some), parts(groups, share), parts(length, rows)
        )
    )
    return tiles, some * share * each * rows * length


def _look(scores: Tensor, of: _Scores, at: tuple[slice, slice, slice]) -> None:
    """Turn a tile's products ``[b, h, t, keys]`` into what enters the softmax, in place."""
    if of.softcap is not None:
        scores.div_(of.softcap).tanh_().mul_(of.softcap)
    sequences, heads, queries = at
    count = queries.stop - queries.start
    if of.mask is None:
        later = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu_(1)
        scores[..., queries.start :].masked_fill_(later, -torch.inf)
        return
    mask = of.mask[sequences if len(of.mask) > 1 else slice(None)]
    mask = mask[:, heads if mask.shape[1] > 1 else slice(None), queries, : scores.shape[-1]]
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores.add_(mask)


def _finite(query: Tensor, key: Tensor) -> Tensor:
    """bool ``[B, H]``: are queries and keys of a head numbers? Extremes propagate nan."""
    ask, keys = (
        x.amax(-2).amax(-1).isfinite() & x.amin(-2).amin(-1).isfinite() for x in (query, key)
    )  # a dimension at a time is three times faster
    return ask & keys.repeat_interleave(query.shape[1] // key.shape[1], 1)


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
