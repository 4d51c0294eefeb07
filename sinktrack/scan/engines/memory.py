"""How much memory measuring takes, and how much there is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from sinktrack.archive.source import Checkpoint, open
from sinktrack.errors import SinktrackError, require

psutil = require("psutil", "scan")
_PROCESS = 2**30
"""Bytes that a process takes beside the weights: torch, transformers, a probe's states."""
_BLOCK = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_BITS = re.compile(r"(?<=[A-Z])\d+")


def footprint_of_one(checkpoints: Sequence[Checkpoint]) -> int:
    """Bytes for each of several: what the first takes that is not known to be unreadable."""
    readable = (checkpoint for checkpoint in checkpoints if checkpoint.reason is None)
    return footprint(next(readable, checkpoints[0]))


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
            if match := _BLOCK.search(name):
                inside[match[1]] = inside.get(match[1], 0) + size
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
