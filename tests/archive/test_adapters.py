"""LoRA adapters merged into their base as PEFT merges them, bit for bit; the rest is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    TrainerState,
)

from sinktrack import ArchiveError, Probe, measure, scan
from sinktrack.archive.discover import archives_below, discover
from sinktrack.archive.huggingface import load
from tests.helpers import models
from tests.helpers.commands import sinktrack_here

PROBE = Probe.random(models.VOCABULARY, sequences=3, length=8)
Build = Callable[..., Any]


def filled(model: Any, scale: float = 0.3) -> Any:
    """With every trained weight of the adapter drawn anew: B is zero at first."""
    torch.manual_seed(7)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            with torch.no_grad():
                new = torch.randn_like(weight) * scale
                weight.copy_(new.abs() + 0.5 if "magnitude" in name else new)
    return model


def trained(
    path: Path, config: peft.PeftConfig, build: Build = models.llama, dtype: Any = torch.float32
) -> tuple[Path, Path]:
    """A base, and an archive of adapters on it as PEFT saves them."""
    base, archive = path / "base", path / "run"
    build().to(dtype).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    filled(get_peft_model(model, config)).save_pretrained(str(archive / "checkpoint-5"))
    return base, archive


def merged(base: Path, adapter: Path, dtype: Any = torch.float32) -> Any:
    """By PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()


def read(base: Path, archive: Path, dtype: str | None = None) -> Any:
    (checkpoint,) = discover(archive, base=base)
    return load(checkpoint, dtype=dtype)


llama = partial(models.llama, num_hidden_layers=2)


def gpt2() -> Any:
    return models.build(GPT2Config(
        vocab_size=models.VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        initializer_range=0.2,
    ))  # fmt: skip


