"""Attention that is not what its name says: measured as the model runs it, or refused by name."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers.models.gemma2.modeling_gemma2 as gemma2
import transformers.models.llama.modeling_llama as llama
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinktrack import MeasurementError, Probe, measure
from sinktrack.interventions import necessity
from sinktrack.models.rehearsal import Rehearsal
from tests.helpers import models
from tests.helpers.families import EXACT, tiny
from tests.helpers.reference import check_exact

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=20, seed=3)
EAGER = llama.eager_attention_forward
Weights = Callable[[Tensor], Tensor]


def attention(of: Weights) -> Any:
    """Eager attention whose probabilities are a function of the scores."""

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float,
        dropout: float = 0.0, **rest: Any,
    ) -> Any:  # fmt: skip
        key = llama.repeat_kv(key, module.num_key_value_groups)
        value = llama.repeat_kv(value, module.num_key_value_groups)
        scores = query @ key.mT * scaling
        if mask is None:
            mask = torch.full(scores.shape[-2:], torch.finfo(scores.dtype).min).triu(1)
        weights = of(scores + mask)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    return forward


def off_by_one(scores: Tensor) -> Tensor:
    return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1]


def reweighted(scores: Tensor) -> Tensor:
    weights = scores.softmax(-1)
    return weights * torch.linspace(0.5, 1, weights.shape[-1])


def pretending(function: Any) -> Any:
    """A function that bears the names of transformers' own."""
    return functools.wraps(EAGER)(function)


@pytest.mark.parametrize("of", [off_by_one, reweighted])
@pytest.mark.parametrize("dress", [lambda function: function, pretending])
def test_a_familys_eager_attention_is_replaced(
    of: Weights, dress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.llama()
    monkeypatch.setattr(llama, "eager_attention_forward", dress(attention(of)))
    with pytest.raises(MeasurementError, match="eager_attention_forward of .*modeling_llama is a"):
        measure(model, PROBE)
    monkeypatch.undo()
    check_exact(model, PROBE)


def test_what_runs_is_judged_and_not_what_lies_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.llama()
    wanted = measure(model, PROBE)
    monkeypatch.setattr(llama, "eager_attention_forward", attention(off_by_one))
    model.set_attn_implementation("sdpa")
    assert torch.equal(measure(model, PROBE).p0_attention, wanted.p0_attention)


@pytest.mark.parametrize("dress", [lambda function: function, pretending])
def test_torchs_attention_is_overwritten_in_transformers_table(dress: Any) -> None:
    model = models.llama()
    model.set_attn_implementation("sdpa")
    ALL_ATTENTION_FUNCTIONS["sdpa"] = dress(attention(off_by_one))
    try:
        with pytest.raises(MeasurementError, match="attention 'sdpa' is a function of"):
            measure(model, PROBE)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    measure(model, PROBE)


def test_torchs_own_function_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.llama()
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: scaled_dot_product_attention(*args, **kwargs),
    )
    with pytest.raises(MeasurementError, match=r"scaled_dot_product_attention of torch.nn.func"):
        measure(model, PROBE)
    model.set_attn_implementation("eager")
    check_exact(model, PROBE)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_torchs_softmax_is_replaced(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one of the same name with one more term in its denominator."""
    own, model = softmax, tiny(family, EXACT[family])

    def one_more(scores: Tensor, dim: int = -1, dtype: Any = None, **_: Any) -> Tensor:
        padded = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)
        return own(padded, dim, dtype=dtype)[..., :-1]

    monkeypatch.setattr(nn.functional, "softmax", one_more)
    with pytest.raises(MeasurementError, match=r"block 0 .*(what its attention|was not seen)"):
        measure(model, PROBE)


def test_torchs_attention_is_overwritten_by_one_of_transformers() -> None:
    """Of the right origin and another meaning: only the values tell."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    model = models.llama()
    model.set_attn_implementation("sdpa")
    capped = functools.partial(eager_attention_forward, softcap=0.5)
    capped.__module__ = eager_attention_forward.__module__
    ALL_ATTENTION_FUNCTIONS["sdpa"] = capped
    try:
        with pytest.raises(MeasurementError, match=r"block 0 \(LlamaDecoderLayer\): what its att"):
            measure(model, PROBE)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_a_soft_cap_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gemma2", EXACT["gemma2"])
    check_exact(model, PROBE)

    def linear(*args: Any, **kwargs: Any) -> Any:
        return EAGER(*args, **kwargs | {"softcap": None})

    monkeypatch.setattr(gemma2, "eager_attention_forward", linear)
    model.config.attn_logit_softcapping = 0.5
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    with pytest.raises(MeasurementError, match="eager_attention_forward of .*gemma2 is a function"):
        measure(model, PROBE)


class Own(llama.LlamaAttention):  # type: ignore[misc]
    """A forward of its own; ``weights`` tells what becomes of its scores."""

    weights: Weights

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **_: Any
    ) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        mixed, weights = self.mix(query, key, value)
        return self.o_proj(mixed.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), weights

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        key, value = (llama.repeat_kv(x, self.num_key_value_groups) for x in (key, value))
        scores = query @ key.mT * self.scaling
        length = scores.shape[-1]
        mask = torch.full((length, length), torch.finfo(scores.dtype).min).triu(1)
        weights = type(self).weights(scores + mask)
        return weights @ value, weights


