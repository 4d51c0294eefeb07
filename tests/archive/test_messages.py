"""What is said of each kind of archive that is not read, word for word."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import archive_kinds
import pytest
import torch
import transformers

from sinktrack import ArchiveError, Probe, Run, scan
from sinktrack.archive import names
from sinktrack.archive.discover import NoCheckpoint, archives_below, discover
from sinktrack.archive.huggingface import load
from sinktrack.errors import AnotherModel
from sinktrack.scan import choose_probe
from tests.helpers import models
from tests.helpers.commands import sinktrack_here
from tests.helpers.paths import DOCS

SAID = {
    "PEFT adapters": (
        "holds adapters alone (adapter_config.json, adapter_model.safetensors); give the model "
        "that they were trained on with --base (base), or merge them into it with PEFT's "
        "merge_and_unload and save that"
    ),
    "PEFT adapters, unexplained": (
        "holds an adapter's weights (adapter_model.safetensors) without adapter_config.json, which "
        "says how they are merged; copy it from where they come from"
    ),
    "DeepSpeed, pipeline parts alone": (
        "holds DeepSpeed's state (global_step5/, zero_to_fp32.py), a part for each process; "
        "write the weights with DeepSpeed's own zero_to_fp32.py --safe_serialization"
    ),
    "shards without an index": (
        "holds shards (model-00001-of-00002.safetensors) without their index; copy "
        "model.safetensors.index.json, or pytorch_model.bin.index.json, from where they come "
        "from"
    ),
    "FSDP, local state": (
        "holds FSDP's local state (pytorch_model_fsdp_rank0.bin, pytorch_model_fsdp_rank1.bin),"
        " a file for each process; save with SHARDED_STATE_DICT"
    ),
    "Meta, Mistral": (
        "holds a model in Meta's or Mistral's own layout (consolidated.00.pth, params.json); "
        "write it with the convert_llama_weights_to_hf.py or convert_mistral_weights_to_hf.py of "
        "transformers 4, or download the repository's files of Hugging Face's layout"
    ),
    "torchtune": (
        "holds a checkpoint of torchtune (hf_model_0001_0.pt, recipe_state/); write it with its"
        " FullModelHFCheckpointer and safe_serialization=True"
    ),
    "nanotron, parts": (
        "holds a part of nanotron's checkpoint (checkpoint_metadata.json); name the directory that "
        "holds checkpoint_metadata.json, model_config.json and model/"
    ),
    "NeMo 2": (
        "holds a checkpoint of NeMo (context/); write it with `nemo llm export path=... "
        "target=hf output_path=...`"
    ),
    "NeMo 1": (
        "holds a packed checkpoint of NeMo (model.nemo); write it with NeMo's own export to "
        "Hugging Face"
    ),
    "several of GGUF": (
        "holds files of GGUF (model-Q4_K_M.gguf, model-f16.gguf); name the one to "
        "measure, or scan the model they were made of"
    ),
    "TensorFlow, Flax": (
        "holds weights of TensorFlow or Flax (flax_model.msgpack, tf_model.h5); load them with "
        "an older transformers (4.x, from_tf=True or from_flax=True) and save them with "
        "save_pretrained"
    ),
    "JAX, Orbax": (
        "holds a checkpoint of JAX by Orbax (_CHECKPOINT_METADATA, _METADATA, manifest.ocdbt);"
        " write it with its project's own converter to Hugging Face, such as MaxText's "
        "to_huggingface.py or levanter.main.export_lm_to_hf"
    ),
    "NumPy": ("holds arrays of NumPy (params.npz); save the model with save_pretrained"),
    "ONNX": (
        "holds an exported graph (model.onnx), of which no block can be read; scan the model it"
        " was made of"
    ),
    "packed": ("holds a packed archive, or its parts (step1000.tar.gz); unpack or join them first"),
    "distributed, unfinished": (
        "holds shards (__0_0.distcp, __1_0.distcp) without .metadata, which is written last; "
        "unless that is still to come, they cannot be put together"
    ),
    "another name": (
        "holds weights under a name that is not read (model.fp16.safetensors); save the model "
        "with save_pretrained"
    ),
    "an adapter in another file": (
        "holds an adapter's weights in a file that PEFT does not load (adapter_model.pt); save "
        "them with PEFT's save_pretrained"
    ),
    "OLMo, parts": (
        "holds a part for each process of OLMo's first trainer (rank0.pt, rank1.pt); put them "
        "together with its scripts/unshard.py"
    ),
    "metaseq, parts": (
        "holds a part for each process of metaseq (checkpoint_1000-model_part-0-shard0.pt, "
        "checkpoint_1000-model_part-0-shard1.pt); write it with the "
        "convert_opt_original_pytorch_checkpoint_to_pytorch.py of transformers 4"
    ),
    "verl, not of FSDP": (
        "holds a checkpoint of verl (actor/) without the parts of FSDP that are read, "
        "actor/model_world_size_*_rank_*.pt; --pattern finds what lies further below, such as a "
        "model in actor/huggingface, else `python -m verl.model_merger merge` of verl writes one"
    ),
    "vLLM, TensorRT-LLM": (
        "holds weights as vLLM or TensorRT-LLM splits them to serve them "
        "(model-rank-0-part-0.safetensors, model-rank-1-part-0.safetensors); scan the model that "
        "they were made of"
    ),
    "llm.c": (
        "holds a checkpoint of llm.c (model_00001000.bin); write it with its dev/eval/export_hf.py"
    ),
    "Diffusers": ("holds a pipeline of Diffusers (model_index.json); read are decoders of text"),
    "parts of GGUF": (
        "holds parts of one GGUF (model-00001-of-00002.gguf, model-00002-of-00002.gguf); join "
        "them with llama.cpp's llama-gguf-split --merge"
    ),
    "Keras": (
        "holds a model of Keras (model.keras); write it with KerasHub's export_to_transformers"
    ),
    "Paddle, MindSpore, EasyLM": (
        "holds weights of Paddle, MindSpore or Flax (model_state.pdparams); write them with that "
        "framework's own converter to Hugging Face"
    ),
    "cut short": (
        "holds a download or a copy that did not end (model.safetensors.incomplete); download or "
        "copy it again"
    ),
    "a data set": (
        "holds a data set (train.bin, val.bin) and no weights; name the directory of the "
        "checkpoints"
    ),
    "a pickle": (
        "holds a pickle of Python objects (model.pkl), which can run code and is not read; load "
        "it where you trust it, and save the model with save_pretrained"
    ),
    "state of training alone": (
        "holds the state of training (optimizer.pt, rng_state.pth, trainer_state.json) and no "
        "weights; save the model, too"
    ),
    "a tokenizer alone": (
        "holds a tokenizer (tokenizer.json, tokenizer_config.json, vocab.json) and no weights; "
        "name the directory of the model"
    ),
    "a run of sinktrack": (
        "holds a run of sinktrack itself (records.jsonl); name the archive of checkpoints, and "
        "this as --run"
    ),
    "something else": (
        "holds nothing of a format that is known (notes.txt, plots/); --pattern finds what lies"
        " further below"
    ),
    "nothing": ("is empty; is the checkpoint still being written?"),
}
"""What follows the directory's name."""


