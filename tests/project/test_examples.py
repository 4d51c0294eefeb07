"""Every example runs as it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

EXAMPLES = ROOT / "examples"


def run(directory: Path, *arguments: str) -> str:
    """What it prints; on one thread, since tests run side by side."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=directory,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_script(script: Path, tmp_path: Path) -> None:
    assert run(tmp_path, str(script), str(tmp_path))
    assert (tmp_path / "run" / "records.jsonl").exists()


def test_notebook(tmp_path: Path) -> None:
    """Its cells, one after the other."""
    cells = json.loads((EXAMPLES / "analysis.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    run(tmp_path, "-c", "\n".join(code))
