"""Measure checkpoints in several processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait as wait_for
from typing import Any

import torch

from sinktrack.archive.source import Checkpoint
from sinktrack.errors import MeasurementError
from sinktrack.scan.engines import ATTEMPTS, Outcome, Work, attempt, died
from sinktrack.scan.engines.memory import available, footprint_of_one

_AHEAD = 2
"""Checkpoints that are given out for each process, so that none waits for the scanner."""


def distribute(
    work: Work, checkpoints: Sequence[Checkpoint], workers: int | None = None
) -> Iterator[tuple[Checkpoint, Outcome]]:
    """Measure checkpoints in worker processes; outcomes come as they are ready.

    A process that dies, mostly for want of memory, takes the pool with it; what was under way is
    then tried again with nothing beside it, three times at most.

    Args:
        work: measures one checkpoint; can be pickled.
        checkpoints: what to measure.
        workers: processes; by default as many as cores and memory allow.

    Raises:
        MeasurementError: no process comes up at all.
    """
    size = workers or sensible(checkpoints)
    waiting, alone = deque(checkpoints), deque[Checkpoint]()
    deaths: dict[Checkpoint, int] = {}
    while waiting or alone:
        with _pool(size, getattr(work, "device", "cpu")) as pool:
            running: dict[Future[Outcome], Checkpoint] = {}
            first = [] if deaths else [pool.submit(os.getpid) for _ in range(size)]
            try:
                while waiting or alone or running:
                    queue, room = (alone, 1) if alone else (waiting, _AHEAD * size)
                    while queue and len(running) < room:
                        future = pool.submit(attempt, work, queue[0])
                        running[future] = queue.popleft()
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        outcome = future.result()
                        yield running.pop(future), outcome
            except BrokenProcessPool as error:
                if not _came_up(first):
                    raise MeasurementError(
                        "no worker process comes up; its own error stands above. A script must "
                        "call a scan with workers under `if __name__ == '__main__':`, as every "
                        "process imports it again"
                    ) from error
                for checkpoint in running.values():
                    deaths[checkpoint] = deaths.get(checkpoint, 0) + 1
                    if deaths[checkpoint] < ATTEMPTS:
                        alone.append(checkpoint)
                    else:
                        yield checkpoint, died(deaths[checkpoint])
            finally:
                pool.shutdown(cancel_futures=True)


def _came_up(first: Sequence[Future[int]]) -> bool:
    """Whether a worker did anything at all, of those that the first tasks were given to."""
    return not first or any(one.done() and one.exception() is None for one in first)


def sensible(checkpoints: Sequence[Checkpoint]) -> int:
    """Processes that cores and memory allow, at least one."""
    if not checkpoints:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, len(checkpoints), available() // footprint_of_one(checkpoints)))


def _pool(size: int, device: str) -> ProcessPoolExecutor:
    """Processes that share the cores, and their imports where they may be forks.

    They may not where they use an accelerator, whose driver is of no use in a fork.
    """
    threads = max(1, torch.get_num_threads() // size)
    forks = device == "cpu" and sys.platform == "linux"
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["sinktrack.scan.engines.loaded"])
    return ProcessPoolExecutor(
        size, mp_context=context, initializer=partial(_begin, threads, dict(os.environ))
    )


def _begin(threads: int, environment: dict[str, str]) -> None:
    """In a worker: end with the scanner, however it ends, and share the cores.

    The server of forks outlives a scan: what was set since then, such as a token, is passed on.
    """
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def end() -> None:
        if parent is not None:
            wait_for([parent.sentinel])
            os._exit(1)

    threading.Thread(target=end, daemon=True).start()
    torch.set_num_threads(threads)
