"""Commands, and Python code in processes of their own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sinktrack.cli import main
from tests.helpers.paths import ROOT, SCRIPTS

COMMAND = (sys.executable, "-c", "from sinktrack.cli import main; main()")
"""``sinktrack``, as it is imported here."""


def sinktrack(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def child(code: str, *arguments: object) -> list[str]:
    """The command that runs ``code`` with this repository and the arguments in ``sys.argv``."""
    return [
        sys.executable,
        "-c",
        textwrap.dedent(code),
        str(ROOT),
        *map(str, arguments),
    ]


def two_processes(tmp_path: Path, code: str, count: int = 2) -> None:
    """Run ``code`` under torchrun with what trainings need, and ``out``, at hand."""
    script = tmp_path / "script.py"
    start = f"""
        import copy, json, logging, os, random, re, sys, torch, torch.distributed as dist
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from typing import Any
        from sinktrack import MeasurementError, Probe, ProbeError, Run, measure
        from sinktrack.callbacks.huggingface import SinkTrackCallback
        from sinktrack.callbacks.loop import SinkTracker
        from tests.helpers import models
        from tests.helpers.trainings import *
        torch.set_num_threads(1)
        out = Path({str(tmp_path)!r})
    """
    end = "os._exit(0)  # gloo's threads may outlive the interpreter, which then aborts\n"
    script.write_text(textwrap.dedent(start) + textwrap.dedent(code) + end)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command.append(f"--nproc-per-node={count}")
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def on_a_disk(directory: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script that mounts file systems of its own below a directory."""
    allowed = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if allowed.returncode:
        pytest.skip("no permission to mount file systems")
    script = f'sinktrack() {{ {shlex.join(COMMAND)} "$@" || echo exit $? >&2; }}\n{script}'
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        capture_output=True, text=True, cwd=directory, timeout=300,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """That of scripts which import `tests.helpers` and what is in ``scripts/``."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, SCRIPTS)))}


def launch(processes: int, script: str, *arguments: str) -> str:
    """Run a script of `tests.helpers` under torchrun; what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = str(ROOT / "tests" / "helpers" / script)
    done = subprocess.run(
        [*command, f"--nproc-per-node={processes}", path, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def sinktrack_here(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The command in this process: its exit code and what it says on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sinktrack", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), capsys.readouterr().err
