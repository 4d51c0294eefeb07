"""FP8 is off while a probe runs.

Transformer Engine wants a GPU, where `gpu_check.py` has its layers; here its state stands in, with
the names that its layers ask.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinktrack import MeasurementError, Probe, measure
from sinktrack.models.fp8 import plain
from tests.helpers import models

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=12, seed=3)
NAMES = ["transformer_engine.pytorch.quantization", "transformer_engine.pytorch.fp8"]


class FP8GlobalStateManager:
    """Of Transformer Engine's what its layers ask."""

    enabled = False

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        return cls.enabled


class Linear(nn.Linear):
    """Multiplies in FP8 where that is on, and notes the largest values, in eval mode too."""

    noted: ClassVar[list[float]] = []

    def forward(self, input: Tensor) -> Tensor:
        if not FP8GlobalStateManager.is_fp8_enabled():
            return F.linear(input, self.weight)
        self.noted.append(float(input.detach().abs().max()))
        low = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (input, self.weight))
        return F.linear(*low)


Linear.__module__ = "transformer_engine.pytorch.module.linear"


def whole(name: str, state: type, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(name)
    module.FP8GlobalStateManager = state  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)


@contextmanager
def autocast() -> Iterator[None]:
    FP8GlobalStateManager.enabled = True
    try:
        yield
    finally:
        FP8GlobalStateManager.enabled = False


def engine(in_fp8: bool) -> Any:
    """A model with such layers, which enters FP8 itself."""
    model = models.llama()
    for block in model.model.layers:
        own = block.mlp.down_proj
        block.mlp.down_proj = Linear(own.in_features, own.out_features, bias=False)
        block.mlp.down_proj.weight = own.weight
    forward = model.model.forward

    def within(*args: Any, **given: Any) -> Any:
        with autocast():
            return forward(*args, **given)

    if in_fp8:
        model.model.forward = within
    return model


@pytest.mark.parametrize("name", NAMES)
def test_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No scale moves, and what is measured are the weights as they are; then it is as before."""
    whole(name, FP8GlobalStateManager, monkeypatch)
    before = dict(vars(FP8GlobalStateManager))
    model = engine(in_fp8=True)
    model(PROBE.tokens)
    assert len(Linear.noted) >= len(model.model.layers)
    Linear.noted.clear()
    found, wanted = measure(model, PROBE), measure(engine(in_fp8=False), PROBE)
    assert not Linear.noted
    assert torch.equal(found.p0_norm, wanted.p0_norm)
    assert torch.equal(found.p0_attention, wanted.p0_attention)
    assert dict(vars(FP8GlobalStateManager)) == before
    model(PROBE.tokens)
    assert Linear.noted


def test_a_failing_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 is on again behind a probe that failed."""
    whole(NAMES[0], FP8GlobalStateManager, monkeypatch)
    model = engine(in_fp8=True)
    before = dict(vars(FP8GlobalStateManager))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(MeasurementError):
        measure(model, PROBE)
    assert dict(vars(FP8GlobalStateManager)) == before


def test_no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is asked otherwise is refused: a probe would move its scales."""
    whole(NAMES[0], type("FP8GlobalStateManager", (), {}), monkeypatch)
    with pytest.raises(MeasurementError, match="no is_fp8_enabled and is_fp8_calibration, so"):
        measure(models.llama(), PROBE)


class Float8Tensor(Tensor):
    """What Transformer Engine keeps weights in."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor) * 2


Float8Tensor.__module__ = "transformer_engine.pytorch.tensor.float8_tensor"


def test_weights() -> None:
    """Such a weight stands for other numbers than those that it holds; any other for its own."""
    weight = torch.randn(3, 3)
    assert torch.equal(plain(weight.as_subclass(Float8Tensor)), 2 * weight)
    assert plain(weight) is weight
