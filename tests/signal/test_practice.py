"""Numbers of practice: what is said of keys, the first token, outliers and experts, and why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sinktrack import Run
from sinktrack.cli import app
from sinktrack.signal.practice import practice
from tests.helpers.synthetic import synthetic_records


def a_record(**changes: Any) -> dict[str, Any]:
    """Of 4 blocks with 4 heads, of which two share a key head."""
    record = synthetic_records()[-1]
    record["p0_attention"] = [
        [0.0, 0.1, 0.2, 0.3], [0.95, 0.97, 0.95, 0.5], [0.9, 0.99, 0.9, 0.91], [0.99] * 4,
    ]  # fmt: skip
    record["sink_sequences"] = [[1.0] * 4, [1.0] * 4, [1.0] * 4, [1.0, 1.0, 0.9, 1.0]]
    record["value_ratio"] = [[0.5, 0.5]] * 4
    return record | changes


def kept(record: dict[str, Any], least: float = 0.9) -> dict[tuple[int, int], str | None]:
    return {(one.block, one.kv_head): one.keep for one in practice(record, least).keys}


def test_a_key_head_goes_only_where_all_its_readers_let_it() -> None:
    found = kept(a_record())
    few = {place for place, keep in found.items() if keep == "p0_and_recent"}
    assert few == {(1, 0), (2, 0), (2, 1), (3, 0)}, "not 1.1: a head of two; not 3.1: 9 of 10"
    assert len(found) == 8 and set(found.values()) == {"p0_and_recent", "all"}
    assert {p for p, keep in kept(a_record(), 0.95).items() if keep == "p0_and_recent"} == {
        (1, 0), (3, 0),
    }  # fmt: skip
    [one] = [one for one in practice(a_record()).keys if (one.block, one.kv_head) == (1, 1)]
    assert one.heads == (2, 3) and one.rest == pytest.approx(0.5)


def test_what_rests_on_sink_logits_rests_on_no_key() -> None:
    record = a_record(sink_logit_mass=[[0.0] * 4, [0.0, 0.0, 0.0, 0.45], [0.0] * 4, [0.0] * 4])
    assert kept(record)[1, 1] == "p0_and_recent"


def test_windows_and_linear_blocks_have_no_say() -> None:
    found = kept(a_record(block_kinds=["linear", "sliding", "full", "mlp"]))
    assert found == {(1, 0): None, (1, 1): None, (2, 0): "p0_and_recent", (2, 1): "p0_and_recent"}
    nothing = practice(a_record(block_kinds=["linear"] * 4))
    assert nothing.keys == () and "no block's full attention" in nothing.lines()[0]


@pytest.mark.parametrize("ratio", [None, [None] * 4, [[0.5] * 3] * 4])
def test_unknown_groups_are_not_guessed(ratio: Any) -> None:
    found = practice(a_record(value_ratio=ratio))
    assert found.keys == () and "share a key head" in found.missing["keys"]


def test_what_was_not_measured_is_not_told() -> None:
    """Of the first blocks alone, and of a record from which fields were taken."""
    record = a_record(formed=False, measured_blocks=1, model={"blocks": 4, "experts": 4})
    found = practice(record)
    assert found.first_key is None and "first 1 blocks" in found.missing["first_key"]
    assert "first 1 blocks" in found.missing["experts"]
    assert " of the first 1 blocks" in found.lines()[0]
    for name in ("block_kinds", "sink_sequences"):
        lacking = a_record()
        del lacking[name]
        assert practice(lacking).keys == () and name in practice(lacking).missing["keys"]
    assert "on average over the probe" in practice(a_record()).lines()[0]


def card(answer: str | None) -> dict[str, Any]:
    return {"answer": answer, "missing": {"answer": "the probe has no start token"}}


@pytest.mark.parametrize(
    ("changes", "first", "start", "said"),
    [
        ({"position_share": 1.0}, True, False, "not needed"),
        ({"position_share": 0.05}, True, True, "[BOS]: keep it"),
        ({"position_share": 0.5}, True, None, "in part"),
        ({"position_share": None}, True, None, "scan --card"),
        ({"position_share": 1.0, "position_card": card("token")}, True, True, "[BOS]: keep it"),
        ({"position_share": None, "position_card": card(None)}, True, None, "no start token"),
        ({"formed": False}, False, None, "no block rests on it"),
        ({"formed": None, "missing": {"sinks": "its blocks run apart"}}, None, None, "run apart"),
    ],
)
def test_whether_the_start_token_is_needed(
    changes: dict[str, Any], first: bool | None, start: bool | None, said: str
) -> None:
    found = practice(a_record(**changes))
    assert (found.first_key, found.start_token) == (first, start)
    assert said in " ".join(found.lines())


def test_the_largest_activation_and_its_channels() -> None:
    of: dict[str, Any] = {
        "p0": [1.0, 2.0, 900.0, 5.0, 7.0], "others": [2.0] * 5, "p0_channel": [0, 1, 9, 3, 4],
        "others_channel": [6] * 5, "ratio": [2.0, 3.0, 450.0, None, 4.0],
    }  # fmt: skip
    channels = [{"channel": 9, "share": 0.9}, {"channel": 1, "share": 0.01}]
    found = practice(a_record(max_activation=of, p0_channels=channels))
    assert found.largest == {"value": 900.0, "channel": 9, "block": 2, "at_p0": True,
                             "ratio": 450.0, "at_output": False}  # fmt: skip
    assert found.channels == ({"channel": 9, "share": 0.9},)
    of["ratio"][4] = 500.0
    output = practice(a_record(max_activation=of))
    assert "7 in channel 4 at P0 at the last block's output" in " ".join(output.lines())
    assert "holds no largest activation" in " ".join(
        practice(a_record(max_activation=None)).lines()
    )


def test_experts_that_the_sink_hangs_on() -> None:
    rows = [
        {"kind": "expert", "block": 1, "index": 2, "share": 0.6, "gate": 0.9},
        {"kind": "expert", "block": 0, "index": 3, "share": 0.05, "gate": 0.9},
        {"kind": "head", "block": 0, "index": 0, "share": 0.5},
    ]
    effects = [
        {"kind": "expert", "block": 0, "index": 3, "effect": 0.8},
        {"kind": "mlp", "block": 0, "index": None, "effect": 0.9},
        {"kind": "expert", "block": 0, "index": 4, "effect": None},
    ]
    record = a_record()
    record["sinks"] = [record["sinks"][0] | {"top_components": rows, "total_effects": effects}]
    record["causal"] = {"experts": [{"block": 2, "index": 7, "super_expert": True},
                                    {"block": 2, "index": 6, "super_expert": False}]}  # fmt: skip
    found = [(one.block, one.expert, one.why) for one in practice(record).experts]
    assert found == [
        (0, 3, ("without it 80% of that state goes",)),
        (1, 2, ("writes 60% of the P0 state",)),
        (2, 7, ("extreme output",)),
    ]
    record["missing"] = {"parts": "the routing is not seen"}
    assert practice(record).missing["experts"] == "the routing is not seen"
    assert practice(a_record(model=record["model"] | {"experts": None})).experts == ()


def test_the_command(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run")
    run.append(a_record())
    told = CliRunner().invoke(app, ["practice", str(tmp_path / "run")])
    assert told.exit_code == 0 and "none of it is tested" in told.output
    found = json.loads(
        CliRunner().invoke(app, ["practice", str(tmp_path / "run"), "--json"]).output
    )
    assert found == json.loads(json.dumps(practice(a_record()).to_json()))
    assert next(one for one in found["keys"] if one["keep"] == "p0_and_recent") == {
        "block": 1, "kv_head": 0, "heads": [0, 1], "rest": pytest.approx(0.05),
        "keep": "p0_and_recent",
    }  # fmt: skip
    empty = Run.open(tmp_path / "empty")
    assert CliRunner().invoke(app, ["practice", str(empty.directory)]).exit_code != 0


@pytest.mark.parametrize("least", [0, -1, 1.5])
def test_no_such_attention(least: float) -> None:
    with pytest.raises(ValueError, match="wanted more than 0"):
        practice(a_record(), least)
