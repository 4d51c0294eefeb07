"""The command for a machine with a GPU: whole on one, in small on one without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import SCRIPTS

SCRIPT = SCRIPTS / "gpu_check.py"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_all_checks_pass(device: str, tmp_path: Path) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--device", device, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= 33 and not any(row["failed"] for row in rows)
    told = {row["name"]: row["value"] for row in rows}
    assert told["training, float32, with the callback: bits that differ"] == 0
