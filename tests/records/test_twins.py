"""Steps that hold the same weights are told: while scanning, in `show`, and in the report."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from sinktrack import Probe, Run, scan
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.records.twins import equal_weights, like, told
from sinktrack.signal import analyze
from sinktrack.signal.compare import compare
from sinktrack.views.report.data import embedded
from sinktrack.views.terminal import show
from tests.helpers import models
from tests.helpers.synthetic import synthetic_records

PROBE = Probe.random(models.VOCABULARY, sequences=2, length=6)


def record(step: int, weights: str | None) -> dict[str, object]:
    return {"step": step, "weights": weights}


def test_groups_of_steps() -> None:
    records = [record(step, weights) for step, weights in
               [(40, "a"), (10, "b"), (20, "a"), (30, "a"), (50, "b"), (60, None), (70, None),
                (80, "c"), (80, "c")]]  # fmt: skip
    assert equal_weights(records) == [[10, 50], [20, 30, 40]]
    assert equal_weights([]) == equal_weights([{"step": 1}]) == []
    assert told([20, 30, 40]) == "steps 20, 30 and 40 hold the same weights, by their digest"
    assert told(range(100)).startswith("steps 0, 1, 2, 3, 4, 5, 6 and 93 others hold")


def test_the_digest_alone_does_not_tell() -> None:
    """Adapters and frozen norms leave it as it is."""
    measured = {"weights": "a", "probe": "p", "dtype": "float32", "p0_norm": [1.0, 20.0],
                "p0_attention": [[0.25, None], [0.5, 0.75]], "norm_ratio": [1.0, 2.0]}  # fmt: skip
    rounded = measured | {"p0_attention": [[0.25, None], [0.5 + 1e-7, 0.75]]}
    others = (
        {"p0_attention": [[0.25, None], [0.5001, 0.75]]}, {"norm_ratio": [1.0, 2.001]},
        {"p0_attention": [[0.25, 0.0], [0.5, 0.75]]}, {"dtype": "bfloat16"}, {"probe": "q"},
        {"p0_norm": [1.0]}, {"weights": "b"}, {"measured_blocks": 1},
    )  # fmt: skip
    records = [measured, rounded, *(measured | other for other in others)]
    numbered = [one | {"step": step} for step, one in enumerate(records)]
    assert equal_weights(numbered) == [[0, 1]]
    assert like(numbered[1], numbered) == [0, 1]
    assert [like(one, numbered) for one in numbered[2:]] == [[step] for step in range(2, 10)]


def test_adapters_that_train_are_told_apart(tmp_path: Path) -> None:
    for run in ("a", "b"):
        model = get_peft_model(models.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
        torch.manual_seed(ord(run))
        tracker = SinkTracker(PROBE, tmp_path / run, every=1, loggers=[])
        for step in range(3):
            tracker.step(step, model)
            with torch.no_grad():
                for value in model.parameters():
                    if value.requires_grad:
                        value.add_(torch.randn_like(value), alpha=0.1)
        tracker.finish()
    records = Run.read(tmp_path / "a").records
    assert len({one["weights"] for one in records}) == 1  # it cannot tell
    assert equal_weights(records) == []
    found = compare({run: Run.read(tmp_path / run) for run in ("a", "b")})
    assert not [note for note in found.notes if "same weights" in note]


def test_a_scan_and_what_is_shown_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed, step in ((1, 10), (2, 20), (2, 30), (2, 40)):
        path = tmp_path / f"a/checkpoint-{step}"
        models.build(models.llama(num_hidden_layers=2).config, seed).save_pretrained(path)
    shutil.move(tmp_path / "a/checkpoint-40", tmp_path / "checkpoint-40")
    list(scan(tmp_path / "a", probe=PROBE, run=tmp_path / "run"))
    first = "steps 20 and 30 hold the same weights, by their digest"
    assert caplog.messages == [first]
    list(scan(tmp_path / "checkpoint-40", run=tmp_path / "run"))
    both = "steps 20, 30 and 40 hold the same weights, by their digest"
    assert caplog.messages == [first, both]

    records = Run.read(tmp_path / "run").records
    assert len(records) == 4
    console = Console(width=80, color_system=None, file=io.StringIO())
    show(records, analyze(records), "run", console)
    assert isinstance(console.file, io.StringIO)
    assert f"{both.capitalize()}.\n" in console.file.getvalue()
    (run,) = json.loads(embedded({"run": records}))["runs"]
    assert run["same_weights"] == [both]


def test_a_usual_run_says_nothing() -> None:
    (run,) = json.loads(embedded({"run": synthetic_records()}))["runs"]
    assert run["same_weights"] == []
