"""What goes wrong around a run: nothing recorded is lost, and training is as it would have been."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import wandb
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

from sinktrack import ArchiveError, MeasurementError, Probe, RecordError, Run, measure, scan
from sinktrack.attention import attend
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.cli import app, main
from sinktrack.models.huggingface import _ACTIVE
from sinktrack.records.run import to_json
from tests.helpers import models
from tests.helpers.commands import child, on_a_disk, sinktrack
from tests.helpers.scanner import PROBE as SCANNED
from tests.helpers.scanner import save_archive
from tests.helpers.trainings import PROBE, assert_identical, fingerprint, same, warnings


def test_a_full_disk_during_training(tmp_path: Path) -> None:
    """Earlier records are whole, training is bit-identical, and later records go on."""
    code = """
        import sys; sys.path.insert(0, sys.argv[1])
        import resource
        from tests.scan.test_faults import *
        from tests.helpers.trainings import train
        torch.set_num_threads(1)
        plain = train(models.llama(attention_dropout=0.1).train(), None)
        tracker = SinkTracker(PROBE, sys.argv[2], every=2)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def fill(probe, size):
            def step(number, model):
                if number == 4:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
                if number == 8:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                return probe(number, model)
            return step

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        tracker.step(0, models.llama())
        room = (Path(sys.argv[2]) / "records.jsonl").stat().st_size
        tracker.step = fill(tracker.step, room + room * 3 // 2)
        tracked = train(models.llama(attention_dropout=0.1).train(), tracker)
        assert_identical(plain, tracked)
    """
    done = subprocess.run(child(code, tmp_path), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the probe at step 4 failed, training goes on" in done.stderr
    assert "earlier records are untouched" in done.stderr
    assert Run.read(tmp_path).steps == [0, 2, 8, 10]


def test_a_scan_on_a_disk_that_is_full(tmp_path: Path) -> None:
    save_archive(tmp_path / "archive", steps=range(3))
    SCANNED.save(tmp_path / "probe")
    (tmp_path / "disk").mkdir()
    done = on_a_disk(
        tmp_path,
        """
        mount -t tmpfs -o size=512k none disk
        cat /dev/zero > disk/filler 2> /dev/null
        sinktrack scan archive --run disk/run --probe probe
        ls -A disk/run >&2
        head -c 488k /dev/zero > disk/filler
        sinktrack scan archive --run disk/run --probe probe --json
        rm disk/filler
        sinktrack scan archive --run disk/run --json
        mount -o remount,ro disk
        sinktrack scan archive --run disk/run
        """,
    )
    said = re.sub(r"\d+:\d\d:\d\d left", "time left", done.stderr)
    older = int(version("rich").split(".")[0]) < 14  # leaves an empty line behind a bar
    assert [line for line in said.splitlines() if line or not older] == [
        "sinktrack: cannot write to the run directory disk/run: No space left on device; give "
        "another",
        "exit 2",  # and it left nothing behind
        "measured: checkpoint-0 (1 of 3, time left)",
        "1 measured, 0 already recorded, 0 failed -> disk/run",
        "ended, 2 left: the same command goes on with them",
        "sinktrack: cannot append to disk/run/records.jsonl: No space left on device; earlier "
        "records are untouched",
        "exit 2",
        "steps 0 and 1 hold the same weights, by their digest",
        "measured: checkpoint-1 (1 of 2, time left)",
        "steps 0, 1 and 2 hold the same weights, by their digest",
        "measured: checkpoint-2 (2 of 2, time left)",
        "2 measured, 1 already recorded, 0 failed -> disk/run",
        "sinktrack: cannot write to the run directory disk/run: Read-only file system; give "
        "another",
        "exit 2",
    ], done.stderr
    steps = [json.loads(line)["step"] for line in done.stdout.splitlines()]
    assert steps == [0, 1, 2]


def test_a_run_directory_that_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker, model = SinkTracker(PROBE, tmp_path / "run", every=1), models.llama()
    tracker.step(1, model)
    shutil.rmtree(tmp_path / "run")
    assert tracker.step(2, model) is None and tracker.step(3, model) is None
    (told,) = warnings(caplog)
    assert "cannot append to" in told and "No such file or directory" in told
    (tmp_path / "run").mkdir()
    assert tracker.step(4, model) is not None
    assert Run.read(tmp_path / "run").steps == [4]


class Stop(BaseException):
    """What a handler of signals may raise."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_probe(number: signal.Signals, tmp_path: Path) -> None:
    """It goes through to whoever handles it, and the model is that of training again."""

    def stop(*_: Any) -> None:
        raise Stop

    model = models.mixtral(attention_dropout=0.1).train()
    before = fingerprint(model)
    tracker = SinkTracker(PROBE, tmp_path, every=1)
    tracker.step(1, model)
    handle = model.model.layers[2].register_forward_hook(lambda *_: os.kill(os.getpid(), number))
    own = signal.signal(number, stop)
    try:
        with pytest.raises(Stop):
            tracker.step(2, model)
    finally:
        signal.signal(number, own)
        handle.remove()
    assert same(before, fingerprint(model))
    assert Run.read(tmp_path).steps == [1]
    assert tracker.step(3, model) is not None


def test_a_signal_at_any_moment_of_a_probe() -> None:
    """Also while hooks are set and things are put back: stopped at every 97th line of ours."""
    model = models.llama(num_hidden_layers=2, attention_dropout=0.1).train()
    probe = Probe.random(models.VOCABULARY, 2, 6)
    model(probe.tokens, labels=probe.tokens).loss.backward()
    seen = wanted = 0

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        seen += event == "line"
        if event == "line" and seen == wanted:
            raise Stop
        return on_line

    def on_call(frame: FrameType, *_: Any) -> Any:
        caller = frame.f_back.f_globals.get("__name__", "") if frame.f_back else ""
        ours = frame.f_globals["__name__"]
        ours = caller if ours == "contextlib" else ours  # which stands for `with`
        places = ("sinktrack.measure", "sinktrack.models.guard", "sinktrack.models.huggingface")
        return on_line if ours in places else None

    def state() -> dict[str, Any]:
        modes = torch._C._len_torch_function_stack()
        attention = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
        return fingerprint(model) | {"modes": modes, "attention": attention, "tap": _ACTIVE.get()}

    before, stopped, own = state(), 0, sys.gettrace()
    measure(model, probe)
    while seen >= wanted:
        seen, wanted = 0, wanted + 97
        sys.settrace(on_call)
        try:
            measure(model, probe)
        except (Stop, RuntimeError):  # torch's own modes may fail when they are left like that
            stopped += 1
        finally:
            sys.settrace(own)
        after = state()
        assert [name for name in before if not same(before[name], after[name])] == [], wanted
    assert stopped > 50


def test_a_checkpoint_saved_in_the_middle_of_a_probe(tmp_path: Path) -> None:
    """A handler that saves and returns saves the weights of training; the probe goes on."""
    model = models.deepseek_v3(attention_dropout=0.1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saved: list[dict[str, Any]] = []
    own = signal.signal(signal.SIGUSR1, lambda *_: saved.append(model.state_dict()))
    handle = model.model.layers[2].register_forward_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGUSR1)
    )
    try:
        assert SinkTracker(PROBE, tmp_path, every=1, on_error="raise").step(1, model) is not None
    finally:
        signal.signal(signal.SIGUSR1, own)
        handle.remove()
    assert len(saved) == 4  # two of a few tokens, the probe's, and that of the first tokens
    for found in saved:
        assert_identical(before, found)


