"""A model on another device than the CPU gives what it gives on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_check import VOCABULARY, Decoder

import sinktrack as st
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.interventions import run_causal_tests
from tests.helpers import models, planted
from tests.helpers.elsewhere import elsewhere

PROBE = st.Probe.random(models.VOCABULARY, sequences=4, length=12)
FAMILIES = {
    name: getattr(models, name) for name in ("mixtral", "deepseek_v3", "mistral_sliding", "gpt2")
}


def eager(model: Any) -> Any:
    """With experts one by one: the fused products ask the driver."""
    if hasattr(model.config, "num_local_experts") or hasattr(model.config, "n_routed_experts"):
        model.set_experts_implementation("eager")
    return model


def near(found: Any, wanted: Any) -> None:
    """The same but for rounding: some operations are made of smaller ones on the device."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            if name != "seconds":
                near(found[name], value)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            near(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    else:
        assert found == wanted


def record(model: Any, probe: st.Probe, run: Path, **options: Any) -> dict[str, Any]:
    tracker = SinkTracker(probe, run, every=1, on_error="raise", **options)
    tracker.step(1, model)
    tracker.close()
    found = st.Run.read(run).records[0]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_records(family: str, tmp_path: Path) -> None:
    model = eager(FAMILIES[family]())
    wanted = record(model, PROBE, tmp_path / "here")
    with elsewhere() as move:
        found = record(move(model), PROBE, tmp_path / "there")
    near(found, wanted)


def test_causal_tests() -> None:
    model = planted.dense()
    planted.neuron_writer(model, 1)
    for block in range(2, planted.BLOCKS):
        planted.reader(model, block)
    probe = planted.probe(8)
    wanted = run_causal_tests(model, probe, st.measure(model, probe))
    with elsewhere() as move:
        move(model)
        found = run_causal_tests(model, probe, st.measure(model, probe))
    near(json.loads(json.dumps(found)), json.loads(json.dumps(wanted)))


@pytest.mark.parametrize("attention", ["SDPA", "written"])
def test_a_decoder_of_ones_own(attention: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Decoder(attention)
    probe = st.Probe.random(VOCABULARY, 4, 12)
    wanted = record(model, probe, tmp_path / "here")
    with elsewhere() as move:
        found = record(move(model), probe, tmp_path / "there")
    near(found, wanted)


def test_the_position_card() -> None:
    model = models.llama()
    wanted = st.position_card(model, PROBE)
    with elsewhere() as move:
        near(st.position_card(move(model), PROBE), wanted)