def test_what_is_said_of_each_kind() -> None:
    assert archive_kinds.said() == SAID


def test_the_docs_show_the_table() -> None:
    docs = DOCS / "archives.md"
    assert archive_kinds.table() in docs.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [kind for kind in SAID if archive_kinds.KINDS[kind]])
def test_an_archive_of_it_says_so(kind: str, tmp_path: Path) -> None:
    """As the archive itself and as a checkpoint among others."""
    archive_kinds.build(kind, tmp_path / "archive/checkpoint-5")
    for archive in (tmp_path / "archive", tmp_path / "archive/checkpoint-5"):
        (found,) = discover(archive)
        assert str(found.reason).endswith(SAID[kind]) and found.step == 5
    unnamed = (tmp_path / "archive/checkpoint-5").rename(tmp_path / "one")
    if kind == "something else":
        with pytest.raises(NoCheckpoint, match=r"looked for .*there is plots\)"):
            discover(unnamed)
    elif "global_step" not in SAID[kind]:
        (found,) = discover(unnamed)
        assert str(found.reason).endswith(SAID[kind])


def test_what_else_may_have_been_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "a.json")
    (tmp_path / "runs/one/checkpoints/checkpoint-5").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for archive, said in {
        "EleutherAI/pythia-14m": "nothing at .*/pythia-14m; for the repository .* hf://EleutherAI/pythia",
        "runs/oen": "there is nothing at .*runs/oen; there is .*/runs/one$",
        "runs/one": "there is checkpoints.; checkpoints are in .*/runs/one/checkpoints: name that",
        "X.ckpt": "there is nothing at .*/X.ckpt$",
        "a.json": "a.json is a file that holds no weights by name; name the directory",
    }.items():
        with pytest.raises(ArchiveError, match=said):
            discover(archive)


