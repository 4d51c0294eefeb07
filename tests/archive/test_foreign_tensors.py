"""Which tensors of a directory are the model: what transformers would load, or a refusal."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from sinktrack import ArchiveError, Probe, measure, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.huggingface import empty, load, tokenizer
from sinktrack.archive.source import open as open_source
from sinktrack.archive.storage.files import Files
from sinktrack.measure import measure_streamed
from sinktrack.models.streaming import Streamed
from tests.helpers import models

PROBE = Probe.random(models.VOCABULARY, sequences=2, length=8)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
Weights = dict[str, Tensor]


def put(weights: Weights, directory: Path, kind: str = SINGLE, shards: str = "model") -> Path:
    """Weights in one of the four ways in which transformers saves them."""
    directory.mkdir(exist_ok=True)
    write: Callable[[Weights, Path], object] = (
        (lambda part, path: save_file(part, path, {"format": "pt"}))
        if "safetensors" in kind
        else torch.save
    )
    weights = {name: value.clone().contiguous() for name, value in weights.items()}
    if not kind.endswith("json"):
        write(weights, directory / kind)
        return directory
    suffix = "safetensors" if "safetensors" in kind else "bin"
    names = sorted(weights)
    parts = {f"{shards}-{i + 1:05}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, held in parts.items():
        write({name: weights[name] for name in held}, directory / file)
    listed = {name: file for file, held in parts.items() for name in held}
    (directory / kind).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return directory


def described(model: Any, directory: Path, **changes: Any) -> Path:
    """The configuration alone."""
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def streamed(directory: Path, **options: Any) -> Any:
    (checkpoint,) = discover(directory)
    return measure_streamed(Streamed(open_source(checkpoint), **options), PROBE)


def same(left: Any, right: Any) -> bool:
    one, two = left.state_dict(), right.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("pair", combinations([SINGLE, INDEX, BIN, BIN_INDEX], 2), ids="+".join)
def test_of_two_the_one_that_transformers_loads(
    pair: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = models.llama(), models.llama()
    with torch.no_grad():
        second.model.layers[0].mlp.up_proj.weight.mul_(2)
    described(first, tmp_path)
    put(first.state_dict(), tmp_path, pair[0], "a")
    put(second.state_dict(), tmp_path, pair[1], "b")
    assert same(load(discover(tmp_path)[0]), AutoModelForCausalLM.from_pretrained(tmp_path))
    with caplog.at_level(logging.WARNING, "sinktrack"):
        (record,) = scan(tmp_path, probe=PROBE, run=tmp_path / "run")
    found = measure(first, PROBE)
    assert record["weights"] == found.weights
    assert torch.tensor(record["p0_norm"]).equal(found.p0_norm)
    (said,) = caplog.messages
    assert str(tmp_path / pair[0]) in said and pair[1] in said and "up_proj" in said


def test_of_two_that_agree_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.llama()
    for kind in (SINGLE, INDEX, BIN, BIN_INDEX):
        put(model.state_dict(), described(model, tmp_path), kind)
    list(scan(tmp_path, probe=PROBE, run=tmp_path / "run"))
    assert not caplog.messages


def test_what_cannot_be_compared_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = models.llama()
    put(model.state_dict(), described(model, tmp_path))
    torch.save(model.state_dict(), tmp_path / BIN, _use_new_zipfile_serialization=False)
    list(scan(tmp_path, probe=PROBE, run=tmp_path / "run"))
    (said,) = caplog.messages
    assert BIN in said and "torch's format before 1.6, which is not compared" in said


def test_an_index_whose_shards_are_gone_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.save_pretrained(tmp_path)  # removes the shards, but not their index
    (record,) = scan(tmp_path, probe=PROBE, run=tmp_path / "run")
    assert record["weights"] == measure(model, PROBE).weights
    (said,) = caplog.messages
    assert INDEX in said and "is missing" in said


def test_files_that_nobody_reads(tmp_path: Path) -> None:
    first, second = models.llama(), models.llama()
    put(first.state_dict(), described(first, tmp_path), INDEX)
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "training_args.bin"):
        put({"x": second.lm_head.weight}, tmp_path, name)
    assert same(load(discover(tmp_path)[0]), AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("beside", [SINGLE, BIN, None])
@pytest.mark.parametrize("name", ["own.safetensors", "own.safetensors.index.json"])
def test_a_file_that_the_configuration_names(name: str, beside: str | None, tmp_path: Path) -> None:
    first, second = models.llama(), models.gpt2()
    put(first.state_dict(), described(first, tmp_path, transformers_weights=name), name, "own")
    if beside is not None:
        put(second.state_dict(), tmp_path, beside)
    assert same(load(discover(tmp_path)[0]), AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_file_that_the_configuration_names_elsewhere(tmp_path: Path) -> None:
    model = models.llama()
    described(model, tmp_path, transformers_weights="../own.safetensors")
    put(model.state_dict(), tmp_path)
    with pytest.raises(ArchiveError, match=r"names '../own.* not a file of its directory"):
        streamed(tmp_path)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    model = models.llama()
    put(model.state_dict(), described(model, tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ArchiveError, match=r"adapter_config.json .*merge it"):
        streamed(tmp_path)


def test_an_index_that_does_not_list_what_its_files_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, name = models.llama(), "model.norm.weight"
    put(model.state_dict(), described(model, tmp_path), INDEX)
    first, last = sorted(tmp_path.glob("model-*"))
    for path, factor in ((first, 2), (last, 3)):  # in both: the last one counts
        save_file(load_file(path) | {name: factor * model.model.norm.weight}, path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"][name] = first.name
    (tmp_path / INDEX).write_text(json.dumps(index))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.model.norm.weight, 3 * model.model.norm.weight)
    assert same(load(discover(tmp_path)[0]), theirs)
    assert f"{INDEX} does not list 1 tensor" in caplog.text and name in caplog.text


def block(name: str, number: int = 0) -> str:
    return f"model.layers.{number}.{name}"


FOREIGN: dict[str, tuple[Callable[[], Any], Weights, str]] = {
    "a bias": (models.llama, {block("self_attn.q_proj.bias"): torch.ones(32)}, "q_proj.bias"),
    "a bias of an MLP": (models.llama, {block("mlp.up_proj.bias"): torch.ones(48)}, "up_proj.bias"),
    "a norm's bias": (models.llama, {"model.norm.bias": torch.ones(32)}, "norm.bias"),
    "norms of queries": (
        models.llama, {block("self_attn.q_norm.weight"): torch.ones(8)}, "q_norm"),
    "a block too many": (
        models.llama, {block("mlp.up_proj.weight", 4): torch.ones(48, 32)}, "4 blocks.*block 4"),
    "LoRA": (
        models.llama, {block("self_attn.q_proj.lora_A.weight"): torch.ones(2, 32)}, "an adapter"),
    "PEFT's layers": (
        models.llama, {block("mlp.up_proj.base_layer.weight"): torch.ones(48, 32)}, "an adapter"),
    "scales": (models.llama, {block("mlp.up_proj.weight_scale"): torch.ones(1)}, "quantized"),
    "scales of blocks": (
        models.llama, {block("mlp.up_proj.weight_scale_inv"): torch.ones(1)}, "quantized"),
    "bitsandbytes": (models.llama, {block("mlp.up_proj.SCB"): torch.ones(48)}, "quantized.*SCB"),
    "four bits": (
        models.llama,
        {block("mlp.up_proj.weight.quant_state.bitsandbytes__nf4"): torch.ones(9).byte()},
        "quantized.*quant_state"),
    "GPTQ": (models.llama, {block("mlp.up_proj.qweight"): torch.ones(4, 4).int()}, "quantized"),
    "learned positions": (
        models.llama, {"model.embed_positions.weight": torch.ones(128, 32)}, "embed_positions"),
    "a bias of the head": (models.llama, {"lm_head.bias": torch.ones(65)}, "lm_head.bias"),
    "what looks like a mask": (
        models.gpt2, {"transformer.h.0.attn.bias": torch.ones(32)}, "attn.bias"),
    "an expert's bias": (
        models.mixtral, {block("block_sparse_moe.experts.0.w1.bias"): torch.ones(16)}, "w1.bias"),
    "a matrix of a head to predict more": (
        models.deepseek_v3, {block("mlp.gate.bias", 1): torch.ones(8)}, "gate.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_tensor_without_a_place_is_refused_by_name(name: str, tmp_path: Path) -> None:
    build, more, message = FOREIGN[name]
    model = build()
    model.save_pretrained(tmp_path)
    path = tmp_path / SINGLE
    save_file(load_file(path) | more, path, {"format": "pt"})
    for read in (streamed, lambda directory: load(discover(directory)[0])):
        with pytest.raises(ArchiveError, match=message):
            read(tmp_path)


HARMLESS: dict[str, tuple[Callable[[], Any], Weights]] = {
    "rotary frequencies": (
        models.llama, {block("self_attn.rotary_emb.inv_freq"): torch.ones(4)}),
    "masks": (
        models.gpt2,
        {"transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128).byte(),
         "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}),
    "masks of GPT-NeoX": (
        models.gpt_neox,
        {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 128, 128).bool(),
         "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e4),
         "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1)}),
    "a reward head": (models.llama, {"score.weight": torch.ones(1, 32)}),
    "a value head": (models.llama, {"v_head.summary.weight": torch.ones(1, 32),
                                    "v_head.summary.bias": torch.ones(1)}),
    "a head to predict more tokens": (
        models.deepseek_v3,
        {block("eh_proj.weight", 4): torch.ones(32, 64),
         block("self_attn.o_proj.weight", 4): torch.ones(32, 32)}),
    "that of DeepSeek": (models.deepseek_v3, {block("mlp.up_proj.weight", 61): torch.ones(4, 4)}),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_known_to_be_harmless_stays_welcome(name: str, tmp_path: Path) -> None:
    build, more = HARMLESS[name]
    model = build()
    model.save_pretrained(tmp_path)
    path = tmp_path / SINGLE
    save_file(load_file(path) | more, path, {"format": "pt"})
    assert streamed(tmp_path).weights == measure(model, PROBE).weights
    load(discover(tmp_path)[0])


def test_a_reward_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(models.llama().config).eval()
    model.save_pretrained(tmp_path)
    wanted = measure(model.model, PROBE)
    assert streamed(tmp_path).weights == wanted.weights
    whole = load(discover(tmp_path)[0], head=False)
    assert measure(whole, PROBE).p0_norm.equal(wanted.p0_norm)
    with pytest.raises(ArchiveError, match=r"1 weights missing \(lm_head.weight\)"):
        load(discover(tmp_path)[0])


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.embed_tokens.weight", None])
def test_tied_weights_of_which_one_name_is_stored(lost: str | None, tmp_path: Path) -> None:
    model = models.llama(tie_word_embeddings=True)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if lost is None:  # both, and another
        weights["lm_head.weight"] = weights["lm_head.weight"] * 2
    else:
        del weights[lost]
    put(weights, described(model, tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert same(load(discover(tmp_path)[0]), theirs)
    assert streamed(tmp_path).weights == measure(theirs, PROBE).weights


def eight(weights: Weights) -> Weights:
    return {name: value.to(torch.float8_e4m3fn) for name, value in weights.items()}


def whole(weights: Weights) -> Weights:
    return {n: v.mul(9).to(torch.int8) if v.ndim == 2 else v for n, v in weights.items()}


def packed(weights: Weights) -> Weights:
    return {
        (f"{n}_packed" if "proj" in n else n): v.mul(9).byte() if "proj" in n else v
        for n, v in weights.items()
    }


@pytest.mark.parametrize("kind", [SINGLE, BIN])
@pytest.mark.parametrize(
    ("change", "says"), [(eight, "F8_E4M3"), (whole, "I8"), (packed, "weight_packed")]
)
def test_quantized_weights_are_known_by_their_dtype(
    change: Callable[[Weights], Weights], says: str, kind: str, tmp_path: Path
) -> None:
    model = models.llama()
    put(change(model.state_dict()), described(model, tmp_path), kind)
    for read in (streamed, lambda directory: load(discover(directory)[0])):
        with pytest.raises(ArchiveError, match=f"quantized weights are not supported: .*{says}"):
            read(tmp_path)


def test_dtypes_of_fewer_bits_than_eight(tmp_path: Path) -> None:
    described(models.llama(), tmp_path)
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(ArchiveError, match="quantized weights are not supported: 'x' .*F4"):
        streamed(tmp_path)


@pytest.mark.parametrize("said", ["float32", "bfloat16", "float16", None])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stored_dtype_is_measured(
    stored: torch.dtype, said: str | None, tmp_path: Path
) -> None:
    model = models.llama().to(stored)
    described(model, tmp_path, dtype=said)
    put(model.state_dict(), tmp_path)
    wanted, found = measure(model, PROBE), streamed(tmp_path)
    assert found.dtype == wanted.dtype == str(stored).removeprefix("torch.")
    assert found.weights == wanted.weights and found.p0_norm.equal(wanted.p0_norm)
    assert same(load(discover(tmp_path)[0]), model)


def test_another_dtype_if_asked_for(tmp_path: Path) -> None:
    model = models.llama()
    model.save_pretrained(tmp_path / "a")
    run = tmp_path / "run"
    (record,) = scan(tmp_path / "a", probe=PROBE, run=run)
    assert record["dtype"] == "float32"
    assert not list(scan(tmp_path / "a", run=run, dtype="float32"))
    (record,) = scan(tmp_path / "a", run=run, dtype="bfloat16")
    assert record["dtype"] == "bfloat16"
    assert record["weights"] == measure(model.bfloat16(), PROBE).weights


def test_of_several_stored_dtypes_none_is_rounded(tmp_path: Path) -> None:
    model = models.llama().bfloat16()
    weights = model.state_dict()
    norm = block("input_layernorm.weight")
    weights[norm] = weights[norm].float() + 1e-5
    put(weights, described(model, tmp_path))
    wanted = models.llama()
    wanted.load_state_dict({name: value.float() for name, value in weights.items()})
    found = streamed(tmp_path)
    assert found.dtype == "float32" and found.weights == measure(wanted, PROBE).weights


def test_what_no_block_reads_does_not_widen_the_others(tmp_path: Path) -> None:
    model = models.llama().bfloat16()
    weights = model.state_dict()
    weights["lm_head.weight"] = weights["lm_head.weight"].float()
    put(weights | {"score.weight": torch.ones(1, 32)}, described(model, tmp_path))
    assert streamed(tmp_path).weights == measure(model, PROBE).weights
    assert load(discover(tmp_path)[0]).dtype == torch.float32  # it needs the head


def test_what_transformers_keeps_in_float32_does_not_widen_the_others(tmp_path: Path) -> None:
    models.deepseek_v3().bfloat16().save_pretrained(tmp_path)
    weights = load_file(tmp_path / SINGLE)
    kept = [name for name in weights if name.endswith("e_score_correction_bias")]
    weights |= {name: weights[name].float() for name in kept}
    save_file(weights, tmp_path / SINGLE, {"format": "pt"})
    assert kept and empty(open_source(discover(tmp_path)[0])).model.dtype == torch.bfloat16


WRAPPED: dict[str, Callable[[str], str]] = {
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "the other way round": lambda name: f"_orig_mod.module.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "PEFT in TRL in DDP": lambda name: f"module.pretrained_model.base_model.model.{name}",
    "blocks compiled one by one": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "a module of one's own": lambda name: f"policy.{name}",
    "two of them": lambda name: f"agent.net.{name}",
    "FSDP": lambda name: name.replace("mlp.", "_fsdp_wrapped_module.mlp."),
}


@pytest.mark.parametrize("kind", [SINGLE, BIN_INDEX])
@pytest.mark.parametrize("name", WRAPPED)
def test_the_names_of_wrappers_are_no_part_of_the_models(
    name: str, kind: str, tmp_path: Path
) -> None:
    model = models.llama()
    weights = {WRAPPED[name](own): value for own, value in model.state_dict().items()}
    put(weights, described(model, tmp_path), kind)
    assert same(load(discover(tmp_path)[0]), model)
    assert streamed(tmp_path).weights == measure(model, PROBE).weights


def test_a_value_head_beside_a_wrapped_model(tmp_path: Path) -> None:
    model = models.llama()
    weights = {f"pretrained_model.{own}": value for own, value in model.state_dict().items()}
    put(weights | {"v_head.summary.weight": torch.ones(1, 32)}, described(model, tmp_path))
    assert streamed(tmp_path).weights == measure(model, PROBE).weights


def test_a_prefix_that_only_some_carry_is_no_wrappers(tmp_path: Path) -> None:
    model = models.llama()
    weights = dict(model.state_dict())
    weights["module.model.norm.weight"] = weights.pop("model.norm.weight")
    put(weights, described(model, tmp_path))
    with pytest.raises(ArchiveError, match=r"holds module.model.norm.weight .*module. is a wr"):
        streamed(tmp_path)
    weights = dict(model.state_dict())
    weights["model._orig_mod.norm.weight"] = weights["model.norm.weight"]
    put(weights, tmp_path)
    with pytest.raises(ArchiveError, match=r"are both model.norm.weight without their wrappers"):
        streamed(tmp_path)


def sharded(weights: Weights, directory: Path) -> None:
    """As FSDP saves it."""
    named = {f"model.{name}": value.clone() for name, value in weights.items()}
    save(named, checkpoint_id=directory / "pytorch_model_fsdp_0")


def test_sharded_checkpoints_of_fsdp(tmp_path: Path) -> None:
    model = models.llama()
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    sharded(wrapped, described(model, tmp_path / "a"))
    assert streamed(tmp_path / "a").weights == measure(model, PROBE).weights
    more = {block("self_attn.q_proj.bias"): torch.ones(32)}
    sharded(dict(model.state_dict()) | more, described(model, tmp_path / "b"))
    with pytest.raises(ArchiveError, match=r"q_proj.bias that llama has no"):
        streamed(tmp_path / "b")
    sharded(eight(model.state_dict()), described(model, tmp_path / "c"))
    with pytest.raises(ArchiveError, match="quantized weights are not supported.*F8_E4M3"):
        streamed(tmp_path / "c")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        (SINGLE, SINGLE), (SINGLE, "config.json"), (INDEX, INDEX),
        (INDEX, "model-00002-of-00002.safetensors"), (BIN, BIN), (BIN_INDEX, BIN_INDEX),
        (BIN_INDEX, "model-00001-of-00002.bin"), ("fsdp", "pytorch_model_fsdp_0/.metadata"),
        ("fsdp", "pytorch_model_fsdp_0/__0_0.distcp"),
    ],
)  # fmt: skip
def test_a_git_lfs_pointer_is_called_by_its_name(kind: str, file: str, tmp_path: Path) -> None:
    model = models.llama()
    described(model, tmp_path)
    if kind == "fsdp":
        sharded(model.state_dict(), tmp_path)
    else:
        put(model.state_dict(), tmp_path, kind)
    (tmp_path / file).write_text(POINTER)
    with pytest.raises(ArchiveError, match=f"{file} is a Git LFS pointer.*git lfs pull"):
        streamed(tmp_path)


def test_a_pointer_in_the_place_of_a_tokenizer(tmp_path: Path) -> None:
    model = models.llama()
    put(model.state_dict(), described(model, tmp_path))
    (tmp_path / "tokenizer.json").write_text(POINTER)
    with pytest.raises(ArchiveError, match=r"tokenizer.json is a Git LFS pointer"):
        tokenizer(discover(tmp_path)[0].files)


@pytest.mark.parametrize("file", ["common.pt", "run_config.yaml", "train_state.pt"])
def test_a_pointer_in_the_place_of_any_small_file(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(POINTER)
    with pytest.raises(ArchiveError, match=f"{file} is a Git LFS pointer"):
        Files(tmp_path).whole(file, 2**20)


def test_all_lines_of_a_reason_are_told(tmp_path: Path) -> None:
    model = models.llama()
    put(model.state_dict(), described(model, tmp_path, model_type="nonesuch"))
    with pytest.raises(ArchiveError, match=r"nonesuch.*pip install --upgrade transformers"):
        streamed(tmp_path)
