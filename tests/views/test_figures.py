"""Figures, and how IPython shows a run and a measurement."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sinktrack import Probe, Run, measure
from sinktrack.errors import RecordError
from sinktrack.figures import measured, training
from tests.helpers import models
from tests.helpers.paths import SCRIPTS
from tests.helpers.synthetic import synthetic_records

pytest.importorskip("plotly")
PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture
def notebook() -> Iterator[object]:
    """IPython's own machinery of display, as it is in a notebook."""
    pio = pytest.importorskip("plotly.io")
    formatters = pytest.importorskip("IPython.core.formatters")
    before = pio.renderers.default
    pio.renderers.default = "plotly_mimetype+notebook"
    formatter = formatters.DisplayFormatter()
    formatter.active_types = formatter.format_types
    yield formatter
    pio.renderers.default = before


def test_training_holds_every_block(run: Run) -> None:
    figure = training(run.records)
    norms, attention = figure.data[:5], figure.data[5:]
    assert [line.name for line in norms] == [*(f"block {b}" for b in range(4)), "output"]
    for block, line in enumerate(attention):
        assert list(line.x) == run.steps
        assert list(line.y) == [record["concentration"][block] for record in run.records]
    assert list(norms[4].y) == [record["p0_norm"][4] for record in run.records]
    over_tokens = training(run.records, "tokens")
    assert list(over_tokens.data[0].x) == [record["tokens"] for record in run.records]


def test_no_token_counts() -> None:
    records = synthetic_records(steps=[1, 2])
    for record in records:
        record["tokens"] = None
    with pytest.raises(RecordError, match="no record with tokens"):
        training(records, "tokens")


def test_a_run_shows_itself(run: Run, notebook: object, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = notebook.format(run)  # type: ignore[attr-defined]
    assert len(data[PLOTLY]["data"]) == 9
    assert "text/html" in data
    assert data["text/plain"].endswith("20 records, steps 0 to 1,900)")
    monkeypatch.setitem(sys.modules, "plotly", None)
    data, _ = notebook.format(run)  # type: ignore[attr-defined]
    assert set(data) == {"text/plain"}, "without plotly, words"


def test_an_empty_run_shows_itself(tmp_path: Path, notebook: object) -> None:
    data, _ = notebook.format(Run.open(tmp_path / "run"))  # type: ignore[attr-defined]
    assert set(data) == {"text/plain"}


def test_a_measurement_shows_itself(notebook: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinktrack.metrics.localization.READ", 0)
    probe = Probe.random(models.VOCABULARY, sequences=4, length=12)
    found = measure(models.mixtral(), probe)
    data, _ = notebook.format(found)  # type: ignore[attr-defined]
    heat, ratio, shares = data[PLOTLY]["data"]
    assert (heat["type"], ratio["type"], shares["orientation"]) == ("heatmap", "bar", "h")
    assert "mixtral, 4 blocks" in data["text/plain"] and len(data["text/plain"]) < 100
    figure = measured(found)
    assert [list(row) for row in figure.data[0].z] == found.p0_attention.tolist()
    assert sum(figure.data[2].x) == pytest.approx(1, abs=1e-3)


def test_the_figure_of_the_paper_with_one_command(
    run: Run, tmp_path: Path, browser: object
) -> None:
    script = SCRIPTS / "paper_figure.py"
    out = tmp_path / "figure.svg"
    subprocess.run([sys.executable, script, run.directory, "-o", out], check=True, timeout=120)
    root = ElementTree.parse(out).getroot()
    lines = root.findall(".//{*}path[@class='js-line']")
    assert len([line for line in lines if re.search("[LHV]", line.get("d", ""))]) == 9
