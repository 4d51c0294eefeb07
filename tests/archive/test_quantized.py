"""FP8 and MXFP4: transformers' own numbers, bit for bit; what lacks parts is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig

from sinktrack import ArchiveError, Probe, measure, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.huggingface import load
from sinktrack.archive.source import open as open_source
from sinktrack.archive.storage.files import Files
from tests.helpers import models

PROBE = Probe.random(models.VOCABULARY, sequences=2, length=8)
FILE = "model.safetensors"
Weights = dict[str, Tensor]
llama = partial(models.llama, num_hidden_layers=2, hidden_size=64, intermediate_size=96)
moe = partial(models.qwen3_moe, num_hidden_layers=2, hidden_size=64, moe_intermediate_size=32)
deepseek = partial(
    models.deepseek_v3, num_hidden_layers=2, hidden_size=64, intermediate_size=64,
    moe_intermediate_size=32, kv_lora_rank=28, q_lora_rank=32, qk_nope_head_dim=12,
    v_head_dim=4,
)  # fmt: skip


def eight(weight: Tensor, blocks: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """A matrix in FP8 and the scales of its blocks; of the whole of it without."""
    rows, columns = weight.shape
    tall, wide = blocks or weight.shape
    grid = torch.empty(math.ceil(rows / tall), math.ceil(columns / wide))
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            place = slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide)
            grid[i, j] = weight[place].float().abs().max() / 448
            values[place] = (weight[place].float() / grid[i, j]).to(torch.float8_e4m3fn)
    return values, grid if blocks else grid[0, 0]


def written(
    path: Path, build: Callable[[], Any], blocks: tuple[int, int] | None, **settings: Any
) -> Path:
    """A checkpoint as DeepSeek and Qwen publish them: projections in FP8, the rest in bfloat16."""
    build().to(torch.bfloat16).save_pretrained(path)
    weights = load_file(path / FILE)
    for name, weight in list(weights.items()):
        if "proj" in name:
            weights[name], scale = eight(weight, blocks)
            weights[f"{name}_scale_inv"] = scale
    save_file(weights, path / FILE, {"format": "pt"})
    described(path, {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": blocks and list(blocks),
    } | settings)  # fmt: skip
    return path


def described(path: Path, settings: dict[str, Any] | None) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = settings
    (path / "config.json").write_text(json.dumps(config))


def read(path: Path, dtype: str | None = None) -> Any:
    (checkpoint,) = discover(path)
    return load(checkpoint, dtype=dtype)


def same(found: Weights, wanted: Weights) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("build", "blocks"),
    [(llama, (32, 32)), (llama, (16, 32)), (llama, None), (moe, (16, 16)), (deepseek, (32, 32))],
    ids=["square blocks", "flat blocks", "one scale", "experts", "deepseek"],
)
def test_eight_bits_are_what_transformers_makes_of_them(
    tmp_path: Path, build: Callable[[], Any], blocks: tuple[int, int] | None
) -> None:
    path = written(tmp_path / "model", build, blocks)
    same(read(path).state_dict(), AutoModelForCausalLM.from_pretrained(path).state_dict())


def test_records(tmp_path: Path) -> None:
    path = written(tmp_path / "checkpoint-3", moe, (16, 16))
    (record,) = scan(tmp_path, probe=PROBE, run=tmp_path / "run")
    assert record["dtype"] == "bfloat16 from float8_e4m3fn"
    wanted = measure(read(path), PROBE)
    assert record["weights"] == wanted.weights
    torch.testing.assert_close(
        torch.tensor(record["p0_attention"]), wanted.p0_attention, atol=1e-6, rtol=0
    )
    assert not list(scan(tmp_path, probe=PROBE, run=tmp_path / "run", dtype="bfloat16"))
    (again,) = scan(tmp_path, probe=PROBE, run=tmp_path / "run", dtype="float32")
    assert again["dtype"] == "float32 from float8_e4m3fn"


def test_the_last_blocks_may_be_smaller(tmp_path: Path) -> None:
    """DeepSeek-V3's kv_a_proj has 576 rows in blocks of 128, which transformers refuses."""
    path = written(tmp_path / "model", llama, (40, 28))
    weights, source = load_file(path / FILE), open_source(discover(path)[0])
    for name, values in weights.items():
        if values.dtype != torch.float8_e4m3fn:
            continue
        scales = weights[f"{name}_scale_inv"]
        wanted = torch.stack([
            torch.stack([values[i, j].float() * scales[i // 40, j // 28]
                         for j in range(values.shape[1])])
            for i in range(values.shape[0])
        ])  # fmt: skip
        found = source.slice(name)
        assert found.get_dtype() == "BF16" and found.get_shape() == list(values.shape)
        assert torch.equal(found[...], wanted)
        for low, high in ((0, 1), (39, 41), (7, 60), (50, 50)):
            assert torch.equal(found[low:high], wanted[low:high])
        assert torch.equal(found[3:9, 2], wanted[3:9, 2])
        assert torch.equal(found[5], wanted[5])
        assert torch.equal(read(path, "float32").state_dict()[name], wanted)  # nothing is rounded


def test_scales_as_others_write_them(tmp_path: Path) -> None:
    """A row's scale; exponents in a byte; scales of activations, which are left out."""
    path = written(tmp_path / "model", llama, (32, 32))
    weights = load_file(path / FILE)
    exponents = {}
    for name in [name for name in weights if name.endswith("scale_inv")]:
        powers = torch.exp2(torch.log2(weights[name]).ceil())
        weights[name] = powers.to(torch.float8_e8m0fnu)
        exponents[name] = (torch.log2(powers) + 127).to(torch.uint8)
        weights[name.replace("weight_scale_inv", "activation_scale")] = torch.tensor(0.5)
    save_file(weights, path / FILE)
    found = read(path).state_dict()
    same(found, AutoModelForCausalLM.from_pretrained(path).state_dict())
    save_file(weights | exponents, path / FILE)
    same(read(path).state_dict(), found)


def test_compressed_tensors(tmp_path: Path) -> None:
    """`weight_scale` by tensor, by row and by block: the products, rounded once."""
    ways: list[tuple[str, tuple[int, int] | None]] = [
        ("tensor", None), ("channel", (1, 10**6)), ("block", (32, 32)),
    ]  # fmt: skip
    for way, blocks in ways:
        path = written(tmp_path / way, llama, blocks)
        weights = {
            name.replace("scale_inv", "scale"): value
            for name, value in load_file(path / FILE).items()
        }
        save_file(weights, path / FILE)
        group = {
            "type": "float", "num_bits": 8, "symmetric": True, "dynamic": False, "strategy": way,
            "block_structure": blocks if way == "block" else None,
        }  # fmt: skip
        described(path, {
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": group}},
        })  # fmt: skip
        found = read(path).state_dict()
        for name, values in weights.items():
            if values.dtype == torch.float8_e4m3fn:
                scales = weights[f"{name}_scale"]
                if way == "block":
                    scales = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
                    scales = scales[: values.shape[0], : values.shape[1]]
                assert torch.equal(found[name], (values.float() * scales).to(torch.bfloat16))


def gpt_oss() -> Any:
    return models.build(GptOssConfig(
        vocab_size=models.VOCABULARY, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        num_experts_per_tok=2, initializer_range=0.2, max_position_embeddings=128,
        layer_types=["sliding_attention", "full_attention"], sliding_window=6,
    ))  # fmt: skip


def packed(path: Path) -> Path:
    """A checkpoint as gpt-oss is published: experts in blocks of 4 bits, the rest in bfloat16."""
    gpt_oss().to(torch.bfloat16).save_pretrained(path)
    weights = load_file(path / FILE)
    torch.manual_seed(0)
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "down_proj"))]:
        experts, into, out = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, into // 32, 16)).byte()
        weights[f"{name}_scales"] = torch.randint(122, 127, (experts, out, into // 32)).byte()
    save_file(weights, path / FILE, {"format": "pt"})
    described(
        path, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    )
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_four_bits_are_what_transformers_makes_of_them(
    tmp_path: Path, dtype: Literal["bfloat16", "float32"]
) -> None:
    path = packed(tmp_path / "checkpoint-2")
    wide = getattr(torch, dtype)
    wanted = AutoModelForCausalLM.from_pretrained(path, dtype=wide).to(wide)  # 5.12 takes bfloat16
    same(read(path, None if dtype == "bfloat16" else dtype).state_dict(), wanted.state_dict())
    (record,) = scan(tmp_path, probe=PROBE, run=tmp_path / "run", dtype=dtype)
    assert record["dtype"] == f"{dtype} from mxfp4"
    assert record["weights"] == measure(wanted, PROBE).weights


BROKEN: dict[str, tuple[Callable[[Weights, str], object], str]] = {
    "no scale": (lambda w, n: w.pop(f"{n}_scale_inv"), "is stored as F8_E4M3 and has no scale"),
    "no weight": (lambda w, n: w.pop(n), "weight_scale_inv has no weight of 8 bits beside it"),
    "another grid": (lambda w, n: w.update({f"{n}_scale_inv": torch.ones(3, 2)}),
                     "has scales of shape [3, 2], config.json says blocks of [32, 32]"),
    "whole numbers": (lambda w, n: w.update({f"{n}_scale_inv": torch.ones(2, 2).int()}),
                      "has scales of I32"),
    "rows": (lambda w, n: w.update({f"{n}_scale_inv": torch.ones(64, 1)}),
             "has scales of shape [64, 1], config.json says blocks"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_whole_is_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "model", llama, (32, 32))
    weights = load_file(path / FILE)
    change, said = BROKEN[name]
    change(weights, "model.layers.1.self_attn.q_proj.weight")
    save_file(weights, path / FILE)
    with pytest.raises(ArchiveError) as error:
        read(path)
    assert said in str(error.value)


PACKED_BROKEN: dict[str, tuple[Callable[[Weights, str], object], str]] = {
    "no scales": (lambda w, n: w.pop(f"{n}_scales"), "gate_up_proj_blocks is without"),
    "no blocks": (lambda w, n: w.pop(f"{n}_blocks"), "gate_up_proj_scales is without"),
    "other shapes": (lambda w, n: w.update({f"{n}_scales": torch.ones(4, 64, 3).byte()}),
                     "and scales of shape [4, 64, 3], U8; wanted U8"),
    "twice": (lambda w, n: w.update({n: torch.ones(4, 64, 64)}), "stands beside its"),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED_BROKEN)
def test_what_is_not_whole_of_four_bits(tmp_path: Path, name: str) -> None:
    path = packed(tmp_path / "model")
    weights = load_file(path / FILE)
    change, said = PACKED_BROKEN[name]
    change(weights, "model.layers.1.mlp.experts.gate_up_proj")
    save_file(weights, path / FILE)
    with pytest.raises(ArchiveError) as error:
        read(path)
    assert said in str(error.value)


def test_what_the_configuration_does_not_say_stays_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "model", llama, (32, 32))
    described(path, None)
    with pytest.raises(ArchiveError, match=r"quantized weights are not supported.*F8_E4M3"):
        read(path)
    for odd in (3, "ab", [2, 2.0]):
        described(path, {"quant_method": "fp8", "weight_block_size": odd})
        with pytest.raises(ArchiveError, match=r"weight_block_size|is not as it should be"):
            read(path)
    kept = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "block"}
    odd_groups = ([1], {"a": 3}, {"a": {"weights": kept | {"block_structure": [[1], 2]}}})
    for groups in odd_groups:
        described(
            path,
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": groups,
            },
        )
        with pytest.raises(ArchiveError, match="is not as it should be"):
            read(path)
    for settings in (
        {"quant_method": "gptq"},
        {"quant_method": "fp8", "weight_block_size": [0, 1]},
    ):
        described(path, settings)
        with pytest.raises(ArchiveError, match=r"not supported|weight_block_size"):
            read(path)


