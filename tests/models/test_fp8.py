"""FP8 is off while a probe runs.

Transformer Engine wants a GPU, where `gpu_check.py` has its layers; here its state stands in, with
the names that its layers ask. torchao's layers are its own where it is installed, and what stands
in for them has their names.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinktrack import Decoder, MeasurementError, Probe, measure
from sinktrack.models.fp8 import plain
from tests.helpers import models, planted, torch_models
from tests.helpers.torch_models import Kind, Net, reading
from tests.models.test_any_decoder import check

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


def test_a_state_that_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches of a class above are hidden, and shown again."""
    state = type("FP8GlobalStateManager", (FP8GlobalStateManager,), {})
    whole(NAMES[0], state, monkeypatch)
    monkeypatch.setitem(sys.modules, NAMES[1], types.ModuleType(NAMES[1]))
    measure(models.llama(), PROBE)
    assert not vars(state).keys() & {"is_fp8_enabled", "is_fp8_calibration"}


def test_no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is asked otherwise is refused: a probe would move its scales."""
    whole(NAMES[0], type("FP8GlobalStateManager", (), {}), monkeypatch)
    with pytest.raises(MeasurementError, match="no is_fp8_enabled and is_fp8_calibration, so"):
        measure(models.llama(), PROBE)


class Float8Linear(nn.Linear):
    """Multiplies in FP8, out of torch's sight, as torchao's does."""

    ran = 0

    def forward(self, input: Tensor) -> Tensor:
        Float8Linear.ran += 1
        low = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (input, self.weight))
        return torch.from_numpy(F.linear(*low).detach().numpy())


Float8Linear.__module__ = Float8Linear.forward.__module__ = "torchao.float8.float8_linear"


def stand_in(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
            module.__class__ = Float8Linear


def converted(recipe: str) -> Callable[[nn.Module], None]:
    """torchao's own conversion, which computes in float32 what a GPU does in FP8."""

    def convert(model: nn.Module) -> None:
        float8 = pytest.importorskip("torchao.float8")
        recipes = float8.Float8LinearConfig.from_recipe_name(recipe)
        float8.convert_to_float8_training(model, config=replace(recipes, emulate=True))

    return convert


LAYERS = {
    "stand-in": stand_in,
    **{name: converted(name) for name in ("tensorwise", "rowwise", "rowwise_with_gw_hp")},
}


@pytest.mark.parametrize("name", LAYERS)
def test_torchao_in_any_decoder(name: str) -> None:
    """As the model multiplies in full: with heads, and whatever else is in the batch."""
    probe = Probe.random(torch_models.VOCABULARY, sequences=5, length=17)
    model: Net = reading(Kind(), probe.tokens)
    LAYERS[name](model)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Float8Linear" in kinds
    with torch.no_grad():
        before = model(probe.tokens)
    Float8Linear.ran = 0
    found = measure(Decoder(model), probe)
    assert not Float8Linear.ran
    check(found, model, probe.tokens)
    assert not found.missing
    assert {type(module).__name__ for module in model.modules()} == kinds
    with torch.no_grad():
        assert torch.equal(model(probe.tokens), before)


@pytest.mark.parametrize("name", LAYERS)
def test_torchao_in_transformers(name: str) -> None:
    """The same numbers as before it was converted."""
    wanted, model = measure(models.llama(), PROBE), models.llama()
    LAYERS[name](model)
    found = measure(model, PROBE)
    assert torch.equal(found.p0_norm, wanted.p0_norm)
    assert torch.equal(found.p0_attention, wanted.p0_attention)
    assert found.localization == wanted.localization
    assert found.missing == wanted.missing


class Tripled(Float8Linear):
    """A layer of torchao with a forward pass of somebody's own."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * F.linear(input, self.weight)


class LowRank(nn.Linear):
    """A linear layer without a weight."""

    low: Tensor
    high: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.low.T @ self.high.T


def own_class(module: nn.Linear) -> None:
    module.__class__ = Tripled


def own_instance(module: nn.Linear) -> None:
    module.__class__ = Float8Linear
    module.forward = lambda input: 3 * F.linear(input, module.weight)  # type: ignore[method-assign]


def no_weight(module: nn.Linear) -> None:
    weight = module.weight.detach()
    del module.weight
    module.__class__ = LowRank
    module.low, module.high = torch.randn(4, weight.shape[1]), weight[:, :4].clone()


@pytest.mark.parametrize("change", [own_class, own_instance, no_weight])
def test_another_forward_pass_is_left_alone(change: Callable[[nn.Linear], None]) -> None:
    """What such a layer computes is what is measured, and it is as before."""
    model = models.llama()
    layers = [block.mlp.down_proj for block in model.model.layers]
    for layer in layers:
        change(layer)
    before = [dict(vars(layer)) for layer in layers]
    found = measure(model, PROBE)
    assert [dict(vars(layer)) for layer in layers] == before
    with torch.no_grad():
        states = model.model(PROBE.tokens, output_hidden_states=True).hidden_states
    norms = torch.stack([state[:, 0].norm(dim=-1).mean() for state in states[:-1]])
    torch.testing.assert_close(found.p0_norm[: len(norms)], norms)


def test_a_layer_has_its_own_forward_pass_again() -> None:
    model = models.llama()
    stand_in(model)
    measure(model, PROBE)
    assert not any("forward" in vars(module) for module in model.modules())


class Whole(Tensor):
    """A weight that multiplies as whole numbers, as that of torchao's BitNet does by three."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear:
            args = (args[0], args[1].as_subclass(Tensor).ceil(), *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def test_weights_of_a_class_that_multiplies_otherwise() -> None:
    """Heads are not told by numbers that did not multiply; norms and attention stand."""
    probe = planted.probe()
    model = planted.dense()
    planted.head_writer(model, 0, 1, size=2.5)
    planted.reader(model, 1)
    found = measure(model, probe)
    assert any(part.kind == "head" for part in found.localization.parts)
    for block in model.model.layers:
        own = block.self_attn.o_proj
        own.weight = nn.Parameter(own.weight.detach().as_subclass(Whole), requires_grad=False)
    found = measure(model, probe)
    assert found.localization.share_sum is None
    assert "multiplies otherwise than by its numbers" in found.missing["shares"]
    with torch.no_grad():
        states = model(probe.tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found.p0_norm[1], states[1][:, 0].norm(dim=-1).mean())


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
