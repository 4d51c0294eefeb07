"""Scanning archives: the right numbers, in order, resumable, and clear about what is broken."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sinktrack import ArchiveError, Probe, Run, measure, scan
from sinktrack.demo import AGREEMENT, largest_difference
from tests.helpers import models
from tests.helpers.commands import COMMAND, sinktrack
from tests.helpers.families import EXACT, tiny

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=12)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a small MoE, the second sharded."""
    root = tmp_path_factory.mktemp("archive")
    for step, changes in ((30, {}), (4, {"max_shard_size": "20KB"}), (200, {})):
        torch.manual_seed(step)
        model = models.mixtral()
        model.model.embed_tokens.weight.data.normal_()
        model.save_pretrained(root / f"checkpoint-{step}", **changes)
    assert len(list((root / "checkpoint-4").glob("model-*.safetensors"))) > 2
    return root


@pytest.fixture
def archive(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "archive"))


def test_in_step_order_and_equal_to_the_live_model(archive: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    records = list(scan(archive, probe=PROBE, run=tmp_path / "run"))
    assert [record["step"] for record in records] == [4, 30, 200]
    assert [record["source"] for record in records] == [
        "checkpoint-4", "checkpoint-30", "checkpoint-200",
    ]  # fmt: skip
    for record in records:
        model = AutoModelForCausalLM.from_pretrained(archive / record["source"])
        live = measure(model, PROBE)
        assert record["p0_attention"] == [[float(v) for v in row] for row in live.p0_attention]
        assert record["weights"] == live.weights


def test_what_is_recorded_is_skipped(archive: Path, tmp_path: Path) -> None:
    shutil.move(archive / "checkpoint-30", tmp_path / "later")
    assert len(list(scan(archive, probe=PROBE, run=tmp_path / "run"))) == 2
    shutil.move(tmp_path / "later", archive / "checkpoint-30")
    again = list(scan(archive, run=tmp_path / "run"))
    assert [record["step"] for record in again] == [30]
    assert Run.read(tmp_path / "run").steps == [4, 30, 200]


def test_parts_at_once_into_one_run(archive: Path, tmp_path: Path) -> None:
    """As jobs of an array: every record once, and the same as of one scan."""
    PROBE.save(tmp_path / "probe")
    command = ("scan", archive, "--run", tmp_path / "run", "--probe", tmp_path / "probe", "--part")
    jobs = [
        subprocess.Popen(
            [*COMMAND, *map(str, command), f"{i}/2"], stderr=subprocess.PIPE, text=True
        )
        for i in (0, 1)
    ]
    said = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert "2 measured" in said[0] and "1 measured" in said[1]
    list(scan(archive, probe=PROBE, run=tmp_path / "whole"))
    parts, whole = (Run.read(tmp_path / name) for name in ("run", "whole"))
    assert len(parts.history) == 3
    assert [r | {"seconds": 0} for r in parts.records] == [
        r | {"seconds": 0} for r in whole.records
    ]
    with parts.claimed("0-of-2"):
        assert "is being scanned by" in sinktrack(*command, "0/2").stderr
    wrong = sinktrack(*command, "2/2")
    assert wrong.returncode == 2 and "from 0 to N - 1" in wrong.stderr


def test_steps_of_checkpoints_of_other_names_are_told_of(archive: Path, tmp_path: Path) -> None:
    """Their weights may be another training's, which only measuring them would show."""
    list(scan(archive / "checkpoint-4", probe=PROBE, run=tmp_path / "run"))
    for step in (4, 30):
        (archive / f"checkpoint-{step}").rename(archive / f"step{step}")
    done = sinktrack("scan", archive, "--run", tmp_path / "run")
    assert done.returncode == 0 and "2 measured, 1 already recorded" in done.stderr
    assert "from others than are here: step4 (checkpoint-4); if these" in done.stderr


def test_models_without_a_step_are_told_of(archive: Path, tmp_path: Path) -> None:
    (archive / "checkpoint-30").rename(tmp_path / "final")
    command = ("scan", archive, tmp_path / "final", "--run", tmp_path / "run")
    assert "final is recorded as step 0" in sinktrack(*command).stderr
    assert Run.read(tmp_path / "run").steps == [0, 4, 200]


def test_a_single_model_directory(archive: Path, tmp_path: Path) -> None:
    moved = tmp_path / "model"
    shutil.move(archive / "checkpoint-4", moved)
    (moved / "trainer_state.json").write_text('{"global_step": 77, "num_input_tokens_seen": 5}')
    (record,) = scan(moved, probe=PROBE, run=tmp_path / "run")
    assert (record["step"], record["tokens"], record["source"]) == (77, 5, "model")


def test_online_and_offline_agree_on_a_real_run(demo: tuple[Path, str]) -> None:
    out, text = demo
    online = {record["step"]: record for record in Run.read(out / "run").records}
    offline = Run.read(out / "scanned").records
    assert [record["step"] for record in offline] == [200, 400]
    for record in offline:
        assert largest_difference(online[record["step"]], record) <= AGREEMENT
        assert record["weights"] == online[record["step"]]["weights"]
        assert record["tokens"] == online[record["step"]]["tokens"] == record["step"] * 32 * 64
    assert "online and offline agree" in text


def test_the_demo_tells_what_is_there(demo: tuple[Path, str]) -> None:
    out, text = demo
    last = Run.read(out / "run").records[-1]
    assert last["formed"] == ("A P0 sink formed" in text)
    assert (out / "report.html").stat().st_size > 1_000_000


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def wrong_header(path: Path) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    header[name]["data_offsets"] = [0, 2**40]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def drop_weight(path: Path) -> None:
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, {"format": "pt"})