class Fused(Own):
    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True), 0


class Twofold(Fused):
    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        mixed, _ = super().mix(query, key, value)
        return mixed + llama.repeat_kv(value, self.num_key_value_groups).cumsum(2), 0


def with_class(kind: type[Own], of: Weights = lambda scores: softmax(scores, -1)) -> Any:
    """A Llama of that attention, which puts out what it used for probabilities."""
    kind.weights = staticmethod(of)
    model = models.llama()
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    return model


@pytest.mark.parametrize("kind", [Own, Fused])
def test_a_class_of_its_own_that_attends_by_softmax_is_exact(kind: Any) -> None:
    wanted, found = measure(models.llama(), PROBE), measure(with_class(kind), PROBE)
    torch.testing.assert_close(found.p0_attention, wanted.p0_attention, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.p0_norm, wanted.p0_norm, atol=0, rtol=1e-5)


CHANGES: dict[str, Weights] = {
    "a factor": reweighted,
    "a factor in place": lambda scores: scores.softmax(-1).mul_(0.5),
    "renormalized": lambda scores: nn.functional.normalize(scores.softmax(-1) ** 2, p=1, dim=-1),
    "clipped": lambda scores: (scores.softmax(-1) - 0.05).clamp(min=0),
    "P0 taken out": lambda scores: torch.cat(
        [torch.zeros_like(scores[..., :1]), scores.softmax(-1)[..., 1:]], -1
    ),
    "a threshold": lambda scores: scores.softmax(-1).masked_fill(scores < 0, 0.0),
    "added to": lambda scores: scores.softmax(-1) + 0.1,
}


@pytest.mark.parametrize("change", CHANGES)
def test_probabilities_changed_after_the_softmax_are_refused(change: str) -> None:
    with pytest.raises(MeasurementError, match=r"block 0 .*(after the softmax|was not seen)"):
        measure(with_class(Own, CHANGES[change]), PROBE)


def test_a_second_path_beside_the_attention_is_refused() -> None:
    with pytest.raises(
        MeasurementError, match="block 0 .*something is added to what its heads attend to"
    ):
        measure(with_class(Twofold), PROBE)


def test_attention_by_no_softmax_is_refused() -> None:
    with pytest.raises(MeasurementError, match="block 0 .*its attention was not seen"):
        measure(with_class(Own, lambda scores: scores.sigmoid().tril()), PROBE)


@pytest.mark.parametrize("block", [0, 2])
def test_one_patched_instance_is_named(block: int) -> None:
    model = models.llama()
    module = model.model.layers[block].self_attn
    module.forward = types.MethodType(Own.forward, module)
    module.mix = types.MethodType(Own.mix, module)
    kind = type(module)
    kind.weights = staticmethod(off_by_one)
    try:
        with pytest.raises(MeasurementError, match=f"block {block} "):
            measure(model, PROBE)
    finally:
        del kind.weights


def test_a_patched_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.llama()
    monkeypatch.setattr(llama.LlamaAttention, "forward", Own.forward)
    monkeypatch.setattr(llama.LlamaAttention, "mix", Own.mix, raising=False)
    monkeypatch.setattr(llama.LlamaAttention, "weights", staticmethod(reweighted), raising=False)
    with pytest.raises(MeasurementError, match=r"block 0 .*after the softmax"):
        measure(model, PROBE)


@pytest.mark.parametrize("of", [off_by_one, reweighted, lambda scores: scores.softmax(-1)])
def test_another_class_in_the_place_of_an_attention(of: Weights) -> None:
    """Not a block without attention, whose curves are null."""

    class Other(nn.Module):
        def __init__(self, like: Any) -> None:
            super().__init__()
            self.like = [like]

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return Own.forward(self.like[0], *args, **kwargs)

    model = with_class(Own, of)
    model.model.layers[1].self_attn = Other(model.model.layers[1].self_attn)
    with pytest.raises(MeasurementError, match="block 1 .*Other is in the place of its attention"):
        measure(model, PROBE)


