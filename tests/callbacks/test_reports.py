"""Where a Trainer reports to and Lightning's loggers: our curves are there, and all of theirs.

MLflow, trackio and TRL are packages of their own; their tests run where they are installed.
"""

from __future__ import annotations

import csv
import json
import math
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.data import DataLoader
from transformers.integrations import AzureMLCallback, TensorBoardCallback

from sinktrack import Run
from sinktrack.callbacks.huggingface import SinkTrackCallback
from sinktrack.callbacks.lightning import SinkTrackLightning
from sinktrack.loggers.curves import metrics
from tests.helpers import models
from tests.helpers.lightning_modules import Module
from tests.helpers.trainings import PROBE, Data, assert_identical, run_trainer, warnings
from tests.helpers.wandb_files import finished

pytest.importorskip("tensorboard")
TIMED = ("runtime", "per_second", "tokens_per")
"""Parts of the names of what no two trainings have alike."""


Points = dict[str, list[tuple[int, float]]]


def events(directory: Path) -> Points:
    """By tag, the scalars of all event files in a directory: step and value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Points = {}
    for file in sorted(directory.rglob("events.out*")):
        read = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in read.Tags()["scalars"]:
            found.setdefault(tag, []).extend((e.step, e.value) for e in read.Scalars(tag))
    return found


def split(found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is ours by key, and theirs; of theirs without what tells a time."""
    ours = {key: value for key, value in found.items() if "sinktrack/" in key}
    theirs = {key: value for key, value in found.items() if key not in ours}
    return ours, {k: v for k, v in theirs.items() if not any(part in k for part in TIMED)}


def assert_curves(ours: Mapping[str, list[tuple[int, float]]], run: Path) -> None:
    """Each curve of each record is there once, at the record's step."""
    wanted: Points = {}
    for record in Run.read(run).records:
        for key, value in metrics(record).items():
            if key != "sinktrack/step":
                wanted.setdefault(key, []).append((record["step"], value))
    for key, points in wanted.items():
        assert [step for step, _ in ours[key]] == [step for step, _ in points], key
        for (_, found), (_, value) in zip(ours[key], points, strict=True):
            assert math.isclose(found, value, rel_tol=1e-6, abs_tol=1e-12), key


@pytest.mark.parametrize("theirs_first", [True, False])
def test_the_trainers_tensorboard(theirs_first: bool, tmp_path: Path) -> None:
    """Also where the user gave it, after ours, so that it opens its file after the first probe."""
    found = {}
    for name in ("plain", "tracked"):
        callbacks: list[Any] = []
        if name == "tracked":
            callbacks = [SinkTrackCallback(PROBE, every=3, on_error="raise")]
        if not theirs_first:
            callbacks.append(TensorBoardCallback())
        out = run_trainer(
            models.llama(num_hidden_layers=2).train(), tmp_path / name, callbacks, max_steps=8,
            logging_steps=2, report_to=["tensorboard"] if theirs_first else [], save_steps=5,
        )  # fmt: skip
        found[name] = (vars(out), events(tmp_path / name))
    (plain, before), (tracked, after) = found.values()
    assert_identical(plain, tracked)
    ours, theirs = split(after)
    assert theirs == split(before)[1] and [step for step, _ in theirs["train/loss"]] == [2, 4, 6, 8]
    run = tmp_path / "tracked" / "sinktrack"
    assert Run.read(run).steps == [0, 3, 5, 6, 8]
    assert_curves(ours, run)
    assert not list(tmp_path.glob("runs")), "no second place"


def test_loggers_that_are_named_are_all(tmp_path: Path) -> None:
    callback = SinkTrackCallback(PROBE, tmp_path / "run", every=2, loggers=[], on_error="raise")
    run_trainer(
        models.llama(num_hidden_layers=2), tmp_path, [callback], max_steps=4,
        report_to=["tensorboard"],
    )  # fmt: skip
    assert split(events(tmp_path))[0] == {}


