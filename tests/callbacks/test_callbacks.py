"""Training with the callback is training without it, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sinktrack import MeasurementError, ProbeError, Run, measure
from sinktrack.callbacks.huggingface import SinkTrackCallback
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.callbacks.options import OptionArguments, Options
from tests.helpers import models
from tests.helpers.commands import child, two_processes
from tests.helpers.trainings import PROBE, Data, assert_identical, run_trainer, warnings

SETUPS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "dense with dropout": (models.gpt2, {}),
    "moe with dropout": (
        lambda: models.mixtral(attention_dropout=0.1, router_jitter_noise=0.1),
        {},
    ),
    "moe with router buffers": (lambda: models.deepseek_v3(attention_dropout=0.1), {}),
    "gradient accumulation": (models.mixtral, {"gradient_accumulation_steps": 2}),
    "gradient checkpointing": (models.llama, {"gradient_checkpointing": True}),
    "bf16 autocast": (models.mixtral, {"bf16": True}),
    "outputs of every block": (
        lambda: models.mixtral(output_router_logits=True, output_hidden_states=True),
        {},
    ),
}


@pytest.mark.parametrize("name", SETUPS)
def test_training_is_bit_identical(name: str, tmp_path: Path) -> None:
    build, changes = SETUPS[name]
    plain = run_trainer(build().train(), tmp_path / "plain", [], **changes)
    callback = SinkTrackCallback(PROBE, tmp_path / "run", every=7, early=True, on_error="raise")
    tracked = run_trainer(build().train(), tmp_path / "tracked", [callback], **changes)
    assert_identical(vars(plain), vars(tracked))
    steps = {0, 1, 2, 4, 7, 14, 20, 21, 28, 35, 40, 42, 49, 50}
    assert Run.read(tmp_path / "run").steps == sorted(steps)


@pytest.mark.parametrize("evaluated", ["steps", "epoch"])
def test_weights_that_are_loaded_at_the_end_are_not_those_of_the_last_step(
    evaluated: str, tmp_path: Path
) -> None:
    """Of an early stop. An evaluation after the epoch's last step leaves no moment to probe it."""
    steps = 3 if evaluated == "steps" else 16
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=9,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        eval_strategy=evaluated,
        eval_steps=steps,
        save_strategy="best",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first is the best
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = SinkTrackCallback(PROBE, tmp_path / "run", every=7, on_error="raise")
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    model, data = models.llama().train(), Data()
    trainer = Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback, stop]
    )
    trainer.train()
    run, last = Run.read(tmp_path / "run"), 2 * steps
    assert trainer.state.global_step == last and trainer.state.best_global_step == steps
    assert run.steps == ([0, 3, 6] if evaluated == "steps" else [0, 7, 14, 16, 21, 28])
    digests = [record["weights"] for record in run.records]
    assert len(set(digests)) == len(digests)
    assert measure(model, PROBE).weights == digests[run.steps.index(steps)]


def test_resuming_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def callback() -> SinkTrackCallback:
        return SinkTrackCallback(PROBE, tmp_path / "run", every=10, on_error="raise")

    checkpoint = str(tmp_path / "out" / "checkpoint-20")
    run_trainer(models.llama().train(), tmp_path / "out", [callback()], max_steps=30)
    assert Run.read(tmp_path / "run").steps == [0, 10, 20, 30]
    plain = run_trainer(models.llama().train(), tmp_path / "plain", [], resume=checkpoint)
    tracked = run_trainer(
        models.llama().train(), tmp_path / "tracked", [callback()], resume=checkpoint
    )
    assert_identical(vars(plain), vars(tracked))
    assert Run.read(tmp_path / "run").steps == [0, 10, 20, 30, 40, 50]


