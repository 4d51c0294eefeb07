"""One block at a time against the whole model, for every family."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sinktrack import ArchiveError, Measurement, Probe, measure
from sinktrack.archive.huggingface import empty
from sinktrack.measure import measure_streamed
from sinktrack.models.blockwise import BlockwiseUnsupported
from sinktrack.models.streaming import Streamed, _neighbours
from sinktrack.records.run import to_json
from tests.helpers import models
from tests.helpers.archives import Recorded
from tests.helpers.families import EXACT, PROBE, minutes, tiny

NOT_ONE_BY_ONE = {"bamba", "glm_moe_dsa"}
"""Their blocks return more than the stream."""


def saved(family: str, directory: Path) -> Recorded:
    tiny(family, EXACT[family]).save_pretrained(directory)
    return Recorded(directory)


def streamed(source: Recorded, probe: Probe = PROBE, **options: Any) -> Measurement:
    return measure_streamed(Streamed(source), probe, **options)


def assert_close(found: Measurement, wanted: Measurement) -> None:
    assert found.weights == wanted.weights and found.block_kinds == wanted.block_kinds
    left, right = (to_json(m.to_record(0, "", {})) for m in (found, wanted))
    left["seconds"] = right["seconds"] = 0
    assert close(left, right)


def close(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(close(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(close, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return abs(left - right) <= 1e-6 * max(1, abs(right))
    return bool(left == right)


@pytest.mark.parametrize("family", minutes(sorted(set(EXACT) - NOT_ONE_BY_ONE)))
def test_as_the_whole_model(family: str, tmp_path: Path) -> None:
    source = saved(family, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert_close(streamed(source), measure(whole, PROBE))
    assert_close(streamed(source, batch_size=2), measure(whole, PROBE, batch_size=2))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "gpt2", "gpt_oss", "qwen3_moe"])
def test_weights_as_transformers_loads_them(
    family: str, stored: torch.dtype, tmp_path: Path
) -> None:
    """Some are always kept in float32, such as the router's biases of DeepSeek-V3."""
    tiny(family, EXACT[family]).to(stored).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    model = Streamed(Recorded(tmp_path), dtype="bfloat16")
    later = {name for index in model.decoder.blocks for name in later_of(model, index)}
    assert len(later) < len(model.targets)
    for index in model.decoder.blocks:
        with model.block(index):
            for name in model._own(index) - later:
                value = model.weight(name)
                assert value.dtype == whole[name].dtype, name
                assert torch.equal(value, whole[name]), name


def later_of(model: Streamed, index: int) -> set[str]:
    return model._own(index) - model._besides_experts(index)


def test_checkpoints_alike_but_for_their_configuration(tmp_path: Path) -> None:
    """The empty model of the one is not used for the other."""
    thetas = {"first": 1e4, "second": 3.0, "third": 1e4}
    for name, theta in thetas.items():
        model = models.qwen3_moe()
        model.config.rope_parameters["rope_theta"] = theta
        model.save_pretrained(tmp_path / name)
    first, second, third = (streamed(Recorded(tmp_path / name)) for name in thetas)
    assert_close(third, first)
    assert first.concentration.tolist() != second.concentration.tolist()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype="auto").eval()
    assert_close(second, measure(whole, PROBE))


def test_checkpoints_alike_but_for_their_numbers(tmp_path: Path) -> None:
    """They are copies of one empty model, and nothing of the last is left in the next."""
    found = {}
    for seed in (0, 1):
        models.build(models.deepseek_v3().config, seed).save_pretrained(tmp_path / str(seed))
        found[seed] = streamed(Recorded(tmp_path / str(seed)))
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / str(seed), dtype="auto").eval()
        assert_close(found[seed], measure(whole, PROBE))
    assert found[0].weights != found[1].weights
    one, other = (empty(Recorded(tmp_path / "0")).model for _ in range(2))
    assert one is not other and one.config is not other.config
    assert one.model.layers[0] is not other.model.layers[0]
    held = [{id(b) for b in model.buffers() if not b.is_meta} for model in (one, other)]
    assert held[0].isdisjoint(held[1])


