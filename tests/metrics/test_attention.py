"""Attention to P0 against softmax written out in float64."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sinktrack import attention
from sinktrack.attention import attend, edit_mask, read_scores
from sinktrack.errors import MeasurementError


def softmax_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, all probabilities, and the largest sum of a score's absolute terms, in float64."""
    heads, length = query.shape[1], query.shape[2]
    key = torch.stack([key[:, h * key.shape[1] // heads] for h in range(heads)], 1).double()
    value = torch.stack([value[:, h * value.shape[1] // heads] for h in range(heads)], 1).double()
    scores = torch.einsum("bhid,bhjd->bhij", query.double(), key) * scale
    largest = torch.einsum("bhid,bhjd->bhij", query.double().abs(), key.abs()).max() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        scores = torch.where(mask, scores, -math.inf)
    else:
        scores = scores + mask.double()
    extra = torch.full((*scores.shape[:3], 1), -math.inf, dtype=torch.float64)
    if sinks is not None:
        extra = sinks.double()[None, :, None, None].expand_as(extra)
    probabilities = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    return probabilities @ value, probabilities, largest


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "groups": st.integers(1, 3),
        "per_group": st.integers(1, 4),
        "length": st.integers(1, 70),
        "width": st.integers(1, 40),
        "value_width": st.integers(1, 40),
        "scale": st.floats(0.01, 2.0),
        "spread": st.floats(0.1, 3.0),
        "window": st.one_of(st.none(), st.integers(1, 20)),
        "seed": st.integers(0, 2**31),
    }
)


def draw(shape: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(shape["seed"])

    def normal(heads: int, width: int) -> Tensor:
        size = (shape["batch"], heads, shape["length"], width)
        spread: float = shape["spread"]
        return (torch.randn(size, generator=generator) * spread).to(dtype)

    query = normal(shape["groups"] * shape["per_group"], shape["width"])
    key = normal(shape["groups"], shape["width"])
    value = normal(shape["groups"], shape["value_width"])
    mask = None
    if shape["window"] is not None:
        distance = torch.arange(shape["length"])[:, None] - torch.arange(shape["length"])
        mask = ((distance >= 0) & (distance < shape["window"]))[None, None]
    return query, key, value, mask


def small_tiles(scores: int = 64) -> Any:
    """Several tiles of sequences, heads and queries, as large models have them."""
    return patch.multiple(attention, _CHUNK_SCORES=scores, _CACHED_SCORES=scores)


@given(shapes, st.booleans(), st.sampled_from([64, 4096]))
@settings(max_examples=150, deadline=None)
def test_float32_equals_softmax(shape: dict[str, Any], with_mixing: bool, scores: int) -> None:
    query, key, value, mask = draw(shape, torch.float32)
    with small_tiles(scores):
        output, got = attend(
            query, key, value, scale=shape["scale"], mask=mask, with_mixing=with_mixing
        )
    wanted, probabilities, largest = softmax_reference(query, key, value, shape["scale"], mask)
    bound = 1e-6 + 2**-22 * float(largest)
    assert (got.p0.double() - probabilities[..., 0]).abs().max() <= bound
    torch.testing.assert_close(output.double(), wanted, atol=1e-4, rtol=1e-4)
    with small_tiles(scores):
        assert (got.mixing().double() - probabilities.square().sum(-1)).abs().max() <= 4 * bound


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_moderate_scores_are_within_a_millionth(shape: dict[str, Any]) -> None:
    shape = shape | {"scale": min(shape["scale"], 1 / math.sqrt(shape["width"])), "spread": 1.0}
    query, key, value, mask = draw(shape, torch.float32)
    _, got = attend(query, key, value, scale=shape["scale"], mask=mask)
    _, probabilities, _ = softmax_reference(query, key, value, shape["scale"], mask)
    assert (got.p0.double() - probabilities[..., 0]).abs().max() <= 1e-6


@given(shapes, st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=100, deadline=None)
def test_half_precision_is_within_its_bound(shape: dict[str, Any], dtype: torch.dtype) -> None:
    query, key, value, mask = draw(shape, dtype)
    _, got = attend(query, key, value, scale=shape["scale"], mask=mask)
    _, probabilities, largest = softmax_reference(query, key, value, shape["scale"], mask)
    bound = 2**-13 + 2**-22 * float(largest)
    assert (got.p0.double() - probabilities[..., 0]).abs().max() <= bound


@given(
    shapes, st.one_of(st.none(), st.floats(0.5, 50.0)), st.booleans(), st.booleans(), st.booleans()
)
@settings(max_examples=100, deadline=None)
def test_softcap_sinks_and_biases(
    shape: dict[str, Any],
    softcap: float | None,
    has_sinks: bool,
    has_bias: bool,
    with_mixing: bool,
) -> None:
    query, key, value, mask = draw(shape, torch.float32)
    generator = torch.Generator().manual_seed(shape["seed"] + 1)
    sinks = torch.randn(query.shape[1], generator=generator) if has_sinks else None
    if has_bias:
        length = query.shape[2]
        bias = torch.randn(1, query.shape[1], length, length, generator=generator)
        seen = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
        mask = bias.masked_fill(~seen, torch.finfo(torch.float32).min)
    with small_tiles():
        output, got = attend(
            query, key, value, scale=shape["scale"], mask=mask, softcap=softcap, sinks=sinks,
            with_mixing=with_mixing,
        )  # fmt: skip
    wanted, probabilities, largest = softmax_reference(
        query, key, value, shape["scale"], mask, softcap, sinks
    )
    bound = 2e-6 + 2**-21 * float(largest)
    assert (got.p0.double() - probabilities[..., 0]).abs().max() <= bound
    torch.testing.assert_close(output.double(), wanted, atol=2e-4, rtol=2e-4)
    squares = probabilities.square().sum(-1)
    assert (got.mixing().double() - squares).abs().max() <= 4 * bound
    if sinks is not None:
        assert got.sink is not None
        assert (got.sink.double() - (1 - probabilities.sum(-1))).abs().max() <= bound
    else:
        assert got.sink is None


@given(shapes, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_chunks_equal_softmax(shape: dict[str, Any], dtype: torch.dtype) -> None:
    query, key, value, mask = draw(shape, dtype)
    of = attention._Scores(shape["scale"], mask, None, None, False)
    with small_tiles():
        _, (p0,), _, squares = attention._tiled(query, key, value, of)
    _, probabilities, largest = softmax_reference(query, key, value, shape["scale"], mask)
    bound = 1e-6 + 2**-21 * float(largest)
    assert (p0 - probabilities[..., 0]).abs().max() <= bound
    assert (squares - probabilities.square().sum(-1)).abs().max() <= 4 * bound


def test_visible_queries_of_a_window() -> None:
    query, key, value, mask = draw(
        {"batch": 2, "groups": 1, "per_group": 2, "length": 9, "width": 4, "value_width": 4,
         "scale": 1.0, "spread": 1.0, "window": 3, "seed": 0},
        torch.float32,
    )  # fmt: skip
    _, got = attend(query, key, value, scale=1.0, mask=mask)
    assert got.visible.tolist() == [[True] * 3 + [False] * 6]
    assert (got.p0[..., 3:] == 0).all() and (got.p0[..., :3] > 0).all()


def test_a_key_cache_is_refused() -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(MeasurementError, match=r"\(1, 2, 3, 4\).*\(1, 2, 5, 4\).*no cache"):
        attend(query, key, key, scale=1.0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    for keys, values in ((key, key[:, :, :3]), (key, key[:, :1]), (query[:, :3], query[:, :3])):
        with pytest.raises(MeasurementError, match="a whole number of query heads per key head"):
            attend(query, keys, values, scale=1.0)


@pytest.mark.parametrize(
    ("dtype", "options", "most"),
    [(torch.float32, {}, 4 * 2048 * 16), (torch.bfloat16, {}, 4 * 2048 * 16),
     (torch.float32, {"softcap": 9.0}, 2**20), (torch.float32, {"with_mixing": True}, 2**20)],
)  # fmt: skip
def test_no_quadratic_matrix_is_held(
    dtype: torch.dtype, options: dict[str, Any], most: int
) -> None:
    """The largest tensor that any operation returns has far fewer than T * T numbers per head.

    With a soft cap, which no fused kernel knows, or squared probabilities, 4 MiB at most.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else (result,):
                if isinstance(value, Tensor):
                    self.numbers = max(self.numbers, value.numel())
            return result

    query = torch.randn(1, 4, 2048, 16).to(dtype)
    key = torch.randn(1, 2, 2048, 16).to(dtype)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        attend(query, key, key, scale=0.25, **options)
    assert largest.numbers <= most


@given(shapes, st.booleans(), st.booleans(), st.sampled_from([None, 4.0]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_other_sight(
    shape: dict[str, Any],
    additive: bool,
    allow_future_keys: bool,
    softcap: float | None,
    with_mixing: bool,
) -> None:
    """Hiding keys by `edit_mask`, or showing later ones, equals softmax over the others."""
    query, key, value, mask = draw(shape, torch.float32)
    length = shape["length"]
    seen = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask[0, 0]
    wanted = seen.clone()
    wanted[length // 2 :, 1 : length // 2 + 1] = False
    if allow_future_keys:
        wanted[0] = True
    wanted.fill_diagonal_(True)
    reference = wanted[None, None]
    if additive:  # a bias stays on what was seen before, and there is none on the rest
        bias = torch.linspace(-2, 2, length).where(seen, 0.0)[None, None]
        mask = bias.masked_fill(~seen, torch.finfo(torch.float32).min)
        reference = bias.masked_fill(~wanted, -math.inf)

    def change(now: Tensor) -> Tensor:
        assert now.dtype == torch.bool and torch.equal(now, seen[None, None])
        return wanted[None, None]

    changed = edit_mask(mask, change, query)
    options: dict[str, Any] = {
        "mask": changed,
        "allow_future_keys": allow_future_keys,
        "softcap": softcap,
        "with_mixing": with_mixing,
    }
    with small_tiles():
        output, got = attend(query, key, value, scale=shape["scale"], **options)
    wanted_output, probabilities, largest = softmax_reference(
        query, key, value, shape["scale"], reference, softcap
    )
    bound = 2e-6 + 2**-21 * float(largest)
    torch.testing.assert_close(output.double(), wanted_output, atol=2e-4, rtol=2e-4)
    assert (got.p0.double() - probabilities[..., 0]).abs().max() <= bound
    assert edit_mask(mask, lambda _: None, query) is mask


@given(shapes, st.booleans(), st.sampled_from([None, 4.0]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_another_position_beside_p0(
    shape: dict[str, Any], scored: bool, softcap: float | None, with_mixing: bool
) -> None:
    """Told by `attend`, or read off the scores of a model that holds them."""
    query, key, value, mask = draw(shape, torch.float32)
    batch, length = shape["batch"], shape["length"]
    second_key = torch.randint(
        length, (batch,), generator=torch.Generator().manual_seed(shape["seed"])
    )
    _, probabilities, largest = softmax_reference(query, key, value, shape["scale"], mask, softcap)
    if scored:
        seen = torch.ones(length, length).tril().bool() if mask is None else mask[0, 0]
        scores = probabilities.log().float() + torch.linspace(-3, 3, length)[:, None]
        found = read_scores(scores.masked_fill(~seen, -torch.inf), second_key)
    else:
        options: dict[str, Any] = {"mask": mask, "softcap": softcap, "second_key": second_key}
        with small_tiles():
            _, found = attend(
                query, key, value, scale=shape["scale"], with_mixing=with_mixing, **options
            )
    assert found.second_key is not None and found.sink is None
    bound = 2e-6 + 2**-21 * float(largest)
    for got, keys in ((found, torch.zeros_like(second_key)), (found.second_key, second_key)):
        wanted = probabilities[torch.arange(batch), :, :, keys]
        assert (got.p0.double() - wanted).abs().max() <= bound
        distance = torch.arange(length) - keys[:, None]
        within = shape["window"] or length
        assert torch.equal(got.visible.expand(batch, -1), (distance >= 0) & (distance < within))


@pytest.mark.parametrize("sinks", [None, torch.randn(4)])
@pytest.mark.parametrize("boolean", [True, False])
def test_with_mixing_is_the_same(boolean: bool, sinks: Tensor | None) -> None:
    """Also where a query sees nothing, and where a head's keys are no numbers."""
    query, (key, value) = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 2, 9, 8)
    key[1, 1, 5, 3] = -torch.inf
    seen = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    seen[..., 4, :] = False
    mask = seen if boolean else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    (one, without), (two, with_mixing) = (
        attend(query, key, value, scale=0.3, mask=mask, sinks=sinks, with_mixing=wanted)
        for wanted in (False, True)
    )
    torch.testing.assert_close(one[0], two[0])
    assert not two[0, :, 4].any()
    assert with_mixing.p0[1, 2:, 5:].isnan().all() and with_mixing.p0[0].isfinite().all()
    torch.testing.assert_close(without.p0, with_mixing.p0, equal_nan=True)
    torch.testing.assert_close(without.mixing(), with_mixing.mixing(), equal_nan=True)
    if sinks is not None:
        assert without.sink is not None and with_mixing.sink is not None
        torch.testing.assert_close(without.sink, with_mixing.sink, equal_nan=True)


@pytest.mark.parametrize("length", [9, 40])
def test_a_query_that_sees_nothing_by_a_finite_mask(length: int) -> None:
    """It takes the mean of all values, as in torch, and counts for nothing."""
    query, (key, value) = torch.randn(2, 4, length, 8), torch.randn(2, 2, 2, length, 8)
    seen = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    seen[..., 4, :] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    wanted = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    for with_mixing in (False, True):
        for scores in (64, 2**20):
            with small_tiles(scores):
                output, found = attend(
                    query, key, value, scale=0.3, mask=mask, with_mixing=with_mixing
                )
                squares = found.mixing()
            torch.testing.assert_close(output, wanted)
            assert not found.p0[..., 4].any() and not squares[..., 4].any()


def test_inputs_that_require_gradients() -> None:
    query, key = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(2))
    _, found = attend(query, key, key, scale=0.3, with_mixing=True)
    _, again = attend(query.detach(), key.detach(), key.detach(), scale=0.3, with_mixing=True)
    assert torch.equal(found.p0, again.p0) and torch.equal(found.mixing(), again.mixing())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wide_mask_on_half_precision(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 4, 9, 8).to(dtype), torch.randn(2, 2, 9, 8).to(dtype)
    seen = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril().triu(-4)
    wide = torch.zeros(1, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    found = [attend(query, key, key, scale=0.3, mask=mask) for mask in (seen, wide)]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1].p0, found[1][1].p0)


def test_float64_and_wide_values() -> None:
    """What no fused kernel takes is computed in chunks."""
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    for dtype, width in ((torch.float64, 8), (torch.float32, 12)):
        value = torch.randn(2, 2, 9, width).to(dtype)
        output, got = attend(query.to(dtype), key.to(dtype), value, scale=0.3)
        wanted, probabilities, _ = softmax_reference(query, key, value, 0.3, None)
        torch.testing.assert_close(output.double(), wanted, atol=1e-6, rtol=0)
        assert (got.p0.double() - probabilities[..., 0]).abs().max() <= 1e-6


def test_heads_that_differ_in_sight_are_refused() -> None:
    scores = torch.zeros(1, 2, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    scores[0, 1, 2, 0] = -torch.inf
    with pytest.raises(MeasurementError, match="heads differ in which queries see P0"):
        read_scores(scores)


def test_later_keys_where_they_were_asked_for() -> None:
    found = read_scores(torch.zeros(1, 2, 4, 4), allow_future_keys=True)
    assert found.second_key is None and found.visible.all()
    assert torch.allclose(found.p0, torch.full((1, 2, 4), 0.25))


@pytest.mark.parametrize("ahead", [1, 3])
def test_what_is_not_causal_is_refused(ahead: int) -> None:
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(ahead)
    query = torch.zeros(1, 1, 4, 8)
    for mask in (seen, torch.zeros(1, 1, 4, 4).masked_fill(~seen, -torch.inf)):
        with pytest.raises(MeasurementError, match="not causal"):
            attend(query, query, query, scale=1.0, mask=mask)
    for level in (-300.0, 0.0, 300.0):
        with pytest.raises(MeasurementError, match="not causal"):
            read_scores(torch.full((1, 1, 4, 4), level))
    pair = torch.zeros(1, 1, 2, 8)
    with pytest.raises(MeasurementError, match="not causal"):
        attend(pair, pair, pair, scale=1.0, mask=torch.ones(1, 1, 2, 2, dtype=torch.bool))


@pytest.mark.parametrize("masked", [torch.finfo(torch.float32).min / 8, -1e4, -1e9, -torch.inf])
def test_masks_in_scores_are_known_however_large(masked: float) -> None:
    """Families mask before they scale, or with a number of their own."""
    generator = torch.Generator().manual_seed(0)
    scores = 30 * torch.randn(2, 3, 9, 9, generator=generator)
    hidden = ~torch.ones(9, 9, dtype=torch.bool).tril() | torch.ones(9, 9, dtype=torch.bool).tril(
        -4
    )
    hidden[8, 8] = False
    attended = read_scores(scores.masked_fill(hidden, masked))
    assert attended.keys.tolist() == [(~hidden).sum(-1).tolist()] * 2
    assert attended.visible.tolist() == [(~hidden)[:, 0].tolist()] * 2
