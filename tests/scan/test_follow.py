"""Following a run in progress: nothing is taken before it is whole and at rest."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sinktrack import Probe, Run, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.follow import Watch
from tests.helpers import models
from tests.helpers.commands import COMMAND

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "sharded"
    models.mixtral().save_pretrained(path, max_shard_size="40KB")
    return path


def watch_over(archive: Path) -> Watch:
    return Watch(archive, partial(discover, archive))


def names(watch: Watch) -> list[str]:
    return [checkpoint.name for checkpoint in watch.look()]


def test_a_checkpoint_being_written_is_left_until_it_is_whole(saved: Path, tmp_path: Path) -> None:
    watch = watch_over(tmp_path)
    assert names(watch) == []
    target = tmp_path / "checkpoint-5"
    target.mkdir()
    files = sorted(saved.iterdir(), key=lambda file: (file.name.endswith("index.json"), file.name))
    assert files[-1].name == "model.safetensors.index.json" and len(files) > 4
    for file in files:  # index last, as transformers writes it; each file in two halves
        data = file.read_bytes()
        for part in (data[: len(data) // 2], data):
            (target / file.name).write_bytes(part)
            assert names(watch) == [], (file.name, len(part))
            if file is not files[-1] or part is not data:
                assert names(watch) == [], (file.name, len(part))
    assert names(watch) == ["checkpoint-5"]
    assert names(watch) == []


def test_an_index_that_comes_first_waits_for_its_shards(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once said what is waited for, until it stands still again without being whole."""
    target = Path(shutil.copytree(saved, tmp_path / "checkpoint-5"))
    shard = next(target.glob("*.safetensors"))
    shard.rename(tmp_path / "later")
    watch = watch_over(tmp_path)
    assert [names(watch) for _ in range(4)] == [[], [], [], []]
    said = f"waiting for checkpoint-5, which is not complete: {shard} is missing; is the"
    assert [told.startswith(said) for told in caplog.messages] == [True]
    (tmp_path / "later").rename(shard)
    assert [names(watch) for _ in range(3)] == [[], ["checkpoint-5"], []]


def test_a_checkpoint_that_is_written_anew_is_given_again(saved: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(saved, tmp_path / "checkpoint-5"))
    watch = watch_over(tmp_path)
    assert [names(watch) for _ in range(3)] == [[], ["checkpoint-5"], []]
    shard = next(target.glob("*.safetensors"))
    data = shard.read_bytes()
    shard.unlink()
    assert [names(watch) for _ in range(2)] == [[], []]
    shard.write_bytes(data)
    assert [names(watch) for _ in range(2)] == [[], ["checkpoint-5"]]
    shutil.rmtree(target)
    assert names(watch) == []


def test_a_scan_that_follows_measures_what_comes(saved: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    shutil.copytree(saved, archive / "checkpoint-5")
    following: Any = scan(archive, probe=PROBE, run=tmp_path / "run", follow=0)
    assert next(following)["step"] == 5
    shutil.copytree(saved, archive / "checkpoint-6")
    shutil.copytree(saved, archive / "checkpoint-7")
    assert [next(following)["step"] for _ in range(2)] == [6, 7]
    following.close()
    assert Run.read(tmp_path / "run").steps == [5, 6, 7]


def test_the_command_waits_for_the_first_checkpoint(saved: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    with subprocess.Popen(
        [*COMMAND, "scan", archive, "--run", tmp_path / "run", "--json",
         "--follow", "--poll", "0.1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as scanner:  # fmt: skip
        shutil.copytree(saved, archive / "checkpoint-5")
        assert scanner.stdout is not None
        assert json.loads(scanner.stdout.readline())["step"] == 5
        scanner.send_signal(signal.SIGINT)
        _, said = scanner.communicate(timeout=60)
        assert scanner.returncode == 130
    assert said.startswith(f"following {archive}, a look every 0.1 s")
    assert "measured: checkpoint-5\n" in said
    assert said.endswith(f"1 measured, 0 already recorded, 0 failed -> {tmp_path / 'run'}\n")