ATTENTION = ["q_proj", "v_proj"]
CASES: dict[str, tuple[Build, LoraConfig]] = {
    "usual": (llama, LoraConfig(r=4, lora_alpha=16, target_modules=ATTENTION)),
    "all linear": (llama, LoraConfig(r=4, target_modules="all-linear")),
    "rslora": (llama, LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=ATTENTION)),
    "patterns": (llama, LoraConfig(
        r=4, target_modules="all-linear", rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 3},
        alpha_pattern={r"^model\.layers\.(0|1)\.self_attn\..*": 5, "down_proj": 64, "proj": 1})),
    "patterns and rslora": (llama, LoraConfig(
        r=4, use_rslora=True, target_modules=ATTENTION, rank_pattern={"v_proj": 1},
        alpha_pattern={"q_proj": 32})),
    "dora": (llama, LoraConfig(r=4, use_dora=True, target_modules="all-linear")),
    "some blocks": (llama, LoraConfig(
        r=2, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "embedding": (llama, LoraConfig(r=4, target_modules=["embed_tokens", "k_proj"])),
    "modules to save": (llama, LoraConfig(
        r=4, target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head", "norm"])),
    "transposed": (gpt2, LoraConfig(
        r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "transposed, said falsely": (gpt2, LoraConfig(r=4, target_modules=["c_attn", "c_proj"])),
    "transposed dora": (gpt2, LoraConfig(
        r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)),
    "biases": (gpt2, LoraConfig(
        r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")),
    "own biases": (models.gpt_neox, LoraConfig(
        r=4, target_modules=["query_key_value"], bias="lora_only")),
    "a bias of B": (models.gpt_neox, LoraConfig(
        r=4, target_modules=["query_key_value", "dense"], lora_bias=True)),
    "gaussian": (llama, LoraConfig(
        r=4, target_modules=ATTENTION, init_lora_weights="gaussian")),
}  # fmt: skip


ROUNDED = [(name, "bfloat16") for name in ("usual", "dora", "transposed", "modules to save")]


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in CASES), *ROUNDED])
def test_weights_are_those_of_pefts_own_merge(tmp_path: Path, name: str, dtype: str) -> None:
    build, config = CASES[name]
    base, archive = trained(tmp_path, config, build, getattr(torch, dtype))
    wanted = merged(base, archive / "checkpoint-5", getattr(torch, dtype)).state_dict()
    found = read(base, archive).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert value.dtype == found[key].dtype == getattr(torch, dtype), key
        assert torch.equal(found[key], value), key
    assert any(not torch.equal(plain[key].float(), wanted[key].float()) for key in wanted)


def test_in_float32_nothing_is_rounded(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    base, archive = trained(tmp_path, config, llama, torch.bfloat16)
    wanted = merged(base, archive / "checkpoint-5").state_dict()
    found = read(base, archive, "float32").state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_records_are_those_of_the_merged_model(tmp_path: Path) -> None:
    """Rows of an embedding that are merged by themselves, blocks one at a time."""
    config = LoraConfig(r=4, target_modules=["embed_tokens", "v_proj", "down_proj"])
    base, archive = trained(tmp_path, config, llama)
    other = filled(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), 0.1)
    other.save_pretrained(str(archive / "checkpoint-10"))
    TrainerState(global_step=10, num_input_tokens_seen=640).save_to_json(
        str(archive / "checkpoint-10" / "trainer_state.json")
    )
    records = list(scan(archive, base=base, probe=PROBE, run=tmp_path / "records"))
    assert [record["step"] for record in records] == [5, 10]
    assert [record["tokens"] for record in records] == [None, 640]
    for record in records:
        wanted = measure(merged(base, archive / f"checkpoint-{record['step']}"), PROBE)
        torch.testing.assert_close(
            torch.tensor(record["p0_attention"]), wanted.p0_attention, atol=1e-6, rtol=0
        )
        assert record["norm_ratio"] == pytest.approx(wanted.norm_ratio.tolist(), rel=1e-5)
        assert record["dtype"] == "float32"


def test_a_head_that_the_base_ties_is_a_weight_of_its_own_once_one_of_both_is_trained(
    tmp_path: Path,
) -> None:
    tied = partial(llama, tie_word_embeddings=True)
    for number, config in enumerate((
        LoraConfig(r=4, target_modules=["embed_tokens"]),
        LoraConfig(r=4, target_modules=["lm_head"]),
        LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head"]),
    )):  # fmt: skip
        base, archive = trained(tmp_path / str(number), config, tied)
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(archive / "checkpoint-5")
        ).eval()  # not merged, which would change both
        tokens = PROBE.tokens
        with torch.no_grad():
            wanted = model(tokens, output_hidden_states=True)
            found = read(base, archive)(tokens, output_hidden_states=True)
        for one, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)


def test_adapters_of_a_bare_decoder_of_a_classifier_and_in_pickles(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = llama()
    model.save_pretrained(base)
    config = LoraConfig(r=4, target_modules=ATTENTION, task_type="SEQ_CLS")
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    for number, inner in enumerate((model.model, classifier)):
        path = tmp_path / f"run{number}" / "checkpoint-3"
        trained_model = filled(get_peft_model(inner, config if number else LoraConfig(
            r=4, target_modules=ATTENTION)))  # fmt: skip
        trained_model.save_pretrained(str(path))
        weights = load_file(path / "adapter_model.safetensors")
        (path / "adapter_model.safetensors").unlink()
        torch.save(weights, path / "adapter_model.bin")
        wanted = trained_model.merge_and_unload()
        decoder = (wanted.model if number else wanted).state_dict()
        found = read(base, path).model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in decoder.items())


def edited(path: Path, **changes: Any) -> None:
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | changes))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights olora changed the base"),
    "experts": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters is not"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices is not merged here"),
    "replicated": ({"layer_replication": [[0, 2]]}, "layer_replication is not merged here"),
    "activated": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is not merged"),
    "what is to come": ({"hyper_lora": True}, "hyper_lora is not merged here"),
    "another rank": ({"r": 8}, "has rank 4 in model.layers.0.self_attn.q_proj, "),
    "a list for a kind": ({"peft_type": ["LORA"]}, r"peft_type \['LORA'\] is not merged here"),
    "no number": ({"lora_alpha": "16"}, "has lora_alpha 16 of model.layers"),
    "not finite": ({"lora_alpha": float("nan")}, "has lora_alpha nan of model.layers"),
    "slow to match": ({"alpha_pattern": {"(a*)*b": 2}}, "alpha_pattern that is not matched here"),
    "no expression": ({"alpha_pattern": {"q_(": 2}}, r"alpha_pattern 'q_\('"),
    "of another kind": ({"peft_type": "VERA"}, "peft_type VERA is not merged here, LORA alone is"),
}  # fmt: skip


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return trained(tmp_path_factory.mktemp("usual"), CASES["usual"][1], llama)


