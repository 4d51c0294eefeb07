"""Localization and amplification against their definitions, written out in plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinktrack.circuit import (
    SHARE_TOLERANCE,
    Component,
    Leaf,
    amplification,
    first_two_gain,
    localize,
    reference_block,
    summarize,
)
from sinktrack.errors import MeasurementError

EXACT = 2**-24


def values(*rows: float) -> torch.Tensor:
    return torch.tensor(rows)


def test_the_reference_block() -> None:
    ratio = values(1.0, 2.0, 5.0, 9.0)
    assert reference_block(values(0.1, 0.3, 0.9), ratio) == (1, True)
    assert reference_block(values(math.nan, 0.31, 0.2), ratio) == (1, True)
    assert reference_block(values(0.9, 0.9, 0.9), ratio) == (0, True)
    # none formed: the highest norm at a block's input, of which the last entry is none
    assert reference_block(values(0.1, 0.2, 0.29), ratio) == (2, False)


@st.composite
def streams(draw: st.DrawFn) -> dict[str, Any]:
    """States that are exactly what embedding and writes make, in integers."""
    blocks = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sequences, width = 3, 6

    def rows(size: int = 3) -> torch.Tensor:
        return torch.from_numpy(rng.integers(-size, size + 1, (sequences, width))).float()

    state = rows() + 20  # far from 0, so that shares are moderate
    states, writes, leaves = [state], [], []
    for block in range(blocks):
        for sublayer in ("attention", "mlp"):
            parts = [rows(), rows()]
            write = parts[0] + parts[1]
            kind = {"attention": "head", "mlp": "expert"}[sublayer]
            leaves += [Leaf(kind, block, i, part.mean(0)) for i, part in enumerate(parts)]
            writes.append((sublayer, block, write))
            state = state + write
        states.append(state)
    others = torch.stack([rows() for _ in states])
    return {
        "reference": draw(st.integers(0, blocks)),
        "states": torch.stack(states),
        "others": others,
        "writes": writes,
        "leaves": leaves,
    }


@given(streams())
@settings(max_examples=60, deadline=None)
def test_shares_are_projections(stream: dict[str, Any]) -> None:
    reference, states, others = (stream[name] for name in ("reference", "states", "others"))
    found = localize(reference, True, states, others, stream["writes"], stream["leaves"], EXACT)
    assert found.formed and found.reference_block == reference
    direction = (states[reference] - others[reference]).double().mean(0).numpy()
    direction /= np.linalg.norm(direction)
    total = states[reference].double().mean(0).numpy() @ direction

    def share(write: torch.Tensor) -> float:
        rows = write.double().numpy()
        return float((rows.mean(0) if rows.ndim > 1 else rows) @ direction / total)

    wanted = [("embedding", None, share(states[0]))]
    wanted += [(kind, b, share(write)) for kind, b, write in stream["writes"] if b < reference]
    assert [(c.kind, c.block) for c in found.shares] == [row[:2] for row in wanted]
    for component, (*_, value) in zip(found.shares, wanted, strict=True):
        assert component.share == pytest.approx(value, abs=1e-9) and component.index is None
    assert found.share_sum == pytest.approx(1, abs=1e-9)

    parts: dict[Any, float] = {("embedding", None, None): share(states[0])}
    for leaf in stream["leaves"]:
        if leaf.block < reference:
            parts[leaf.kind, leaf.block, leaf.index] = share(leaf.write)
    assert {(c.kind, c.block, c.index) for c in found.parts} == parts.keys()
    for part in found.parts:
        wanted_share = parts[part.kind, part.block, part.index]
        assert part.share == pytest.approx(wanted_share, abs=1e-5)
    sizes = [abs(part.share) for part in found.parts]
    assert sizes == sorted(sizes, reverse=True)
    assert found.top_components == found.parts[:16]

    by_block = [sum(v for _, b, v in wanted if b == block) for block in range(reference)]
    if not by_block:
        assert found.first_two_share is found.depth is found.effective_blocks is None
        return
    assert found.first_two_share == pytest.approx(sum(by_block[:2]), abs=1e-9)
    check_summary(by_block, found.depth, found.effective_blocks)


def check_summary(by_block: list[float], depth: Any, effective: Any) -> None:
    size = sum(map(abs, by_block))
    if size < 1e-9:
        return
    weights = [abs(value) / size for value in by_block]
    assert depth == pytest.approx(sum(b * w for b, w in enumerate(weights)), abs=1e-6)
    entropy = -sum(w * math.log(w) for w in weights if w > 0)
    assert effective == pytest.approx(math.exp(entropy), rel=1e-6)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8))
def test_summaries(by_block: list[float]) -> None:
    rows = torch.tensor([by_block, by_block[::-1]], dtype=torch.float64)
    first_two, depth, effective = summarize(rows)
    for row, order in enumerate((by_block, by_block[::-1])):
        assert float(first_two[row]) == pytest.approx(sum(order[:2]), abs=1e-12)
        check_summary(order, float(depth[row]), float(effective[row]))


def test_no_block_writes_before_block_0() -> None:
    for found in summarize(torch.zeros(3, 0)):
        assert found.shape == (3,) and found.isnan().all()


@pytest.mark.parametrize("rounding", [0.0, 1e-3])
@pytest.mark.parametrize("beyond", [False, True])
def test_what_is_left_over_is_refused(beyond: bool, rounding: float) -> None:
    """A part of the state that no write accounts for, just below and above what is allowed.

    That is a thousandth, and twice the unit roundoff of all states on the way: here their norms are
    1 and 2, for a projection of 2.
    """
    allowed = 1e-3 + rounding * (1 + 2) * 2 / 2
    off = allowed * (1.01 if beyond else 0.99)
    states = torch.zeros(3, 5, 4, dtype=torch.float64)
    states[0, :, 0], states[1, :, 0], states[2] = 1.0, 2.0, 100.0
    write = torch.zeros(5, 4, dtype=torch.float64)
    write[:, 0] = 1.0 + 2 * off
    arguments: Any = (1, True, states, torch.zeros_like(states), [("mlp", 0, write)], [], rounding)
    assert SHARE_TOLERANCE == 1e-3
    if beyond:
        with pytest.raises(MeasurementError, match=r"make 1\.00\d+ of .* not 1.*\(seen: mlp 0\)"):
            localize(*arguments)
    else:
        assert localize(*arguments).share_sum == pytest.approx(1 + off)


def test_components_in_a_record() -> None:
    head = Component("head", 2, 3, 0.25)
    assert head.to_record() == {"kind": "head", "block": 2, "index": 3, "share": 0.25}
    expert = Component("expert", 2, 3, 0.25, gate=0.5)
    assert expert.to_record() == head.to_record() | {"kind": "expert", "gate": 0.5}


@given(st.lists(st.floats(0.1, 50), min_size=2, max_size=8))
def test_amplification(ratio: list[float]) -> None:
    gain, peak, first_two = amplification(torch.tensor(ratio, dtype=torch.float64))
    assert peak == ratio.index(max(ratio)) and len(gain) == len(ratio) - 1
    for block, value in enumerate(gain.tolist()):
        if block < peak:
            assert value == pytest.approx(math.log(ratio[block + 1] / ratio[block]), abs=1e-9)
        else:
            assert math.isnan(value)
    grown = math.log(max(ratio) / ratio[0])
    if grown < math.log(2) - 1e-9:
        assert first_two is None
    elif grown > math.log(2) + 1e-9:
        early = math.log(ratio[min(2, peak)] / ratio[0])
        assert first_two == pytest.approx(early / grown, abs=1e-9)


def test_growth_counts_from_a_doubling_on() -> None:
    assert amplification(values(1.0, 2.0))[2] == 1
    assert amplification(values(1.0, 1.99))[2] is None


def test_growth_over_resamples() -> None:
    """Of many rows at once, as the bootstrap asks: the peak stays where it was measured."""
    logs = torch.tensor([[0.0, 1.0, 2.0, 4.0], [0.0, 0.1, 0.2, 0.3], [1.0, 1.0, 3.0, 5.0]])
    found = first_two_gain(logs, 3).tolist()
    assert (
        found[0] == pytest.approx(0.5) and math.isnan(found[1]) and found[2] == pytest.approx(0.5)
    )