def test_a_report_that_fails_stops_neither_training_nor_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(AzureMLCallback):  # type: ignore[misc]
        def __init__(self) -> None: ...

        def on_init_end(self, *args: Any, **kwargs: Any) -> None: ...

        def on_log(self, *args: Any, logs: Any, **kwargs: Any) -> None:
            if any("sinktrack" in key for key in logs):
                raise ConnectionError("no server")

    callbacks = [Broken(), SinkTrackCallback(PROBE, tmp_path / "run", every=2)]
    run_trainer(
        models.llama(num_hidden_layers=2), tmp_path, callbacks, max_steps=4,
        report_to=["tensorboard"],
    )  # fmt: skip
    assert sum("ConnectionError: no server" in told for told in warnings(caplog)) == 1
    assert_curves(split(events(tmp_path))[0], tmp_path / "run")


class Kept(Logger):
    """A logger of the user's own."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Logs(Module):
    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize("each", [1, 4])
def test_lightnings_loggers(each: int, tmp_path: Path) -> None:
    """At our steps, whatever ``log_every_n_steps``; no row of theirs is lost, moved or mixed."""
    found: list[Any] = []
    for name in ("plain", "tracked"):
        torch.manual_seed(0)
        own = Kept()
        loggers = [TensorBoardLogger(tmp_path, name), CSVLogger(tmp_path, f"{name}.csv"), own]
        callbacks: Any = []
        if name == "tracked":
            callbacks = [SinkTrackLightning(PROBE, every=3, on_error="raise", tokens=4 * 16)]
        data: Any = torch.randint(models.VOCABULARY, (9, 4, 16))
        trainer = Trainer(
            accelerator="cpu", logger=loggers, max_steps=9, log_every_n_steps=each,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=callbacks, default_root_dir=tmp_path / name,
        )  # fmt: skip
        module = Logs()
        trainer.fit(module, DataLoader(data, batch_size=None))
        (file,) = (tmp_path / f"{name}.csv").rglob("metrics.csv")
        rows = list(csv.DictReader(file.open()))
        found.append((module.state_dict(), events(tmp_path / name), rows, own.rows))
    (plain, board, table, kept), (tracked, board_2, table_2, kept_2) = found
    assert_identical(plain, tracked)
    run = tmp_path / "tracked" / "sinktrack"
    records = Run.read(run).records
    assert [record["step"] for record in records] == [0, 3, 6, 9]
    assert [record["tokens"] for record in records] == [0, 192, 384, 576]

    ours, theirs = split(board_2)
    assert theirs == split(board)[1] and len(theirs["loss"]) == 9 // each
    assert_curves(ours, run)
    our_rows = [row for row in table_2 if row["sinktrack/sink_rate"]]
    keys = table[0].keys()
    assert [{k: row[k] for k in keys} for row in table_2 if row not in our_rows] == table
    columns: Points = {}
    for row in our_rows:
        for key, value in row.items():
            if value:
                columns.setdefault(key, []).append((int(row["step"]), float(value)))
    assert_curves(columns, run)
    assert [row for row in kept_2 if "sinktrack/sink_rate" not in row[1]] == kept
    assert sum("sinktrack/sink_rate" in row for _, row in kept_2) == 4


@pytest.mark.parametrize(
    ("wrong", "error"), [(0, ValueError), ("many", TypeError), (2.5, TypeError), (True, TypeError)]
)
def test_tokens_of_a_step_are_checked(wrong: Any, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error, match="tokens="):
        SinkTrackLightning(PROBE, tmp_path / "run", tokens=wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [lambda module: module.seen, lambda module: None])
def test_a_count_of_tokens_that_fails_ends_no_training(
    count: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = SinkTrackLightning(PROBE, tmp_path / "run", every=2, tokens=count)
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
        default_root_dir=tmp_path,
    )  # fmt: skip
    data: Any = torch.randint(models.VOCABULARY, (2, 4, 16))
    trainer.fit(Module(), DataLoader(data, batch_size=None))
    records = Run.read(tmp_path / "run").records
    assert [record["step"] for record in records] == [0, 2]
    assert all(record["tokens"] is None for record in records)
    assert "the count of tokens at step 0 failed, training goes on" in caplog.text


def configuration(directory: Path) -> dict[str, Any]:
    """What an offline W&B run's files say of its config."""
    found: dict[str, Any] = {}
    for record in finished(directory):
        if record.WhichOneof("record_type") in ("config", "run"):
            part = record.config if record.WhichOneof("record_type") == "config" else None
            for item in (part or record.run.config).update:
                found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found


