"""What looks like a checkpoint and cannot be measured is named, with what to do; nothing is cut."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from transformers import TrainerState

from sinktrack import ArchiveError, Probe, Run, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.follow import Watch, lack
from sinktrack.archive.source import Checkpoint
from sinktrack.archive.storage.files import Files
from sinktrack.errors import one_line
from sinktrack.scan.engines import attempt
from tests.helpers import models
from tests.helpers.archives import place, steps
from tests.helpers.commands import sinktrack_here

PROBE = Probe.random(models.VOCABULARY, sequences=2, length=6)
WEIGHTS = "model.safetensors"
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    models.llama(num_hidden_layers=2).save_pretrained(path)
    return path


def adapters(path: Path, saved: Path) -> None:
    """As PEFT writes them."""
    from peft import LoraConfig, get_peft_model

    model = models.llama(num_hidden_layers=2)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(path))


def write(path: Path, *names: str) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x" * 99)


def with_config(path: Path, saved: Path, *names: str) -> None:
    path.mkdir(parents=True)
    write(path, *names)
    shutil.copy(saved / "config.json", path)


def pointer(path: Path, saved: Path) -> None:
    with_config(path, saved)
    (path / WEIGHTS).write_text(POINTER)


def pointers_of_shards(path: Path, saved: Path) -> None:
    models.llama(num_hidden_layers=2).save_pretrained(path, max_shard_size="10KB")
    next(path.glob("model-00002*")).write_text(POINTER)


def pointer_of_a_pickle(path: Path, saved: Path) -> None:
    with_config(path, saved)
    (path / "pytorch_model.bin").write_text(POINTER)


def dangling(path: Path, saved: Path) -> None:
    with_config(path, saved)
    (path / WEIGHTS).symlink_to("../blobs/gone")


REMAINS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "adapters": (adapters, "holds adapters alone .adapter_config.json, adapter_model.safetensors.; "
                 "give the model that they"),
    "adapters in DeepSpeed": (lambda p, _: write(p, "adapter_model.bin", "global_step5/a", "latest",
                              "zero_to_fp32.py"), "adapter_model.bin. without adapter_config.json"),
    "DeepSpeed": (lambda p, _: write(p, "global_step5/mp_rank_00_model_states.pt", "latest",
                  "rng_state.pth"), "mp_rank_00_model_states.pt is no zip archive"),
    "DeepSpeed and a config": (lambda p, s: with_config(p, s, "global_step5/a"), "zero_to_fp32.py"),
    "DeepSpeed's own": (lambda p, _: write(p, "mp_rank_00_model_states.pt"), "is no zip archive"),
    "optimizer": (lambda p, _: write(p, "optimizer.pt", "trainer_state.json", "rng_state.pth"),
                  "the state of training .optimizer.pt, .* and no weights"),
    "optimizer and a config": (lambda p, s: with_config(p, s, "optimizer.pt"), "and no weights"),
    "FSDP whole": (lambda p, _: write(p, "pytorch_model_fsdp.bin", "optimizer.bin"),
                   "pytorch_model_fsdp.bin is no zip archive"),
    "FSDP local": (lambda p, _: write(p, "pytorch_model_fsdp_rank0.bin"), "SHARDED_STATE_DICT"),
    "FSDP shards": (lambda p, _: write(p, "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/a"),
                    "shards .pytorch_model_fsdp_0/. without .metadata"),
    "shards": (lambda p, _: write(p, *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))),
               "shards .*00001-of-00002.* without their index; copy model.safetensors.index.json"),
    "shards and a config": (lambda p, s: with_config(p, s, "pytorch_model-00001-of-00002.bin"),
                            "without their index"),
    "another format": (lambda p, _: write(p, "consolidated.00.pth", "params.json"),
                       "in Meta's or Mistral's own layout .consolidated.00.pth"),
    "a variant": (lambda p, s: with_config(p, s, "model.fp16.safetensors"), "model.fp16"),
    "empty": (lambda p, _: p.mkdir(), "is empty; is the checkpoint still being written"),
    "further below": (lambda p, _: write(p, "policy/weights/config.json"),
                      ".policy/.; --pattern finds what lies further below"),
    "in verl's": (lambda p, _: write(p, "actor/huggingface/config.json"),
                  "of verl .actor/. .*; --pattern finds what lies further below"),
    "a file of Git LFS": (pointer, "model.safetensors is a Git LFS pointer.*git lfs pull"),
    "shards of Git LFS": (pointers_of_shards, "model-00002.* is a Git LFS pointer"),
    "a pickle of Git LFS": (pointer_of_a_pickle, "pytorch_model.bin is a Git LFS pointer"),
    "links to nothing": (dangling, "links to what is not there .model.safetensors"),
    "a link to nothing": (lambda p, _: p.symlink_to("gone"), "is a link to what is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", REMAINS)
def test_what_cannot_be_measured_is_named_and_the_others_are_measured(
    name: str, saved: Path, tmp_path: Path
) -> None:
    make, reason = REMAINS[name]
    shutil.copytree(saved, tmp_path / "a/checkpoint-1000")
    make(tmp_path / "a/checkpoint-500", saved)
    with pytest.raises(ArchiveError, match=f"1 checkpoints failed\ncheckpoint-500: .*({reason})"):
        list(scan(tmp_path / "a", probe=PROBE, run=tmp_path / "run"))
    assert Run.read(tmp_path / "run").steps == [1000]
    if name != "a link to nothing":  # that is not there at all
        (alone,) = discover(tmp_path / "a/checkpoint-500")
        assert alone.step == 500
        assert re.search(reason, str(lack(alone)))


def test_a_checkpoint_with_deepspeeds_state_in_it(saved: Path, tmp_path: Path) -> None:
    """The state's own directory is none, however the archive is named."""
    path = Path(shutil.copytree(saved, tmp_path / "out/checkpoint-500"))
    write(path, "global_step499/mp_rank_00_model_states.pt", "latest")
    for archive in (path.parent, path):
        assert [(c.step, c.reason) for c in discover(archive)] == [(500, None)]
    final = path.rename(tmp_path / "final")
    assert [(c.step, c.reason, c.files.name) for c in discover(final)] == [(0, None, "final")]
    write(tmp_path / "own", "global_step5/mp_rank_00_model_states.pt", "latest", "global_step6/x")
    assert [c.step for c in discover(tmp_path / "own")] == [5, 6]
    shutil.copytree(saved, tmp_path / "out/checkpoint-7")
    shutil.copy(saved / WEIGHTS, tmp_path / "out")  # the Trainer's last model beside checkpoints
    shutil.copy(saved / "config.json", tmp_path / "out")
    assert [c.step for c in discover(tmp_path / "out")] == [7]