@pytest.mark.parametrize(
    "name",
    [
        "epoch_3",
        "checkpoint_5",
        "checkpoint_0050000",
        "ckpt_000",
        "CrystalCoder_phase1_checkpoint_000055500",
        "lc-4k-to-32k.step+7x",
    ],
)
def test_a_pattern_that_is_suggested_works_as_printed(name: str, tmp_path: Path) -> None:
    models.llama(num_hidden_layers=1).save_pretrained(tmp_path / "a" / name)
    (tmp_path / "a/other").mkdir()
    cache = tmp_path / "models--a--b"
    shutil.copytree(tmp_path / "a" / name, cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / name).write_text("a" * 40)
    for archive in (tmp_path / "a", cache):
        with pytest.raises(ArchiveError, match="--pattern '") as raised:
            discover(archive)
        pattern = re.findall(r"--pattern '([^']+)'", str(raised.value))[-1]
        (found,) = discover(archive, pattern)
        assert found.name == name and found.reason is None


@pytest.mark.parametrize(
    ("name", "step", "tokens"),
    [
        ("step143000", 143_000, None),  # Pythia
        ("step1000-tokens4B", 1000, 4 * 10**9),  # OLMo, OLMoE
        ("stage1-step721901-tokens6056B", 721_901, 6056 * 10**9),  # OLMo 2
        ("stage2-ingredient1-step11921-tokens101B", 11_921, 101 * 10**9),
        ("stage1-step-40000", 40_000, None),  # SmolLM 3
        ("step-50K-105b", 50_000, 105 * 10**9),  # TinyLlama
        ("step50000-tokens210B", 50_000, 210 * 10**9),  # Apertus
        ("epoch=1-step=20.ckpt", 20, None),  # Lightning
        ("ep0-ba100-rank0", 100, None),  # Composer
        ("global_step_20", 20, None),  # verl
        ("step-00001000", 1000, None),  # litgpt
    ],
)
def test_names_of_public_checkpoints(name: str, step: int, tokens: int | None) -> None:
    found = names.known(name)
    assert found is not None and (found.step, found.tokens) == (step, tokens)


def test_the_model_in_the_output_directory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models.llama(num_hidden_layers=1).save_pretrained(tmp_path)
    shutil.copytree(tmp_path, tmp_path.parent / "copy")
    shutil.move(tmp_path.parent / "copy", tmp_path / "checkpoint-7")
    assert [found.step for found in discover(tmp_path)] == [7]
    assert "the model in the directory itself is passed over" in caplog.text
    (tmp_path / "trainer_state.json").write_text('{"global_step": 9}')
    assert [found.step for found in discover(tmp_path)] == [7, 9]
    (tmp_path / "trainer_state.json").write_text('{"global_step": 7}')
    assert [found.files.name for found in discover(tmp_path)] == ["checkpoint-7"]


@pytest.mark.parametrize(
    ("paths", "pattern"),
    [
        (("1000", "20000"), "(?P<step>[0-9]+)"),
        (("runs/model:v1", "runs/model:v2"), "runs/model:v(?P<step>[0-9]+)"),
        (("epoch_1", "epoch_2"), "epoch_(?P<step>[0-9]+)"),
    ],
)
def test_numbered_saves_are_no_sweep(paths: tuple[str, str], pattern: str, tmp_path: Path) -> None:
    """Nor a step 0 each."""
    for path in paths:
        models.llama(num_hidden_layers=1).save_pretrained(tmp_path / path)
    with pytest.raises(NoCheckpoint, match=re.escape(f"--pattern '{pattern}' where")):
        discover(tmp_path)
    assert [found.name for found in discover(tmp_path, pattern)] == list(paths)
    if ":" not in pattern:
        assert not archives_below(tmp_path)