def test_wandb_is_told_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run that holds another entry, and what else is in its config, are no hindrance."""
    monkeypatch.chdir(tmp_path)
    run = wandb.init(
        project="test", mode="offline", dir=tmp_path, id="one", resume="allow",
        config={"lr": 1, "sinktrack": {"probe": "another", "every": 7}},
    )  # fmt: skip
    callback = SinkTrackCallback(PROBE, tmp_path / "run", every=2, on_error="raise")
    run_trainer(
        models.llama(num_hidden_layers=2), tmp_path / "out", [callback], max_steps=2,
        report_to=["wandb"],
    )  # fmt: skip
    run.config.update({"mine": 2})
    assert run.config["lr"] == 1 and run.config["learning_rate"] == 3e-3
    run.finish()
    found = configuration(tmp_path)
    assert found["lr"] == 1 and found["mine"] == 2 and found["max_steps"] == 2
    entry = found["sinktrack"]
    assert entry["probe"] == PROBE.digest and entry["every"] == 2
    assert (entry["sequences"], entry["length"]) == PROBE.tokens.shape
    assert entry["version"] and entry["schema"] == 2 and entry["run"] == str(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("theirs_first", [True, False])
def test_mlflow(theirs_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    from transformers.integrations import MLflowCallback

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "sinks")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    found = []
    for name in ("plain", "tracked"):
        callbacks: list[Any] = []
        if name == "tracked":
            callbacks = [SinkTrackCallback(PROBE, tmp_path / "run", every=3, on_error="raise")]
        if not theirs_first:
            callbacks.append(MLflowCallback())
        out = run_trainer(
            models.llama(num_hidden_layers=2).train(), tmp_path / name, callbacks, max_steps=8,
            logging_steps=2, report_to=["mlflow"] if theirs_first else [], run_name=name,
        )  # fmt: skip
        assert mlflow.active_run() is None
        found.append(vars(out))
    assert_identical(found[0], found[1])
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("sinks")
    runs = {one.info.run_name: one for one in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"plain", "tracked"}, "no run was begun for us"
    told = {}
    for name, one in runs.items():
        points = {key: client.get_metric_history(one.info.run_id, key) for key in one.data.metrics}
        told[name] = {
            key: [(point.step, point.value) for point in of] for key, of in points.items()
        }
    ours, theirs = split(told["tracked"])
    assert theirs == split(told["plain"])[1] and len(theirs["loss"]) == 4
    assert_curves(ours, tmp_path / "run")


@pytest.mark.slow
def test_mlflow_of_lightning(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    told = []
    tracked = SinkTrackLightning(PROBE, tmp_path / "run", every=3, on_error="raise")
    each: Any = ([], [tracked])
    for callbacks in each:
        torch.manual_seed(0)
        logger = MLFlowLogger("sinks", tracking_uri=uri)
        data: Any = torch.randint(models.VOCABULARY, (6, 4, 16))
        trainer = Trainer(
            accelerator="cpu", logger=logger, max_steps=6, log_every_n_steps=2,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=callbacks, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Logs(), DataLoader(data, batch_size=None))
        client = mlflow.MlflowClient(uri)
        keys = client.get_run(logger.run_id).data.metrics
        points = {key: client.get_metric_history(logger.run_id, key) for key in keys}
        told.append({key: [(one.step, one.value) for one in of] for key, of in points.items()})
    ours, theirs = split(told[1])
    assert theirs == told[0] and len(theirs["loss"]) == 3
    assert_curves(ours, tmp_path / "run")


@pytest.mark.slow
def test_mlflow_takes_more_keys_than_it_takes_at_once(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with mlflow.start_run() as run:
        mlflow.log_metrics({f"sinktrack/{n}": 1.0 for n in range(1500)}, step=3, synchronous=False)
    assert len(mlflow.MlflowClient().get_run(run.info.run_id).data.metrics) == 1500


@pytest.mark.slow
@pytest.mark.parametrize("theirs_first", [True, False])
def test_trackio(theirs_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are numbered: ours join theirs."""
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage
    from transformers.integrations import TrackioCallback

    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    rows = {}
    for name in ("plain", "tracked"):
        callbacks: list[Any] = []
        if name == "tracked":
            callbacks = [SinkTrackCallback(PROBE, tmp_path / "run", every=3, on_error="raise")]
        if not theirs_first:
            callbacks.append(TrackioCallback())
        run_trainer(
            models.llama(num_hidden_layers=2).train(), tmp_path / name, callbacks, max_steps=8,
            logging_steps=2, report_to=["trackio"] if theirs_first else [], run_name=name,
            project="sinks",
        )  # fmt: skip
        with sqlite3.connect(SQLiteStorage.get_project_db_path("sinks")) as connection:
            rows[name] = [
                (step, json.loads(text))
                for step, text in connection.execute(
                    "select step, metrics from metrics where run_name = ? order by id", (name,)
                )
            ]
    ours = [row for row in rows["tracked"] if "sinktrack/sink_rate" in row[1]]
    theirs = [row for row in rows["tracked"] if row not in ours]
    assert [(step, split(row)[1]) for step, row in theirs] == [
        (step, split(row)[1]) for step, row in rows["plain"]
    ]
    assert [row["train/loss"] for _, row in theirs if "train/loss" in row]
    columns: Points = {}
    for _, row in ours:
        for key, value in row.items():
            columns.setdefault(key, []).append((row["train/global_step"], value))
    assert_curves(columns, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"gradient_accumulation_steps": 2}])
