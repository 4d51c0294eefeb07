"""`measure` against eager attention, plain hooks and its own definitions."""

from __future__ import annotations

import random
import re
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from transformers import AttentionInterface, GPTNeoConfig

from sinktrack import MeasurementError, Probe, ProbeError, measure
from sinktrack.metrics import FIELDS
from sinktrack.records.run import to_json
from tests.helpers import models
from tests.helpers.reference import blocks_of, localized_by_hand, measured_by_hand
from tests.helpers.trainings import fingerprint, same

FAMILIES = [
    models.mixtral,
    models.qwen3_moe,
    models.deepseek_v3,
    models.llama,
    models.mistral_sliding,
    models.gpt2,
    models.gpt_neox,
]
PROBE = Probe.random(models.VOCABULARY, sequences=6, length=20, seed=3)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_equals_the_definitions(family: Any) -> None:
    model = family()
    found = measure(model, PROBE)
    truth = measured_by_hand(model, PROBE.tokens)
    np.testing.assert_allclose(found.p0_attention_by_sequence, truth["p0"], atol=2e-6)
    np.testing.assert_allclose(found.p0_attention, truth["p0"].mean(0), atol=1e-6)
    np.testing.assert_allclose(found.concentration, truth["p0"].mean((0, 2)), atol=1e-6)
    for name in ("p0_norm", "norm_ratio", "direction_consistency"):
        np.testing.assert_allclose(getattr(found, name), truth[name], rtol=2e-5, atol=2e-5)
    for name in ("uniform", "rivals", "mixing", "direction_to_mean"):
        np.testing.assert_allclose(getattr(found, name), truth[name], rtol=2e-5, atol=2e-6)
    for name in ("attention", "mlp"):
        wanted = truth["write_ratios"][name]
        np.testing.assert_allclose(getattr(found, f"{name}_write_ratio"), wanted, rtol=2e-5)
    largest = found.max_activation
    np.testing.assert_allclose(largest["p0"], truth["max_p0"], rtol=1e-5)
    np.testing.assert_allclose(largest["others"], truth["max_others"], rtol=1e-5)
    ratio = np.maximum(truth["max_p0"], truth["max_others"]) / truth["median"]
    np.testing.assert_allclose(largest["ratio"], ratio, rtol=1e-4)
    often = (truth["alpha"] > 0.3).mean(0)
    np.testing.assert_allclose(found.sink_sequences, often)
    for eps in (0.1, 0.3):
        often = (truth["alpha"] > eps).mean(0) >= 0.5
        assert found.sink_heads[str(eps)].tolist() == often.sum(1).tolist()
    first = [block for block, heads in enumerate(often) if heads.any()]
    assert found.first_sink_block == (first[0] if first else None)
    for eps in (0.1, 0.3, 0.5):
        assert found.sink_rate(eps) == pytest.approx((truth["alpha"] > eps).mean(), abs=1e-9)
        np.testing.assert_allclose(
            found.sink_rate_by_block(eps), (truth["alpha"] > eps).mean((0, 2)), atol=1e-9
        )
    later = (truth["alpha"][:, 2:] > 0.1).mean()
    assert found.sink_rate(0.1, start_block=2) == pytest.approx(later, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_shares_are_the_projections_of_the_writes(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block's two shares are what its stream changed by, seen from outside."""
    monkeypatch.setattr("sinktrack.metrics.localization.READ", 0)
    model = family()
    measured = measure(model, PROBE)
    found, truth = measured.localization, measured_by_hand(model, PROBE.tokens)
    readers = np.maximum(0, truth["concentration"] - truth["uniform"])
    by_block, embedding, sums = localized_by_hand(truth["inputs"], readers)
    np.testing.assert_allclose(sums, 1, atol=1e-6)
    assert found.share_sum == pytest.approx(1, abs=1e-5)
    assert found.shares[0].share == pytest.approx(embedding, abs=1e-5)
    for block, wanted in enumerate(by_block):
        own = [c for c in found.shares if c.block == block]
        assert sum(c.share for c in own) == pytest.approx(wanted, abs=1e-5)
        assert {c.kind for c in own} <= {"attention", "mlp"}
    assert found.first_two_share == pytest.approx(by_block[:2].sum(), abs=1e-5)


@pytest.mark.parametrize(
    "family", [models.mixtral, models.qwen3_moe, models.deepseek_v3], ids=lambda f: f.__name__
)
def test_heads_and_experts_add_up_to_their_sublayer(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinktrack.metrics.localization._TOP", 10_000)
    monkeypatch.setattr("sinktrack.metrics.localization.READ", 0)
    found = measure(family(), PROBE).localization
    whole = {"attention": ("head", "attention_bias", "attention_rest"),
             "mlp": ("expert", "shared_expert", "mlp")}  # fmt: skip
    assert len(found.shares) > 4
    for component in found.shares[1:]:
        parts = [
            part
            for part in found.parts
            if part.block == component.block and part.kind in whole[component.kind]
        ]
        assert sum(part.share for part in parts) == pytest.approx(component.share, abs=1e-4)


def test_experts_are_those_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroing the down projection of one expert changes the MLP's write by that expert's part."""
    monkeypatch.setattr("sinktrack.metrics.localization._TOP", 10_000)
    monkeypatch.setattr("sinktrack.metrics.localization.READ", 0)
    model = models.mixtral()
    probe = Probe.random(models.VOCABULARY, sequences=6, length=20, seed=3)
    seen: list[torch.Tensor] = []
    experts = blocks_of(model)[0].mlp.experts
    found = measure(model, probe).localization
    handle = experts.register_forward_hook(lambda m, a, out: seen.append(out.view(6, 20, -1)[:, 0]))
    with torch.no_grad():
        model(probe.tokens)
        before = seen[0].clone()
        chosen = next(p for p in found.parts if p.kind == "expert" and p.block == 0)
        experts.down_proj[chosen.index] = 0
        model(probe.tokens)
    handle.remove()
    truth = measured_by_hand(models.mixtral(), probe.tokens)
    readers = np.maximum(0, truth["concentration"] - truth["uniform"])
    assert chosen.block == 0
    wanted = 0.0
    for reader in range(1, 4):
        state = truth["inputs"][reader, :, 0].mean(0)
        direction = state - truth["inputs"][reader, :, 1:].mean((0, 1))
        lost = (before - seen[1]).double().mean(0).numpy() @ direction / (state @ direction)
        wanted += float(readers[reader] / readers.sum() * lost)
    assert chosen.share == pytest.approx(wanted, abs=1e-4)


def assert_same(one: Any, other: Any, name: str = "") -> None:
    """Records, or fields of them, within rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_same(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), name
        for place, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{name}[{place}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5), name
    else:
        assert one == other, name


def measured_fields(model: Any, probe: Probe, **options: Any) -> dict[str, Any]:
    record = to_json(measure(model, probe, **options).to_record(0, "", {}))
    return {name: record[name] for name in (*FIELDS, "intervals") if name in record}


def test_how_often_experts_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the probe, on its P0 rows to tell them apart, and on the single first tokens."""
    model = models.qwen3_moe()
    experts = type(model.model.layers[0].mlp.experts)
    rows: list[int] = []
    forward = experts.forward

    def counted(self: Any, hidden: torch.Tensor, *args: Any) -> Any:
        rows.append(len(hidden))
        return forward(self, hidden, *args)

    monkeypatch.setattr(experts, "forward", counted)
    monkeypatch.setattr("sinktrack.models.live.refuse_another_model", lambda *_: None)  # runs, too
    measure(model, PROBE, in_training=True)
    p0 = PROBE.sequences * model.config.num_experts_per_tok
    each = [PROBE.tokens.numel(), p0, len(PROBE.first_tokens())]
    routed = [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    assert sorted(rows) == sorted(each * len(routed))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_give_the_same_numbers(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinktrack.metrics.localization.READ", 0)
    monkeypatch.setattr("sinktrack.metrics.phases.EPSILON", 0.1)
    monkeypatch.setattr("sinktrack.metrics.phases.GOES_ON", 0.08)
    model = models.mixtral()
    whole, split = (measured_fields(model, PROBE, batch_size=n) for n in (None, size))
    assert whole["sinks"] and whole["position_share"] is not None
    assert_same(split, whole)


@pytest.mark.parametrize("where", ["state", "mlp", "values"])
def test_a_ratio_over_zero_is_null_with_its_reason(where: str) -> None:
    """The other positions' state at the first block, a block's writes there, or its values."""
    model = models.llama()
    tokens = PROBE.tokens.clone()
    tokens[:, 0], tokens[:, 1:] = 0, tokens[:, 1:].clamp(min=1)
    layer = model.model.layers[1]
    if where == "state":
        model.model.embed_tokens.weight.data[1:] = 0
        nulls = {"norm_ratio": [0], "gain": [0]}
    elif where == "mlp":
        layer.mlp.register_forward_hook(lambda _, args, out: only_p0(out))
        nulls = {"mlp_write_ratio": [1]}
    else:
        layer.self_attn.v_proj.register_forward_hook(lambda _, args, out: only_p0(out))
        nulls = {"value_ratio": [1]}
    record = to_json(measure(model, Probe.from_tokens(tokens)).to_record(0, "", {}))
    for name, blocks in nulls.items():
        for block, value in enumerate(record[name]):
            values = value if isinstance(value, list) else [value]
            assert (values == [None] * len(values)) == (block in blocks), (name, block)
        assert "infinite" in record["missing"][name]
    assert record["sink_rate"] is not None and record["p0_norm"][0] > 0


def only_p0(out: torch.Tensor) -> torch.Tensor:
    """Zero at all other positions."""
    return torch.cat([out[:, :1], torch.zeros_like(out[:, 1:])], 1)


def test_packed_documents_of_one_length_are_sequences() -> None:
    model, documents = models.mixtral(), torch.arange(2).repeat_interleave(10).expand(6, -1)
    packed = Probe.from_tokens(PROBE.tokens, documents)
    assert_same(
        measured_fields(model, packed),
        measured_fields(model, Probe.from_tokens(PROBE.tokens.view(12, 10))),
    )


def test_packed_documents_of_several_lengths() -> None:
    """Means are of each document's own mean, medians and shares of positions over all."""
    model, cuts = models.llama(), (8, 20, 5, 13, 20, 10)
    documents = torch.stack([(torch.arange(20) >= cut).long() for cut in cuts])
    found = measure(model, Probe.from_tokens(PROBE.tokens, documents))
    parts = [
        part[None]
        for row, cut in zip(PROBE.tokens, cuts, strict=True)
        for part in (row[:cut], row[cut:])
        if len(part)
    ]
    each = [measured_by_hand(model, part) for part in parts]
    norms = [np.linalg.norm(of["inputs"][:, 0], axis=-1) for of in each]
    own = np.stack([norm[:, 0] for norm in norms])
    others = np.concatenate([norm[:, 1:] for norm in norms], 1)
    beside = np.concatenate([norm[:, 1:] >= norm[:, :1] / 2 for norm in norms], 1)
    np.testing.assert_allclose(found.norm_ratio, own.mean(0) / np.median(others, 1), rtol=2e-5)
    np.testing.assert_allclose(found.rivals, beside.mean(1), atol=1e-6)
    for name in ("concentration", "uniform", "mixing"):
        wanted = np.mean([of[name] for of in each], 0)
        np.testing.assert_allclose(getattr(found, name), wanted, atol=2e-6)
    alpha = np.concatenate([of["alpha"] for of in each])
    assert found.sink_rate() == pytest.approx((alpha > 0.3).mean(), abs=1e-9)
    np.testing.assert_allclose(found.sink_sequences, (alpha > 0.3).mean(0), atol=1e-9)
    unit = np.stack([of["inputs"][:, 0, 0] for of in each]) / own[..., None]
    centre = unit.mean(0) / np.linalg.norm(unit.mean(0), axis=-1, keepdims=True)
    np.testing.assert_allclose(found.direction_to_mean, (unit * centre).sum(-1).mean(0), atol=1e-5)
    for name in ("max_p0", "max_others"):
        got = found.max_activation[name.removeprefix("max_")]
        np.testing.assert_allclose(got, np.max([of[name] for of in each], 0), rtol=1e-5)


def test_first_tokens_are_measured_alone() -> None:
    model = models.llama()
    found = measure(model, PROBE).first_token
    distinct = PROBE.tokens.unique()
    assert found.tokens == len(distinct)
    truth = measured_by_hand(model, PROBE.tokens)["inputs"]
    alone = [measured_alone(model, int(token)) for token in distinct]
    for block in range(5):
        median = np.median(np.linalg.norm(truth[block, :, 1:], axis=-1))
        ratios = [np.linalg.norm(state[block]) / median for state in alone]
        for quantile, values in found.norm_ratio.items():
            assert float(values[block]) == pytest.approx(np.percentile(ratios, quantile), rel=1e-4)


def measured_alone(model: Any, token: int) -> np.ndarray:
    from tests.helpers.reference import capture_inputs

    return capture_inputs(model, torch.tensor([[token]]))[:, 0, 0]


def test_equal_first_tokens_have_no_direction_consistency() -> None:
    tokens = PROBE.tokens.clone()
    tokens[:, 0] = 7
    found = measure(models.llama(), Probe.from_tokens(tokens))
    for name in ("direction_consistency", "direction_to_mean"):
        assert getattr(found, name).isnan().all()
        assert "all 6 sequences of the probe begin with token id 7" in found.missing[name]
    assert not {"direction_consistency", "rivals"} & measure(models.llama(), PROBE).missing.keys()


def test_a_sliding_window_sees_p0_only_early() -> None:
    found = measure(models.mistral_sliding(), PROBE)
    assert found.visible_queries == (5, 5, 5, 5)


def test_intervals_hold_the_value() -> None:
    found = measure(models.mixtral(), PROBE)
    for low, value, high in [
        (found.intervals["sink_rate"][0], found.sink_rate(), found.intervals["sink_rate"][1]),
        *(
            (low, float(value), high)
            for (low, high), value in zip(
                found.intervals["concentration"], found.concentration, strict=True
            )
        ),
    ]:
        assert low <= value <= high


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinktrack.metrics.localization.READ", 0)
    model = models.mixtral()
    exact = measure(model, PROBE)
    half = measure(model.to(dtype), PROBE)
    torch.testing.assert_close(half.norm_ratio, exact.norm_ratio, rtol=0.1, atol=0.1)
    assert half.localization.share_sum == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("broken", [False, True], ids=["measured", "failing"])
def test_leaves_no_trace(broken: bool) -> None:
    model = models.mixtral(attention_dropout=0.1).train()
    model.model.layers[1].eval()
    model(PROBE.tokens, labels=PROBE.tokens).loss.backward()
    model.register_buffer("count", torch.zeros(2))

    def disturb(module: Any, args: Any) -> None:
        model.count += 1
        random.random(), np.random.rand(), torch.rand(1)
        module.scratch = object()
        if broken:
            raise RuntimeError("planted")

    handle = model.model.layers[2].register_forward_pre_hook(disturb)
    before = fingerprint(model)
    with torch.autocast("cpu", torch.bfloat16):
        if broken:
            with pytest.raises(RuntimeError, match="planted"):
                measure(model, PROBE)
        else:
            measure(model, PROBE)
        assert torch.is_autocast_enabled("cpu")
    after = fingerprint(model)
    handle.remove()
    assert [name for name in before if not same(before[name], after[name])] == []


def test_what_transformers_captures_is_captured_once() -> None:
    """Its hooks are set by the first forward pass, which may be the probe's."""
    model = models.mixtral(output_router_logits=True, output_hidden_states=True)
    before = fingerprint(model)
    for _ in range(2):
        measure(model, PROBE)
    assert same(before, fingerprint(model))
    output = model(PROBE.tokens)
    assert (len(output.router_logits), len(output.hidden_states)) == (4, 5)
    measure(model, PROBE)
    assert len(model(PROBE.tokens).router_logits) == 4


def test_attention_of_which_nothing_is_known_is_refused() -> None:
    def of_its_own(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return torch.sigmoid(query @ key.mT).tril() @ value, None

    model = models.llama(num_key_value_heads=4)
    AttentionInterface.register("planted", of_its_own)
    try:
        model.set_attn_implementation("planted")
        with pytest.raises(MeasurementError, match="'planted' is a function of .*test_measure"):
            measure(model, PROBE)
        model.set_attn_implementation("sdpa")
        measure(model, PROBE)
    finally:
        del AttentionInterface._global_mapping["planted"]


@pytest.mark.parametrize("family", [models.mixtral, models.llama, models.gpt2])
def test_double_precision_measures_as_single(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinktrack.metrics.localization.READ", 0)
    model = family()
    model.set_experts_implementation("eager")  # torch groups no products of doubles
    single, double = measure(model, PROBE), measure(model.double(), PROBE)
    for name in ("p0_attention", "p0_norm", "norm_ratio"):
        found = getattr(double, name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, getattr(single, name), atol=1e-5, rtol=1e-5)
    assert double.localization.share_sum == pytest.approx(1, abs=1e-6)


def test_sliding_blocks_are_named() -> None:
    assert measure(models.mistral_sliding(), PROBE).block_kinds == ("sliding",) * 4
    assert measure(models.mixtral(sliding_window=5), PROBE).block_kinds == ("sliding",) * 4
    assert measure(models.mixtral(), PROBE).block_kinds == ("full",) * 4
    neo = GPTNeoConfig(
        vocab_size=models.VOCABULARY, hidden_size=32, num_layers=4, num_heads=4, window_size=6,
        attention_types=[[["global", "local"], 2]], initializer_range=0.2,
    )  # fmt: skip
    found = measure(models.build(neo), PROBE)
    assert found.block_kinds == ("full", "sliding") * 2
    assert found.visible_queries == (19, 5, 19, 5)


def test_a_first_token_without_an_embedding_is_named() -> None:
    model, tokens = models.llama(), PROBE.tokens.clone()
    tokens[:, 0] = 5
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = 0
        for block in model.model.layers:  # nothing writes at P0
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        for block in model.model.layers:  # all attend to P0 more than evenly
            block.self_attn.q_proj.weight.zero_()
            block.self_attn.k_proj.weight.zero_()
    model.config.sliding_window = 3
    found = measure(model, Probe.from_tokens(tokens))
    assert found.localization.shares == () and not found.sinks


def test_autocast_does_not_change_the_numbers() -> None:
    model = models.mixtral()
    plain = measure(model, PROBE)
    with torch.autocast("cpu", torch.bfloat16):
        cast = measure(model, PROBE)
    assert torch.equal(plain.p0_attention, cast.p0_attention)


def test_nan_weights_name_the_block() -> None:
    model = models.mixtral()
    with torch.no_grad():
        blocks_of(model)[1].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(MeasurementError, match="not finite at the input of block 2"):
        measure(model, PROBE)


def test_a_model_on_meta_is_refused() -> None:
    with torch.device("meta"):
        model = models.llama()
    with pytest.raises(MeasurementError, match=r"embed_tokens.*meta device.*load"):
        measure(model, PROBE)


@pytest.mark.parametrize("offload", [False, True])
def test_models_that_accelerate_placed(offload: bool) -> None:
    """A device map is measured as the model is; weights that are elsewhere are called so."""
    model = models.mixtral().eval()
    if offload:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(MeasurementError, match=r"embed_tokens.*offloaded.*sinktrack scan"):
            measure(model, PROBE)
    else:
        wanted = measured_fields(model, PROBE)
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        assert measured_fields(model, PROBE) == wanted


def test_not_a_transformers_model() -> None:
    with pytest.raises(MeasurementError, match="Linear is not a transformers model"):
        measure(torch.nn.Linear(2, 2), PROBE)


def test_a_probe_of_another_vocabulary() -> None:
    probe = Probe.from_tokens([[1, 2, 3], [4, 99, 6]])
    with pytest.raises(ProbeError, match="token id 99 at sequence 1, position 1 .* of 65"):
        measure(models.llama(), probe)


def test_a_probe_longer_than_the_positions() -> None:
    with pytest.raises(ProbeError, match="200 tokens, the model 128 positions"):
        measure(models.llama(), Probe.random(60, sequences=1, length=200))


def test_an_unseen_write_leaves_attention_and_norms() -> None:
    """A hook that changes the stream between blocks is a write that nobody accounts for."""
    model = models.llama()
    handle = blocks_of(model)[0].register_forward_hook(lambda m, args, out: out * 1.5)
    try:
        found, truth = measure(model, PROBE), measured_by_hand(model, PROBE.tokens)
    finally:
        handle.remove()
    assert re.search("not 1: something writes|its input plus writes", found.missing["shares"])
    assert found.localization.shares == () and found.depth is None
    np.testing.assert_allclose(found.p0_attention, truth["p0"].mean(0), atol=1e-6)
    np.testing.assert_allclose(found.norm_ratio, truth["norm_ratio"], rtol=2e-5)
