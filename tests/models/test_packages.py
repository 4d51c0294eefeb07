"""Models of packages and their training loops, each in an environment of its own.

What is run, and against what, says the script. nanochat and nanoGPT are no packages: their sources
are given to it by hand.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import check_packages
import pytest

PACKAGES = sorted(name for name, wanted in check_packages.REQUIREMENTS.items() if wanted)


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_models_are_exact_or_refused(package: str, tmp_path: Path) -> None:
    command = [sys.executable, check_packages.__file__, package, "--make", str(tmp_path / "made")]
    done = subprocess.run(command, capture_output=True, text=True)
    if check_packages.NOT_INSTALLED in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("| exact: ") > 0
    assert "WRONG" not in done.stdout