def test_trl(changes: dict[str, Any], tmp_path: Path) -> None:
    """Its tokens, over a resume; its averages stay in its own rows; training is the same."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, set_seed
    from trl import SFTConfig, SFTTrainer

    words = {f"w{number}": number for number in range(models.VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "w0")), pad_token="w0", eos_token="w1"
    )
    lengths = [5 + index % 9 for index in range(64)]
    data = Dataset.from_dict(
        {
            "input_ids": [
                row[:length] for row, length in zip(Data().tokens.tolist(), lengths, strict=True)
            ]
        }
    )

    def train(name: str, steps: int, callbacks: list[Any], resume: bool = False) -> Any:
        set_seed(1)
        arguments = SFTConfig(
            output_dir=str(tmp_path / name), max_steps=steps, per_device_train_batch_size=2,
            logging_steps=1, save_steps=4, report_to=["tensorboard"], disable_tqdm=True,
            use_cpu=True, bf16=False, max_length=16, learning_rate=1e-3, **changes,
        )  # fmt: skip
        trainer = SFTTrainer(
            models.llama(num_hidden_layers=2), arguments, train_dataset=data,
            processing_class=tokenizer, callbacks=callbacks,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    found = {}
    for name in ("plain", "tracked"):
        counted: list[float] = []
        for steps in (4, 6):
            callbacks: list[Any] = []
            if name == "tracked":
                callbacks = [SinkTrackCallback(PROBE, tmp_path / "run", every=2, on_error="raise")]
            trainer = train(name, steps, callbacks, steps == 6)
            rows = [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row]
            counted += rows[len(counted) :] if steps == 4 else rows[-2:]
        history = [
            {k: v for k, v in row.items() if not any(part in k for part in TIMED)}
            for row in trainer.state.log_history
        ]
        found[name] = (trainer.model.state_dict(), history, counted)
    assert_identical(found["plain"][:2], found["tracked"][:2])
    counted = found["tracked"][2]
    seen = {record["step"]: record["tokens"] for record in Run.read(tmp_path / "run").records}
    assert seen == {0: 0, 2: counted[1], 4: counted[3], 6: counted[3] + counted[5]}
    shown = events(tmp_path / "tracked")["sinktrack/sink_rate"]
    assert sorted(step for step, _ in shown) == [0, 2, 4, 4, 6], "a resume begins with a probe"
