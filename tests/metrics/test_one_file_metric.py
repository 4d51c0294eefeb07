"""A metric is one file: its fields reach every view by themselves. This is the example of the docs.

And a logger is one: an object with `log`, `alert` and `close`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console
from torch.optim import SGD

from sinktrack import Probe, Run, figures
from sinktrack.attention import Attended
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.loggers.base import Logger
from sinktrack.loggers.curves import metrics
from sinktrack.metrics import FIELDS, METRICS
from sinktrack.metrics.base import Field, Metric, PartialStates, Seen, State
from sinktrack.signal import analyze
from sinktrack.views.export import export
from sinktrack.views.terminal import show
from tests.helpers import models

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=16)


# The metric ----------------------------------------------------------------------------------
class LastToP0(Metric):
    """How much the last query alone attends to P0."""

    fields = (
        Field("last_to_p0", "last query to P0", "Mean attention to P0 of the last query.",
              ("block", "head"), "probability", form=".3f", curve=True),
    )  # fmt: skip
    states: ClassVar = {"last": State("whole", heads=True)}

    def on_attention(self, attended: Attended) -> PartialStates:
        """[b, H]"""
        return {"last": attended.p0[..., -1].float()}

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """Mean over the sequences."""
        return {"last_to_p0": seen.by_block("last_to_p0", "last").mean(0)}


# The logger ----------------------------------------------------------------------------------
class JsonLines:
    """Curves as lines of JSON."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")

    def log(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(metrics(record)) + "\n")

    def alert(self, title: str, text: str) -> None:
        self._file.write(json.dumps({"alert": text}) + "\n")

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, list[dict[str, Any]]]:
    """Four records of a model in training, with the metric; and what the logger wrote."""
    monkeypatch.setitem(METRICS, "last_to_p0", LastToP0())
    monkeypatch.setitem(FIELDS, "last_to_p0", LastToP0.fields[0])
    model = models.mixtral().train()
    optimizer = SGD(model.parameters(), lr=0.1)
    tracker = SinkTracker(
        PROBE, tmp_path / "run", every=1, on_error="raise",
        loggers=[JsonLines(tmp_path / "log.jsonl")],
    )  # fmt: skip
    for step in range(4):
        tracker.step(step, model)
        tokens = PROBE.tokens
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tracker.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    return Run.read(tmp_path / "run"), list(map(json.loads, lines))


def test_its_curve_is_everywhere(
    trained: tuple[Run, list[dict[str, Any]]], tmp_path: Path, browser: Any
) -> None:
    run, logged = trained
    records = run.records
    heads = records[-1]["last_to_p0"]
    assert len(heads) == 4 and 0 < heads[2][1] < 1
    mean = sum(heads[2]) / len(heads[2])

    key = "sinktrack/last_to_p0/block_02"
    assert [line["sinktrack/step"] for line in logged] == [0, 1, 2, 3]
    assert logged[-1][key] == metrics(records[-1])[key] == pytest.approx(mean), "as W&B has it"

    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from sinktrack.loggers.tensorboard_events import publish

    publish(run, tmp_path / "tb")
    events = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars(key)
    assert events[-1].value == pytest.approx(mean, rel=1e-6)

    text = io.StringIO()
    show(records, analyze(records), "run", Console(width=80, file=text, color_system=None))
    assert "Last query to P0 by block: 0." in text.getvalue()

    pandas = pytest.importorskip("pandas")
    export(records, tmp_path / "out.parquet", "parquet")
    frame = pandas.read_parquet(tmp_path / "out.parquet")
    mine = frame[(frame.metric == "last_to_p0") & (frame.step == 3) & (frame.block == 2)]
    assert mine.value.tolist() == pytest.approx(heads[2])

    from sinktrack.views.report import write_report

    write_report({"run": records}, tmp_path / "report.html")
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector("#shares .main-svg")
    page.select_option("#measure", label="Last query to P0")
    drawn = page.evaluate("document.getElementById('blocks').data[0].customdata[2].at(-1)")
    assert drawn == pytest.approx(mean, rel=1e-3)
    assert "Mean attention to P0 of the last query." in page.inner_text("#measured")
    page.select_option("#of_heads", label="Last query to P0")
    drawn = page.evaluate("document.getElementById('heads').data[0].z[2]")
    assert drawn == pytest.approx(heads[2], rel=1e-2)
    page.close()

    figure = figures.curve(records, "last_to_p0")
    assert figure.data[2].y[-1] == pytest.approx(mean)


def test_a_logger_is_an_object_of_three_methods(tmp_path: Path) -> None:
    assert isinstance(JsonLines(tmp_path / "log"), Logger)
    wrong: Any
    for wrong in ([print], [JsonLines], "tensorboard"):
        with pytest.raises(TypeError, match="logger"):
            SinkTracker(PROBE, tmp_path / "run", loggers=wrong)


def test_a_logger_that_fails_stops_neither_the_others_nor_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(JsonLines):
        def log(self, record: Mapping[str, Any]) -> None:
            raise OSError("no server")

    broken, whole = Broken(tmp_path / "a"), JsonLines(tmp_path / "b")
    tracker = SinkTracker(PROBE, tmp_path / "run", every=1, loggers=[broken, whole])
    for step in range(2):
        assert tracker.step(step, models.mixtral()) is not None
    tracker.close()
    assert Run.read(tmp_path / "run").steps == [0, 1]
    assert len((tmp_path / "b").read_text().splitlines()) == 2
    assert [m for m in caplog.messages if "Broken log" in m and "no server" in m]


def test_tensorboard_live(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from sinktrack.loggers.tensorboard_events import TensorBoard, publish

    model = models.mixtral()
    for steps in (range(4), range(2, 6)):  # the second goes on from a checkpoint of step 1
        logger = TensorBoard(tmp_path / "tb")
        tracker = SinkTracker(PROBE, tmp_path / "run", every=1, loggers=[logger])
        for step in steps:
            tracker.step(step, model)
            events = EventAccumulator(str(tmp_path / "tb")).Reload()
            at = [event.step for event in events.Scalars("sinktrack/norm_ratio/block_01")]
            assert at == list(range(step + 1)), "as soon as it is recorded, each step once"
        tracker.close()
    assert publish(Run.read(tmp_path / "run"), tmp_path / "tb") == 0, "it is all there"