def test_a_hook_on_an_attention_is_part_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of its output enters the stream, and that is what is measured."""
    monkeypatch.setattr("sinktrack.metrics.localization.READ", 0)
    model, scaled = models.llama(), models.llama()
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, out: (out[0] * 0.5, *out[1:]))
    with torch.no_grad():
        for layer in scaled.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.5)
    found, wanted = measure(model, PROBE), measure(scaled, PROBE)
    torch.testing.assert_close(found.p0_attention, wanted.p0_attention, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.p0_norm, wanted.p0_norm, atol=0, rtol=1e-5)
    assert found.localization.share_sum == pytest.approx(1, abs=1e-4)


@pytest.fixture
def rehearsals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each rehearsal that is held."""
    held: list[int] = []
    begin = Rehearsal.as_in_training

    def counted(rehearsal: Rehearsal) -> Any:
        held.append(len(held))
        return begin(rehearsal)

    monkeypatch.setattr(Rehearsal, "as_in_training", counted)
    return held


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_oss"])
def test_a_model_is_rehearsed_once(family: str, rehearsals: list[int]) -> None:
    """Training changes weights alone; another model of the family is another."""
    model = tiny(family, EXACT[family])
    measure(model, PROBE)
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    model.train()
    measure(model.eval(), PROBE)
    assert len(rehearsals) == 1
    measure(tiny(family, EXACT[family]), PROBE)
    measure(model, Probe.random(models.VOCABULARY, sequences=2, length=24))
    assert len(rehearsals) == 3, "more tokens may show more"


def _another_class(model: Any) -> None:
    Own.weights = staticmethod(off_by_one)
    model.model.layers[1].self_attn.__class__ = Own


def _another_module(model: Any) -> None:
    model.model.layers[1].self_attn = with_class(Own, off_by_one).model.layers[1].self_attn


def _another_forward(model: Any) -> None:
    module = model.model.layers[1].self_attn
    module.forward = types.MethodType(type(module).forward, module)


EDITS: dict[str, Callable[[Any], None]] = {
    "class": _another_class,
    "module": _another_module,
    "forward": _another_forward,
    "hook": lambda model: model.model.layers[1].self_attn.register_forward_hook(
        lambda _, __, out: None
    ),
    "setting": lambda model: setattr(model.config, "attention_dropout", 0.5),
    "number": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.1),
    "kernel": lambda model: model.set_attn_implementation("eager"),
    "dtype": lambda model: model.double(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_model_is_rehearsed_anew(edit: str, rehearsals: list[int]) -> None:
    model = models.llama()
    model.set_attn_implementation("sdpa")
    measure(model, PROBE)
    EDITS[edit](model)
    with suppress(MeasurementError):  # some are refused, before or after
        measure(model, PROBE)
    assert len(rehearsals) == 2


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "LlamaAttention", "repeat_kv"])
def test_what_its_module_names_may_not_change_unseen(
    name: str, rehearsals: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.llama()
    measure(model, PROBE)
    monkeypatch.setattr(llama, name, functools.partial(getattr(llama, name)))
    measure(model, PROBE)
    assert len(rehearsals) == 2


def test_code_of_others_is_rehearsed_each_time(rehearsals: list[int]) -> None:
    """It may change what it does without a sign."""
    model = with_class(Own)
    measure(model, PROBE)
    measure(model, PROBE)
    assert len(rehearsals) == 2
    Own.weights = staticmethod(reweighted)
    with pytest.raises(MeasurementError, match="after the softmax"):
        measure(model, PROBE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rounding_is_not_taken_for_another_model(
    family: str, dtype: torch.dtype, implementation: str
) -> None:
    model = tiny(family, EXACT[family]).to(dtype)
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers runs this family's attention eagerly")
    model.set_attn_implementation(implementation)
    measure(model, PROBE)


def test_a_kernel_that_needs_a_gpu_gives_way_to_eager_attention() -> None:
    model = models.llama()
    wanted = measure(model, PROBE)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "flash_attention_2"
    assert torch.equal(measure(model, PROBE).p0_attention, wanted.p0_attention)
    assert model.config._attn_implementation == "flash_attention_2"


def test_the_causal_tests_refuse_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.llama()
    measured = measure(model, PROBE)
    import sinktrack.interventions.trials as trials

    monkeypatch.setattr(trials, "is_testable", lambda _: True)
    monkeypatch.setattr(llama, "eager_attention_forward", attention(off_by_one))
    with pytest.raises(MeasurementError, match="eager_attention_forward of"):
        necessity(model, PROBE, measured)