def reshape_weight(path: Path) -> None:
    weights = load_file(path)
    weights["model.norm.weight"] = torch.zeros(5)
    save_file(weights, path, {"format": "pt"})


def set_nan(path: Path) -> None:
    weights = load_file(path)
    weights["model.layers.0.self_attn.o_proj.weight"][0] = torch.nan
    save_file(weights, path, {"format": "pt"})


def rename_type(path: Path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "nonesuch"}))


def escape(path: Path) -> None:
    index = json.loads(path.read_text())
    index["weight_map"] = {key: "../../secret.safetensors" for key in index["weight_map"]}
    path.write_text(json.dumps(index))


INDEX = "model.safetensors.index.json"
DAMAGES: dict[str, tuple[int, str, Callable[[Path], object], str]] = {
    "no weights": (30, WEIGHTS, Path.unlink, "model.safetensors is missing"),
    "cut weights": (30, WEIGHTS, lambda p: cut(p, 5000), "model.safetensors is truncated"),
    "empty weights": (30, WEIGHTS, lambda p: cut(p, 0), "model.safetensors is truncated"),
    "wrong header": (30, WEIGHTS, wrong_header, "model.safetensors is truncated or damaged"),
    "weight missing": (30, WEIGHTS, drop_weight, "1 weights missing .model.norm.weight"),
    "weight of another shape": (30, WEIGHTS, reshape_weight, "mismatched|size mismatch|ckpt"),
    "nan": (30, WEIGHTS, set_nan, "not finite at the input of block 1"),
    "no config": (30, "config.json", Path.unlink, "config.json is missing"),
    "cut config": (30, "config.json", lambda p: cut(p, 40), "config.json is not valid JSON"),
    "unknown architecture": (30, "config.json", rename_type, "model_type 'nonesuch'"),
    "missing shard": (4, "model-00002-of-*.safetensors", Path.unlink, "model-00002.* is missing"),
    "cut shard": (4, "model-00002-of-*.safetensors", lambda p: cut(p, 99), "00002.* is truncated"),
    "cut index": (4, INDEX, lambda p: cut(p, 99), "index.json is not valid JSON"),
    "index that points out": (4, INDEX, escape, "which is not a file of its directory"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_others_are_measured(
    name: str, archive: Path, tmp_path: Path
) -> None:
    step, file, damage, message = DAMAGES[name]
    (path,) = (archive / f"checkpoint-{step}").glob(file)
    damage(path)
    with pytest.raises(
        ArchiveError, match=f"1 checkpoints failed\ncheckpoint-{step}: .*({message})"
    ):
        list(scan(archive, probe=PROBE, run=tmp_path / "run"))
    assert Run.read(tmp_path / "run").steps == sorted({4, 30, 200} - {step})


def test_the_command(archive: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    PROBE.save(tmp_path / "probe")
    cut(archive / "checkpoint-30" / WEIGHTS, 99)
    first = sinktrack("scan", archive, "--run", run, "--probe", tmp_path / "probe")
    assert first.returncode == 1, first.stderr
    assert "failed: checkpoint-30: " in first.stderr and "truncated" in first.stderr
    assert "2 measured, 0 already recorded, 1 failed" in first.stderr
    shutil.copy(archive / "checkpoint-200" / WEIGHTS, archive / "checkpoint-30" / WEIGHTS)
    second = sinktrack("scan", archive, "--run", run, "--json")
    assert second.returncode == 0, second.stderr
    assert [json.loads(line)["step"] for line in second.stdout.splitlines()] == [30]
    assert Run.read(run).probe == PROBE and Run.read(run).steps == [4, 30, 200]


def test_two_archives_with_the_same_steps_are_refused(archive: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(archive, tmp_path / "other"))
    command = ("scan", archive, other, "--run", tmp_path / "run")
    done = sinktrack(*command)
    assert done.returncode == 2 and not Run.open(tmp_path / "run").steps
    assert "archive/checkpoint-4 and" in done.stderr and "both of step 4" in done.stderr
    for step in (4, 30, 200):
        (other / f"checkpoint-{step}").rename(other / f"checkpoint-{step + 1}")
    done = sinktrack(*command)
    assert done.returncode == 0 and "6 measured" in done.stderr
    assert Run.read(tmp_path / "run").steps == [4, 5, 30, 31, 200, 201]


def test_another_model_is_refused_by_a_run(archive: Path, tmp_path: Path) -> None:
    scanned = sinktrack("scan", archive / "checkpoint-4", "--run", tmp_path / "run")
    assert scanned.returncode == 0, scanned.stderr
    models.llama(num_hidden_layers=2).save_pretrained(tmp_path / "checkpoint-9")
    done = sinktrack("scan", tmp_path / "checkpoint-9", "--run", tmp_path / "run")
    assert done.returncode == 1  # others of an archive of several models go on
    assert "a model with type llama, blocks 2, experts None" in done.stderr
    assert "records of one with type mixtral, blocks 4, experts" in done.stderr
    assert Run.read(tmp_path / "run").steps == [4]


def test_what_the_command_says_of_steps_and_patterns(archive: Path, tmp_path: Path) -> None:
    shutil.copytree(archive / "checkpoint-4", tmp_path / "final")
    done = sinktrack("scan", tmp_path / "final", "--run", tmp_path / "run")
    assert done.returncode == 0 and "final is recorded as step 0" in done.stderr
    pattern = r"point-(?P<step>\d+)"
    done = sinktrack("scan", archive, "--run", tmp_path / "run", "--pattern", pattern)
    assert done.returncode == 2 and f"{pattern} matches from beginning to end" in done.stderr
    assert "checkpoint-200, checkpoint-30" in done.stderr


def probe_of(run: Path) -> Probe:
    found = Run.read(run).probe
    assert found is not None
    return found


def test_without_a_probe_the_command_says_what_it_takes(archive: Path, tmp_path: Path) -> None:
    done = sinktrack("scan", archive, "--run", tmp_path / "random")
    assert done.returncode == 0 and "seeded random tokens" in done.stderr
    assert int(probe_of(tmp_path / "random").tokens.max()) < models.VOCABULARY

    models.save_tokenizer(["[UNK]", "the", "and", "a", "of"], archive / "checkpoint-4")
    done = sinktrack("scan", archive, "--run", tmp_path / "prose")
    assert done.returncode == 0, done.stderr
    assert "built-in prose and the checkpoint's tokenizer" in done.stderr
    probe = probe_of(tmp_path / "prose")
    assert probe.length == 64 and set(probe.tokens.unique().tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "{tmp}/empty", "--run", "{tmp}/run"], "no checkpoint in .*empty"),
        (["scan", "{tmp}/missing", "--run", "{tmp}/run"], "there is nothing at .*missing"),
        (["scan", "{tmp}/archive", "--run", "{tmp}/file"], "cannot write to the run directory"),
        (["scan", "{tmp}/archive", "--run", "{tmp}/run", "--probe", "{tmp}/no"], "no probe file"),
        (["scan", "{tmp}/archive"], "Missing option '--run'"),
        (["show", "{tmp}/empty"], "empty is not a run directory"),
        (["show", "{tmp}/fresh"], "fresh holds no records yet"),
        (["report", "{tmp}/fresh", "-o", "{tmp}/r.html"], "fresh holds no records yet"),
        (["nonsense"], "No such command"),
    ],
)
def test_wrong_use_exits_with_2(
    arguments: list[str], message: str, archive: Path, tmp_path: Path
) -> None:
    import re

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    Run.open(tmp_path / "fresh", PROBE)
    done = sinktrack(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert re.search(message, " ".join(done.stderr.split())), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r.html").exists()


def test_a_probe_of_another_vocabulary_fails_every_checkpoint(
    archive: Path, tmp_path: Path
) -> None:
    Probe.from_tokens([[1, 2, 3], [4, 999, 6]]).save(tmp_path / "probe")
    done = sinktrack("scan", archive, "--run", tmp_path / "run", "--probe", tmp_path / "probe")
    assert done.returncode == 1
    assert done.stderr.count("token id 999") == 1
    assert done.stderr.count("for the same reason") == 2


def test_import_is_light() -> None:
    heavy = ("transformers", "wandb", "pandas", "plotly", "rich")
    code = f"import sys, sinktrack; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_probe_is_made_from_the_first_checkpoint_that_can_be_read(
    archive: Path, tmp_path: Path
) -> None:
    (archive / "checkpoint-4" / "config.json").write_text("{")
    done = sinktrack("scan", archive, "--run", tmp_path / "run")
    assert done.returncode == 1 and "failed: checkpoint-4: " in done.stderr
    assert Run.read(tmp_path / "run").steps == [30, 200]
    for step in (30, 200):
        (archive / f"checkpoint-{step}" / "config.json").write_text("{")
    none = sinktrack("scan", archive, "--run", tmp_path / "none")
    assert none.returncode == 1 and "0 measured, 0 already recorded, 3 failed" in none.stderr
    assert all(f"failed: checkpoint-{step}: " in none.stderr for step in (4, 30, 200))


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("nonesuch", "device 'nonesuch': Expected one of cpu, cuda"),
        ("cuda:99", "device 'cuda:99' is not here: torch sees "),
    ],
)
def test_a_device_that_is_not_here(device: str, says: str, archive: Path, tmp_path: Path) -> None:
    done = sinktrack("scan", archive, "--run", tmp_path / "run", "--device", device)
    assert done.returncode == 2 and says in done.stderr and "failed:" not in done.stderr


