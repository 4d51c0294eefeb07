"""What holds for every metric: its fields, and that parts of a pass join to the whole."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sinktrack import MeasurementError
from sinktrack.attention import attend
from sinktrack.collect import Arena, Collector, Copies
from sinktrack.events import Write
from sinktrack.metrics import FIELDS, METRICS
from sinktrack.metrics.base import PositionShard, State
from sinktrack.models.megatron.shards import join
from tests.helpers.elsewhere import DEVICE, elsewhere
from tests.helpers.paths import DOCS

SEQUENCES, LENGTH, WIDTH, HEADS = 3, 12, 8, 4


def test_fields_have_names_of_their_own_and_say_what_they_are() -> None:
    names = [field.name for metric in METRICS.values() for field in metric.fields]
    assert len(names) == len(set(names)) == len(FIELDS)
    for field in FIELDS.values():
        assert field.title and field.help[0].isupper() and field.help.endswith((".", "?"))
        assert not field.curve or field.axes in ((), ("block",), ("boundary",), ("block", "head"))


@pytest.mark.parametrize("page", ["metrics.md", "records.md"])
def test_every_field_has_a_row_in_the_pages(page: str) -> None:
    text = (DOCS / page).read_text()
    firsts = re.findall(r"^\| (`[^|]*) \|", text, re.M)
    rows = {name for cell in firsts for name in re.findall(r"`(\w+)`", cell)}
    assert FIELDS.keys() - rows == set()


@st.composite
def splits(draw: st.DrawFn) -> list[list[int]]:
    """Positions over some processes, any way, P0 first on the one that holds it."""
    count = draw(st.integers(1, 4))
    owner = draw(st.lists(st.integers(0, count - 1), min_size=LENGTH, max_size=LENGTH))
    return [[i for i in range(LENGTH) if owner[i] == rank] for rank in range(count)]


def same(state: State, one: torch.Tensor, other: torch.Tensor) -> None:
    """Of states that stand side by side the order of positions does not matter."""
    if state.positions == "cat":
        one, other = one.sort(1).values, other.sort(1).values
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@given(splits(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_positions_of_several_processes_join(owners: list[list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator)
    gate = torch.rand(SEQUENCES, LENGTH, HEADS, generator=generator)
    for metric in METRICS.values():

        def seen(at: list[int], shard: PositionShard, metric: Any = metric) -> dict[str, Any]:
            write = Write("mlp", stream[:, at])
            return {
                **metric.on_state(stream[:, at], shard),
                **metric.on_gate(gate[:, at], shard),
                **metric.on_write(write, shard),
            }

        whole = seen(list(range(LENGTH)), PositionShard())
        parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for at in filter(None, owners):
            others = torch.tensor([position > 0 for position in at])
            for name, value in seen(at, PositionShard(at[0] == 0, others)).items():
                if value is not None:
                    parts.setdefault(name, []).append((0, value))
        assert parts.keys() == {name for name, value in whole.items() if value is not None}
        for name, values in parts.items():
            wanted = whole[name]
            assert wanted is not None
            same(metric.states[name], join(metric.states[name], values), wanted)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_heads_of_several_processes_join(ranks: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(SEQUENCES, HEADS, LENGTH, WIDTH, generator=generator) for _ in range(3)
    )
    _, whole = attend(query, key, value, scale=0.3)
    size = HEADS // ranks
    spans = [slice(rank * size, (rank + 1) * size) for rank in range(ranks)]
    shared = [attend(query[:, s], key[:, s], value[:, s], scale=0.3)[1] for s in spans]
    for metric in METRICS.values():
        wanted = metric.on_attention(whole)
        kept = [metric.on_attention(part) for part in shared]
        for name, of_all in wanted.items():
            parts = [
                (rank, part)
                for rank, of_rank in enumerate(kept)
                if (part := of_rank[name]) is not None
            ]
            if of_all is None:
                assert not parts
            else:
                torch.testing.assert_close(join(metric.states[name], parts), of_all)


def test_sums_of_one_process_per_heads_are_not_counted_twice() -> None:
    """Of a state without heads the first process' value counts, also where two give it."""
    value = torch.ones(2, 1)
    assert torch.equal(join(State("whole"), [(0, value), (1, value)]), value)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30))
def test_an_arena_keeps_what_it_is_given(sizes: list[int]) -> None:
    arena, rng = Arena(), np.random.default_rng(0)
    given_values, kept_values = [], []
    for size in sizes:
        value = torch.from_numpy(rng.standard_normal((size, 3)))
        value = value.float() if size % 2 else value
        given_values.append(value.clone())
        kept_values.append(arena.keep(value))
        value.zero_()
    for before, after in zip(given_values, kept_values, strict=True):
        assert torch.equal(before, after) and before.dtype == after.dtype


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=30), st.integers(0, 999))
def test_copies_come_in_order_whatever_device_they_are_from(
    kinds: list[tuple[bool, int]], held: int
) -> None:
    """Those of a device are of the values at the time: the next pass may write over them."""
    copies = Copies()
    wanted: list[Tensor] = []
    found: list[dict[str, Tensor]] = []
    with pytest.MonkeyPatch.context() as patch, elsewhere():
        patch.setattr("sinktrack.collect._HELD", held)
        for number, (away, size) in enumerate(kinds):
            value = torch.full((size, 2), float(number))
            wanted.append(value.clone())
            here = value.to(DEVICE) if away else value
            copies.keep(
                {"values": here, "flags": here > 3},
                lambda got: found.append({name: value.clone() for name, value in got.items()}),
            )
            here.zero_()
        copies.settle()
    assert len(found) == len(wanted)
    for got, value in zip(found, wanted, strict=True):
        assert torch.equal(got["values"], value) and torch.equal(got["flags"], value > 3)


def test_copies_that_found_no_memory_still_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on after the error finds all of them."""
    copies = Copies()
    found: list[dict[str, Tensor]] = []
    with elsewhere():
        for number in range(3):
            copies.keep({"value": torch.full((2,), float(number)).to(DEVICE)}, found.append)
        with monkeypatch.context() as patch:
            patch.setattr("sinktrack.collect._on_cpu", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                copies.settle()
        assert not found
        copies.settle()
    assert [got["value"].tolist() for got in found] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def test_p0_that_does_not_see_itself_is_refused_by_its_block() -> None:
    """As in a batch that is padded on the left."""
    query = torch.randn(2, HEADS, LENGTH, WIDTH)
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    for hidden in (False, True):
        mask[1, :, :, 0] = not hidden
        collected = Collector(METRICS)
        collected.state(0, torch.randn(2, LENGTH, WIDTH))
        collected.attention(0, attend(query, query, query, scale=1.0, mask=mask)[1])
        if hidden:
            with pytest.raises(MeasurementError, match=r"^block 0: P0 does not see itself"):
                collected.check()
        else:
            collected.check()
