"""Megatron-Core's hybrid models: each sublayer of their pattern is a block."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from typing import Any

import pytest
import torch

from tests.helpers.commands import launch
from tests.helpers.reference import check_states
from tests.helpers.trainings import assert_identical
from tests.models.test_megatron import PROBE, assert_same

pytest.importorskip("megatron.core")

pytestmark = pytest.mark.distributed

HYBRID = importlib.util.find_spec("megatron.core.models.hybrid") is not None
"""Is there HybridModel, and not yet MambaModel alone?"""
KINDS = {"*": "full", "+": "full", "-": "mlp", "E": "mlp", "M": "linear", "G": "linear"}
ALONE = ["hybrid:*-M*-*:", "hybrid experts:*-*EM*E:", "hybrid gate:*-*-:",
         "hybrid windows:*-*-*-*-:"]  # fmt: skip
LATER = ["hybrid delta:*-G*-:", "hybrid latent:+-+E:"]  # GDN and MLA of their own symbols
if HYBRID:
    ALONE += LATER if version("megatron-core") >= "0.19" else LATER[:1]
TWO = ["hybrid:*-M|*-*:pp2", "hybrid:*-M*-*:tp2 sp", "hybrid experts:*-*EM*E:ep2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found(tmp_path_factory, 1, *ALONE, "as_gpt", "edits", "trained")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found(tmp_path_factory, 2, *TWO)


def found(tmp: pytest.TempPathFactory, processes: int, *wanted: str) -> dict[str, Any]:
    out = tmp.mktemp("hybrid") / "out.pt"
    launch(processes, "megatron_hybrid.py", str(out), *wanted)
    results: dict[str, Any] = torch.load(out, weights_only=False)
    return results


@pytest.mark.parametrize("case", ALONE)
def test_one_process_against_plain_hooks(case: str, alone: dict[str, Any]) -> None:
    assert not isinstance(alone[case], str), alone[case]
    measured, leaves, seen = alone[case]
    pattern = case.split(":")[1]
    kinds = [KINDS[symbol] for symbol in pattern]
    if "windows" in case:
        kinds = ["sliding" if k == "full" and (n + 1) % 3 else k for n, k in enumerate(kinds)]
    assert list(measured.block_kinds) == kinds
    assert measured.model["blocks"] == len(pattern)
    softmax = {block for block, kind in enumerate(kinds) if kind in ("full", "sliding")}
    assert seen["matrices"].keys() == softmax
    for block in range(len(pattern)):
        if block not in softmax:
            assert measured.visible_queries[block] is None
            assert bool(measured.p0_attention[block].isnan().all())
            continue
        matrix = seen["matrices"][block]
        p0 = matrix[:, :, 1:, 0].sum(-1) / measured.visible_queries_by_sequence[:, block, None]
        got = measured.p0_attention_by_sequence[:, block]
        torch.testing.assert_close(got, p0, atol=1e-6, rtol=0)
    check_states(measured, seen["states"].numpy(), PROBE.tokens[:, 0])
    assert measured.localization.share_sum == pytest.approx(1, abs=1e-5)
    names = {"*": "head", "+": "head", "-": "mlp", "E": "expert", "M": "mixer", "G": "mixer"}
    scale = float(seen["states"].norm(dim=-1).max())
    for block, symbol in enumerate(pattern):
        parts = {key: part for key, part in leaves.items() if key[1] == block}
        assert names[symbol] in {kind for kind, *_ in parts}
        wanted = (seen["states"][block + 1] - seen["states"][block])[:, 0].mean(0).float()
        torch.testing.assert_close(sum(parts.values()), wanted, atol=1e-6 * scale, rtol=0)


def test_the_same_as_a_gpt_model(alone: dict[str, Any]) -> None:
    """The blocks of a GPTModel, cut in two: the same attention, states, shares and effects."""
    gpt, hybrid = alone["as_gpt"]
    assert torch.equal(gpt.p0_attention, hybrid.p0_attention[::2])
    assert torch.equal(gpt.p0_norm, hybrid.p0_norm[::2])
    assert gpt.sink_rate() == hybrid.sink_rate()
    shares = [
        {(one.kind, one.block and one.block // by): one.share for one in of.localization.shares}
        for of, by in ((gpt, 1), (hybrid, 2))
    ]
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)


def test_edits_are_those_of_plain_hooks(alone: dict[str, Any]) -> None:
    assert alone["edits"].keys() == {"mlp", "mixer", "head", "experts"}
    for ours, theirs in alone["edits"].values():
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_training_is_unchanged(alone: dict[str, Any]) -> None:
    assert_identical(*alone["trained"])


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO)
def test_two_processes(case: str, alone: dict[str, Any], two: dict[str, Any]) -> None:
    name, pattern, _ = case.split(":")
    assert_same(two[case], alone[f"{name}:{pattern.replace('|', '')}:"])
