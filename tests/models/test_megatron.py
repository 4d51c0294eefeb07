"""Megatron-Core over real gloo process groups: the same numbers under every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sinktrack import Probe
from sinktrack.metrics import FIELDS
from sinktrack.records.run import to_json
from tests.helpers.commands import asked_cases, launch
from tests.helpers.reference import check_matrices, check_states

pytestmark = pytest.mark.distributed

pytest.importorskip("megatron.core")

ALONE = ["gpt", "llama", "qwen", "deepseek", "mla", "windows", "off-by-one", "learnable", "gate",
         "capacity", "biases", "mtp", "bf16", "recomputed", "fully recomputed"]  # fmt: skip
PROBE = Probe.random(64, sequences=5, length=15, seed=3)
"""That of `megatron_models`."""
TWO = ["deepseek:", "deepseek:ep2", "qwen:pp2", "deepseek:pp2 vp2", "llama:tp2", "gpt:tp2 sp",
       "qwen:tp2 sp etp2", "deepseek:tp2 sp ep2", "deepseek:tp2 ep2", "gate:tp2", "learnable:tp2",
       "mla:tp2 sp", "gpt:cp2", "deepseek:cp2 ep2", "gate:cp2", "mla:cp2", "mtp:pp2",
       "llama:pp2 first3", "llama:pp2 ends", "deepseek:pp2 E|ttttL", "qwen:pp2 Etttt|L",
       "llama:fsdp", "deepseek:fsdp"]  # fmt: skip
LONG = ["deepseek:", "qwen:tp2 sp etp2", "deepseek:tp2 ep2", "gate:tp2", "learnable:tp2",
        "gate:cp2", "gpt:cp2", "llama:pp2 first3", "llama:pp2 ends", "deepseek:pp2 E|ttttL",
        "llama:fsdp"]  # fmt: skip
"""Those of two processes that others come near to."""
FOUR = ["qwen:tp2 pp2", "qwen:pp2 ep2", "gpt:tp2 sp pp2 vp2", "deepseek:tp2 sp ep4",
        "qwen:tp2 sp pp2 ep2", "deepseek:cp2 pp2 ep2", "qwen:cp2 tp2 sp etp2 ep2"]  # fmt: skip


def cases(tmp: pytest.TempPathFactory, processes: int, wanted: list[str]) -> dict[str, Any]:
    out = tmp.mktemp("megatron") / "out.pt"
    launch(processes, "megatron_models.py", str(out), *wanted)
    found: dict[str, Any] = torch.load(out, weights_only=False)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return cases(tmp_path_factory, 1, [f"{name}:" for name in [*ALONE, "jitter"]])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    asked = asked_cases(request)
    return cases(tmp_path_factory, 2, [case for case in TWO if case in asked])


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return cases(tmp_path_factory, 4, FOUR)


@pytest.mark.parametrize("name", ALONE)
def test_one_process_against_plain_computations(name: str, alone: dict[str, Any]) -> None:
    assert not isinstance(alone[f"{name}:"], str), alone[f"{name}:"]
    found, leaves, plain = alone[f"{name}:"]
    half = name == "bf16"
    sinks = found.sink_logit_mass
    for block in range(4):
        matrix = plain["matrices"][block].float()
        p0 = matrix[:, :, 1:, 0].sum(-1) / found.visible_queries_by_sequence[:, block, None]
        got = found.p0_attention_by_sequence[:, block]
        torch.testing.assert_close(got, p0, atol=4e-3 if half else 1e-6, rtol=0)
        if sinks is not None:
            missing = (1 - matrix.sum(-1))[:, :, 1:].mean((0, 2))
            torch.testing.assert_close(sinks[block], missing, atol=1e-5, rtol=0)
    if not half:
        matrices = {block: matrix.float() for block, matrix in plain["matrices"].items()}
        check_matrices(found, matrices)
        check_states(found, plain["states"].numpy(), PROBE.tokens[:, 0])
    if name == "windows":
        assert found.block_kinds == ("sliding", "full", "sliding", "full")
        assert found.visible_queries == (5, 14, 5, 14)
    assert (sinks is not None) == (name in ("off-by-one", "learnable"))
    assert (found.attention_gate is not None) == (name == "gate")
    states = plain["states"]
    norms = np.linalg.norm(states, axis=-1)
    np.testing.assert_allclose(found.p0_norm, norms[:, :, 0].mean(1), rtol=1e-5)
    ratio = [row[:, 0].mean() / np.median(row[:, 1:]) for row in norms]
    np.testing.assert_allclose(found.norm_ratio, ratio, rtol=1e-5)
    scale = float(norms.max())
    for kind, wanted in (("head", plain["heads"]), ("expert", plain["experts"])):
        parts = {(block, index): part for (what, block, index), part in leaves.items()
                 if what == kind}  # fmt: skip
        assert parts.keys() == wanted.keys()
        for key, part in parts.items():
            tolerance = (1e-2 if half else 1e-6) * scale
            torch.testing.assert_close(part, wanted[key].float(), atol=tolerance, rtol=0)
    for block in range(4):
        total = sum(part for (_, where, _), part in leaves.items() if where == block)
        wanted = (states[block + 1] - states[block])[:, 0].mean(0).float()
        torch.testing.assert_close(total, wanted, atol=(1e-2 if half else 1e-6) * scale, rtol=0)


def test_the_routers_jitter_is_off(alone: dict[str, Any]) -> None:
    """Else these two models, which have the same weights, would differ."""
    jittered, steady = alone["jitter:"][0], alone["mtp:"][0]
    assert torch.equal(jittered.p0_attention, steady.p0_attention)
    assert torch.equal(jittered.p0_norm, steady.p0_norm)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) if case in LONG else case for case in TWO],
)
def test_two_processes(case: str, alone: dict[str, Any], two: dict[str, Any]) -> None:
    assert_same(two[case], alone[case.split(":")[0] + ":"])


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR)
def test_four_processes(case: str, alone: dict[str, Any], four: dict[str, Any]) -> None:
    assert_same(four[case], alone[case.split(":")[0] + ":"])


def assert_same(one_layout: Any, one_process: Any) -> None:
    """A measurement and its parts, against those of one process."""
    assert not isinstance(one_layout, str), one_layout
    (found, leaves), (whole, wanted, _) = one_layout, one_process
    for name in ("p0_attention", "own_attention", "visible_queries"):
        one, other = (getattr(of, f"{name}_by_sequence") for of in (found, whole))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-6, equal_nan=True)
    left, right = (without_effects(to_json(of.to_record(0, "", {}))) for of in (found, whole))
    assert left.keys() == right.keys() >= FIELDS.keys() - {"sink_logit_mass", "attention_gate"}
    for name in (FIELDS.keys() | {"intervals", "missing"}) & left.keys():
        assert_close(left[name], right[name], name)
    assert leaves.keys() == wanted.keys()
    for key, part in leaves.items():
        torch.testing.assert_close(part, wanted[key], atol=1e-5, rtol=1e-5)
    shares = zip(found.localization.shares, whole.localization.shares, strict=True)
    for one, other in shares:
        assert (one.kind, one.block) == (other.kind, other.block)
        assert abs(one.share - other.share) < 1e-5
    assert found.block_kinds == whole.block_kinds and found.model == whole.model


def without_effects(record: dict[str, Any]) -> dict[str, Any]:
    """Total effects are had where a process holds the whole model; else with the reason."""
    missing = {k: v for k, v in record.pop("missing", {}).items() if k != "total_effects"}
    for sink in record["sinks"] or ():
        sink.pop("total_effects", None)
    return record | ({"missing": missing} if missing else {})


def assert_close(left: Any, right: Any, name: str) -> None:
    """Fields of two records; terms of a sum that are next to nothing may change places."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for key in left:
            assert_close(left[key], right[key], f"{name}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), name
        for place, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_close(one, other, f"{name}[{place}]")
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=1e-4, abs=2e-5), name
    else:
        assert left == right, name
