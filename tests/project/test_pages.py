"""README and pages: their Python runs as it stands, and what they link to is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

import sinktrack
from sinktrack import Probe, Run, measure
from sinktrack.records.run import to_json, versions
from sinktrack.views.export import export
from tests.helpers import models
from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_python(page: Path) -> None:
    for block in blocks(page):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slugs = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
            assert anchor in slugs, link


class Tokenizer:
    """Letters as ids."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % 60 for letter in text]}


NOT_HERE = ("megatron", "Megatron", "Lightning", "Api()")
"""In blocks that need processes, another trainer or a server: other tests run what they show."""


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/causal.md",
                                  "docs/signal.md", "docs/dashboards.md"])  # fmt: skip
def test_the_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = models.mixtral()
    probe = Probe.random(models.VOCABULARY, sequences=4, length=16)
    recorded = Run.open("recorded", probe)
    measured = to_json(measure(model, probe).to_record(1, "callback", versions()))
    for step in range(8):
        recorded.append(measured | {"step": step})
    export(recorded.records, Path("one.parquet"), "parquet")
    log = [{"step": step, "loss": 4 - step / 4} for step in range(8)]
    Path("trainer_state.json").write_text(json.dumps({"log_history": log}))
    given = {
        "st": sinktrack,
        "tokenizer": Tokenizer(),
        "texts": [f"{letter}{'some text to read ' * 5}" for letter in "abcdef"],
        "trainer": Trainer(model, TrainingArguments("out", use_cpu=True, report_to=[])),
        "model": model,
        "probe": probe,
        "run": recorded,
        "step": 0,
    }
    run = [block for block in blocks(ROOT / page) if not any(word in block for word in NOT_HERE)]
    assert run
    for block in run:
        if "st.Run.read" in block:
            Run.open("runs/one", given["probe"]).append(measured | {"probe": given["probe"].digest})
        exec(block, given)
    if page == "README.md":
        assert len(run) == 4 and Run.read("runs/one").steps == [0, 1]
    if page == "docs/quickstart.md":
        assert Run.read("runs/one").steps == [0] and Probe.load("probe.safetensors").length == 64
    if page == "docs/dashboards.md":
        assert len(given["frame"]) > 100 and len(given["heads"]) == 8 * 4
