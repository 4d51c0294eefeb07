"""Any PyTorch decoder, against its arithmetic done once more in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_models
from torch_models import BLOCKS, HEADS, VOCABULARY, Kind, Net, by_hand, reading, shares

import sinktrack as st
from sinktrack import Decoder, MeasurementError, Probe, measure

PROBE = Probe.random(VOCABULARY, sequences=5, length=17)
KINDS = {
    "plain": Kind(),
    "parallel": Kind(parallel=True),
    "nanochat": Kind(squared_relu=True, qk_norm=True, lambdas=True),
    "modded": Kind(squared_relu=True, qk_norm=True, lambdas=True, value_residual=True, skips=True),
    "residual scale": Kind(residual=0.4),
    "residual scale and experts": Kind(residual=0.4, experts="list", shared=True),
    "gated": Kind(gated=True),
    "output norm": Kind(output_norm=True),
    "window": Kind(window=6),
    "softmax": Kind(attention="softmax", window=6),
    "einsum": Kind(attention="einsum"),
    "flex": Kind(attention="flex"),
    "flex window": Kind(attention="flex", window=6),
    "experts": Kind(experts="list"),
    "stacked experts": Kind(experts="stacked", shared=True, lambdas=True),
    "time first": Kind(time_first=True),
    "flat": Kind(flat=True),
    "carried": Kind(carried=True),
}


def check(
    found: st.Measurement, model: Net, tokens: torch.Tensor, atol: float = 5e-7
) -> None:
    """Against the sums by hand: attention within 5e-7, norms and shares to rounding."""
    hand = by_hand(model, tokens)
    for block, a in enumerate(hand.attention):
        visible = (a[0, 0, 1:, 0] > 0).sum()
        p0 = (a[:, :, 1:, 0].sum(-1) / visible).float()
        assert float((found.p0_attention_by_sequence[:, block] - p0).abs().max()) < atol
        assert found.visible_queries[block] == int(visible)
        mixing = a[:, :, 1:].square().sum(-1).mean((0, 2))
        torch.testing.assert_close(found.mixing[block].double(), mixing, rtol=1e-5, atol=1e-6)

    for block, state in enumerate(hand.states):
        size = state.norm(dim=-1)
        torch.testing.assert_close(found.p0_norm[block].double(), size[:, 0].mean(), rtol=2e-6, atol=0)
        ratio = size[:, 0].mean() / size[:, 1:].median()
        assert float(found.norm_ratio[block]) == pytest.approx(float(ratio), rel=0.2)
    total, parts = shares(hand)
    assert found.localization.share_sum == pytest.approx(1, abs=1e-5)
    seen = {
        part.kind if part.block is None else (part.kind, part.block): part.share
        for part in found.localization.shares
    }
    scale = max(abs(value) for value in total.values())
    assert {key for key in total if abs(total[key]) > 1e-9} <= set(seen)
    for key, share in seen.items():
        assert share == pytest.approx(total[key], abs=2e-6 * scale), key
    told = {
        (part.kind, part.block, part.index): part.share
        for part in found.localization.parts if part.kind in ("head", "expert")
    }  # fmt: skip
    for key, share in parts.items():
        if abs(share) > 1e-9:
            assert told[key] == pytest.approx(share, abs=4e-6 * scale), key


@pytest.mark.parametrize("name", KINDS)
def test_exact(name: str) -> None:
    model = reading(KINDS[name], PROBE.tokens)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = measure(model, PROBE)
    check(found, model, PROBE.tokens)
    assert found.model == {
        "type": "Net", "blocks": BLOCKS, "heads": HEADS,
        "experts": torch_models.EXPERTS if KINDS[name].experts else None,
    }  # fmt: skip
    assert found.block_kinds == ("sliding" if KINDS[name].window else "full",) * BLOCKS
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if KINDS[name].experts:
        assert any(part.kind == "expert" for part in found.localization.parts)
        assert "parts" not in found.missing


@pytest.mark.parametrize("name", ["plain", "time first", "flat", "modded", "experts"])
@pytest.mark.parametrize("sequences", [1, 2, 17, 19])
def test_any_number_of_sequences(name: str, sequences: int) -> None:
    """As many as positions leave the layout to be told by value."""
    probe = Probe.random(VOCABULARY, sequences=sequences, length=17)
    model = reading(KINDS[name], probe.tokens)
    check(measure(model, probe), model, probe.tokens, 2e-6)
    half = measure(model, probe, batch_size=2)
    if sequences > 1:
        whole = measure(model, probe)
        torch.testing.assert_close(half.p0_norm, whole.p0_norm)


def test_batches_join_to_the_same() -> None:
    model = reading(KINDS["modded"], PROBE.tokens)
    whole, parts = measure(model, PROBE), measure(model, PROBE, batch_size=2)
    torch.testing.assert_close(whole.p0_attention, parts.p0_attention)
    for one, two in zip(whole.localization.shares, parts.localization.shares, strict=True):
        assert one.share == pytest.approx(two.share, abs=1e-6)
