"""Every family of transformers that we name: measured exactly, or refused by name.

The outcome is kept in ``docs/families.md``; ``FAMILIES=write pytest`` of this file writes
it anew.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from sinktrack import MeasurementError, measure
from tests.helpers.families import EXACT, LATENT, PROBE, minutes, tiny
from tests.helpers.paths import DOCS
from tests.helpers.reference import TOGETHER, check_attention, check_exact

TABLE = DOCS / "families.md"
PARTLY: dict[str, tuple[str, dict[str, Any]]] = {
    "jetmoe": ("its attention heads are routed like experts", {}),
    "openai-gpt": ("its output is not its input plus writes", {}),
    "zaya": ("is added to its residual stream", {"num_experts_per_tok": 1}),
}
"""Attention and norms are exact; what writes the P0 state cannot be told."""
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": ("its attention was not seen", {}),
    "doge": ("attention over queries", {}),
    "xglm": ("its attention was not seen", {}),
    "diffllama": ("something is added to what its heads attend to", {}),
    "longcat_flash": ("attends more than once", LATENT | {
        "num_layers": 4, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2,
        "zero_expert_num": 2, "head_dim": 4}),
    "falcon_h1": ("FalconH1Mixer beside its attention", {
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64}),
    "inkling_text": ("learned position biases", {}),
    "deepseek_v4": ("no residual stream", {}),
    "bert": ("attention that is not causal", {}),
    "cpmant": ("attention that is not causal", {}),
    "rwkv": ("in eval mode RwkvForCausalLM divides its weights", {}),
    "hy_v4": ("no residual stream", {}),
    "hrm_text": ("runs more than once in a pass of the model", {}),
    "inkling2_text": ("learned position biases", {}),
    "inkling2_loop_text": ("learned position biases", {}),
    "dory": ("runs more than once in a pass of the model", {}),
    "zamba": ("ZambaMambaMixer beside its attention", {}),
    "zamba2": ("Zamba2MambaMixer beside its attention", {"layer_types": ["mamba", "hybrid"] * 2}),
}  # fmt: skip


@pytest.mark.parametrize("family", minutes(EXACT))
def test_exact(family: str) -> None:
    check_exact(tiny(family, EXACT[family]), PROBE)


@pytest.mark.parametrize("family", PARTLY)
def test_what_can_be_had_is_exact(family: str) -> None:
    reason, changes = PARTLY[family]
    model = tiny(family, changes)
    found = measure(model, PROBE)
    for name in ("shares", "share_sum", "depth", "mlp_write_ratio"):
        assert reason in found.missing[name] and found.values[name] is None
    assert found.localization.shares == ()
    check_attention(found, model, PROBE)


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family: str) -> None:
    reason, changes = REFUSED[family]
    with pytest.raises(MeasurementError, match=rf"block \d .*{reason}"):
        measure(tiny(family, changes), PROBE)


def test_a_refused_model_keeps_its_weights() -> None:
    """In eval mode RWKV divides some of them, and notes that it did."""
    model = tiny("rwkv", {}).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MeasurementError):
        measure(model, PROBE)
    model(PROBE.tokens)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_without_softmax_attention_is_refused() -> None:
    model = tiny("jamba", {})  # of its first four blocks none attends
    with pytest.raises(MeasurementError, match="no block has softmax attention"):
        measure(model, PROBE)


def test_the_table_is_up_to_date() -> None:
    notes = dict.fromkeys(TOGETHER, "its routed experts are reported together, as one MLP")
    rows = [f"| {family} | exact | {notes.get(family, '')} |" for family in EXACT]
    rows += [f"| {family} | without shares | {reason} |" for family, (reason, _) in PARTLY.items()]
    rows += [f"| {family} | refused | {reason} |" for family, (reason, _) in REFUSED.items()]
    text = "\n".join(
        [
            "# Model families",
            "",
            "Tiny random models of each family in transformers 5.24 against the family's own",
            "eager attention (within 1e-6) and residual stream: the parts of every block make",
            "what it adds at P0, and heads and experts equal plain loops over the weights (within",
            "2e-5 of the P0 norm).",
            "Families that are not listed are measured where the same checks hold at run time, and",
            "refused by name where they do not.",
            "",
            "Vision-language models (Gemma 3, Llava, Mistral 3, Qwen2-VL, Qwen2.5-VL, Qwen3-VL and",
            "its MoE) are exact live, by their text decoder and on text alone. PaliGemma reads",
            "both ways and is refused.",
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
