"""Checkpoints measured in several processes, or by a Ray cluster that loses a node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sinktrack import ArchiveError, Run, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.source import Checkpoint
from sinktrack.scan.engines import local, memory
from tests.helpers.commands import COMMAND
from tests.helpers.paths import ROOT
from tests.helpers.scanner import PROBE, save_archive

STEPS = range(1, 7)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_archive(tmp_path_factory.mktemp("archive"), STEPS)


@pytest.fixture(scope="module")
def wanted(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return plain(scan(archive, probe=PROBE, run=tmp_path_factory.mktemp("plain")))


def plain(records: Any) -> list[dict[str, Any]]:
    return sorted((r | {"seconds": None} for r in records), key=lambda record: record["step"])


def check(run: Path, wanted: list[dict[str, Any]]) -> None:
    assert plain(Run.read(run).records) == wanted
    assert len((run / "records.jsonl").read_text().splitlines()) == len(wanted)


def dies_once(checkpoint: Checkpoint, mark: Path) -> dict[str, Any]:
    """Kills its own process the first time that it sees step 3, and whenever it sees step 5."""
    if checkpoint.step == 5 or (checkpoint.step == 3 and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"step": checkpoint.step}


def test_worker_processes_measure_the_same(
    archive: Path, wanted: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert plain(scan(archive, probe=PROBE, run=tmp_path, workers=2)) == wanted
    check(tmp_path, wanted)


def told(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a worker sees of the environment."""
    return {"step": checkpoint.step, "told": os.environ.get("SINKTRACK_TOLD")}


def test_workers_see_the_environment_of_their_scan(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server that they are forked from outlives a scan."""
    for value in ("before", "after"):
        monkeypatch.setenv("SINKTRACK_TOLD", value)
        found = [outcome for _, outcome in local.distribute(told, discover(archive)[:2], 1)]
        assert [one["told"] for one in found if isinstance(one, dict)] == [value] * 2


def test_a_worker_that_dies_is_replaced_and_one_checkpoint_fails(
    archive: Path, tmp_path: Path
) -> None:
    work = partial(dies_once, mark=tmp_path / "mark")
    found = {c.step: outcome for c, outcome in local.distribute(work, discover(archive), 2)}
    assert sorted(found) == list(STEPS)
    assert isinstance(found.pop(5), ArchiveError)
    assert all(outcome == {"step": step} for step, outcome in found.items())


def test_workers_fit_into_memory(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = discover(archive)
    need = memory.footprint(checkpoints[0])
    weights = (archive / "checkpoint-1/model.safetensors").stat().st_size
    assert 0 < need - 2**30 < weights
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for free, count in ((10 * need, 6), (3 * need, 3), (need // 2, 1), (0, 1)):
        monkeypatch.setattr(local, "available", lambda free=free: free)
        assert local.sensible(checkpoints) == count


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one core beside a head that computes nothing."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    made.doomed = made.add_node(num_cpus=1)
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_a_cluster_that_loses_a_node_midway(
    archive: Path, wanted: list[dict[str, Any]], tmp_path: Path, cluster: Any
) -> None:
    seen = []

    def notify(checkpoint: Checkpoint, outcome: Any) -> None:
        seen.append(checkpoint.step)
        if len(seen) == 2:
            cluster.remove_node(cluster.doomed, allow_graceful=False)

    records = list(scan(archive, probe=PROBE, run=tmp_path / "run", engine="ray", notify=notify))
    assert plain(records) == wanted and sorted(seen) == list(STEPS)
    check(tmp_path / "run", wanted)


def test_ray_without_a_cluster_uses_this_machine(
    archive: Path, wanted: list[dict[str, Any]], tmp_path: Path
) -> None:
    PROBE.save(tmp_path / "probe")
    done = subprocess.run(
        [*COMMAND, "scan", archive, "--run", tmp_path / "run", "--json",
         "--probe", tmp_path / "probe", "--engine", "ray", "--workers", "2"],
        capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no Ray cluster found" in done.stderr
    assert plain(map(json.loads, done.stdout.splitlines())) == wanted
    check(tmp_path / "run", wanted)
