"""A real offline W&B run, read back with wandb's own messages."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from typer.testing import CliRunner

from sinktrack import RecordError, Run
from sinktrack.callbacks.huggingface import SinkTrackCallback
from sinktrack.callbacks.lightning import SinkTrackLightning
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.cli import app
from sinktrack.loggers.curves import metrics
from sinktrack.loggers.weights_and_biases import Sent, log, publish
from sinktrack.loggers.workspace import save, view
from sinktrack.signal import analyze
from tests.helpers import models, planted
from tests.helpers.commands import on_a_disk
from tests.helpers.lightning_modules import Module
from tests.helpers.synthetic import synthetic_records
from tests.helpers.trainings import PROBE, run_trainer
from tests.helpers.wandb_files import finished, read_back, read_summary


def test_the_trainer_loses_no_row_and_ours_have_their_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = wandb.init(project="test", mode="offline", dir=tmp_path)
    callback = SinkTrackCallback(PROBE, tmp_path / "run", every=3, on_error="raise")
    run_trainer(
        models.mixtral().train(), tmp_path / "out", [callback],
        max_steps=10, logging_steps=1, report_to=["wandb"],
    )  # fmt: skip
    run.finish()
    rows, definitions = read_back(tmp_path)
    losses = [row for row in rows if "train/loss" in row]
    assert [row["train/global_step"] for row in losses] == list(range(1, 11))
    ours = [row for row in rows if "sinktrack/sink_rate" in row]
    records = Run.read(tmp_path / "run").records
    assert [row["sinktrack/step"] for row in ours] == [0, 3, 6, 9, 10]
    assert [row["train/global_step"] for row in ours] == [0, 3, 6, 9, 10]
    for row, record in zip(ours, records, strict=True):
        for name in ("sink_rate", "first_two_share", "first_two_gain", "reference_block", "depth"):
            if record[name] is None:
                assert f"sinktrack/{name}" not in row
            else:
                assert math.isclose(row[f"sinktrack/{name}"], record[name], rel_tol=1e-6)
        for block in range(4):
            key = f"block_{block:02d}"
            assert row[f"sinktrack/concentration/{key}"] == record["concentration"][block]
            assert row[f"sinktrack/norm_ratio/{key}"] == record["norm_ratio"][block]
        assert row["sinktrack/top_components/_type"] == "table-file"
        assert row["sinktrack/heads/_type"] == row["sinktrack/blocks/_type"] == "image-file"
    [directory] = tmp_path.glob("wandb/offline-run-*/files")
    table = json.loads((directory / ours[-1]["sinktrack/top_components/path"]).read_text())
    assert table["columns"] == ["step", "kind", "block", "index", "share", "gate"]
    assert table["data"][0] == [
        10,
        *[records[-1]["top_components"][0].get(name) for name in table["columns"][1:]],
    ]
    with Image.open(directory / ours[-1]["sinktrack/blocks/path"]) as picture:
        assert picture.size == (5 * 36 + 142, 4 * 37 + 80), "a column a record, a row a block"
    summary = read_summary(tmp_path)
    assert (summary["sinktrack/probes"], summary["sinktrack/probes_failed"]) == (5, 0)
    assert summary["sinktrack/sink_rate"] == pytest.approx(records[-1]["sink_rate"])
    assert summary["sinktrack/formed"] is records[-1]["formed"]
    defined = {
        d.name: d.step_metric for d in definitions
        if d.name.startswith("sinktrack/") and "." not in d.name  # of a picture, such as its width
    }  # fmt: skip
    assert not any(d.glob_name.startswith("sinktrack") for d in definitions)
    assert any(d.glob_name == "*" and d.step_metric == "train/global_step" for d in definitions)
    logged = {*metrics(records[-1]), "sinktrack/heads", "sinktrack/blocks"}
    assert logged <= {*defined} and defined.pop("sinktrack/step") == ""
    assert {*defined.values()} == {"sinktrack/step"}, "whatever a trainer's pattern says"


def test_causal_tests_are_curves_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = wandb.init(project="test", mode="offline", dir=tmp_path)
    model = planted.dense()
    planted.neuron_writer(model, 1)
    for block in (2, 3, 4):
        planted.reader(model, block)
    tracker = SinkTracker(
        planted.probe(), tmp_path / "run", every=1, causal_every=2, on_error="raise"
    )
    for step in (1, 2):
        tracker.step(step, model)
    run.finish()
    rows, _ = read_back(tmp_path)
    key = "sinktrack/causal/necessity/mlp_01"
    without, tested = (row for row in rows if "sinktrack/sink_rate" in row)
    assert key not in without and "sinktrack/causal_tests/_type" not in without
    record = Run.read(tmp_path / "run").records[-1]
    assert tested[key] == record["causal"]["necessity"][0]["effect"] > 0.5
    assert tested["sinktrack/causal/position/p0_mixed"] < 0.1
    assert tested["sinktrack/causal_tests/_type"] == "table-file"
    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/sinktrack/causal_tests*")
    table = json.loads(file.read_text())
    verdicts = {(row[1], row[2], row[3]): row[-1] for row in table["data"]}
    assert verdicts["necessity", "mlp", 1] == "necessary"


def test_without_an_active_run_none_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert wandb.run is None
    SinkTracker(PROBE, tmp_path / "run", every=1, on_error="raise").step(0, models.llama())
    assert wandb.run is None and not (tmp_path / "wandb").exists()


def test_probes_that_fail_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at the table of runs sees that nothing was measured."""
    monkeypatch.chdir(tmp_path)
    model, probe = planted.dense(), planted.probe(4)
    with wandb.init(project="test", mode="offline", dir=tmp_path):
        tracker = SinkTracker(probe, tmp_path / "run", every=1)
        model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda *_, **__: 1 / 0, with_kwargs=True
        )
        tracker.step(0, model)
        tracker.step(1, model)
        wandb.log({"loss": 1.0})
    found = read_summary(tmp_path)
    assert (found["sinktrack/probes"], found["sinktrack/probes_failed"]) == (0, 2)