@pytest.mark.parametrize("kind", ["JAX, Orbax", "NeMo 1", "TensorFlow, Flax", "PEFT adapters"])
@pytest.mark.parametrize("name", ["100", "epoch_3", "model--step=99-last"])
def test_what_stands_below_is_told(kind: str, name: str, tmp_path: Path) -> None:
    archive_kinds.build(kind, tmp_path / name / "default")
    with pytest.raises(NoCheckpoint) as raised:
        discover(tmp_path)
    if kind == "PEFT adapters":  # are read, with --base
        assert "; checkpoints are in" in str(raised.value) or "--pattern '" in str(raised.value)
    else:
        assert str(raised.value).endswith(f"; {tmp_path / name / 'default'} {SAID[kind]}")


def test_a_sweep_makes_a_run_of_each_child(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for child in ("a", "b/checkpoints"):
        models.llama(num_hidden_layers=1).save_pretrained(tmp_path / "s" / child / "checkpoint-5")
    Probe.random(models.VOCABULARY, sequences=2, length=6).save(tmp_path / "probe")
    command = ("scan", tmp_path / "s", "--run", tmp_path / "runs", "--probe", tmp_path / "probe")
    code, said = sinktrack_here(*command, capsys=capsys)
    assert code == 0 and "holds 2 archives" in said
    assert "measured: checkpoint-5 (1 of 1, 0:00:00 left)" in said
    assert [Run.read(tmp_path / "runs" / name).steps for name in "ab"] == [[5], [5]]
    code, said = sinktrack_here("show", tmp_path / "runs", capsys=capsys)
    assert code == 2 and said.endswith(f"there is {tmp_path / 'runs/a'}\n")
    code, said = sinktrack_here("demo", "--out", tmp_path / "probe", capsys=capsys)
    assert code == 2


def edited(path: Path, **changes: object) -> Path:
    """A checkpoint whose configuration says something else."""
    models.llama(num_hidden_layers=1).save_pretrained(path)
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}},
            f"config.json: transformers {transformers.__version__} does not know how to build "
            "model_type 'mine', which is code of the checkpoint's own (configuration_mine.Mine); "
            "that is never run: give the config.json of a family of transformers that holds the "
            "same tensors with --hf-config (hf_config), or load the model where you trust its code "
            "and measure it with st.measure(st.Decoder(model, blocks=...), probe)",
        ),
        (
            {"model_type": "mine"},
            f"config.json: transformers {transformers.__version__} does not know how to build "
            "model_type 'mine'; give the config.json of a family that it knows with --hf-config "
            "(hf_config), or, where a newer one knows it, pip install --upgrade transformers",
        ),
        (
            {"model_type": None},
            "config.json: it names no model_type; give the config.json of a family that it knows "
            "with --hf-config (hf_config), or, where a newer one knows it, pip install --upgrade "
            "transformers",
        ),
        (
            {"model_type": "t5"},
            "a t5 cannot be built: it is an encoder and a decoder, and read are decoders that "
            "stand alone",
        ),
        (
            {"model_type": "clip", "architectures": ["CLIPModel"]},
            "a clip cannot be built: transformers has no language model of this kind (saved as "
            "CLIPModel), whose blocks could be measured",
        ),
        (
            {
                "rope_parameters": {
                    kind: {"rope_type": "default", "rope_theta": 5e5}
                    for kind in ("sliding_attention", "full_attention")
                }
            },
            "a llama cannot be built: its configuration gives rope_parameters by kind of block "
            "(sliding_attention, full_attention), and LlamaForCausalLM of transformers "
            f"{transformers.__version__} reads one for all blocks; install a newer transformers",
        ),
    ],
)
def test_configurations_that_no_decoder_is_built_of(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    (found,) = discover(edited(tmp_path / "checkpoint-1", **changes))
    with pytest.raises(ArchiveError) as error:
        load(found)
    text = str(error.value).removeprefix(f"{found.files.location}/")
    assert text == said


def test_another_model_in_the_archive_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    archive = tmp_path / "a"
    for step, build in ((1, models.llama), (2, models.gpt2), (3, models.llama)):
        build().save_pretrained(archive / f"checkpoint-{step}")
    probe = Probe.random(models.VOCABULARY, sequences=2, length=6)
    with pytest.raises(
        ArchiveError, match="1 checkpoints failed\ncheckpoint-2: record of a model "
    ):
        list(scan(archive, probe=probe, run=tmp_path / "run"))
    assert Run.read(tmp_path / "run").steps == [1, 3]


def test_tokenizers_that_are_read_and_others(tmp_path: Path) -> None:
    models.llama(num_hidden_layers=1).save_pretrained(tmp_path / "a/checkpoint-1")
    hf = tmp_path / "hf"
    hf.mkdir()
    shutil.copy(tmp_path / "a/checkpoint-1/config.json", hf)

    def said(hf_config: Path | None = None) -> str:
        run = Run.open(tmp_path / "run")
        found = discover(tmp_path / "a", hf_config=hf_config)
        (note,) = choose_probe(found, run, None)[1:]
        return str(note)

    assert said().startswith("no probe given and no tokenizer found: ")
    (tmp_path / "a/checkpoint-1/vocab.json").write_text("{}")
    (tmp_path / "a/checkpoint-1/merges.txt").write_text("")
    assert said(hf_config=hf).startswith(
        "no probe given and there is vocab.json, merges.txt without the tokenizer.json that is "
        "read: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes it: "
    )
    models.save_tokenizer([f"w{i}" for i in range(60)], hf)
    assert said(hf_config=hf).endswith("built-in prose and the checkpoint's tokenizer")


def test_a_state_of_deepspeed_beside_a_checkpoint_of_its_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models.llama(num_hidden_layers=1).save_pretrained(tmp_path / "checkpoint-5")
    for step in (5, 6):
        state = tmp_path / f"global_step{step}/mp_rank_00_model_states.pt"
        state.parent.mkdir()
        torch.save({"module": {"a": torch.ones(2)}}, state)
    assert [found.name for found in discover(tmp_path)] == ["checkpoint-5", "global_step6"]
    assert (
        f"{tmp_path}/global_step5 is passed over: checkpoint-5 beside it is a checkpoint of the "
        "same step 5; to measure it, name it by itself"
    ) in caplog.text


def test_revisions_without_a_number_get_no_pattern(tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    models.llama(num_hidden_layers=1).save_pretrained(cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    for name in ("main", "kestrel", "deeper-starling"):
        (cache / "refs" / name).write_text("a" * 40)
    with pytest.raises(ArchiveError) as error:
        discover(cache)
    assert str(error.value) == (
        f"{cache} holds revisions whose names tell no step that is known: deeper-starling, "
        f"kestrel; give one revision as the archive: {cache}/snapshots/COMMIT"
    )


def test_a_run_of_another_model_ends_the_scan_at_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, run = tmp_path / "a", tmp_path / "run"
    probe = Probe.random(models.VOCABULARY, sequences=2, length=6)
    models.gpt2().save_pretrained(tmp_path / "b/checkpoint-1")
    list(scan(tmp_path / "b", probe=probe, run=run))
    for step in (2, 3, 4):
        models.llama().save_pretrained(archive / f"checkpoint-{step}")
    asked = []
    with pytest.raises(AnotherModel, match="all others here are as checkpoint-2, and none is of"):
        list(scan(archive, run=run, notify=lambda one, _: asked.append(one.step)))
    assert asked == [2]
    code, said = sinktrack_here("scan", archive, "--run", run, capsys=capsys)
    assert code == 2 and "0 measured, 0 already recorded, 1 failed" in said
    assert "give another run directory" in said and "goes on with them" not in said
    models.gpt2().save_pretrained(archive / "checkpoint-5")  # one fits: the others are named
    code, said = sinktrack_here("scan", archive, "--run", run, capsys=capsys)
    assert code == 1 and "1 measured, 0 already recorded, 3 failed" in said