def test_the_process_of_wandb_dies(tmp_path: Path) -> None:
    """Of a live run: training goes on, records are kept, it is told once."""
    code = """
        import sys; sys.path.insert(0, sys.argv[1])
        import psutil
        from tests.scan.test_faults import *
        os.environ.pop("WANDB_SERVICE", None)  # not the one of the process that runs the tests
        wandb.init(project="test", mode="offline", dir=sys.argv[2])
        tracker, model = SinkTracker(PROBE, sys.argv[2] + "/run", every=1), models.llama()
        tracker.step(1, model)
        served = [one for one in psutil.Process().children() if one.name() == "wandb-core"]
        assert served
        for one in served:
            one.kill()
            one.wait()
        for step in (2, 3, 4):
            assert tracker.step(step, model) is not None
        os._exit(0)  # wandb's own end would wait for what is gone
    """
    done = subprocess.run(child(code, tmp_path), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("training goes on") == 1
    assert "the W&B log at step 2 failed" in done.stderr
    assert Run.read(tmp_path / "run").steps == [1, 2, 3, 4]


def test_a_training_that_is_told_to_end(tmp_path: Path) -> None:
    """By SIGTERM, as schedulers do: what was recorded is whole, and the next start goes on."""
    code = """
        import sys; sys.path.insert(0, sys.argv[1])
        from tests.scan.test_faults import *
        tracker, model = SinkTracker(PROBE, sys.argv[2], every=1), models.llama()
        start = len(Run.read(sys.argv[2]))
        for step in range(start, 10_000):
            tracker.step(step, model)
            print("step", step, flush=True)
    """
    for reached in (3, 6):
        with subprocess.Popen(child(code, tmp_path), stdout=subprocess.PIPE, text=True) as training:
            assert training.stdout is not None
            while training.stdout.readline() != f"step {reached}\n":
                assert training.poll() is None
            training.terminate()
            assert training.wait(60) == -signal.SIGTERM
        steps = Run.read(tmp_path).steps
        assert steps == list(range(len(steps))) and len(steps) > reached


def test_a_run_of_wandb_that_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Records are kept, the signal is judged, and the failure is told once, for what it is."""
    monkeypatch.chdir(tmp_path)
    active = wandb.init(project="test", mode="offline", dir=tmp_path)

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(active, "log", broken)
    tracker, model = SinkTracker(PROBE, tmp_path / "run", every=1), models.llama()
    assert all(tracker.step(step, model) is not None for step in range(1, 5))
    active.finish()
    assert tracker.step(5, model) is not None
    assert warnings(caplog) == [
        "the W&B log at step 1 failed, training goes on: ConnectionError: no route to host"
    ]
    assert Run.read(tmp_path / "run").steps == [1, 2, 3, 4, 5]


def test_an_unreachable_wandb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing fails in words and within its time; the records stay as they are."""
    run = Run.open(tmp_path / "run", PROBE)
    run.append(to_json(measure(models.llama(), PROBE).to_record(1, "callback", {})))
    for name, value in {
        "BASE_URL": "http://127.0.0.1:9", "API_KEY": "a" * 40, "MODE": "online",
        "INIT_TIMEOUT": "5", "HTTP_TIMEOUT": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"WANDB_{name}", value)
    done = sinktrack("publish", tmp_path / "run", "--to", "wandb")
    assert done.returncode == 2, done.stderr
    assert "sinktrack: W&B: " in done.stderr and "Traceback" not in done.stderr
    assert Run.read(tmp_path / "run").steps == [1]


def test_weights_that_are_no_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = models.mixtral().train()
    tracker = SinkTracker(PROBE, tmp_path, every=1)
    with torch.no_grad():
        norm = model.model.layers[2].input_layernorm.weight
        kept, norm[3] = norm[3].clone(), torch.nan
    assert tracker.step(1, model) is None
    (told,) = warnings(caplog)
    assert "attention of block 2, head 0 is not finite" in told and "training goes on" in told
    assert Run.read(tmp_path).steps == []
    with torch.no_grad():
        norm[3] = kept
    assert tracker.step(2, model) is not None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_queries_and_keys_that_are_no_numbers(name: str, value: float) -> None:
    """A fused kernel makes a finite output of them, so the residual stream shows nothing."""
    for model in (models.llama(), models.mixtral()):
        with torch.no_grad():
            getattr(model.model.layers[2].self_attn, name).weight[0, 0] = value
        with pytest.raises(MeasurementError, match="not finite") as caught:
            measure(model, PROBE)
        if value != value:
            assert "the attention of block 2, head 0 is not finite" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_key_that_is_no_number(dtype: torch.dtype, value: float) -> None:
    """As of an overflow at one position: no probability of its head passes for a number."""
    torch.manual_seed(0)
    query, key, values = (torch.randn(2, 2, 100, 16).to(dtype) for _ in range(3))
    _, whole = attend(query, key, values, scale=0.25)
    key[1, 1, 5, 3] = value
    _, got = attend(query, key, values, scale=0.25)
    assert got.p0[1, 1].isnan().all()
    assert torch.equal(got.p0[0], whole.p0[0]) and torch.equal(got.p0[1, 0], whole.p0[1, 0])


def test_a_single_sequence_that_is_no_number(tmp_path: Path) -> None:
    """One token of one sequence suffices; nothing is averaged over the others."""
    model = models.llama()
    tokens = torch.randint(models.VOCABULARY - 1, (4, 12))
    tokens[3, 11] = models.VOCABULARY - 1
    tracker = SinkTracker(Probe.from_tokens(tokens), tmp_path, every=1, on_error="raise")
    with torch.no_grad():
        model.model.embed_tokens.weight[-1] = torch.inf
    with pytest.raises(MeasurementError, match="not finite at the input of block 0"):
        tracker.step(1, model)
    assert Run.read(tmp_path).steps == []


def test_an_expert_that_is_no_number() -> None:
    """It matters where a token of the probe comes to it, and nowhere else."""
    probe = Probe.random(models.VOCABULARY, sequences=1, length=2)
    whole = measure(models.mixtral(), probe)
    failures = 0
    for expert in range(8):
        model = models.mixtral()
        with torch.no_grad():
            model.model.layers[2].mlp.experts.down_proj[expert] = torch.nan
        try:
            assert torch.equal(measure(model, probe).norm_ratio, whole.norm_ratio)
        except MeasurementError as error:
            assert "not finite at the input of block 3" in str(error)
            failures += 1
    assert 2 <= failures <= 4  # two tokens go to two experts each


def test_an_archive_that_changes_while_it_is_scanned(tmp_path: Path) -> None:
    """Each checkpoint is what it was when its turn came; what is gone or half there is named."""
    archive = save_archive(tmp_path / "archive", range(1, 6))
    seen: dict[int, Any] = {}

    def notify(checkpoint: Any, outcome: Any) -> None:
        seen[checkpoint.step] = outcome
        if checkpoint.step != 1:
            return
        shutil.rmtree(archive / "checkpoint-2")
        weights = archive / "checkpoint-3/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        shutil.copy(archive / "checkpoint-5/model.safetensors", archive / "checkpoint-4")
        shutil.copytree(archive / "checkpoint-5", archive / "checkpoint-6")

    records = list(scan(archive, probe=SCANNED, run=tmp_path / "run", notify=notify))
    assert [record["step"] for record in records] == [1, 4, 5]
    assert records[1]["p0_attention"] == records[2]["p0_attention"]
    assert isinstance(seen[2], ArchiveError) and "checkpoint-2" in str(seen[2])
    assert isinstance(seen[3], ArchiveError) and "truncated" in str(seen[3])
    again = list(scan(archive, run=tmp_path / "run", notify=lambda *_: None))
    assert [record["step"] for record in again] == [6]


def test_a_callback_and_a_scanner_on_one_run(tmp_path: Path) -> None:
    """Both append; of a step that both measured the last counts."""
    archive = save_archive(tmp_path / "archive", range(1, 4))
    tracker = SinkTracker(SCANNED, tmp_path / "run", every=1, on_error="raise")
    model = models.mixtral()
    scanning = scan(archive, run=tmp_path / "run")
    for step in (2, 7, 8):
        next(scanning)
        tracker.step(step, model)
    assert list(scanning) == []
    run = Run.read(tmp_path / "run")
    assert run.steps == [1, 2, 3, 7, 8] and len(run.written) == 6
    assert [record["source"] for record in run.records] == [
        "checkpoint-1", "checkpoint-2", "checkpoint-3", "callback", "callback",
    ]  # fmt: skip


def test_a_clock_that_goes_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is ordered by it: a file that looks older than before is read anew all the same."""
    run = Run.open(tmp_path, PROBE)
    record = to_json(measure(models.llama(), PROBE).to_record(1, "callback", {}))
    run.append(record)
    reader = Run.read(tmp_path)
    assert reader.steps == [1]
    run.append(record | {"step": 2})
    os.utime(tmp_path / "records.jsonl", (0, 0))
    assert reader.steps == [1, 2] and run.steps == [1, 2]
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert measure(models.llama(), PROBE).seconds > 0


def test_the_log_says_each_failure_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = models.llama()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)  # the head is none of the probe's business
    tracker = SinkTracker(PROBE, tmp_path, every=1)
    assert tracker.step(1, broken) is not None
    with torch.no_grad():
        broken.model.embed_tokens.weight.fill_(torch.nan)
    with caplog.at_level(logging.WARNING, "sinktrack"):
        assert all(tracker.step(step, broken) is None for step in range(2, 6))
    assert len(warnings(caplog)) == 1


def test_paths_that_are_not_utf8(tmp_path: Path) -> None:
    """Written and read back, shown, reported and exported; refused where others take none."""
    odd = os.fsdecode(b"caf\xe9")
    archive = save_archive(tmp_path / "plain", steps=range(2))
    (tmp_path / odd).mkdir()
    archive = archive.rename(tmp_path / odd / odd)
    for checkpoint in list(archive.iterdir()):
        checkpoint.rename(checkpoint.with_name(f"{odd}-{checkpoint.name}"))
    probe, directory = tmp_path / odd / "probe", tmp_path / odd / "run"
    SCANNED.save(probe)
    assert Probe.load(probe) == SCANNED
    pattern = r".*-(?P<step>\d+)"
    for left in (2, 0):
        found = list(scan(archive, probe=Probe.load(probe), run=directory, pattern=pattern))
        assert len(found) == left
    run = Run.read(directory)
    assert run.probe == SCANNED and run.steps == [0, 1]
    assert [record["source"][:10] for record in run.records] == ["caf\\udce9-"] * 2
    for arguments in (
        ["show", directory],
        ["show", directory, "--json"],
        ["report", directory, "-o", tmp_path / odd / "report.html"],
        ["export", directory, "--format", "csv", "-o", tmp_path / odd / "out.csv"],
        ["export", directory, "--format", "parquet", "-o", tmp_path / odd / "out.parquet"],
        ["scan", archive, "--run", directory, "--pattern", pattern],
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["sinktrack", *map(str, arguments)])
            patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 0, arguments
    assert (tmp_path / odd / "out.csv").read_text().startswith('"step"')
    (tmp_path / odd / "report.html").read_text(encoding="utf-8")
    for to in ("wandb", "tensorboard"):
        refused = CliRunner().invoke(app, ["publish", str(directory), "--to", to])
        assert isinstance(refused.exception, RecordError)
        assert "takes no path whose name is not UTF-8" in str(refused.exception)
        assert r"caf\udce9" in str(refused.exception)
    assert not (directory / "wandb.json").exists()
