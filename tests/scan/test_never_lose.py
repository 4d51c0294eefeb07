"""A scanner may be killed at any moment, or started twice: each checkpoint is recorded once."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sinktrack import RecordError, Run, scan
from tests.helpers.commands import COMMAND
from tests.helpers.paths import ROOT
from tests.helpers.scanner import PROBE, run_scan, save_archive, scan_and_leave

KILLS = 25
STEPS = range(1, 9)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_archive(tmp_path_factory.mktemp("archive"), STEPS)


def results(run: Path) -> list[dict[str, Any]]:
    return [record | {"seconds": None} for record in Run.read(run).records]


@pytest.fixture(scope="module")
def server() -> Any:
    """Starts processes: forks of a server that has imported all that a scan needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.scanner"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        context.Process(target=int).start()
    return context


def test_killed_at_random_moments_and_started_again(
    archive: Path, tmp_path: Path, server: Any
) -> None:
    run_scan(archive, tmp_path / "undisturbed")
    wanted = results(tmp_path / "undisturbed")
    assert [record["step"] for record in wanted] == list(STEPS)

    def scanner(run: Path) -> Any:
        process = server.Process(target=scan_and_leave, args=(archive, run))
        process.start()
        return process

    began = time.perf_counter()
    scanner(tmp_path / "timed").join()
    whole = time.perf_counter() - began
    rng = random.Random(0)
    kills, finished = 0, 0
    held: set[int] = set()
    while kills < KILLS or (len(held) <= 3 and kills < 10 * KILLS):
        run = tmp_path / f"run-{finished}"
        process = scanner(run)
        process.join(rng.uniform(0, whole / 2))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            if (run / "run.json").exists():
                held.add(len(Run.read(run)))
            continue
        assert process.exitcode == 0
        check(run, wanted)
        finished += 1
    last = scanner(tmp_path / f"run-{finished}")
    last.join()
    check(tmp_path / f"run-{finished}", wanted)
    assert len(held) > 3  # killed early, midway and late


@pytest.mark.slow
def test_the_command_killed_and_started_again(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With workers, who end with the scanner; killed after each record that it reports."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as `run_scan`: several threads round otherwise
    run_scan(archive, tmp_path / "undisturbed")
    command = [*COMMAND, "scan", str(archive), "--run", str(tmp_path / "run"), "--json"]
    PROBE.save(tmp_path / "probe")
    reported: list[int] = []
    for options in (["--probe", str(tmp_path / "probe")], ["--workers", "2"], []):
        with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as scanner:
            assert scanner.stdout is not None
            reported.append(json.loads(scanner.stdout.readline())["step"])
            scanner.kill()
        assert set(reported) <= set(Run.read(tmp_path / "run").steps)
    assert len(set(reported)) == len(reported)
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    check(tmp_path / "run", results(tmp_path / "undisturbed"))


def check(run: Path, wanted: list[dict[str, Any]]) -> None:
    assert results(run) == wanted
    assert len((run / "records.jsonl").read_text().splitlines()) == len(wanted)


def test_a_second_scanner_is_told_who_is_at_work(
    archive: Path, tmp_path: Path, server: Any
) -> None:
    first = scan(archive, probe=PROBE, run=tmp_path)
    next(first)
    with pytest.raises(RecordError, match=f"being scanned by process {os.getpid()} on .* since"):
        next(scan(archive, run=tmp_path))
    second = server.Process(target=run_scan, args=(archive, tmp_path))
    second.start()
    second.join()
    assert second.exitcode == 1
    assert len(list(first)) == len(STEPS) - 1
    assert list(scan(archive, run=tmp_path)) == []  # let go of, and nothing left to do
