"""Commands, and Python code in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from sinktrack.cli import main
from tests.helpers.paths import ROOT, SCRIPTS

COMMAND = (sys.executable, "-c", "from sinktrack.cli import main; main()")
"""``sinktrack``, as it is imported here."""


def sinktrack(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, forked from one that has imported what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sinktrack.scan", "transformers.modeling_utils"])
    with tempfile.TemporaryDirectory() as directory:
        said = [Path(directory) / "stdout", Path(directory) / "stderr"]
        command = ["sinktrack", *map(str, arguments)]
        process = context.Process(target=_run, args=(command, cwd, dict(os.environ), said))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, 120)
        out, err = (path.read_text() for path in said)
        return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _run(
    command: list[str], cwd: Path | None, environment: dict[str, str], said: list[Path]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in zip((sys.stdout, sys.stderr), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = command
    main()


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


def asked_cases(request: pytest.FixtureRequest) -> set[object]:
    """The parameters called ``case`` of the tests that will run: a fixture launches no others."""
    return {
        item.callspec.params.get("case")
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    }


def sinktrack_here(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The command in this process: its exit code and what it says on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sinktrack", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), capsys.readouterr().err