def test_the_first_blocks_then_all_of_them(archive: Path, tmp_path: Path) -> None:
    """What is left out is said; a whole scan measures the checkpoints again."""
    probe = Probe.random(models.VOCABULARY, sequences=4, length=8)
    probe.save(tmp_path / "probe")
    command = ("scan", archive, "--run", tmp_path / "run", "--probe", tmp_path / "probe")
    done = sinktrack(*command, "--blocks", "1")
    assert done.returncode == 0 and "leaves out sink rate" in done.stderr
    assert {record["measured_blocks"] for record in Run.read(tmp_path / "run").records} == {1}
    assert sinktrack("show", tmp_path / "run").returncode == 0
    assert "3 already recorded" in sinktrack(*command, "--blocks", "1").stderr
    more = sinktrack("scan", archive, "--run", tmp_path / "more", "--blocks", "9").stderr
    assert "3 measured" in more and "leaves out" not in more
    assert "3 measured" in sinktrack(*command).stderr
    records = Run.read(tmp_path / "run").records
    assert len(records) == 3 and not any("measured_blocks" in record for record in records)


def test_a_probe_in_parts_is_recorded_the_same(archive: Path, tmp_path: Path) -> None:
    probe = Probe.random(models.VOCABULARY, sequences=5, length=8)
    whole = list(scan(archive, probe=probe, run=tmp_path / "whole"))
    parts = list(scan(archive, probe=probe, run=tmp_path / "parts", batch_size=2))
    for one, other in zip(whole, parts, strict=True):
        assert largest_difference(one, other) < 1e-6


