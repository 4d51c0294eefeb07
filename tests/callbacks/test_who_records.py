"""Which process records, and what the others say."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sinktrack import RecordError, Run
from sinktrack.callbacks.loop import SinkTracker
from tests.helpers import models
from tests.helpers.commands import two_processes
from tests.helpers.paths import ROOT
from tests.helpers.trainings import PROBE, assert_identical, warnings


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_a_number_that_the_platform_gives_is_no_reason_to_record_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    tracker = SinkTracker(PROBE, tmp_path / "run", every=5, on_error="raise")
    assert not (tmp_path / "run").exists()  # it may turn out to be one of several
    tracker.step(1, models.llama())
    assert (tmp_path / "run").exists()
    assert tracker.step(5, models.llama()) is not None
    assert Run.read(tmp_path / "run").steps == [5]


def test_without_a_word_of_the_platform_a_bad_directory_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError):
        SinkTracker(PROBE, tmp_path / "file")


def test_later_a_bad_directory_is_told_once_or_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "3")
    (tmp_path / "file").write_text("")
    tracker = SinkTracker(PROBE, tmp_path / "file", every=1)
    for step in (1, 2):
        assert tracker.step(step, models.llama()) is None
    (told,) = warnings(caplog)
    assert "the run directory at step 1 failed, training goes on" in told
    with pytest.raises(RecordError):
        SinkTracker(PROBE, tmp_path / "file", every=1, on_error="raise").step(1, models.llama())


def test_the_framework_says_who(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = SinkTracker(PROBE, tmp_path, every=1, on_error="raise")
    with caplog.at_level(logging.INFO, "sinktrack"):
        for step in (1, 2):
            tracker.by_framework(False, step)
            assert tracker.step(step, models.llama()) is None
    assert warnings(caplog) == [f"this process records nothing into {tmp_path}: process 0 does"]
    assert Run.read(tmp_path).steps == []


@pytest.mark.distributed
def test_processes_that_are_joined_after_construction(tmp_path: Path) -> None:
    """One of them records, the other says so once; the environment names both wrongly."""
    two_processes(
        tmp_path,
        """
        import logging
        rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
        said = []
        class Said(logging.Handler):
            def emit(self, record):
                said.append(record.getMessage())
        logging.getLogger("sinktrack").addHandler(Said())
        logging.getLogger("sinktrack").setLevel(logging.INFO)
        for number in ("0", "5"):
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = number
            run = out / number
            tracker = SinkTracker(PROBE, run, every=2, on_error="raise")
            if not dist.is_initialized():
                dist.init_process_group(
                    "gloo", init_method=f"file://{out}/meet", rank=int(rank), world_size=int(world)
                )
            for step in range(1, 5):
                tracker.step(step, models.llama())
            dist.barrier()
            assert Run.read(run).steps == [2, 4]
            assert len((run / "records.jsonl").read_text().splitlines()) == 2
            told = [text for text in said if "records nothing" in text]
            assert told == ([f"process 1 of 2 records nothing into {run}: process 0 does"]
                            if rank == "1" else []), told
            said.clear()
        """,
    )


def test_lightning_launches_its_processes_itself(tmp_path: Path) -> None:
    """The callback is there before the process group: one records, training as without it."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(ROOT)!r})
            from tests.callbacks.test_lightning import *
            from lightning.pytorch import Callback

            class Left(Callback):
                def __init__(self, path):
                    self.path = path
                def on_train_end(self, trainer, module):
                    left = module.inner.state_dict(), torch.get_rng_state()
                    torch.save(left, f"{{self.path}}-{{trainer.global_rank}}.pt")

            if __name__ == "__main__":
                torch.set_num_threads(1)
                out = Path(sys.argv[1])
                tracked = SinkTrackLightning(PROBE, out / "run", every=2, on_error="raise")
                for name, callbacks in (("plain", []), ("tracked", [tracked])):
                    train(out, [*callbacks, Left(out / name)], max_steps=4, devices=2,
                          strategy="ddp_find_unused_parameters_true")
            """
        )
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, env=environment,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]
    assert "records into" not in done.stderr
    for rank in (0, 1):
        plain, tracked = (
            torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            for name in ("plain", "tracked")
        )
        assert_identical(plain, tracked)
