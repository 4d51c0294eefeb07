"""The README's Python runs as it stands, with real objects for the names that it takes as given."""

from __future__ import annotations

import re
from pathlib import Path

import models
import pytest
from transformers import Trainer, TrainingArguments

from sinktrack import Run, measure
from sinktrack.record import to_json, versions

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_python(page: Path) -> None:
    for block in blocks(page):
        compile(block, page.name, "exec")


class Tokenizer:
    """Letters as ids."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % 60 for letter in text]}


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = models.mixtral()
    given = {
        "tokenizer": Tokenizer(),
        "texts": [f"{letter}{'some text to read ' * 5}" for letter in "abcdef"],
        "trainer": Trainer(model, TrainingArguments("out", use_cpu=True, report_to=[])),
        "model": model,
        "step": 0,
    }
    run = [block for block in blocks(ROOT / "README.md") if "megatron" not in block]
    assert len(run) == 3
    for block in run:
        if "st.Run.read" in block:
            record = measure(model, given["probe"]).to_record(1, "callback", versions())
            Run.open("runs/one", given["probe"]).append(to_json(record))
        exec(block, given)
    assert Run.read("runs/one").steps == [0, 1]