def test_scales_of_the_cache_leave_the_weights_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "model", llama, (32, 32))
    wanted, weights = read(path).state_dict(), load_file(path / FILE)
    for name in ("k_scale", "v_scale", "k_proj.output_scale", "k_proj.k_scale"):
        weights[f"model.layers.0.self_attn.{name}"] = torch.tensor(0.5)
    save_file(weights, path / FILE)
    same(read(path).state_dict(), wanted)


def test_a_configuration_that_says_too_much(tmp_path: Path) -> None:
    path = written(tmp_path / "model", llama, (32, 32), transform_config={
        "config_groups": {"R1": {"type": "hadamard", "apply": []}}
    })  # fmt: skip
    with pytest.raises(ArchiveError, match="transform_config .*is not applied here"):
        read(path)
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    described(tmp_path / "plain", {"quant_method": "fp8"})
    with pytest.raises(ArchiveError, match="no 8-bit weight is there.*remove quantization_config"):
        read(tmp_path / "plain")


@pytest.mark.parametrize("method", ["fbgemm_fp8", "modelopt", "modelopt beside"])
def test_rows_and_matrices_with_one_scale(tmp_path: Path, method: str) -> None:
    """FBGEMM's rows (Llama 3.1 405B FP8), and ModelOpt's matrices with a scale each."""
    path = written(tmp_path / "model", llama, None)
    weights, wanted = load_file(path / FILE), {}
    for name in [name for name in weights if name.endswith("scale_inv")]:
        own, scale = name.removesuffix("_scale_inv"), weights.pop(name)
        if method == "fbgemm_fp8":
            scale = torch.rand(len(weights[own]), 1) + 0.5
            weights[name.replace("weight_scale_inv", "input_scale_ub")] = torch.tensor([1200.0])
        else:
            weights[name.replace("weight_scale_inv", "input_scale")] = torch.tensor(0.5)
        weights[f"{own}_scale"] = scale
        wanted[own] = (weights[own].float() * scale).to(torch.bfloat16)
    save_file(weights, path / FILE)
    algorithm = {"quant_algo": "FP8", "kv_cache_quant_algo": None}
    described(path, {"quant_method": method} | (algorithm if method == "modelopt" else {}))
    if method == "modelopt beside":
        config = json.loads((path / "config.json").read_text())
        del config["quantization_config"]
        (path / "config.json").write_text(json.dumps(config))
        (path / "hf_quant_config.json").write_text(json.dumps({"quantization": algorithm}))
    found = read(path).state_dict()
    assert len(wanted) == 14
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    if method == "modelopt":
        described(path, {"quant_method": method, "quant_algo": "NVFP4"})
        with pytest.raises(ArchiveError, match="quantized weights are not supported"):
            read(path)


def test_who_has_no_weight_of_8_bits_is_not_asked_for_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    exists = Files.exists

    def counted(self: Files, name: str) -> bool:
        asked.append(name)
        return exists(self, name)

    monkeypatch.setattr(Files, "exists", counted)
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    read(tmp_path)
    assert "adapter_config.json" in asked and "hf_quant_config.json" not in asked


@pytest.mark.parametrize("said", [True, False])
def test_a_cast_without_scales(tmp_path: Path, said: bool) -> None:
    path = tmp_path / "model"
    llama().to(torch.bfloat16).save_pretrained(path)
    weights = load_file(path / FILE)
    weights |= {n: w.to(torch.float8_e4m3fn) for n, w in weights.items() if "proj" in n}
    save_file(weights, path / FILE)
    wanted = "is stored as F8_E4M3 and has no scale beside it .*were cast without scales"
    if said:
        described(path, {"quant_method": "fp8"})
    else:
        wanted = "quantized weights are not supported: .* F8_E4M3"
    with pytest.raises(ArchiveError, match=wanted):
        read(path)
