"""Measure checkpoints on a Ray cluster, one task each."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from sinktrack.archive.source import Checkpoint
from sinktrack.errors import require
from sinktrack.scan.engines import ATTEMPTS, Outcome, Work, attempt, died, local
from sinktrack.scan.engines.memory import footprint_of_one

_log = logging.getLogger("sinktrack")


def distribute(
    work: Work, checkpoints: Sequence[Checkpoint], count: int | None = None, gpus: int = 0
) -> Iterator[tuple[Checkpoint, Outcome]]:
    """Measure checkpoints on the cluster; outcomes come as they are ready.

    A task whose node or process dies is tried again, on any node. Every node must be able to read
    the archive under the same name. Without a cluster, processes of this machine do the work.

    Args:
        work: measures one checkpoint; can be pickled.
        checkpoints: what to measure.
        count: tasks at a time; by default as many as the cluster runs.
        gpus: GPUs of a task.

    Raises:
        MissingExtra: Ray is not installed.
    """
    ray = require("ray", "ray")
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError:
            _log.warning("no Ray cluster found; measuring with processes of this machine")
            yield from local.distribute(work, checkpoints, count)
            return
    if not checkpoints:
        return
    task = ray.remote(attempt).options(
        max_retries=ATTEMPTS - 1, num_gpus=gpus, memory=_memory(ray, checkpoints)
    )
    limit = count or max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    waiting = deque(checkpoints)
    running: dict[Any, Checkpoint] = {}
    while waiting or running:
        while waiting and len(running) < limit:
            checkpoint = waiting.popleft()
            running[task.remote(work, checkpoint)] = checkpoint
        done, _ = ray.wait(list(running), num_returns=1)
        for reference in done:
            checkpoint = running.pop(reference)
            try:
                outcome: Outcome = ray.get(reference)
            except ray.exceptions.RayTaskError:
                raise  # an error of ours, not of the checkpoint
            except ray.exceptions.RayError:
                outcome = died(ATTEMPTS)
            yield checkpoint, outcome


def _memory(ray: Any, checkpoints: Sequence[Checkpoint]) -> int:
    """Bytes to ask for: what a task needs, and no more than some node has."""
    largest = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    return int(min(footprint_of_one(checkpoints), largest))
