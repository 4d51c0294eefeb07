"""Vision-language models, live: their text decoder is measured, on text alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from sinktrack import MeasurementError, Run, measure
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.interventions import examine
from sinktrack.models.huggingface import decoder
from tests.helpers import models
from tests.helpers.reference import check_exact, measured_by_hand
from tests.helpers.trainings import PROBE

TEXT = models.small(head_dim=8)
SEEN = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN: dict[str, Any] = {
    "depth": 3, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
    "patch_size": 14,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {"text_config": TEXT, "vision_config": SEEN | {"model_type": "siglip_vision_model"},
         "mm_tokens_per_image": 4},
    ),
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {"text_config": TEXT | {"model_type": "llama"},
         "vision_config": SEEN | {"model_type": "clip_vision_model"}},
    ),
    "Mistral3ForConditionalGeneration": (
        "Mistral3Config",
        {"text_config": TEXT | {"model_type": "mistral", "sliding_window": 6},
         "vision_config": SEEN | {"model_type": "pixtral", "head_dim": 8}},
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "Qwen2_5_VLConfig",
        {"text_config": TEXT | {"rope_parameters": ROPE}, "vision_config": QWEN},
    ),
    "Qwen2VLForConditionalGeneration": (
        "Qwen2VLConfig",
        {"text_config": TEXT | {"rope_parameters": ROPE},
         "vision_config": {"depth": 3, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}},
    ),
    "Qwen3VLForConditionalGeneration": (
        "Qwen3VLConfig",
        {"text_config": TEXT | {"rope_parameters": ROPE},
         "vision_config": QWEN | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        "Qwen3VLMoeConfig",
        {"text_config": TEXT | {"rope_parameters": ROPE, "moe_intermediate_size": 16,
                                "num_experts": 8, "num_experts_per_tok": 2},
         "vision_config": QWEN | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
    ),
}  # fmt: skip


def tiny(name: str) -> Any:
    kind, options = MODELS[name]
    config = getattr(transformers, kind)(**options)
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in decoder(model).model.get_decoder().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_exact(name: str) -> None:
    model = tiny(name)
    found = check_exact(model, PROBE)
    assert len(found.block_kinds) == 4
    assert found.to_record(0, "", {})["model"]["type"] == model.config.get_text_config().model_type


@pytest.mark.parametrize(
    "name", ["Gemma3ForConditionalGeneration", "Qwen3VLForConditionalGeneration"]
)
def test_its_language_model_alone_measures_the_same(name: str) -> None:
    model = tiny(name)
    whole, alone = measure(model, PROBE), measure(model.model.language_model, PROBE)
    torch.testing.assert_close(whole.p0_attention, alone.p0_attention, atol=1e-6, rtol=0)
    assert whole.weights == alone.weights


def test_a_training_is_followed(tmp_path: Any) -> None:
    model = tiny("Gemma3ForConditionalGeneration").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tracker = SinkTracker(PROBE, tmp_path, every=1, on_error="raise")
    measured = tracker.step(1, model)
    assert measured is not None and Run.read(tmp_path).steps == [1]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(module.training for module in model.modules())
    wanted = measured_by_hand(model.eval(), PROBE.tokens)["p0"]
    assert abs(measured.p0_attention_by_sequence.numpy() - wanted).max() < 1e-6
    examine(model, PROBE, measured)


def test_one_that_reads_both_ways_is_refused() -> None:
    config = transformers.PaliGemmaConfig(
        text_config=TEXT | {"model_type": "gemma"},
        vision_config=SEEN | {"model_type": "siglip_vision_model", "projection_dim": 32},
    )
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    with pytest.raises(MeasurementError, match=r"block \d .*not causal"):
        measure(model, PROBE)
