"""The command for a machine with a GPU runs, in small, on one without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.paths import SCRIPTS

SCRIPT = SCRIPTS / "gpu_check.py"


def test_all_checks_pass_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= 33 and not any(row["failed"] for row in rows)
    told = {row["name"]: row["value"] for row in rows}
    assert told["training, float32, with the callback: bits that differ"] == 0
