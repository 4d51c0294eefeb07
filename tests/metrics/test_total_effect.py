"""Total effects against plain hooks on whole passes of single tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sinktrack import Measurement, Probe, measure
from sinktrack.measure import measure_streamed
from sinktrack.metrics import total_effect
from sinktrack.metrics.phases import phases_of
from sinktrack.metrics.total_effect import is_affordable, thinned
from sinktrack.models.streaming import Streamed
from sinktrack.records.rows import rows
from tests.helpers import models, planted
from tests.helpers.archives import Recorded
from tests.helpers.reference import blocks_of
from tests.helpers.trainings import fingerprint, same

PROBE = Probe.random(models.VOCABULARY, sequences=8, length=12)
FAMILIES = {
    "llama": models.llama,
    "mixtral": models.mixtral,
    "qwen3_moe": models.qwen3_moe,
    "gpt2": models.gpt2,
}


@pytest.fixture
def peak_at_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase in the last block, whatever the tiny model's attention."""

    def phases(concentration: torch.Tensor, ratio: torch.Tensor) -> Any:
        concentration = torch.zeros_like(concentration)
        concentration[-1] = 0.5
        found = phases_of(concentration, ratio)
        return tuple(replace(phase, peak_block=len(concentration) - 1) for phase in found)

    monkeypatch.setattr("sinktrack.metrics.phases.phases_of", phases)


def effects(measured: Measurement) -> dict[tuple[str, int, int | None], float]:
    (sink,) = measured.sinks
    assert sink.total_effects is not None
    return {(e.kind, e.block, e.index): e.effect for e in sink.total_effects}


def sublayers(block: Any) -> dict[str, Any]:
    attention = block.attn if hasattr(block, "attn") else block.self_attn
    return {"attention": attention, "mlp": block.mlp}


def parts(block: Any, kind: str, index: int) -> tuple[Any, Callable[..., Any]]:
    """A module, and the hook before it that takes a head or an expert away."""
    if kind == "head":
        attention = sublayers(block)["attention"]
        module = attention.c_proj if hasattr(attention, "c_proj") else attention.o_proj

        def no_head(module: Any, args: Any) -> Any:
            mixed = args[0].clone().unflatten(-1, (4, -1))
            mixed[..., index, :] = 0
            return (mixed.flatten(-2), *args[1:])

        return module, no_head

    def no_expert(module: Any, args: Any) -> Any:
        stream, chosen, gate = args
        return stream, chosen, gate.masked_fill(chosen == index, 0)

    return block.mlp.experts, no_expert


@torch.no_grad()
def by_hooks(model: Any, probe: Probe, key: tuple[str, int, int | None] | None) -> torch.Tensor:
    """``[n, D]``: what enters the last block, with one component's write set to nothing."""
    last: list[torch.Tensor] = []
    blocks = blocks_of(model)
    handles = [
        blocks[-1].register_forward_pre_hook(
            lambda module, args, kwargs: last.append(
                (args[0] if args else kwargs["hidden_states"])[:, 0].double()
            ),
            with_kwargs=True,
        )
    ]
    if key is not None:
        kind, block, index = key
        if index is None:

            def nothing(module: Any, args: Any, output: Any) -> Any:
                if isinstance(output, tuple):
                    return (torch.zeros_like(output[0]), *output[1:])
                return torch.zeros_like(output)

            module = sublayers(blocks[block])[kind]
            handles.append(module.register_forward_hook(nothing))
        else:
            module, hook = parts(blocks[block], kind, index)
            handles.append(module.register_forward_pre_hook(hook))
    model(thinned(probe.first_tokens())[:, None], use_cache=False)
    for handle in handles:
        handle.remove()
    return last[0]


@torch.no_grad()
def direction(model: Any, probe: Probe) -> torch.Tensor:
    states = model(probe.tokens, use_cache=False, output_hidden_states=True).hidden_states
    entering = states[len(blocks_of(model)) - 1].double()
    apart = entering[:, 0].mean(0) - entering[:, 1:].mean((0, 1))
    unit: torch.Tensor = apart / apart.norm()
    return unit


