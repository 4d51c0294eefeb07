"""SmolLM2-135M-Instruct: two sinks in series, in numbers that were found with plain hooks.

Blocks 3 to 9 rest on what MLPs 1 and 2 write, MLPs 8 and 9 erase it, and blocks 12 to 29 rest on
what MLP 11 writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sinktrack as st
from sinktrack.metrics.localization import Component
from sinktrack.prose import passages
from sinktrack.records.run import to_json
from tests.helpers.reference import localized_by_hand, measured_by_hand

pytestmark = pytest.mark.real_model
BETWEEN = (10, 11)
"""Blocks that do not rest on P0."""


class Story(NamedTuple):
    directory: Path
    model: Any
    prose: st.Probe
    of_prose: st.Measurement
    of_random: st.Measurement

    @property
    def both(self) -> tuple[st.Measurement, st.Measurement]:
        return self.of_prose, self.of_random


@pytest.fixture(scope="module")
def story(smollm2: Path) -> Story:
    """The model measured with prose and with random tokens, 16 sequences of 64 tokens each."""
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prose = st.Probe.from_texts(tokenizer, passages()[:16], length=64)
    noise = st.Probe.random(model.config.vocab_size, sequences=16, length=64)
    return Story(smollm2, model, prose, st.measure(model, prose), st.measure(model, noise))


def named(parts: tuple[Component, ...]) -> dict[tuple[str, int | None], float]:
    return {(part.kind, part.block): part.share for part in parts}


def test_two_phases_in_series(story: Story) -> None:
    for found in story.both:
        first, main = found.sinks
        assert first.first_block in (2, 3) and first.last_block in (9, 10)
        assert (main.first_block, main.last_block) == (12, 29)
        assert found.main_sink is main and found.reference_block == 12
        assert main.mass > 1.5 * first.mass
        assert (first.peak_block, main.step_up_block) == (3, 11)
        assert first.step_up_block in (1, 2) and first.step_down_block == 9
        assert main.peak_block in (12, 13) and main.step_down_block == 28
        assert 9 < found.norm_ratio[3] < 11 and 150 < found.norm_ratio[12] < 190
        for block in BETWEEN:
            assert found.norm_ratio[block] < 1.3
            assert abs(found.concentration[block] - found.uniform[block]) < 0.2
    assert (story.of_prose.sinks[0].first_block, story.of_prose.sinks[0].last_block) == (3, 9)


@pytest.mark.slow
@pytest.mark.parametrize("prose", [True, False])
def test_the_same_with_1024_sequences(story: Story, prose: bool) -> None:
    """Windows of the prose that begin anywhere, and random tokens."""
    tokenizer = AutoTokenizer.from_pretrained(story.directory)
    probe = st.Probe.random(story.model.config.vocab_size, sequences=1024, length=64)
    if prose:
        tokens = torch.tensor([token for text in passages() for token in tokenizer(text).input_ids])
        starts = torch.randint(
            len(tokens) - 64, (1024,), generator=torch.Generator().manual_seed(0)
        )
        probe = st.Probe.from_tokens(tokens[starts[:, None] + torch.arange(64)])
    found = st.measure(story.model, probe, batch_size=64)
    phases = [(sink.first_block, sink.last_block) for sink in found.sinks]
    assert phases == [(3, 9) if prose else (2, 10), (12, 29)]
    first, main = found.sinks
    assert named(main.writers)["mlp", 11] > 0.9
    assert named(first.writers).keys() >= {("mlp", 1), ("mlp", 2)}
    assert named(first.erasers).keys() >= {("mlp", 8), ("mlp", 9)}
    assert named(main.erasers).keys() == {("mlp", 28), ("mlp", 29)}


def test_who_writes_and_who_erases(story: Story) -> None:
    for found in story.both:
        first, main = found.sinks
        assert (main.writers[0].kind, main.writers[0].block) == ("mlp", 11)
        assert main.writers[0].share > 0.9
        assert [(part.kind, part.block) for part in first.writers[:2]] == [("mlp", 2), ("mlp", 1)]
        assert {("mlp", 8), ("mlp", 9)} <= named(first.erasers).keys()
        assert named(main.erasers).keys() == {("mlp", 28), ("mlp", 29)}
        assert found.mlp_write_ratio[11] > 500 and found.mlp_write_ratio.argmax() == 11
        for phase in found.sinks:
            assert all(part.share <= -0.1 for part in phase.erasers)


def test_headlines_do_not_hang_on_the_probe(story: Story) -> None:
    """Where a threshold picked the block, they were .30 and 1.00, and MLP 11 was never named."""
    shares = [named(found.localization.shares) for found in story.both]
    for found, share in zip(story.both, shares, strict=True):
        assert 0.07 < found.first_two_share < 0.13
        assert 8 < found.depth < 10.5
        assert found.localization.share_sum == pytest.approx(1, abs=1e-6)
        assert share["mlp", 11] > 0.65 and max(share, key=share.__getitem__) == ("mlp", 11)
        assert found.sink_rate_from_2 > found.sink_rate() > 0.65
        assert found.first_sink_block == 2 and found.missing == {}


def test_position_decides(story: Story) -> None:
    for found in story.both:
        assert found.position_share == 1
        low = found.first_token.norm_ratio[5]
        assert low[3] > 5 and low[12] > 100
        assert found.direction_to_mean[12] > 0.99 and found.direction_consistency[12] > 0.99


def test_the_first_sink_has_rivals_and_the_second_has_none(story: Story) -> None:
    """Words like "the" are as large as P0 in blocks 3 to 9."""
    found = story.of_prose
    rivals = found.rivals * found.rivals.new_tensor(16 * 63)
    assert 15 < rivals[3] < 40
    assert (rivals[12:] == 0).all()
    assert (found.rivals[list(BETWEEN)] > 0.9).all()
    assert (story.of_random.rivals[12:30] < 0.002).all()


def test_values_are_small_inside_the_sinks_alone(story: Story) -> None:
    for found in story.both:
        ratio = found.value_ratio.mean(-1)
        assert (ratio[3:10] < 0.35).all() and (ratio[12:] < 0.5).all()
        assert (ratio[[0, 1, 10, 11]] > 0.85).all()


def test_one_channel_carries_the_state(story: Story) -> None:
    for found in story.both:
        assert found.p0_channels[0]["channel"] == 507
        assert found.p0_channels[0]["share"] > 0.97
        largest = found.max_activation
        assert largest["p0_channel"][3:30] == [507] * 27
        assert 700 < largest["p0"][3] < 1100 and 26_000 < largest["p0"][12] < 27_500
        assert largest["ratio"][12] > 10_000


def test_equals_a_plain_forward(story: Story) -> None:
    """Eager attention, and hooks on blocks, attentions and MLPs."""
    found, model = story.of_prose, story.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        truth = measured_by_hand(model, story.prose.tokens)
    finally:
        model.set_attn_implementation(before)
    np.testing.assert_allclose(found.p0_attention_by_sequence, truth["p0"], atol=1e-5)
    np.testing.assert_allclose(found.p0_attention, truth["p0"].mean(0), atol=2e-6)
    np.testing.assert_allclose(found.mixing, truth["mixing"], atol=2e-5)
    assert found.sink_rate() == pytest.approx((truth["alpha"] > 0.3).mean(), abs=1e-3)
    for name in ("p0_norm", "norm_ratio"):
        np.testing.assert_allclose(getattr(found, name), truth[name], rtol=1e-4)
    for name in ("uniform", "direction_consistency", "direction_to_mean"):
        np.testing.assert_allclose(getattr(found, name), truth[name], atol=1e-5)
    np.testing.assert_allclose(found.rivals, truth["rivals"], atol=1.5 / (16 * 63))
    for name in ("attention", "mlp"):
        wanted = truth["write_ratios"][name]
        np.testing.assert_allclose(getattr(found, f"{name}_write_ratio"), wanted, rtol=1e-4)
    readers = np.maximum(0, truth["concentration"] - truth["uniform"])
    by_block, embedding, _ = localized_by_hand(truth["inputs"], readers)
    assert found.localization.shares[0].share == pytest.approx(embedding, abs=1e-5)
    for block, wanted in enumerate(by_block):
        own = [part.share for part in found.localization.shares if part.block == block]
        assert sum(own) == pytest.approx(wanted, abs=1e-4)
    assert found.first_two_share == pytest.approx(by_block[:2].sum(), abs=1e-5)


def test_a_scan_gives_the_same_numbers(story: Story, tmp_path: Path) -> None:
    probe = st.Probe.from_tokens(story.prose.tokens[:4])
    (scanned,) = st.scan(story.directory, probe=probe, run=tmp_path / "run")
    live = to_json(st.measure(story.model, probe).to_record(0, "callback", {}))
    assert scanned["weights"] == live["weights"] and scanned["dtype"] == "float32"
    for name in set(live) - {"step", "source", "versions", "seconds"}:
        assert_equal(to_json(scanned)[name], live[name], name)


def assert_equal(left: Any, right: Any, name: str) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for key in left:
            assert_equal(left[key], right[key], f"{name}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), name
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other, name)
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=1e-6, abs=1e-6), name
    else:
        assert left == right, name
