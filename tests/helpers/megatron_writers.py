"""Megatron's processes that write checkpoints while training goes on: without CUDA, and slowly."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import megatron_cpu
import torch

_FILE = "MEGATRON_WRITERS_PACE"
ITERATIONS = 2
"""A checkpoint is on the disk only when training has begun so many more, or has ended."""
SECONDS = 10
"""Or when so many have passed, as when training waits for the last checkpoint to begin another."""


class _Writing(megatron_cpu._OnCpu):
    """Copies what a writer takes off the GPU: training goes on to change the tensors it shares."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moved = super().__torch_function__(func, types, args, kwargs)
        return moved.clone() if func is torch.Tensor.to and args[1:] == ("cpu",) else moved


def train(module: Any, out: str, signal_at: int | None = None) -> None:
    """Tell the writers of this training, which calls ``module``'s function, how far it is.

    Args:
        module: of Megatron.
        out: where it saves.
        signal_at: the iteration, counted in this process, which a signal to exit comes in.
    """
    pace = Path(f"{out}-pace")
    pace.write_bytes(b"")
    os.environ[_FILE] = str(pace)
    iterations = itertools.count(1)
    finalize = module.maybe_finalize_async_save

    def told(*args: Any, **kwargs: Any) -> Any:
        waits = kwargs.get("blocking")  # at the end; else at the start of each iteration
        if waits:
            tell(b"E")
        finalize(*args, **kwargs)
        if not waits:
            tell(b".")
            if next(iterations) == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # steps so short would be over before a writer wakes up

    def tell(what: bytes) -> None:
        if os.environ.get("RANK", "0") == "0":
            with pace.open("ab") as file:
                file.write(what)

    module.maybe_finalize_async_save = told


def write() -> None:
    """Call it in a process that writes: it has a GPU by name, and a slow disk."""
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda *_: None
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    _Writing().__enter__()  # type: ignore[no-untyped-call]
    fsync, begun = os.fsync, set()

    def slowly(descriptor: Any) -> None:
        checkpoint = Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent
        if checkpoint not in begun:
            begun.add(checkpoint)
            far = len(_pace()) + ITERATIONS
            latest = time.monotonic() + SECONDS
            while len(_pace()) < far and b"E" not in _pace() and time.monotonic() < latest:
                time.sleep(0.01)
            if b"E" in _pace():
                time.sleep(0.5)  # training waits for this one
        fsync(descriptor)

    os.fsync = slowly  # type: ignore[assignment]


def _pace() -> bytes:
    with contextlib.suppress(FileNotFoundError):
        return Path(os.environ[_FILE]).read_bytes()
    return b"E"  # the test has ended
