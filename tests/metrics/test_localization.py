"""Localization and amplification against their definitions, written out in plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinktrack.metrics.base import Unmeasured
from sinktrack.metrics.localization import (
    SHARE_TOLERANCE,
    Component,
    Contribution,
    Projections,
    summarize,
)
from sinktrack.metrics.phases import Phase, amplification, first_two_gain, phases_of, stretches

EXACT = 2**-24


def values(*rows: float) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("concentration", "wanted"),
    [
        ([0.1, 0.3, 0.9], [(1, 2)]),
        ([None, 0.31, 0.2], [(1, 2)]),
        ([0.1, 0.2, 0.29], []),
        ([0.5, 0.16, 0.149, 0.2, 0.31], [(0, 1), (4, 4)]),
        ([0.4, None, 0.2, None, 0.1], [(0, 2)]),  # blocks without attention neither begin nor end
        ([0.4, None, None], [(0, 0)]),
        ([None, None, 0.3], [(2, 2)]),
        ([], []),
    ],
)
def test_phases(concentration: list[float | None], wanted: list[tuple[int, int]]) -> None:
    assert stretches(concentration) == wanted


def test_a_phase_knows_its_peak_and_steps() -> None:
    """Two sinks in series, as SmolLM2 has them: the second is written after the first is erased."""
    concentration = values(0.05, 0.1, 0.4, 0.35, 0.05, 0.04, 0.5, 0.6, 0.2)
    ratio = values(1.0, 1.5, 9.0, 8.0, 1.1, 1.0, 170.0, 150.0, 90.0, 10.0)
    first, second = phases_of(concentration, ratio)
    assert first == Phase(2, 3, first.mass, 2, 1, 3) and first.mass == pytest.approx(0.75)
    assert second == Phase(6, 8, second.mass, 6, 5, 8) and second.mass == pytest.approx(1.3)


@st.composite
def streams(draw: st.DrawFn) -> dict[str, Any]:
    """States that are exactly what embedding and writes make, in integers."""
    blocks = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sequences, width = 3, 6

    def rows(size: int = 3) -> torch.Tensor:
        return torch.from_numpy(rng.integers(-size, size + 1, (sequences, width))).float()

    state = rows() + 20  # far from 0, so that shares are moderate
    states, writes, parts = [state], [], []
    for block in range(blocks):
        for sublayer in ("attention", "mlp"):
            own = [rows(), rows()]
            write = own[0] + own[1]
            kind = {"attention": "head", "mlp": "expert"}[sublayer]
            parts += [Contribution(kind, block, i, part.mean(0)) for i, part in enumerate(own)]
            writes.append((sublayer, block, write))
            state = state + write
        states.append(state)
    readers = torch.from_numpy(rng.random(blocks) * rng.integers(0, 2, blocks))
    readers[draw(st.integers(0, blocks - 1))] = 0.5
    return {
        "readers": readers,
        "states": torch.stack(states),
        "others": torch.stack([rows() for _ in states]),
        "writes": writes,
        "parts": parts,
    }


@given(streams())
@settings(max_examples=60, deadline=None)
def test_shares_are_projections_weighted_by_readers(stream: dict[str, Any]) -> None:
    readers, states, others = (stream[name] for name in ("readers", "states", "others"))
    found = Projections(states, others, stream["writes"], stream["parts"], EXACT).localization(
        readers
    )
    reading = [block for block in range(len(readers)) if readers[block] > 0]

    def share(write: torch.Tensor, block: int) -> float:
        """Over the blocks that read it, those after the one that writes."""
        rows = write.double().numpy()
        mean = rows.mean(0) if rows.ndim > 1 else rows
        total = 0.0
        for reader in reading:
            if reader > block:
                direction = (states[reader] - others[reader]).double().mean(0).numpy()
                direction /= np.linalg.norm(direction)
                state = states[reader].double().mean(0).numpy() @ direction
                total += float(readers[reader]) * float(mean @ direction / state)
        return total / float(readers.sum())

    wanted = [("embedding", None, share(states[0], -1))]
    wanted += [(k, b, share(write, b)) for k, b, write in stream["writes"] if b < reading[-1]]
    assert [(c.kind, c.block) for c in found.shares] == [row[:2] for row in wanted]
    for component, (*_, value) in zip(found.shares, wanted, strict=True):
        assert component.share == pytest.approx(value, abs=1e-9) and component.index is None
    assert found.share_sum == pytest.approx(1, abs=1e-9)

    parts: dict[Any, float] = {("embedding", None, None): wanted[0][2]}
    for part in stream["parts"]:
        if part.block < reading[-1]:
            parts[part.kind, part.block, part.index] = share(part.write, part.block)
    assert {(c.kind, c.block, c.index) for c in found.parts} == parts.keys()
    for one in found.parts:
        assert one.share == pytest.approx(parts[one.kind, one.block, one.index], abs=1e-5)
    sizes = [abs(part.share) for part in found.parts]
    assert sizes == sorted(sizes, reverse=True)
    assert found.top_components == found.parts[:16]

    by_block = [sum(v for _, b, v in wanted if b == block) for block in range(len(readers))]
    assert found.first_two_share == pytest.approx(sum(by_block[:2]), abs=1e-9)
    if reading[-1] > 0:
        check_summary(by_block, found.depth, found.effective_blocks)


def test_a_phase_is_read_by_its_own_blocks() -> None:
    """Writers, erasers up to the next phase, and shares of two sinks in series."""
    one = torch.eye(4)
    amounts = [3.0, 0.0, -2.5, 0.0, 40.0, -1.0, -30.0]
    state = one[0].expand(2, 4)
    states, writes = [state], []
    for block, amount in enumerate(amounts):
        write = (amount * one[0]).expand(2, 4)
        writes.append(("mlp", block, write))
        state = state + write
        states.append(state)
    found = Projections(torch.stack(states), torch.zeros(8, 2, 4), writes, [], EXACT)
    readers = torch.tensor([0.0, 0.3, 0.3, 0.0, 0.0, 0.5, 0.5], dtype=torch.float64)
    first, second = Phase(1, 2, 0.6, 1, 0, 2), Phase(5, 6, 1.0, 5, 4, 6)
    early, late = found.sink(first, second, readers), found.sink(second, None, readers)
    assert [(w.kind, w.block) for w in early.writers] == [("mlp", 0), ("embedding", None)]
    assert early.writers[0].share == pytest.approx(0.75)
    assert [e.block for e in early.erasers] == [2]
    assert early.erasers[0].share == pytest.approx(-2.5 / 4)
    assert late.writers[0].block == 4 and late.writers[0].share > 0.9
    assert [e.block for e in late.erasers] == [6]
    assert late.erasers[0].share == pytest.approx(-30 / 41.5)
    assert found.localization(readers).shares[5].share == pytest.approx(
        (0.5 * 40 / 41.5 + 0.5 * 40 / 40.5) / 1.6
    )


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


@pytest.mark.parametrize("rounding", [0.0, 1e-3])
@pytest.mark.parametrize("beyond", [False, True])
def test_what_is_left_over_is_refused(beyond: bool, rounding: float) -> None:
    """A part of the state that no write accounts for, just below and above what is allowed.

    That is a thousandth, and twice the unit roundoff of all states on the way: here their norms are
    1 and 2, for a projection of 2. Every block is looked at, also where no other reads.
    """
    allowed = 1e-3 + rounding * (1 + 2) * 2 / 2
    off = allowed * (1.01 if beyond else 0.99)
    states = torch.zeros(2, 5, 4, dtype=torch.float64)
    states[0, :, 0], states[1, :, 0] = 1.0, 2.0
    write = torch.zeros(5, 4, dtype=torch.float64)
    write[:, 0] = 1.0 + 2 * off
    arguments: Any = (states, torch.zeros_like(states), [("mlp", 0, write)], [], rounding)
    assert SHARE_TOLERANCE == 1e-3
    if beyond:
        with pytest.raises(Unmeasured, match=r"make 1\.00\d+ of .* not 1.*\(seen: mlp 0\)"):
            Projections(*arguments)
    else:
        Projections(*arguments)


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
        assert value == pytest.approx(math.log(ratio[block + 1] / ratio[block]), abs=1e-9)
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