@pytest.mark.usefixtures("peak_at_the_last_block")
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_plain_hooks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(total_effect, "CARRIES", 0.3)
    model = FAMILIES[family]()
    found = effects(measure(model, PROBE))
    towards = direction(model, PROBE)
    before = by_hooks(model, PROBE, None).mean(0) @ towards
    for key, effect in found.items():
        wanted = 1 - float(by_hooks(model, PROBE, key).mean(0) @ towards / before)
        assert effect == pytest.approx(wanted, abs=1e-5, rel=1e-5), key
    whole = {(kind, block, None) for kind in ("attention", "mlp") for block in range(3)}
    assert whole <= set(found)
    kinds = {kind for kind, _, _ in found}
    assert "head" in kinds and ("expert" in kinds) == (family in ("mixtral", "qwen3_moe"))


def test_a_small_share_with_a_large_effect() -> None:
    """Block 0 writes next to nothing, on which the large write of block 2 depends."""
    model = planted.dense()
    planted.neuron_writer(model, 0, size=0.5, to=planted.DECOY)
    mlp = model.model.layers[2].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[5, planted.DECOY] = 4.0
        mlp.up_proj.weight[5, planted.DECOY] = 1.0
        mlp.down_proj.weight[planted.SINK, 5] = 20.0
    for block in (3, 4):
        planted.reader(model, block)
    measured = measure(model, planted.probe())
    assert measured.main_sink is not None
    shares = {(c.kind, c.block): c.share for c in measured.main_sink.shares}
    assert shares["mlp", 0] < 0.1 < shares["mlp", 2]
    assert effects(measured)["mlp", 0, None] > 0.3


@pytest.mark.usefixtures("peak_at_the_last_block")
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_streamed_checkpoints_have_the_same(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path)
    live = effects(measure(model, PROBE))
    streamed = effects(measure_streamed(Streamed(Recorded(tmp_path)), PROBE))
    assert streamed == pytest.approx(live, abs=1e-5)


@pytest.mark.usefixtures("peak_at_the_last_block")
def test_several_batches_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.mixtral()
    whole = effects(measure(model, PROBE))
    assert effects(measure(model, PROBE, batch_size=1)) == pytest.approx(whole, abs=1e-5)


def test_training_pays_a_tenth_at_most() -> None:
    assert is_affordable(blocks=32, tokens=64 * 512)
    assert not is_affordable(blocks=30, tokens=64 * 64)


@pytest.mark.usefixtures("peak_at_the_last_block")
def test_what_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.llama()
    small = measure(model, PROBE, in_training=True)
    assert small.sinks[0].total_effects is None
    assert "over a tenth" in small.missing["total_effects"]
    norms = blocks_of(model)[1].input_layernorm

    def of_the_batch(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + len(output) / 100)

    handle = norms.register_forward_hook(of_the_batch)
    found = measure(model, PROBE)
    handle.remove()
    assert found.sinks[0].total_effects is None and found.sinks[0].shares
    assert "depends on what else is in the batch" in found.missing["total_effects"]
    record = found.to_record(0, "test", {})
    assert "total_effects" not in record["sinks"][0]
    (told,) = measure(model, PROBE).to_record(0, "test", {})["sinks"]
    assert len(told["total_effects"]) <= 16
    sizes = [abs(effect["effect"]) for effect in told["total_effects"]]
    assert sizes == sorted(sizes, reverse=True)
    rows_of = rows({"step": 0, "tokens": None, "sinks": [told], "intervals": {}})
    found_rows = [row for row in rows_of if row["metric"] == "sinks.total_effects"]
    assert [row["value"] for row in found_rows] == [e["effect"] for e in told["total_effects"]]


def test_a_probe_leaves_no_trace() -> None:
    model = models.mixtral().train()
    before = fingerprint(model)
    measure(model, PROBE)
    after = fingerprint(model)
    assert [name for name in before if not same(before[name], after[name])] == []
    assert not any("forward" in vars(block) for block in blocks_of(model))