def test_with_a_pattern_directories_around_a_checkpoint_are_none(
    saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "step_5/actor/huggingface")
    write(tmp_path, "step_5/actor/huggingface/inner/a", "step_6/actor/optimizer.pt")
    found = discover(tmp_path, r"step_(?P<step>\d+)(/.*)?")
    assert [(c.name, c.reason is None) for c in found] == [
        ("step_5/actor/huggingface", True), ("step_6", False), ("step_6/actor", False),
    ]  # fmt: skip


def test_a_step_that_fails_does_not_stand_in_the_way_of_another(
    saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "checkpoint-5")
    write(tmp_path, "global_step5/mp_rank_00_model_states.pt")
    assert [(c.name, c.reason) for c in discover(tmp_path)] == [("checkpoint-5", None)]
    write(tmp_path, "step5/optimizer.pt")
    assert sorted(c.reason is None for c in discover(tmp_path)) == [False, True]


def test_revisions_whose_snapshots_are_gone(saved: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    shutil.copytree(saved, cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    for name, commit in {"step2000": "a" * 40, "step1000": "b" * 40, "step3": "no commit"}.items():
        (cache / "refs" / name).write_text(commit)
    with pytest.raises(ArchiveError, match="2 checkpoints failed\n") as raised:
        list(scan(cache, probe=PROBE, run=tmp_path / "run"))
    assert "\nstep3: " in str(raised.value) and "step3 names no commit; dow" in str(raised.value)
    assert f"step1000: {cache}/snapshots/{'b' * 40} is missing; download" in str(raised.value)
    assert Run.read(tmp_path / "run").steps == [2000]
    shutil.rmtree(cache / "refs")  # downloaded by its commit
    assert [(c.step, c.files.name) for c in discover(cache)] == [(0, "a" * 40)]
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("b" * 40)
    (lost,) = discover(cache)
    assert lost.name == "main" and "is missing; download this revision again" in str(lost.reason)


def test_a_directory_that_cannot_be_read_or_is_damaged(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "iter_0000001")
    write(tmp_path, "iter_0000002/metadata.json")
    one, other = discover(tmp_path)
    assert one.reason is None and "metadata.json is not valid JSON" in str(other.reason)


@pytest.mark.parametrize("name", ["adapters", "optimizer and a config", "a file of Git LFS"])
def test_a_single_checkpoint_that_fails_is_1_and_no_wrong_use(
    name: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    REMAINS[name][0](tmp_path / "a/checkpoint-500", saved)
    PROBE.save(tmp_path / "probe")
    for archive in (tmp_path / "a", tmp_path / "a/checkpoint-500"):
        for options in ((), ("--probe", tmp_path / "probe")):
            command = ("scan", archive, "--run", tmp_path / "run", *options)
            code, said = sinktrack_here(*command, capsys=capsys)
            assert code == 1 and "failed: checkpoint-500: " in said, said
            assert "0 measured, 0 already recorded, 1 failed" in said
            shutil.rmtree(tmp_path / "run")
    (tmp_path / "none").mkdir()
    code, said = sinktrack_here("scan", tmp_path / "none", "--run", tmp_path / "run", capsys=capsys)
    assert code == 2 and "no checkpoint in" in said


def test_following_tells_once_of_what_cannot_be_measured(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "checkpoint-5/adapter_model.bin")
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-7").symlink_to("gone")
    watch = Watch(tmp_path, partial(discover, tmp_path))
    assert [watch.look() for _ in range(4)] == [[]] * 4
    assert [message.split(",")[0] for message in caplog.messages] == [
        f"waiting for checkpoint-{step}" for step in (5, 6, 7)
    ]
    shutil.copytree(saved, tmp_path / "checkpoint-6", dirs_exist_ok=True)
    assert [c.name for _ in range(3) for c in watch.look()] == ["checkpoint-6"]
    assert len(caplog.messages) == 3


def test_following_says_why_an_archive_cannot_be_read(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("step1", "step1-hf"):
        shutil.copytree(saved, tmp_path / name)
    watch = Watch(tmp_path, partial(discover, tmp_path))
    assert [watch.look() for _ in range(3)] == [[]] * 3
    assert len(caplog.messages) == 1 and "are both of step 1; choose" in caplog.messages[0]
    with pytest.raises(ArchiveError, match="no group named step"):
        next(scan(tmp_path, probe=PROBE, run=tmp_path / "run", follow=0, pattern="x"))


def test_two_revisions_of_one_commit_are_both_followed(saved: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    shutil.copytree(saved, cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    for name in ("step1", "step2"):
        (cache / "refs" / name).write_text("a" * 40)
    watch = Watch(cache, partial(discover, cache))
    assert [c.name for _ in range(3) for c in watch.look()] == ["step1", "step2"]


def trainers(path: Path, entries: int, tokens: int = 77) -> None:
    """A state as the Trainer writes it, with its own numbers in every entry of the log."""
    log = [{"step": i, "global_step": i, "num_input_tokens_seen": i} for i in range(entries)]
    state = TrainerState(global_step=1200, num_input_tokens_seen=tokens, log_history=log)
    state.save_to_json(str(path / "trainer_state.json"))


@pytest.mark.parametrize("entries", [0, 3, 20_000])
def test_a_state_of_any_length(
    entries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long one is not parsed, and one that has not changed is not read."""
    place(tmp_path, "model", "checkpoint-7")
    for name in ("model", "checkpoint-7"):
        trainers(tmp_path / name, entries)
    read: list[int] = []
    files_read = Files.read

    def counted(files: Files, name: str, start: int, stop: int) -> memoryview:
        read.append(stop - start)
        return files_read(files, name, start, stop)

    monkeypatch.setattr(Files, "read", counted)
    assert steps(tmp_path / "model")[0][1:] == (1200, 77)
    assert steps(tmp_path)[0][1:] == (7, 77)
    assert 0 < sum(read) <= 2 * 2**17
    read.clear()
    assert steps(tmp_path / "model")[0][1:] == (1200, 77)
    assert steps(tmp_path)[0][1:] == (7, 77)
    assert not read
    trainers(tmp_path / "model", entries, tokens=88)
    assert steps(tmp_path / "model")[0][1:] == (1200, 88)
    path = tmp_path / "model/trainer_state.json"
    laid_out_otherwise = json.dumps(json.loads(path.read_text()))
    path.write_text(laid_out_otherwise)
    assert steps(tmp_path / "model")[0][1:] == (1200, 88)
    os.truncate(path, len(laid_out_otherwise) // 2)
    assert steps(tmp_path / "model")[0][1:] == (0, None)


def test_no_line_of_a_reason_is_lost() -> None:
    def work(checkpoint: Checkpoint) -> dict[str, object]:
        raise RuntimeError("two things are wrong:\n  - this\n  - that; do so\n")

    outcome = attempt(work, Checkpoint(Files("/"), 1, None, "safetensors_files", "one"))
    assert str(outcome) == (
        "it cannot be measured: RuntimeError: two things are wrong: - this - that; do so"
    )
    assert one_line(KeyError()) == "KeyError"
    long = one_line(ValueError("begin " + "middle " * 10_000 + "do so"))
    assert long.startswith("begin ") and long.endswith(" do so") and len(long) < 3000


def test_what_lies_beside_checkpoints_is_told(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Models under names that tell no step, and files named like checkpoints."""
    for name in ("checkpoint-1", "best", "5k"):
        shutil.copytree(saved, tmp_path / "a" / name)
    write(tmp_path / "a", "step200.pt", "step_300.tar.gz", "step400.json", "logs/x", "step500")
    for _ in range(2):
        assert steps(tmp_path / "a") == [("checkpoint-1", 1, None)]
    assert caplog.messages == [
        f"{tmp_path / 'a'}: passed over 5k, best: the names tell no step that is known; --pattern "
        "reads others",
        f"{tmp_path / 'a'}: passed over step200.pt, step500, step_300.tar.gz: these are files, and "
        "checkpoint-1 is read; name each by itself, or move them to a directory of theirs",
    ]


def test_files_beside_a_model_are_told(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved, tmp_path / "a")
    write(tmp_path / "a", "epoch=0-step=20.ckpt", "training_args.bin")
    assert steps(tmp_path / "a") == [("a", 0, None)]
    (said,) = caplog.messages
    assert "passed over epoch=0-step=20.ckpt: " in said