@pytest.fixture
def adapter(usual: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(usual[1], tmp_path / "run")
    return tmp_path / "run" / "checkpoint-5"


def refusal(base: Path, archive: Path) -> str:
    with pytest.raises(ArchiveError) as error:
        read(base, archive)
    return str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_merged_is_refused_by_name(
    usual: tuple[Path, Path], adapter: Path, name: str
) -> None:
    changes, said = REFUSED[name]
    edited(adapter, **changes)
    assert re.search(said, refusal(usual[0], adapter.parent))


OTHERS: dict[str, tuple[peft.PeftConfig, str]] = {
    "IA3": (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3 is not merged"),
    "LOHA": (peft.LoHaConfig(target_modules=["k_proj"]), "LOHA is not merged here"),
    "PREFIX_TUNING": (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
                      "PREFIX_TUNING puts trained vectors before the text"),
    "PROMPT_TUNING": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
                      "PROMPT_TUNING puts trained vectors before the text"),
    "tokens": (LoraConfig(target_modules=["k_proj"],
                          trainable_token_indices={"embed_tokens": [1, 2]}),
               "trainable_token_indices is not merged here"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_as_peft_saves_them(
    usual: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    config, said = OTHERS[name]
    get_peft_model(llama(), config).save_pretrained(str(tmp_path / "checkpoint-1"))
    assert said in refusal(usual[0], tmp_path)


def test_experts_that_the_model_fuses(tmp_path: Path) -> None:
    """Of target_parameters refused; an adapter on the attention of such a model is merged."""
    build = partial(models.mixtral, num_hidden_layers=2)
    base, archive = trained(tmp_path, LoraConfig(r=2, target_modules=["q_proj", "o_proj"]), build)
    wanted = merged(base, archive / "checkpoint-5").state_dict()
    found = read(base, archive).state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    get_peft_model(build(), config).save_pretrained(str(tmp_path / "experts" / "checkpoint-1"))
    assert "target_parameters is not merged here" in refusal(base, tmp_path / "experts")


def test_tensors_that_do_not_fit(usual: tuple[Path, Path], adapter: Path) -> None:
    base, file = usual[0], adapter / "adapter_model.safetensors"
    whole = load_file(file)
    name = next(name for name in whole if "lora_B" in name)

    def said(weights: dict[str, Tensor]) -> str:
        save_file(weights, file)
        return refusal(base, adapter.parent)

    assert "lacks lora_B of model.layers.0.self_attn.q_proj" in said(
        {key: value for key, value in whole.items() if key != name}
    )
    assert "of shape [31, 4], the base takes [32, 4]" in said(
        whole | {name: whole[name][:31].clone()}
    )
    assert "most likely its parts were not gathered" in said(whole | {name: torch.empty(0)})
    another = {key.replace("layers.1", "layers.7"): value for key, value in whole.items()}
    assert "changes model.layers.7.self_attn.q_proj.weight, of which the base" in said(another)
    assert "holds base_model.model.x.lora_E, which is not merged here" in said(
        whole | {"base_model.model.x.lora_E": torch.ones(2)}
    )
    resized = whole | {"base_model.model.model.embed_tokens.weight": torch.ones(70, 32)}
    assert "with its embedding resized as in that training" in said(resized)
    file.write_bytes(file.read_bytes()[:-4])
    assert "truncated or damaged" in refusal(base, adapter.parent)


def test_an_adapter_that_was_not_saved_whole(usual: tuple[Path, Path], adapter: Path) -> None:
    base, file = usual[0], adapter / "adapter_model.safetensors"
    whole = load_file(file)

    def said(weights: dict[str, Tensor]) -> str:
        save_file(weights, file)
        return refusal(base, adapter.parent)

    assert "holds no weights of LoRA" in said({})
    first = {name: value for name, value in whole.items() if "layers.1." not in name}
    assert "has no tensors of model.layers.1.self_attn.q_proj, model.layers.1.self" in said(first)
    edited(adapter, layers_to_transform=[0])
    read(base, adapter.parent)
    edited(adapter, layers_to_transform=None, exclude_modules=r"model\.layers\.1\..*")
    read(base, adapter.parent)
    edited(adapter, exclude_modules=None, target_modules=r".*\.0\.self_attn\.(q|v)_proj")
    read(base, adapter.parent)
    edited(adapter, target_modules=ATTENTION, modules_to_save=["lm_head"])
    assert "has no tensors of lm_head.weight" in said(whole)
    edited(adapter, modules_to_save=None, use_dora=True)
    assert "lacks the magnitude of model.layers.0.self_attn.q_proj" in said(whole)


def test_two_spellings_and_dtypes_of_weights(usual: tuple[Path, Path], adapter: Path) -> None:
    base, file = usual[0], adapter / "adapter_model.safetensors"
    whole = load_file(file)

    def said(weights: dict[str, Tensor]) -> str:
        save_file(weights, file)
        return refusal(base, adapter.parent)

    for before, after in (
        ("base_model.model.", ""), ("lora_A", "lora_A.default"), ("base_model.model.model.", ""),
    ):  # fmt: skip
        others = {name.replace(before, after): value * 0 for name, value in whole.items()}
        assert re.search("which one counts", said(whole | others))
    for dtype, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        assert f"lora_A.weight as {name}, which" in said(
            {key: value.to(dtype) for key, value in whole.items()}
        )


def test_alpha_0_is_the_base(usual: tuple[Path, Path], adapter: Path) -> None:
    edited(adapter, lora_alpha=0)
    wanted = AutoModelForCausalLM.from_pretrained(usual[0]).state_dict()
    found = read(usual[0], adapter.parent).state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_the_base(
    usual: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, archive = usual
    run = ["--run", str(tmp_path / "records")]

    def said(*arguments: str) -> str:
        code, text = sinktrack_here("scan", *arguments, *run, capsys=capsys)
        return f"{code}: {' '.join(text.split())}"

    assert "give the model that they were trained on with --base (base)" in said(str(archive))
    assert "hub write hf://meta/llama" in said(str(archive), "--base", "meta/llama")
    assert "is no model that is read" in said(str(archive), "--base", str(archive))
    assert "holds no adapters: leave out --base" in said(str(base), "--base", str(base))
    assert "0: " in (found := said(str(archive), "--base", str(base))) and "1 measured" in found


def test_a_base_in_a_hub_cache(usual: tuple[Path, Path], tmp_path: Path) -> None:
    base, archive = usual
    cache, commit = tmp_path / "models--a--b", "a" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    (cache / "snapshots" / commit).mkdir(parents=True)
    shutil.copytree(base, cache / "blobs")
    for file in (cache / "blobs").iterdir():
        (cache / "snapshots" / commit / file.name).symlink_to(file)
    wanted = merged(base, archive / "checkpoint-5").state_dict()
    for place in (cache, cache / "snapshots" / commit):
        found = read(place, archive).state_dict()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_final_adapter_around_the_checkpoints(usual: tuple[Path, Path], adapter: Path) -> None:
    archive = adapter.parent
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(adapter / name, archive)
    TrainerState(global_step=9).save_to_json(str(archive / "trainer_state.json"))
    assert [one.step for one in discover(archive, base=usual[0])] == [5, 9]


def test_named_adapters_those_of_mlx_and_unfinished_ones_say_what_they_are(
    usual: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    base = usual[0]
    named = tmp_path / "named/checkpoint-5"
    shutil.copytree(adapter, named / "policy")
    for given in (base, None):
        (found,) = discover(named.parent, base=given)
        assert "holds adapters by name (policy/); choose one with --pattern" in str(found.reason)
    (found,) = discover(named.parent, r".*-(?P<step>[0-9]+)/policy", base=base)
    assert found.reason is None
    (adapter / "adapter_model.safetensors").rename(adapter / "adapters.safetensors")
    for said in ("adapters of MLX", "without adapter_model.safetensors; is the checkpoint still"):
        (found,) = discover(adapter.parent, base=base)
        assert said in str(found.reason)
        (adapter / "adapters.safetensors").unlink(missing_ok=True)


def test_a_sweep_of_adapters_and_models(usual: tuple[Path, Path], tmp_path: Path) -> None:
    base, archive = usual
    shutil.copytree(archive, tmp_path / "one")
    shutil.copytree(base, tmp_path / "two/checkpoint-5")
    assert set(archives_below(tmp_path, base=base)) == {"one", "two"}
    assert set(archives_below(tmp_path)) == {"two"}