def test_a_trainers_own_steps_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that logs with ``step=`` loses no row to ours."""
    monkeypatch.chdir(tmp_path)
    run = wandb.init(project="test", mode="offline", dir=tmp_path)
    tracker = SinkTracker(PROBE, tmp_path / "run", every=2, on_error="raise")
    model = models.llama()
    for step in range(6):
        run.log({"loss": torch.rand(()).item()}, step=step)
        tracker.step(step, model)
    run.finish()
    rows, _ = read_back(tmp_path)
    assert sum("loss" in row for row in rows) == 6
    assert sorted(row["sinktrack/step"] for row in rows if "sinktrack/step" in row) == [0, 2, 4]


@pytest.fixture(autouse=True)
def read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained models have shares too, which dashboards hold."""
    monkeypatch.setattr("sinktrack.metrics.localization.READ", 0)


@pytest.fixture
def past(run: Run) -> Run:
    """A run of which W&B has never heard."""
    return run


def published(run: Run, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["publish", str(run.directory), "--to", "wandb", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_past_run_is_published_in_step_order(past: Run) -> None:
    assert "20 records -> W&B run" in published(past, "--project", "sinks")
    rows, definitions = read_back(past.directory)
    curves = [row for row in rows if "sinktrack/sink_rate" in row]
    assert [row["sinktrack/step"] for row in curves] == past.steps
    for row, record in zip(curves, past.records, strict=True):
        assert row["sinktrack/concentration/block_03"] == record["concentration"][3]
        assert row["sinktrack/heads/_type"] == "image-file"
    assert {d.step_metric for d in definitions if d.step_metric} == {"sinktrack/step"}
    last = rows[-1]
    [directory] = past.directory.glob("wandb/offline-run-*/files")
    table = json.loads((directory / last["sinktrack/top_components/path"]).read_text())
    assert {line[0] for line in table["data"]} == {
        record["step"] for record in past.records if record["top_components"]
    }
    [chart] = [path for path in directory.rglob("*.json") if "concentration_by_block" in path.name]
    lines = json.loads(chart.read_text())
    assert sorted({line[1] for line in lines["data"]}) == [f"block {b:02d}" for b in range(4)]
    assert len(lines["data"]) == 4 * 20
    summary = read_summary(past.directory)
    assert summary["sinktrack/first_formed_at_step"] == next(
        record["step"] for record in past.records if record["formed"]
    )
    assert summary["sinktrack/stage"] == analyze(past).stage
    assert summary["sinktrack/largest_component"] == "block 0 expert 5"


def test_another_project_gets_a_run_of_its_own(past: Run) -> None:
    first = re.search(r"20 records -> W&B run (\w+)", published(past, "--project", "sinks"))
    again = published(past, "--project", "sinks")
    other = re.search(r"20 records -> W&B run (\w+)", published(past, "--project", "elsewhere"))
    assert first and other and first[1] != other[1]
    assert f"0 records -> W&B run {first[1]}" in again
    assert f"0 records -> W&B run {other[1]}" in published(past)
    assert f"0 records -> W&B run {first[1]}" in published(past, "--project", "sinks")
    for to, option in (("wandb", "--out"), ("tensorboard", "--project")):
        result = CliRunner().invoke(
            app, ["publish", str(past.directory), "--to", to, option, str(past.directory / "x")]
        )
        assert result.exit_code == 2 and f"takes no {option}" in " ".join(result.output.split())


@pytest.mark.parametrize("live", [False, True])
def test_the_summary_holds_no_value_that_the_last_record_lacks(live: bool, tmp_path: Path) -> None:
    """W&B's own summary would keep the last one that was logged."""
    run = Run.open(tmp_path / "run")
    active = wandb.init(project="test", mode="offline", dir=run.directory) if live else None
    for record in synthetic_records(steps=[10, 20, 30, 40]):
        lacking = {"first_two_gain": None} if record["step"] > 20 else {}
        run.append(record | lacking)
        if live:
            log(run.records[-1], {}, run)
    if active is None:
        published(run)
    else:
        active.finish()
    found = read_summary(run.directory)
    assert found["sinktrack/step"] == 40 and found["sinktrack/first_two_gain"] is None
    assert found["sinktrack/depth"] == pytest.approx(run.records[-1]["depth"])


def test_publishing_goes_on_where_it_ended(past: Run) -> None:
    published(past)
    [first] = past.directory.glob("wandb/offline-run-*")
    shutil.move(first, past.directory / "first")
    assert "0 records" in published(past)
    assert not list(past.directory.glob("wandb/offline-run-*"))
    past.append(synthetic_records(steps=[150])[0])
    past.append(synthetic_records(steps=[5000])[0])
    assert "2 records" in published(past)
    rows, _ = read_back(past.directory)
    assert [row["sinktrack/step"] for row in rows if "sinktrack/sink_rate" in row] == [150, 5000]
    [second] = past.directory.glob("wandb/offline-run-*")
    assert second.name.split("-")[-1] == first.name.split("-")[-1], "the same W&B run"
    assert read_summary(past.directory)["sinktrack/step"] == 5000


@pytest.mark.parametrize("last", [800, 1900])
def test_an_interrupted_publication_logs_each_record_once(
    past: Run, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    noted = Sent.add

    def stop(sent: Sent, active: wandb.Run, step: int, whole: bool = False) -> None:
        noted(sent, active, step, whole)
        if step == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sent, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        publish(past)
    monkeypatch.undo()
    [first] = past.directory.glob("wandb/offline-run-*")
    wandb.teardown()
    shutil.move(first, past.directory / "first")
    _, count = publish(past)
    later = [step for step in past.steps if step > last]
    assert count == len(later)
    rows, _ = read_back(past.directory)
    assert [row["sinktrack/step"] for row in rows if "sinktrack/sink_rate" in row] == later
    assert "sinktrack/blocks/path" in rows[-1], "the charts over all records follow"
    assert publish(past)[1] == 0
    assert len(list(past.directory.glob("wandb/offline-run-*"))) == 1


def test_another_runs_own_metrics_are_left_alone(past: Run, tmp_path: Path) -> None:
    with wandb.init(project="training", mode="offline", dir=tmp_path, config={"lr": 1}) as training:
        training.log({"loss": 1.0})
    published(past, "--id", training.id, "--project", "training")
    [directory] = past.directory.glob("wandb/offline-run-*")
    assert directory.name.endswith(training.id)
    rows, _ = read_back(past.directory)
    own = {key.split("/")[0] for row in rows for key in row}
    assert {key for key in own if not key.startswith("_")} == {"sinktrack"}
    assert {key.split("/")[0] for key in read_summary(past.directory)} - {"_wandb"} <= {
        "sinktrack", "_step", "_runtime", "_timestamp",
    }  # fmt: skip
    kinds = {record.WhichOneof("record_type") for record in finished(past.directory)}
    assert "stats" not in kinds and "output_raw" not in kinds
    configured = [
        item.key or item.nested_key[0]
        for record in finished(past.directory)
        if record.WhichOneof("record_type") == "config"
        for item in record.config.update
    ]
    assert set(configured) <= {"_wandb"}


def test_what_the_callback_logged_is_not_published_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with wandb.init(project="training", mode="offline", dir=tmp_path) as training:
        tracker = SinkTracker(PROBE, tmp_path / "run", every=1, on_error="raise")
        tracker.step(0, models.llama())
    assert publish(Run.read(tmp_path / "run")) == (training.id, 0)


@pytest.mark.parametrize("how", ["variable", "settings", "wandb disabled"])
def test_what_goes_nowhere_is_not_noted_as_sent(
    how: str, past: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if how == "variable":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    else:
        monkeypatch.delenv("WANDB_MODE")
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text("[default]\nmode = disabled\n")
        if how == "settings":
            monkeypatch.setattr(wandb, "Settings", partial(wandb.Settings, mode="disabled"))
    wandb.teardown()
    with pytest.raises(RecordError, match="W&B is disabled, so nothing was sent and nothing is"):
        publish(past, "sinks")
    assert not (past.directory / "wandb.json").exists()
    monkeypatch.undo()
    wandb.teardown()
    assert publish(past, "sinks")[1] == 20


def test_a_setting_that_is_none_is_told(past: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "Settings", partial(wandb.Settings, mode="often"))
    with pytest.raises(RecordError, match=r"W&B: 1 validation error[\s\S]*nothing was sent"):
        publish(past, "sinks")
    assert not (past.directory / "wandb.json").exists()


def test_what_no_directory_keeps_is_not_noted_as_sent(past: Run) -> None:
    """W&B offline, and its directory is a file, read-only, or on a disk that gets full."""
    where = past.directory / "wandb"
    where.write_text("a file")
    with pytest.raises(RecordError, match="W&B: .*Not a directory.*; nothing was sent"):
        publish(past)
    assert not (past.directory / "wandb.json").exists()
    where.unlink()
    script = """
        mkdir run/wandb
        mount --bind run/wandb run/wandb
        mount -o remount,bind,ro run/wandb
        sinktrack publish run --to wandb
        umount run/wandb
        mount -t tmpfs -o size=512k none run/wandb
        head -c 400k /dev/zero > run/wandb/filler
        sinktrack publish run --to wandb
        umount run/wandb
        mount --bind run run
        mount -o remount,bind,ro run
        sinktrack publish run --to wandb
    """
    done = on_a_disk(past.directory.parent, script.replace("run", past.directory.name))
    told = [line for line in done.stderr.splitlines() if re.match("sinktrack: |exit ", line)]
    assert told[1::2] == ["exit 2"] * 3, done.stderr
    assert "Read-only file system" in told[0] and "nothing was sent" in told[0]
    full = ("No space left on device; step 0 is not noted as sent", "nothing was sent")
    assert any(text in told[2] for text in full)  # the second of wandb before 0.30
    assert "cannot note in" in told[4] and "nothing was sent" in told[4]
    assert not (past.directory / "wandb.json").exists()


def test_a_disabled_run_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with wandb.init(project="training", mode="disabled"):
        tracker = SinkTracker(PROBE, tmp_path / "run", every=1, on_error="raise")
        tracker.step(0, models.llama())
    assert publish(Run.read(tmp_path / "run"))[1] == 1


def test_a_workspace_of_our_curves() -> None:
    pytest.importorskip("wandb_workspaces")
    model = json.loads(view("us", "sinks")._to_model().model_dump_json(by_alias=True))
    sections = model["spec"]["section"]["panelBankConfig"]["sections"]
    panels = [panel["config"] for section in sections for panel in section["panels"]]
    keys = set(metrics(synthetic_records()[-1]))
    plots = [panel for panel in panels if "metrics" in panel]
    assert {panel["xAxis"] for panel in plots} == {"sinktrack/step"}
    for panel in plots:
        if panel["useMetricRegex"]:
            assert sum(bool(re.fullmatch(panel["metricRegex"], key)) for key in keys) >= 4
        else:
            assert set(panel["metrics"]) <= keys
    media = [key for panel in panels for key in panel.get("mediaKeys", [])]
    assert media == ["sinktrack/blocks", "sinktrack/heads"]


def test_a_workspace_needs_a_connection(past: Run) -> None:
    with pytest.raises(RecordError, match="not published"):
        save(past)
    published(past)
    with pytest.raises(RecordError, match="without a connection"):
        save(past)


def rows_of(active: wandb.Run, directory: Path) -> list[dict[str, Any]]:
    """End a run and read its rows, without W&B's own keys."""
    active.finish()
    return [
        {key: value for key, value in row.items() if not key.startswith("_")}
        for row in read_back(directory)[0]
    ]


def assert_kept(rows: list[dict[str, Any]], own: list[dict[str, Any]], run: Path) -> None:
    """Each of the training's rows arrived whole and once, and each of our records with its keys."""
    for wanted in own:
        assert sum(wanted.items() <= row.items() for row in rows) == 1, wanted
    ours = [row for row in rows if "sinktrack/step" in row]
    records = Run.read(run).records
    assert [row["sinktrack/step"] for row in ours] == [record["step"] for record in records]
    for row, record in zip(ours, records, strict=True):
        assert metrics(record).items() <= row.items()
        assert row["sinktrack/heads/_type"] == row["sinktrack/blocks/_type"] == "image-file"
        table = row.get("sinktrack/top_components/_type")
        assert table == ("table-file" if record["top_components"] else None)


ORDERS = {
    "before, step=": "L T",
    "after, step=": "T L",
    "before": "l T",
    "after": "T l",
    "around, step=": "L T M",
    "around": "l T m",
    "around, mixed": "L T m",
    "two before": "L M T",
    "two after": "T L M",
    "commit=False before": "p T m",
    "commit=False after": "T p m",
    "commit=False around": "p T q m",
    "step= and commit": "T C",
    "step=, then commit": "L T D",
    "none": "T",
}
"""What a step does: T is ours, the others log. Capital letters pass ``step=``, p and q
``commit=False``, C and D ``commit=True``."""
KEYS = {"L": "loss", "M": "rate", "p": "part", "q": "rest", "C": "loss", "D": "rate"}


@pytest.mark.parametrize(("start", "every"), [(0, 1), (40, 3)])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_no_order_of_logs_loses_a_row(
    start: int, order: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    active = wandb.init(project="test", mode="offline", dir=tmp_path)
    run = Run.open(tmp_path / "run")
    records = synthetic_records(steps=range(start, start + 9))
    own: list[dict[str, Any]] = []
    for record in records:
        step = record["step"]
        row: dict[str, Any] = {}
        for letter in order.split():
            if letter == "T":
                if step % every == 0:
                    run.append(record)
                    log(run.records[-1], {}, run)
                continue
            data = {KEYS.get(letter, KEYS.get(letter.upper(), "")): step + ord(letter) / 1000}
            options: dict[str, Any] = {"step": step} if letter.isupper() else {}
            if letter in "pqCD":
                options["commit"] = letter.isupper()
            active.log(data, **options)
            row |= data
            if letter in "lmCD":  # it ends the row
                own.append(row)
                row = {}
        if row:
            own.append(row)
    assert_kept(rows_of(active, tmp_path), own, tmp_path / "run")


class Logs(TrainerCallback):  # type: ignore[misc]
    """A user's own log after each step of the Trainer, with ``step=``."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wandb.log({"mine": state.global_step / 8}, step=state.global_step)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("own", ["none", "before", "after"])
def test_a_trainer_and_its_users_own_steps(
    own: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer logs every second step, the user each with ``step=``; then training goes on."""
    monkeypatch.chdir(tmp_path)
    active = wandb.init(project="test", mode="offline", dir=tmp_path)
    ours = SinkTrackCallback(PROBE, tmp_path / "run", every=every, on_error="raise")
    orders: dict[str, list[Any]] = {
        "none": [ours], "before": [Logs(), ours], "after": [ours, Logs()]
    }  # fmt: skip
    callbacks = orders[own]
    for most in (5, 8):
        run_trainer(
            models.llama(num_hidden_layers=2).train(), tmp_path / "out", callbacks,
            most == 8 or None, max_steps=most, logging_steps=2, report_to=["wandb"], save_steps=5,
        )  # fmt: skip
    wanted = [{"mine": step / 8} for step in range(1, 9)] if own != "none" else []
    rows = rows_of(active, tmp_path)
    assert_kept(rows, wanted, tmp_path / "run")
    losses = [row["train/global_step"] for row in rows if "train/loss" in row]
    assert losses == [2, 4, 6, 8]
    steps = {row["sinktrack/step"]: row for row in rows if "sinktrack/step" in row}
    assert [row["train/global_step"] for row in steps.values()] == [*steps]


class Logged(Module):
    """A module that logs by Lightning, and by W&B itself with ``step=``."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def mine(self, where: str) -> None:
        if self.where == where:
            wandb.log({"mine": self.global_step / 8}, step=self.global_step)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.mine("in the step")
        loss = super().training_step(batch, index)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.mine("after the batch")


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("own", ["nowhere", "in the step", "after the batch"])
def test_lightning_and_its_users_own_steps(
    own: str, every: int, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = WandbLogger(project="test", offline=True, save_dir=tmp_path)
    data: Any = torch.randint(models.VOCABULARY, (9, 2, 8))
    trainer = Trainer(
        accelerator="cpu", logger=logger, max_steps=9, log_every_n_steps=each,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SinkTrackLightning(PROBE, tmp_path / "run", every=every, on_error="raise")],
    )  # fmt: skip
    trainer.fit(Logged(own), DataLoader(data, batch_size=None))
    steps = range(9) if own == "in the step" else range(1, 10)
    wanted = [{"mine": step / 8} for step in steps] if own != "nowhere" else []
    rows = rows_of(logger.experiment, tmp_path)
    assert_kept(rows, wanted, tmp_path / "run")
    losses = [row["trainer/global_step"] for row in rows if "loss" in row]
    assert losses == list(range(each - 1, 9, each))
    found = {row["sinktrack/step"]: row for row in rows if "sinktrack/step" in row}
    assert [row["trainer/global_step"] for row in found.values()] == [*found]
