"""One mechanism of attention or of the stream at a time, each against plain computations.

Every case also shows that the mechanism is at work: without it the same weights measure otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sinktrack import Measurement, MeasurementError, Probe, ProbeError, measure
from tests.helpers import models
from tests.helpers.families import EXACT, LATENT, tiny
from tests.helpers.reference import check_exact

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=24, seed=5)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
        "rope_theta": 1e4}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


def differs(found: Measurement, other: Measurement) -> bool:
    """Do attention or states differ by more than rounding?"""
    attention = (found.p0_attention - other.p0_attention).abs().nan_to_num().max()
    states = (found.p0_norm / other.p0_norm - 1).abs().max()
    return bool(attention > 1e-4) or bool(states > 1e-4)


def same_weights(family: str, on: dict[str, Any], off: dict[str, Any]) -> tuple[Any, Any]:
    base = EXACT[family]
    with_it, without = tiny(family, base | on), tiny(family, base | off)
    without.load_state_dict(with_it.state_dict(), strict=False)
    return with_it, without


CONFIGURED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sliding window": ("mistral", {"sliding_window": 6}, {"sliding_window": None}),
    "sliding and full blocks": (
        "olmo3",
        {"sliding_window": 6},
        {"layer_types": ["full_attention"] * 4},
    ),
    "chunked attention": ("llama4_text", {"attention_chunk_size": 8}, {"attention_chunk_size": 64}),
    "soft cap": ("gemma2", {"attn_logit_softcapping": 0.5}, {"attn_logit_softcapping": None}),
    "attention scale": ("granite", {"attention_multiplier": 0.7}, {"attention_multiplier": 0.35}),
    "YaRN": ("llama", {"rope_parameters": YARN}, {}),
    "Llama 3 rotary scaling": ("llama", {"rope_parameters": LLAMA3}, {}),
    "linear rotary scaling": ("llama", {"rope_parameters": LINEAR}, {}),
    "partial rotary embedding": (
        "phi",
        {"rope_parameters": PARTIAL},
        {"rope_parameters": PARTIAL | {"partial_rotary_factor": 1.0}},
    ),
    "latent attention with YaRN": (
        "deepseek_v3",
        LATENT | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
        {},
    ),
    "sparse attention": (
        "deepseek_v32",
        {"index_topk": 4, "index_n_heads": 4, "index_head_dim": 8},
        {"index_topk": 64, "index_n_heads": 4, "index_head_dim": 8},
    ),
    "residual multiplier": ("granite", {"residual_multiplier": 0.3}, {"residual_multiplier": 1.0}),
    "embedding multiplier": (
        "granite",
        {"embedding_multiplier": 7.0},
        {"embedding_multiplier": 1.0},
    ),
    "parallel attention and MLP": (
        "gpt_neox",
        {"use_parallel_residual": True},
        {"use_parallel_residual": False},
    ),
    "top-k normalization": ("qwen3_moe", {"norm_topk_prob": True}, {"norm_topk_prob": False}),
    "routed scaling factor": (
        "deepseek_v3",
        {"routed_scaling_factor": 2.5},
        {"routed_scaling_factor": 1.0},
    ),
    "expert groups": ("deepseek_v3", {"n_group": 4, "topk_group": 1}, {"n_group": 1}),
    "dense first blocks": (
        "deepseek_v3",
        {"first_k_dense_replace": 2},
        {"first_k_dense_replace": 1},
    ),
    "ALiBi with parallel attention": (
        "falcon",
        {"alibi": True},
        {"alibi": False},
    ),
}


@pytest.mark.parametrize("mechanism", CONFIGURED)
def test_configured(mechanism: str) -> None:
    family, on, off = CONFIGURED[mechanism]
    model, without = same_weights(family, on, off)
    if mechanism.startswith("ALiBi"):  # falcon's eager code adds its bias twice; SDPA is the model
        model.config._attn_implementation_internal = "sdpa"
        found = measure(model, PROBE)
    else:
        found = check_exact(model, PROBE)
    assert differs(found, measure(without, PROBE))


def parameters(ending: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    """Sets every parameter or buffer of that name; there must be one."""

    def change(model: Any) -> None:
        named = [*model.named_parameters(), *model.named_buffers()]
        found = [tensor for name, tensor in named if name.endswith(ending)]
        assert found, f"no parameter {ending}"
        with torch.no_grad():
            for tensor in found:
                tensor.copy_(value(tensor))

    return change


ones, zeros = torch.ones_like, torch.zeros_like


def spread(tensor: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


WEIGHTED: dict[str, tuple[str, Callable[[Any], None], Callable[[Any], None]]] = {
    "learned sink logits": (
        "gpt_oss",
        parameters("sinks", spread),
        parameters("sinks", lambda tensor: torch.full_like(tensor, -1e4)),
    ),
    "QK-norm per head": (
        "qwen3",
        parameters("q_norm.weight", lambda t: 3 * ones(t)),
        parameters("q_norm.weight", ones),
    ),
    "QK-norm over heads": (
        "olmoe",
        parameters("k_norm.weight", lambda t: 3 * ones(t)),
        parameters("k_norm.weight", ones),
    ),
    "query and key biases": (
        "qwen2",
        parameters("k_proj.bias", spread),
        parameters("k_proj.bias", zeros),
    ),
    "output bias": (
        "gpt2",
        parameters("attn.c_proj.bias", spread),
        parameters("attn.c_proj.bias", zeros),
    ),
    "MLP bias": (
        "starcoder2",
        parameters("mlp.c_proj.bias", spread),
        parameters("mlp.c_proj.bias", zeros),
    ),
    "expert biases": (
        "gpt_oss",
        parameters("down_proj_bias", spread),
        parameters("down_proj_bias", zeros),
    ),
    "output norms": (
        "olmo2",
        parameters("post_attention_layernorm.weight", lambda t: 2 * ones(t)),
        parameters("post_attention_layernorm.weight", ones),
    ),
    "sandwich norms": (
        "gemma2",
        parameters("post_feedforward_layernorm.weight", ones),
        parameters("post_feedforward_layernorm.weight", zeros),
    ),
    "shared experts": (
        "deepseek_v3",
        parameters("shared_experts.down_proj.weight", spread),
        parameters("shared_experts.down_proj.weight", zeros),
    ),
    "shared expert's gate": (
        "qwen2_moe",
        parameters("shared_expert_gate.weight", lambda t: 9 * spread(t)),
        parameters("shared_expert_gate.weight", zeros),
    ),
    "router score correction": (
        "deepseek_v3",
        parameters("e_score_correction_bias", lambda t: 5 * spread(t)),
        parameters("e_score_correction_bias", zeros),
    ),
}


@pytest.mark.parametrize("mechanism", WEIGHTED)
def test_weighted(mechanism: str) -> None:
    family, on, off = WEIGHTED[mechanism]
    model = tiny(family, EXACT[family])
    on(model)
    found = check_exact(model, PROBE)
    off(model)
    assert differs(found, check_exact(model, PROBE))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_queries(groups: int) -> None:
    check_exact(tiny("llama", {"num_key_value_heads": groups}), PROBE)


def test_alibi() -> None:
    found = check_exact(tiny("bloom", {}), PROBE)
    assert found.visible_queries == (PROBE.length - 1,) * 4


def test_tied_embeddings() -> None:
    model = tiny("llama", {"tie_word_embeddings": True})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_exact(model, PROBE)


@pytest.mark.parametrize("family", ["qwen3_next", "afmoe"])
def test_the_gate_of_gated_attention_is_reported_apart(family: str) -> None:
    model = tiny(family, EXACT[family])
    gates: dict[int, torch.Tensor] = {}
    count = model.config.num_attention_heads

    def keep(block: int) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            if family == "qwen3_next":  # queries and gates side by side, head by head
                output = output.unflatten(-1, (count, 2, -1))[..., 1, :]
            else:
                output = output.unflatten(-1, (count, -1))
            gates[block] = output.sigmoid()[:, 1:].mean((0, 1, 3))

        return hook

    handles = []
    for block, layer in enumerate(model.model.layers):
        if hasattr(layer, "self_attn"):
            gate = layer.self_attn
            gate = gate.q_proj if family == "qwen3_next" else gate.gate_proj
            handles.append(gate.register_forward_hook(keep(block)))
    with torch.no_grad():
        model(PROBE.tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    found = check_exact(model, PROBE)
    assert found.attention_gate is not None and gates
    for block in range(4):
        if block in gates:
            torch.testing.assert_close(found.attention_gate[block], gates[block])
        else:
            assert found.attention_gate[block].isnan().all()
    assert found.to_record(0, "", {})["attention_gate"] is found.attention_gate
    assert measure(tiny("llama", {}), PROBE).attention_gate is None


def test_linear_blocks_are_null_with_their_kind() -> None:
    found = measure(tiny("qwen3_next", {}), PROBE)
    assert found.block_kinds == ("linear", "linear", "linear", "full")
    assert found.p0_attention.isnan().all(1).tolist() == [True, True, True, False]
    assert found.visible_queries == (None, None, None, PROBE.length - 1)


def test_blocks_of_an_mlp_alone_are_null_with_their_kind() -> None:
    found = measure(tiny("nemotron_h", EXACT["nemotron_h"]), PROBE)
    assert found.block_kinds == ("linear", "full", "mlp", "mlp")
    assert found.concentration.isnan().tolist() == [True, False, True, True]


def test_the_documents_of_packed_rows_have_a_p0_each() -> None:
    """Against the model's own eager attention over the packed rows, under a document mask."""
    model = tiny("qwen3_moe", {})
    tokens = PROBE.tokens[:2]
    lengths = [[5, 12, 7], [12, 12]]
    documents = torch.tensor([[n for n, k in enumerate(row) for _ in range(k)] for row in lengths])
    probe = Probe.from_tokens(tokens, documents)
    assert probe.sequences == 5 and "5 documents" in repr(probe)
    found = measure(model, probe)
    split = measure(model, probe, batch_size=1)  # kernels may round by the number of rows
    torch.testing.assert_close(split.p0_attention, found.p0_attention, atol=1e-6, rtol=0)
    seen = (documents[:, :, None] == documents[:, None]).tril()[:, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.tensor([[i for k in row for i in range(k)] for row in lengths])
    with torch.no_grad():
        packed = model(
            tokens, attention_mask=mask, position_ids=positions, output_attentions=True,
            output_hidden_states=True, use_cache=False,
        )  # fmt: skip
    for block in range(4):
        wanted: dict[int, list[torch.Tensor]] = {}
        norms: dict[int, list[torch.Tensor]] = {}
        others = []
        for row, counts in enumerate(lengths):
            start = 0
            for count in counts:
                stop = start + count
                column = packed.attentions[block][row, :, start + 1 : stop, start]
                wanted.setdefault(count, []).append(column.mean(-1))
                states = packed.hidden_states[block][row, start:stop].norm(dim=-1)
                norms.setdefault(count, []).append(states[0])
                others.append(states[1:])
                start = stop
        p0 = torch.stack([p0 for some in wanted.values() for p0 in some])
        torch.testing.assert_close(found.p0_attention_by_sequence[:, block], p0, atol=1e-6, rtol=0)
        norm = torch.stack([norm for some in norms.values() for norm in some]).mean()
        torch.testing.assert_close(found.p0_norm[block], norm, atol=0, rtol=1e-5)
        ratio = norm / torch.cat(others).double().quantile(0.5)
        assert float(found.norm_ratio[block]) == pytest.approx(float(ratio), rel=1e-4)
    assert list(found.visible_queries) == pytest.approx([(4 + 11 * 3 + 6) / 5] * 4)


def test_padding_is_refused() -> None:
    model = tiny("llama", {})
    assert model.config.pad_token_id == 0
    padded = PROBE.tokens.clone()
    padded[2, :5] = 0
    with pytest.raises(ProbeError, match="sequence 2 begins with padding"):
        measure(model, Probe.from_tokens(padded))


def test_an_argument_of_unknown_meaning_is_refused() -> None:
    model = tiny("llama", {})
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs, temperature=2.0)
    with pytest.raises(MeasurementError, match="block 1 .* hands temperature to its attention"):
        measure(model, PROBE)


def test_a_mask_that_shows_later_keys_is_refused() -> None:
    model = tiny("llama", {})
    attention = model.model.layers[2].self_attn
    forward = attention.forward

    def both_ways(*args: Any, **kwargs: Any) -> Any:
        length = kwargs["hidden_states"].shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool)
        return forward(*args, **kwargs | {"attention_mask": mask})

    attention.forward = both_ways
    with pytest.raises(MeasurementError, match="block 2 .*not causal"):
        measure(model, PROBE)
