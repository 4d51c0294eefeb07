"""Every family of transformers that we name: measured exactly, or refused by name.

The outcome is kept in ``docs/families.md``; ``FAMILIES=write pytest tests/test_families.py`` writes
it anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from reference import capture_inputs
from transformers import CONFIG_MAPPING

from sinktrack import MeasurementError, Probe, measure

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=20, seed=3)
TABLE = Path(__file__).parent.parent / "docs" / "families.md"
SHARED: dict[str, Any] = models.small(
    head_dim=8, moe_intermediate_size=16, num_experts=8, n_routed_experts=8, num_local_experts=8,
    num_experts_per_tok=2, shared_expert_intermediate_size=16, shared_intermediate_size=16,
    n_shared_experts=1, n_group=2, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
    qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, moe_num_experts=8, moe_k=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, sliding_window=6,
    intermediate_size_mlp=48, word_embed_proj_dim=32, ffn_dim=48,
)  # fmt: skip
LATENT = {"num_key_value_heads": 4}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2}
EXACT: dict[str, dict[str, Any]] = {
    "qwen2_moe": {}, "qwen3_moe": {}, "qwen3_next": {}, "qwen3_5_moe_text": {}, "olmoe": {},
    "flex_olmo": {}, "mixtral": {}, "gpt_oss": {}, "deepseek_v2": LATENT, "glm4_moe": {},
    "granitemoe": {}, "granitemoeshared": {}, "phimoe": {}, "ernie4_5_moe": {}, "dots1": {},
    "minimax_m2": {}, "hunyuan_v1_moe": {}, "llama4_text": {}, "llama": {}, "mistral": {},
    "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "gpt2": {},
    "gpt_neox": {}, "opt": {}, "olmo": {}, "olmo2": {}, "olmo3": {}, "phi": {}, "phi3": {},
    "smollm3": {}, "cohere": {}, "stablelm": {}, "deepseek_v3": LATENT | {"head_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]}, "afmoe": {}, "starcoder2": {},
    "glm4_moe_lite": LATENT, "deepseek_v32": LATENT, "seed_oss": {}, "arcee": {}, "exaone4": {},
    "apertus": {}, "qwen3_5_text": {}, "hunyuan_v1_dense": {}, "ernie4_5": {}, "gpt_bigcode": {},
    "helium": {}, "granite": {}, "nemotron": {},
}  # fmt: skip
REFUSED = {
    "jetmoe": "its attention heads are routed like experts",
    "minimax": "its output is not its input plus writes",
    "falcon": "its attention does not go through transformers' attention interface",
    "bloom": "its attention does not go through transformers' attention interface",
}


def tiny(family: str, changes: dict[str, Any]) -> Any:
    """A model of the family from those of our arguments that its configuration knows."""
    config = CONFIG_MAPPING[family]
    known = {name: value for name, value in SHARED.items() if hasattr(config(), name)}
    if isinstance(getattr(config, "head_dim", None), property):
        known.pop("head_dim", None)
    return models.build(config(**{**known, "num_hidden_layers": 4, **changes}))


@pytest.mark.parametrize("family", EXACT)
def test_exact(family: str) -> None:
    model = tiny(family, EXACT[family])
    found = measure(model, PROBE)
    with torch.no_grad():
        weights = model(PROBE.tokens, output_attentions=True, use_cache=False).attentions
    full = [block for block, kind in enumerate(found.block_kinds) if kind != "linear"]
    weights = [matrix for matrix in weights if matrix is not None]
    assert len(weights) == len(full) > 0
    for block, matrix in zip(full, weights, strict=True):
        column = matrix[:, :, 1:, 0]
        p0 = column.sum(-1) / found.visible_queries[block]
        torch.testing.assert_close(
            found.p0_attention_by_sequence[:, block], p0.float(), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            found.own_attention_by_sequence[:, block], matrix[:, :, 0, 0].float(), atol=4e-6, rtol=0
        )
        if found.sink_logit_mass is not None:
            missing = (1 - matrix.sum(-1))[:, :, 1:].mean((0, 2))
            torch.testing.assert_close(found.sink_logit_mass[block], missing, atol=1e-5, rtol=0)
    norms = np.linalg.norm(capture_inputs(model, PROBE.tokens), axis=-1)
    np.testing.assert_allclose(found.p0_norm, norms[:, :, 0].mean(1), rtol=1e-5)
    assert found.localization.share_sum == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family: str) -> None:
    with pytest.raises(MeasurementError, match=f"block 0 .*: {REFUSED[family]}"):
        measure(tiny(family, {}), PROBE)


def test_a_model_without_softmax_attention_is_refused() -> None:
    model = tiny("jamba", {})  # of its first four blocks none attends
    with pytest.raises(MeasurementError, match="no block has softmax attention"):
        measure(model, PROBE)


def test_the_table_is_up_to_date() -> None:
    rows = [f"| {family} | exact | |" for family in EXACT]
    rows += [f"| {family} | refused | {reason} |" for family, reason in REFUSED.items()]
    text = "\n".join(
        [
            "# Model families",
            "",
            "Tiny random models of each family in transformers 5.23 against the family's own",
            "eager attention (within 1e-6), its residual stream, and a share sum of 1 within 1e-4.",
            "Families that are not listed are measured where the same checks hold at run time, and",
            "refused by name where they do not.",
            "",
            "| family | | why |",
            "|---|---|---|",
            *sorted(rows),
            "",
        ]
    )
    if os.environ.get("FAMILIES") == "write":
        TABLE.write_text(text)
    assert TABLE.read_text() == text