@pytest.mark.parametrize("family", sorted(NOT_ONE_BY_ONE))
def test_blocks_that_pass_on_more_than_the_stream(family: str, tmp_path: Path) -> None:
    with pytest.raises(BlockwiseUnsupported, match=r"ForCausalLM cannot be run one by one"):
        streamed(saved(family, tmp_path))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_only_what_the_probe_needs_is_read(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts on disk one by one, and all in one tensor; ablations, which route anew, are off."""
    monkeypatch.setattr("sinktrack.models.passes.Passes.ablate", lambda *_: None)
    source = saved(family, tmp_path)
    probe = Probe.random(models.VOCABULARY, sequences=1, length=3, seed=1)
    routed: dict[int, set[int]] = {}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    for block, module in enumerate(whole.model.layers):
        experts = next(m for m in module.modules() if hasattr(m, "is_transposed"))
        experts.register_forward_pre_hook(
            lambda _, args, block=block: routed.setdefault(block, set()).update(
                args[1].flatten().tolist()
            )
        )
    with torch.no_grad():
        whole(probe.tokens)
        whole(probe.first_tokens()[:, None])
    streamed(source, probe)
    assert any(len(experts) < 8 for experts in routed.values())
    for name, count in source.read.items():
        full = source.tensors[name].get_shape()
        numbers = torch.Size(full).numel()
        if "embed" in name:
            rows = probe.tokens.unique()  # and those between them
            assert count == (rows[-1] - rows[0] + 1) * full[1] < numbers
        elif ".experts." in name or "input_linear" in name or "output_linear" in name:
            block = int(name.split("layers.")[1].split(".")[0])
            number = name.split("experts.")[-1].split(".")[0]
            if number.isdigit():
                assert int(number) in routed[block] and count == numbers
            else:
                assert count == len(routed[block]) * numbers // full[0]
        else:
            assert count == numbers
    assert not any("lm_head" in name for name in source.read)


def test_neighbouring_rows_are_read_together() -> None:
    random = torch.Generator().manual_seed(0)
    for width in (1, 4096, 2**17):
        rows = torch.randint(0, 60_000, (700,), generator=random).unique().tolist()
        found = list(_neighbours(rows, width))
        assert [row for *_, wanted in found for row in wanted] == rows
        for first, last, wanted in found:
            assert wanted[0] == first and wanted[-1] == last - 1
            assert (last - first) * width <= 2**25 + width
            assert all((b - a - 1) * width <= 2**16 for a, b in pairwise(wanted))
        gaps = [b[0] - a[1] for a, b in pairwise(found)]
        assert all(gap * width > 2**16 for gap in gaps) or width == 1
        assert len(found) == 1 or width > 1
    assert list(_neighbours([], 8)) == []


def test_one_block_at_a_time(tmp_path: Path) -> None:
    model = Streamed(saved("qwen3_moe", tmp_path))
    layers = model.decoder.blocks

    def held() -> list[int]:
        return [
            index
            for index, block in layers.items()
            if not all(parameter.is_meta for parameter in block.parameters())
        ]

    assert held() == []
    with model.block(1):
        assert held() == [1]
    assert held() == []
    with pytest.raises(KeyError), model.block(2):
        raise KeyError
    assert held() == []


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path)
    wanted, read = streamed(source), dict(source.read)
    source.read.clear()
    model = Streamed(source)
    assert not model.read_ahead  # on a CPU
    model.read_ahead = True
    assert_close(measure_streamed(model, PROBE), wanted)
    assert source.read == read
    source.read.clear()
    part = measure_streamed(model, PROBE, blocks=2)
    assert not any("layers.2" in name for name in source.read)
    assert_close(measure_streamed(model, PROBE), wanted)  # and so does using it again
    assert part.concentration[:2].tolist() == pytest.approx(wanted.concentration[:2].tolist())


def test_the_first_blocks_alone(tmp_path: Path) -> None:
    source = saved("mixtral", tmp_path)
    whole = to_json(streamed(source).to_record(0, "", {}))
    source = Recorded(tmp_path)
    part = streamed(source, blocks=2)
    assert not any("layers.2." in name or "layers.3." in name for name in source.read)
    record = to_json(part.to_record(0, "", {}))
    assert record["measured_blocks"] == 2 and "measured_blocks" not in whole
    assert record["model"] == whole["model"]
    for name in ("concentration", "p0_attention"):
        assert close(record[name][:2], whole[name][:2])
    assert record["concentration"][2:] == [None, None]
    assert record["p0_attention"][2:] == [[None] * 4] * 2
    assert close(record["norm_ratio"][:3], whole["norm_ratio"][:3])
    assert record["norm_ratio"][3:] == [None, None]
    for name in ("sink_rate", "peak_block", "first_two_gain", "weights"):
        assert record[name] is None
    assert record["reference_block"] is None and record["shares"] is None
    assert record["missing"]["shares"] == "only the first 2 blocks were measured"
    assert record["formed"] is False


def test_the_first_blocks_alone_with_a_sink_in_them(tmp_path: Path) -> None:
    """A phase among them is told; who writes what all blocks read is not."""
    saved("llama", tmp_path)
    # Queries and keys of nothing: attention is uniform, so of three tokens each gets a third.
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        if "q_proj" in name:
            tensors[name].zero_()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    probe = Probe.random(models.VOCABULARY, sequences=4, length=3, seed=0)
    whole = streamed(Recorded(tmp_path), probe)
    assert [(sink.first_block, sink.last_block) for sink in whole.sinks] == [(0, 3)]
    part = streamed(Recorded(tmp_path), probe, blocks=2)
    assert [(sink.first_block, sink.last_block) for sink in part.sinks] == [(0, 1)]
    assert part.reference_block == 0 and part.localization.shares == ()


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    gone = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ArchiveError, match=r"1 weights missing \(model.layers.2.mlp.up_proj"):
        streamed(Recorded(tmp_path))
    tensors["model.layers.2.mlp.up_proj.weight"] = gone[:-1].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ArchiveError, match=r"1 weights mismatched \(model.layers.2.mlp.up_proj"):
        streamed(Recorded(tmp_path))
