"""A scanner in a process of its own, forked from a server that has imported this module.

Importing it scans once, so that what is loaded on first use is there in every fork.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from sinktrack import Probe, scan
from tests.helpers import models

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=12)


def save_archive(root: Path, steps: Iterable[int]) -> Path:
    """Checkpoints that differ in the embedding."""
    for step in steps:
        torch.manual_seed(step)
        model = models.mixtral()
        model.model.embed_tokens.weight.data.normal_()
        model.save_pretrained(root / f"checkpoint-{step}")
    return root


def run_scan(archive: Path, run: Path) -> None:
    torch.set_num_threads(1)
    for _ in scan(archive, probe=PROBE, run=run):
        pass


def scan_and_leave(archive: Path, run: Path) -> None:
    """Without the seconds that an interpreter takes to tidy up after itself."""
    run_scan(archive, run)
    os._exit(0)


with tempfile.TemporaryDirectory() as directory:
    models.mixtral().save_pretrained(f"{directory}/model")
    run_scan(Path(directory) / "model", Path(directory) / "run")
