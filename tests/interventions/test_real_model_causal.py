"""Causal tests and position card of SmolLM2-135M-Instruct, against what plain hooks have shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import sinktrack as st
from sinktrack.interventions import run_causal_tests
from sinktrack.interventions.results import CausalTests
from sinktrack.prose import passages

pytestmark = [pytest.mark.real_model, pytest.mark.slow]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def found(smollm2: Path) -> CausalTests:
    """All tests on 8 sequences of 64 tokens of prose: some three minutes of CPU."""
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    probe = st.Probe.from_texts(tokenizer, passages()[:8], length=64)
    return run_causal_tests(model, probe, st.measure(model, probe))


def test_it_is_plain_json(found: Row) -> None:
    again = json.loads(json.dumps(found, allow_nan=False))
    assert [phase["first_block"] for phase in again["phases"]] == [3, 12]


def phase(found: Row, first_block: int) -> Row:
    return next(one for one in found["phases"] if one["first_block"] == first_block)


def necessity(of: Row, kind: str, block: int | None) -> Row:
    return next(
        row
        for row in of["necessity"]
        if (row["kind"], row["block"], row["index"]) == (kind, block, None)
        and "components" not in row
    )


def together(of: Row, *wanted: tuple[str, int]) -> Row:
    """The smallest set that was removed together and holds these."""
    sets = [row for row in of["necessity"] if "components" in row]
    return min(
        (
            row
            for row in sets
            if {*wanted} <= {(one["kind"], one["block"]) for one in row["components"]}
        ),
        key=lambda row: len(row["components"]),
    )


def test_mlp_11_is_necessary_and_its_write_is_sufficient(found: Row) -> None:
    row = necessity(phase(found, 12), "mlp", 11)
    assert row["effect"] > 0.8 and row["zero"]["effect"] > 0.8
    assert (row["verdict"], row["outcome"]) == ("necessary", "lost")
    assert row["p0_norm_ratio"]["after"] < 2 and row["loss"]["effect"] > 1
    assert abs(row["first_token"]["effect"]) < 0.1, "it writes the same whatever token is first"
    patched = next(
        one for one in phase(found, 12)["sufficiency"] if (one["kind"], one["block"]) == ("mlp", 11)
    )
    assert patched["effect"] == pytest.approx(0.45, abs=0.05)
    assert patched["verdict"] == "sufficient" and 0.35 < patched["share_of_two"] < 0.5


def test_the_embedding_is_not_necessary(found: Row) -> None:
    """Another token's is in distribution; the mean embedding made a third of the sink go."""
    for first_block in (3, 12):
        row = necessity(phase(found, first_block), "embedding", None)
        assert row["verdict"] is None and row["effect"] < 0.3


def test_mlps_1_and_2_stand_in_for_each_other(found: Row) -> None:
    """Without both the first sink is lost, and much of the second: the circuits are in series."""
    first, second = phase(found, 3), phase(found, 12)
    for block in (1, 2):
        assert necessity(first, "mlp", block)["verdict"] == "redundant"
        assert abs(necessity(second, "mlp", block)["effect"]) < 0.1
    gone = together(first, ("mlp", 1), ("mlp", 2))
    assert gone["effect"] > 0.85 and (gone["verdict"], gone["outcome"]) == ("necessary", "lost")
    later = together(second, ("mlp", 1), ("mlp", 2))
    assert later["effect"] == pytest.approx(0.65, abs=0.15)
    assert later["components"] == gone["components"]


def test_without_mlp_1_alone_the_first_sink_is_shared(found: Row) -> None:
    """P0 grows, and others that are like it draw more; not in every sequence."""
    row = necessity(phase(found, 3), "mlp", 1)
    assert row["outcome"] == "both" and 1 / 3 < row["diluted"] < 2 / 3
    assert row["p0_norm_ratio"]["after"] > row["p0_norm_ratio"]["before"]


def test_mlp_0_is_lost_in_the_first_sink(found: Row) -> None:
    row = necessity(phase(found, 3), "mlp", 0)
    assert row["zero"]["effect"] == pytest.approx(0.86, abs=0.1)
    assert (row["verdict"], row["outcome"]) == ("necessary", "lost"), "P0 is no longer large"


def test_knockout_figures(found: Row) -> None:
    """Unmixed in blocks 0 to 2 another position draws as P0; P0 that mixes draws nothing."""
    for first_block, effect in ((3, 0.55), (12, 0.46)):
        rows = {row["kind"]: row for row in phase(found, first_block)["position"]}
        alone, mixed = rows["other_position_alone"], rows["p0_mixed"]
        assert alone["blocks"] == mixed["blocks"] == [0, first_block - 1]
        assert alone["effect"] == pytest.approx(effect, abs=0.06)
        assert alone["verdict"] == "follows" and 0.35 < alone["share_of_two"] < 0.5
        assert mixed["effect"] > 0.9
        assert (mixed["verdict"], mixed["outcome"]) == ("unmixed", "lost")
        assert mixed["p0_norm_ratio"]["after"] < 1.5
    rows = {row["kind"]: row for row in phase(found, 12)["position"]}
    assert rows["other_position_alone_since_last_sink"]["blocks"] == [10, 11]
    assert abs(rows["other_position_alone_since_last_sink"]["effect"]) < 0.05
    since = rows["other_position_alone_since_last_sink_began"]
    assert since["blocks"] == [3, 11] and since["verdict"] == "follows"
    assert since["effect"] == pytest.approx(0.3, abs=0.06), "the second finds P0 by itself"
    two = rows["other_position_alone_in_first_two"]
    assert two["blocks"] == [0, 1] and two["verdict"] is None


def test_position_decides_by_the_card(found: Row) -> None:
    card = found["position_card"]
    assert card["answer"] == "position"
    assert card["random_first"]["sink_rate"] > 0.6 and card["repeated"]["sink_rate"] < 0.05
    assert card["as_is"]["sink_rate_from_2"] > card["as_is"]["sink_rate"] > 0.65