def test_a_resume_that_leaves_the_experts_out_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a model whose checkpoint names experts one by one, which the Trainer does not convert:
    it warns of missing keys, and trains random experts."""

    def callback() -> SinkTrackCallback:
        return SinkTrackCallback(PROBE, tmp_path / "run", every=10, on_error="raise")

    checkpoint = str(tmp_path / "out" / "checkpoint-20")
    run_trainer(models.qwen3_moe().train(), tmp_path / "out", [callback()], max_steps=20)
    true = AutoModelForCausalLM.from_pretrained(checkpoint)
    same = copy.deepcopy(true).train()
    run_trainer(same, tmp_path / "same", [callback()], max_steps=21, resume=checkpoint)
    assert "measures otherwise" not in caplog.text
    part = models.build(models.qwen3_moe().config, seed=5).train()
    loaded = []

    class Loaded(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            loaded.append(all(map(torch.equal, part.state_dict().values(), wanted)))

    wanted = list(true.state_dict().values())
    run_trainer(part, tmp_path / "part", [Loaded(), callback()], max_steps=21, resume=checkpoint)
    told = "the model at step 20 measures otherwise than when" in caplog.text
    assert told is not loaded[0]  # a Trainer that converts names says nothing


def test_a_digest_that_training_does_not_change_tells_nothing_of_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As with adapters: the step may have been trained again, otherwise."""
    model = models.llama()
    for values in ((0.0, 0.1, 0.2), (0.3,)):
        tracker = SinkTracker(PROBE, tmp_path, every=5, on_error="raise")
        for step, value in enumerate(values, start=3 - len(values)):
            with torch.no_grad():
                model.model.layers[1].mlp.down_proj.weight.add_(value)
            tracker.step(5 * step, model)
    assert len({one["weights"] for one in Run.read(tmp_path).history}) == 1
    assert "measures otherwise" not in caplog.text


def test_tokens_are_recorded_where_the_trainer_counts_them(tmp_path: Path) -> None:
    callback = SinkTrackCallback(PROBE, tmp_path / "run", every=2)
    run_trainer(
        models.llama(),
        tmp_path / "out",
        [callback],
        max_steps=4,
        include_num_input_tokens_seen="all",
    )
    tokens = [record["tokens"] for record in Run.read(tmp_path / "run").records]
    assert tokens == [0, 2 * 4 * 16, 4 * 4 * 16]


def test_a_hand_written_loop(tmp_path: Path) -> None:
    def train(tracker: SinkTracker | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = models.mixtral(attention_dropout=0.2).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(1, 52):
            tokens = torch.randint(models.VOCABULARY, (4, 16))
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if tracker:
                tracker.step(step, model)
        return {**model.state_dict(), "random": torch.get_rng_state()}

    tracker = SinkTracker(PROBE, tmp_path, every=10, on_error="raise")
    assert_identical(train(None), train(tracker))
    assert Run.read(tmp_path).steps == [10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"every": "100"}, TypeError, "every='100' is of type str: wanted a whole number"),
        ({"every": 2.0}, TypeError, "every=2.0 is of type float"),
        ({"every": True}, TypeError, "every=True is of type bool"),
        ({"every": None}, TypeError, "every=None is of type NoneType"),
        ({"every": 0}, ValueError, "every=0: the interval is at least one step"),
        ({"on_error": "rais"}, ValueError, "on_error='rais': wanted 'warn' or 'raise'"),
        ({"on_error": None}, ValueError, "on_error=None"),
        ({"early": "yes"}, TypeError, "early='yes': wanted True or False"),
        ({"probe_batch_size": -1}, ValueError, "probe_batch_size=-1"),
        ({"probe_batch_size": 0}, ValueError, "probe_batch_size=0"),
        ({"probe_batch_size": "8"}, TypeError, "probe_batch_size='8' is of type str"),
        ({"causal_every": 0}, ValueError, "causal_every=0: the interval is at least one probe"),
        ({"causal_every": 1.5}, TypeError, "causal_every=1.5"),
        ({"evry": 1}, TypeError, "evry"),
        ({"probe": PROBE.tokens}, TypeError, "probe is of type Tensor: wanted a Probe"),
        ({"probe": None}, TypeError, "probe is of type NoneType"),
        ({"run": 3}, TypeError, "run is of type int: wanted the path"),
        ({"run": None}, TypeError, "run is of type NoneType"),
    ],
)
def test_wrong_options_are_refused_where_the_callback_is_made(
    tmp_path: Path, wrong: dict[str, Any], error: type[Exception], said: str
) -> None:
    given: dict[str, Any] = {"probe": PROBE, "run": tmp_path / "run"} | wrong
    with pytest.raises(error, match=re.escape(said)):
        SinkTracker(**given)
    if wrong != {"run": None}:
        with pytest.raises(error, match=re.escape(said)):
            SinkTrackCallback(**given)
    assert not (tmp_path / "run").exists()