def test_blocks_that_share_more_than_the_stream_are_loaded_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("bamba", EXACT["bamba"])
    model.save_pretrained(tmp_path / "archive/step1")
    with pytest.raises(ArchiveError, match="scan all of it, without --blocks"):
        list(scan(tmp_path / "archive", probe=PROBE, run=tmp_path / "part", blocks=1))
    (record,) = scan(tmp_path / "archive", probe=PROBE, run=tmp_path / "run")
    assert "step1: the blocks of BambaForCausalLM" in caplog.text
    assert "loading it whole" in caplog.text
    live = measure(model, PROBE)
    assert record["weights"] == live.weights and record["sink_rate"] == live.sink_rate()

    path = tmp_path / "archive/step1" / WEIGHTS
    tensors = load_file(path)
    gone = [name for name in tensors if "layers.1.feed_forward" in name]
    save_file({n: v for n, v in tensors.items() if n not in gone}, path, {"format": "pt"})
    with pytest.raises(ArchiveError, match="weights missing .*layers.1.feed_forward"):
        list(scan(tmp_path / "archive", probe=PROBE, run=tmp_path / "damaged"))


@pytest.mark.parametrize(
    ("method", "said"),
    [("gptq", "quantized weights are not supported"), ("fp8", "no 8-bit weight is there")],
)
def test_quantized_configurations_that_do_not_fit_are_refused(
    method: str, said: str, archive: Path, tmp_path: Path
) -> None:
    for step in (4, 30):
        shutil.rmtree(archive / f"checkpoint-{step}")
    file = archive / "checkpoint-200/config.json"
    quantized = json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}
    file.write_text(json.dumps(quantized))
    with pytest.raises(ArchiveError, match=said):
        list(scan(archive, probe=PROBE, run=tmp_path / "run"))


def test_wrong_use_is_said(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="holds no probe yet; give one"):
        list(scan(archive, run=tmp_path / "run"))
    with pytest.raises(ValueError, match="causal tests need all blocks"):
        list(scan(archive, probe=PROBE, run=tmp_path / "run", causal=True, blocks=1))
    for options in (["--causal", "--blocks", "1"], ["--follow", archive]):
        done = sinktrack("scan", archive, "--run", tmp_path / "run", *options)
        assert done.returncode == 2, done.stderr
    assert "--follow takes one archive" in done.stderr
