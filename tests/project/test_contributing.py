"""The examples of the page for contributors do what the page says, each as one file."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sinktrack import Probe, Run, measure, scan
from sinktrack.archive import discover
from sinktrack.archive.source import FORMATS
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.loggers.base import Logger
from sinktrack.loggers.curves import metrics
from tests.helpers import models
from tests.helpers.paths import DOCS
from tests.helpers.trainings import assert_identical

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=16)


def module(name: str, word: str) -> Any:
    """The block of the page that has a word in it, as a module."""
    (code,) = [
        block.partition("```")[0]
        for block in (DOCS / "contributing.md").read_text().split("```python\n")[1:]
        if word in block.partition("```")[0]
    ]
    made = ModuleType(name)
    exec(compile(code, name, "exec"), made.__dict__)
    return made


def train(tracker: Any = None) -> dict[str, Any]:
    """Ignite's engine over ten batches; the weights afterwards."""
    from ignite.engine import Engine

    torch.manual_seed(0)
    model = models.mixtral(attention_dropout=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def update(engine: Any, batch: Any) -> None:
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    engine = Engine(update)
    if tracker is not None:
        tracker.attach(engine, model)
    data: Any = torch.randint(models.VOCABULARY, (5, 4, 16)).unbind()
    engine.run(data, max_epochs=2)
    return {"weights": model.state_dict(), "random": torch.get_rng_state()}


def test_a_training_framework(tmp_path: Path) -> None:
    framework = module("ignite_callback", "SinkTrackIgnite")
    tracked = framework.SinkTrackIgnite(PROBE, tmp_path, every=4, on_error="raise")
    assert_identical(train(), train(tracked))
    assert Run.read(tmp_path).steps == [0, 4, 8, 10]


def renamed(model: Any) -> dict[str, torch.Tensor]:
    """The weights under the names of the layout in the page."""
    new = {
        "model.embed_tokens": "embed", "model.norm": "last_norm", "lm_head": "head",
        "model.layers": "blocks", "self_attn.q_proj": "q", "self_attn.k_proj": "k",
        "self_attn.v_proj": "v", "self_attn.o_proj": "o", "mlp.gate_proj": "w1",
        "mlp.up_proj": "w3", "mlp.down_proj": "w2", "input_layernorm": "norm1",
        "post_attention_layernorm": "norm2",
    }  # fmt: skip
    found = {}
    for name, value in model.state_dict().items():
        for theirs, own in new.items():
            name = name.replace(theirs, own)
        found[name] = value.clone()
    return found


def test_a_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = module("toy", "def find(files)")
    monkeypatch.setitem(sys.modules, "sinktrack.archive.layouts.toy", layout)
    known = list(FORMATS)
    known.insert(known.index("trainer_files"), "toy")
    monkeypatch.setattr(discover, "FORMATS", tuple(known))
    model = models.llama()
    sizes = {k: v for k, v in model.config.to_dict().items() if k != "model_type"}
    tree = {"config": sizes, "weights": renamed(model)}
    torch.save(tree, tmp_path / "toy_000300.pt")
    tree["weights"]["blocks.0.extra"] = torch.ones(3)
    torch.save(tree, tmp_path / "toy_000400.pt")
    failed: dict[str, str] = {}

    def notify(checkpoint: Any, outcome: Any) -> None:
        if isinstance(outcome, Exception):
            failed[checkpoint.name] = str(outcome)

    records = list(scan(tmp_path, probe=PROBE, run=tmp_path / "run", notify=notify))
    assert list(failed) == ["toy_000400.pt"], failed
    (record,) = records
    alone = measure(model, PROBE)
    assert record["step"] == 300 and record["weights"] == alone.weights
    assert record["sink_rate"] == alone.sink_rate()
    assert "blocks.0.extra" in failed["toy_000400.pt"]


def test_a_logger_of_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    made: Any = module("mlflow_logger", "class MLflow").MLflow((tmp_path / "mlruns").as_uri())
    loggers: list[Logger] = [made]
    assert isinstance(loggers[0], Logger)
    tracker = SinkTracker(PROBE, tmp_path / "run", every=1, loggers=loggers, on_error="raise")
    model = models.mixtral()
    for step in (1, 2):
        tracker.step(step, model)
    tracker.finish()
    made.alert("the sink fell", "from 0.5 to 0.2")
    client: Any = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    name = made.run
    run = client.get_run(name)
    assert run.info.status == "FINISHED" and "0.2" in run.data.tags["sinktrack.alert"]
    for record in Run.read(tmp_path / "run").records:
        for key, value in metrics(record).items():
            kept = client.get_metric_history(name, key)
            assert {one.step: one.value for one in kept}[record["step"]] == value