def test_options_are_what_the_keyword_arguments_are() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(Options)}
    assert fields.pop("every") == "int"
    assert fields == {
        name: kind.__forward_arg__ for name, kind in OptionArguments.__annotations__.items()
    }
    numbers: dict[str, Any] = {"every": np.int64(7), "causal_every": np.int32(2)}
    options = Options(**numbers)
    assert (options.every, type(options.every), options.causal_every) == (7, int, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.every = 3  # type: ignore[misc]


def test_a_path_of_a_probe_is_loaded(tmp_path: Path) -> None:
    PROBE.save(tmp_path / "probe.safetensors")
    for path in (tmp_path / "probe.safetensors", str(tmp_path / "probe.safetensors")):
        assert SinkTracker(path, tmp_path / "run").probe == PROBE
    with pytest.raises(ProbeError, match="no probe file"):
        SinkTracker(tmp_path / "nothing", tmp_path / "run")


def test_the_run_lies_below_the_trainers_directory_and_the_end_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sinktrack"):
        run_trainer(
            models.llama(), tmp_path / "out", [SinkTrackCallback(PROBE, every=2)], max_steps=4
        )
    run = Run.read(tmp_path / "out" / "sinktrack")
    assert run.steps == [0, 2, 4]
    assert warnings(caplog)[-1] == f"3 records written to {run.directory}, 0 probes failed"


def test_the_end_tells_of_failed_probes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tracker = models.llama(), SinkTracker(PROBE, tmp_path / "run", every=1)
    tracker.step(0, model)
    model.model.norm.weight.data.fill_(float("nan"))
    model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    for step in (1, 2):
        tracker.step(step, model)
    tracker.finish()
    assert warnings(caplog)[-1] == f"1 records written to {tmp_path / 'run'}, 2 probes failed"


def test_a_failing_probe_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = models.llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1.0
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    tracker = SinkTracker(PROBE, tmp_path, every=1)
    with caplog.at_level(logging.WARNING, "sinktrack"):
        assert tracker.step(1, model) is None
        assert tracker.step(2, model) is None
    assert len(caplog.records) == 1
    assert "step 1 failed, training goes on" in caplog.text
    assert "not finite at the input of block 1" in caplog.text
    assert Run.read(tmp_path).steps == []
    with pytest.raises(MeasurementError):
        SinkTracker(PROBE, tmp_path, every=1, on_error="raise").step(3, model)


@pytest.mark.distributed
def test_two_processes_train_alike_and_one_writes(tmp_path: Path) -> None:
    two_processes(
        tmp_path,
        """
        tracked = [SinkTrackCallback(PROBE, out / "run", every=5, on_error="raise")]
        for name, callbacks in (("plain", []), ("tracked", tracked)):
            model = models.mixtral(attention_dropout=0.1).train()
            found = run_trainer(model, out / name, callbacks, max_steps=50, ddp_backend="gloo",
                                ddp_find_unused_parameters=True)
            rank = torch.distributed.get_rank()
            torch.save(found.weights, out / f"{name}-{rank}.pt")
        """,
    )
    weights = [
        torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
        for name in ("plain", "tracked")
        for rank in (0, 1)
    ]
    for other in weights[1:]:
        assert_identical(weights[0], other)
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    assert len(lines) == 11
    assert Run.read(tmp_path / "run").steps == list(range(0, 51, 5))


def test_the_probe_does_not_recompile_a_compiled_model(tmp_path: Path) -> None:
    """A compiled training graph is neither compiled again nor changed by the probe."""
    from torch._dynamo.testing import CompileCounter

    def train(tracker: SinkTracker | None) -> tuple[int, dict[str, torch.Tensor]]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = models.llama().train()
        counter = CompileCounter()
        compiled: Any = torch.compile(model, backend=counter)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(1, 9):
            tokens = torch.randint(models.VOCABULARY, (4, 16))
            compiled(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if tracker:
                tracker.step(step, compiled)
        return counter.frame_count, model.state_dict()

    tracker = SinkTracker(PROBE, tmp_path, every=3, on_error="raise")
    plain, tracked = train(None), train(tracker)
    assert plain[0] > 0 and plain[0] == tracked[0]
    assert_identical(plain[1], tracked[1])
    assert Run.read(tmp_path).steps == [3, 6]


def test_a_resume_from_an_older_checkpoint_logs_the_new_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []
    wandb = "sinktrack.loggers.weights_and_biases"
    monkeypatch.setattr(f"{wandb}.is_active", lambda: True)
    monkeypatch.setattr(f"{wandb}.log", lambda record, *_: logged.append(record))
    tracker = SinkTracker(PROBE, tmp_path, every=10, on_error="raise")
    for step in (10, 20, 10):
        tracker.step(step, models.llama())
    assert [record["step"] for record in logged] == [10, 20, 10]


def test_records_of_later_steps_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.llama()
    for steps in ((10, 20, 30), (10, 20)):
        tracker = SinkTracker(PROBE, tmp_path, every=10, on_error="raise")
        with caplog.at_level(logging.WARNING, "sinktrack"):
            for step in steps:
                tracker.step(step, model)
    (told,) = warnings(caplog)
    assert "holds records of later steps than 10, up to 30" in told


def test_two_trainings_on_one_run_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = """
        import sys; sys.path.insert(0, sys.argv[1])
        from tests.callbacks.test_callbacks import *
        tracker = SinkTracker(PROBE, sys.argv[2])
        print("here", flush=True)
        sys.stdin.read()
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(child(code, tmp_path), text=True, **pipes) as other:
        assert other.stdout is not None
        while other.stdout.readline() != "here\n":
            assert other.poll() is None
        SinkTracker(PROBE, tmp_path)
        other.communicate("")
    (told,) = warnings(caplog)
    assert told.startswith(f"process {other.pid} on ") and "records into" in told


@pytest.mark.distributed
def test_fully_sharded_training(tmp_path: Path) -> None:
    """FSDP2 over two processes: bit-identical training, and the numbers of the whole model."""
    two_processes(
        tmp_path,
        """
        from sinktrack import measure
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        rank = dist.get_rank()
        for name, build in (("dense", models.llama), ("moe", models.mixtral)):
            found = []
            for tracked in (False, True):
                torch.manual_seed(rank)
                model = build().train()
                for block in model.model.layers:
                    fully_shard(block, mesh=mesh)
                fully_shard(model, mesh=mesh)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
                tracker = SinkTracker(PROBE, out / name, every=5, on_error="raise")
                if tracked:  # the first forward pass, in which FSDP sets what it sets once
                    tracker.step(0, model)
                for step in range(1, 12):
                    tokens = torch.randint(models.VOCABULARY, (4, 16))
                    model(tokens, labels=tokens).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if tracked:
                        tracker.step(step, model)
                if tracked:
                    tracker.probe_now(11, model)
                with torch.no_grad():  # leaves whole weights, which FSDP shards on saving
                    model.eval()(tokens)
                found.append({k: v.full_tensor() for k, v in model.state_dict().items()})
            assert_identical(*found)
            whole = build()
            whole.load_state_dict(found[0])
            if rank == 0:
                live = measure(whole, PROBE)
                last = Run.read(out / name).records[-1]
                assert last["step"] == 11 and last["weights"] == live.weights
                torch.testing.assert_close(
                    torch.tensor(last["p0_attention"]), live.p0_attention, atol=1e-6, rtol=0
                )
                assert abs(last["share_sum"] - 1) < 1e-5
        dist.destroy_process_group()
        """,
    )


def test_what_a_training_keeps_in_memory_does_not_grow_with_its_records(tmp_path: Path) -> None:
    tracker = SinkTracker(PROBE, tmp_path, every=1, on_error="raise")
    model = models.mixtral()

    def lists() -> int:
        gc.collect()
        return sum(type(one) is list for one in gc.get_objects())

    for step in range(4):
        tracker.step(step, model)
    before = lists()
    for step in range(4, 14):
        tracker.step(step, model)
    assert lists() - before < 20  # a record holds some fifty
