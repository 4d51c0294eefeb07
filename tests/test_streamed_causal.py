"""Causal tests of a checkpoint, a block at a time: what they say of the model in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import planted
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sinktrack import Probe, measure
from sinktrack.archive.discover import discover
from sinktrack.archive.source import open as open_source
from sinktrack.interventions import run_causal_tests
from sinktrack.models.streaming import Streamed


def _short(seed: int = 3) -> Probe:
    """So short that chance alone makes a sink, and so something to test."""
    return Probe.random(models.VOCABULARY, sequences=10, length=6, seed=seed)


def _circuit() -> Any:
    """Two heads that stand in for each other, a neuron, and their readers."""
    model = planted.dense()
    planted.head_writer(model, 0, 0)
    planted.head_writer(model, 0, 1)
    for block in (2, 3, 4):
        planted.reader(model, block)
    return model


def _routed() -> Any:
    model = planted.mixture()
    planted.expert_writer(model, 1, expert=2, size=8.0)
    for block in (2, 3, 4):
        planted.reader(model, block)
    return model


def _tied() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**models.small(tie_word_embeddings=True))).eval()


CASES: dict[str, tuple[Callable[[], Any], Probe]] = {
    "circuit": (_circuit, planted.probe(10)),
    "routed": (_routed, planted.probe(10)),
    "llama": (models.llama, _short()),
    "tied": (_tied, _short()),
    "mixtral": (models.mixtral, _short()),
    "qwen3_moe": (models.qwen3_moe, _short(0)),
    "deepseek_v3": (models.deepseek_v3, _short(5)),
    "sliding": (models.mistral_sliding, _short()),
    "gpt2": (lambda: models.gpt2(bos_token_id=0), _short()),
}


def close(one: Any, other: Any, where: str = "") -> None:
    """Equal, numbers to 1e-6."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one.keys() - {"seconds"}:
            close(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            close(a, b, f"{where}/{place}")
    elif isinstance(one, float) and isinstance(other, float):
        assert math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6), (where, one, other)
    else:
        assert one == other, where


def streamed_of(model: Any, directory: Path) -> Streamed:
    model.save_pretrained(directory)
    return Streamed(open_source(discover(directory)[0]), head=True)


@pytest.mark.parametrize("case", CASES)
def test_streamed_equals_in_memory(case: str, tmp_path: Path) -> None:
    made, probe = CASES[case]
    model = made()
    measured = measure(model, probe)
    wanted = run_causal_tests(model, probe, measured)
    streamed = streamed_of(model, tmp_path)
    found = run_causal_tests(streamed, probe, measure(streamed, probe))
    assert found["phases"], "nothing was tested"
    close(found, wanted)
