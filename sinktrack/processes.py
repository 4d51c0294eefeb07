"""Measure checkpoints in several processes of this machine."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import psutil
import torch

from sinktrack.archive.source import Checkpoint, open
from sinktrack.errors import ArchiveError, SinktrackError

Outcome = dict[str, Any] | SinktrackError
Work = Callable[[Checkpoint], dict[str, Any]]

_log = logging.getLogger("sinktrack")
ATTEMPTS = 3
"""How often a checkpoint is tried whose process dies."""
_PROCESS = 2**30
"""Bytes that a process takes beside the weights: torch, transformers, a probe's states."""
_BLOCK = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_BITS = re.compile(r"(?<=[A-Z])\d+")


def attempt(work: Work, checkpoint: Checkpoint) -> Outcome:
    """The record, or the error as a value, which can be sent from one process to another."""
    try:
        return work(checkpoint)
    except SinktrackError as error:
        return error
    except Exception as error:  # a stranger's config can break transformers anywhere
        _log.debug("%s", checkpoint.name, exc_info=True)
        said = (str(error).strip().splitlines() or [""])[0]
        return ArchiveError(f"it cannot be measured: {type(error).__name__}: {said}")


def spread(
    work: Work, checkpoints: Sequence[Checkpoint], workers: int | None = None
) -> Iterator[tuple[Checkpoint, Outcome]]:
    """Measure checkpoints in worker processes; outcomes come as they are ready.

    A process that dies, mostly for want of memory, takes the pool with it; what was under way is
    then tried again with nothing beside it, three times at most.

    Args:
        work: measures one checkpoint; can be pickled.
        checkpoints: what to measure.
        workers: processes; by default as many as cores and memory allow.
    """
    size = workers or sensible(checkpoints)
    waiting, alone = deque(checkpoints), deque[Checkpoint]()
    deaths: dict[Checkpoint, int] = {}
    while waiting or alone:
        with _pool(size) as pool:
            running: dict[Future[Outcome], Checkpoint] = {}
            try:
                while waiting or alone or running:
                    queue, room = (alone, 1) if alone else (waiting, size)
                    while queue and len(running) < room:
                        future = pool.submit(attempt, work, queue[0])
                        running[future] = queue.popleft()
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        outcome = future.result()
                        yield running.pop(future), outcome
            except BrokenProcessPool:
                for checkpoint in running.values():
                    deaths[checkpoint] = deaths.get(checkpoint, 0) + 1
                    if deaths[checkpoint] < ATTEMPTS:
                        alone.append(checkpoint)
                    else:
                        yield checkpoint, died(deaths[checkpoint])


def died(times: int) -> ArchiveError:
    """Of a checkpoint whose process did not come back."""
    return ArchiveError(
        f"its process died {times} times, most likely for want of memory; give it more, or measure "
        "fewer at a time"
    )


def sensible(checkpoints: Sequence[Checkpoint]) -> int:
    """Processes that cores and memory allow, at least one."""
    if not checkpoints:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, len(checkpoints), available() // footprint(checkpoints[0])))


def footprint(checkpoint: Checkpoint) -> int:
    """Bytes that a process needs at most to measure a checkpoint a block at a time.

    One block with all its experts, twice where the next is read meanwhile, and what lies outside of
    blocks. A checkpoint that cannot be read is small.
    """
    inside: dict[str, int] = {}
    outside = 0
    with suppress(SinktrackError):
        source = open(checkpoint)
        for name in source.names():
            weight = source.slice(name)
            bits = _BITS.search(weight.get_dtype())
            size = int(torch.Size(weight.get_shape()).numel()) * (int(bits[0]) if bits else 8) // 8
            if found := _BLOCK.search(name):
                inside[found[1]] = inside.get(found[1], 0) + size
            else:
                outside += size
    return _PROCESS + outside + 2 * max(inside.values(), default=0)


def available() -> int:
    """Bytes of memory that are free to use, within the limits of a container."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return max(free, 0)


def _pool(size: int) -> ProcessPoolExecutor:
    threads = max(1, torch.get_num_threads() // size)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(size, mp_context=context, initializer=partial(_begin, threads))


def _begin(threads: int) -> None:
    """In a worker: end with the scanner, however it ends, and share the cores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def end() -> None:
        if parent is not None:
            wait_for([parent.sentinel])
            os._exit(1)

    threading.Thread(target=end, daemon=True).start()
    torch.set_num_threads(threads)
