"""Checkpoints of models of text and images: their text decoder is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Config,
    InternVLConfig,
    LlavaConfig,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)

from sinktrack import ArchiveError, Probe, scan
from tests.helpers import models

PROBE = Probe.random(60, sequences=3, length=12)
TEXT: dict[str, Any] = models.small(head_dim=8, num_hidden_layers=3)
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "depth": 2, "out_hidden_size": 32,
}  # fmt: skip
IDS = {
    "image_token_id": 64, "video_token_id": 63, "vision_start_token_id": 62,
    "vision_end_token_id": 61,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention"] + ["full_attention"] * 2,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: Gemma3Config(
        text_config=TEXT | {"sliding_window": 64},
        vision_config=VISION | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4, image_token_index=64, boi_token_index=62, eoi_token_index=63,
    ),
    "llava": lambda: LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model"}, image_token_index=64,
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=TEXT | {"model_type": "mistral", "sliding_window": None},
        vision_config=VISION | {"model_type": "pixtral"}, image_token_index=64,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config=TEXT | MROPE, vision_config=QWEN | {"fullatt_block_indexes": [1]}, **IDS
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config=TEXT | MROPE,
        vision_config=QWEN | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **IDS,
    ),
    "qwen3_5": lambda: Qwen3_5Config(
        text_config=TEXT | LINEAR, vision_config=QWEN | {"num_position_embeddings": 16}, **IDS
    ),
    "internvl": lambda: InternVLConfig(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=VISION | {"image_size": [28, 28], "patch_size": [14, 14]}, image_token_id=64,
    ),
}  # fmt: skip


def saved(family: str, directory: Path) -> Any:
    torch.manual_seed(0)
    made = AutoModelForImageTextToText.from_config(FAMILIES[family](), attn_implementation="eager")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    made.save_pretrained(directory)
    return made.eval()


@torch.no_grad()
def attention(model: Any) -> Tensor:
    """``[L, H]`` by transformers' own eager attention, for blocks that have one."""
    output = model(input_ids=PROBE.tokens, output_attentions=True, use_cache=False)
    found = [weights for weights in output.attentions if weights is not None]
    return torch.stack([weights[:, :, 1:, 0].mean((0, 2)) for weights in found])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_decoder_is_measured(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    (record,) = scan(tmp_path, probe=PROBE, run=tmp_path / "run")
    assert record["model"]["blocks"] == 3 and record["model"]["heads"] == 4
    assert record["dtype"] == "float32"
    softmax = [row for row in record["p0_attention"] if None not in row]
    torch.testing.assert_close(torch.tensor(softmax), attention(model), atol=1e-6, rtol=1e-5)


def test_a_tensor_without_a_place_in_the_text_decoder(tmp_path: Path) -> None:
    saved("llava", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"vision_tower.vision_model.head.weight": torch.ones(2)}, path)
    assert list(scan(tmp_path, probe=PROBE, run=tmp_path / "run"))  # is not measured
    name = "language_model.model.layers.0.self_attn.q_proj.bias"
    save_file(weights | {name: torch.ones(32)}, path)
    with pytest.raises(ArchiveError, match=f"holds {name} that"):
        list(scan(tmp_path, run=tmp_path / "run", dtype="bfloat16"))


def test_a_decoder_that_was_saved_alone(tmp_path: Path) -> None:
    """Without the tower, under its own configuration."""
    whole = saved("gemma3", tmp_path)
    text = whole.get_decoder()
    weights = {f"model.{name}": value.clone() for name, value in text.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = AutoConfig.from_pretrained(tmp_path).text_config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (record,) = scan(tmp_path, probe=PROBE, run=tmp_path / "run")
    found = torch.tensor(record["p0_attention"])
    torch.testing.assert_close(found, attention(whole), atol=1e-6, rtol=1e-5)
