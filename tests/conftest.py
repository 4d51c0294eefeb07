"""Shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of child processes, too: tests share the cores

import gc
import io
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from sinktrack import Run, smollm2
from tests.helpers.synthetic import synthetic_records

os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
settings.register_profile("sinktrack", deadline=None)  # no test is timed
settings.register_profile("repeatable", settings.get_profile("sinktrack"), derandomize=True)
settings.load_profile("repeatable" if "CI" in os.environ else "sinktrack")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Draw torch's weights by the seed of pytest-randomly."""
    torch.manual_seed(item.config.getoption("randomly_seed", 0))


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Keep what is imported out of garbage collections, which each training asks for."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what opens a browser, or starts Megatron's processes, by its fixtures.

    Files that take minutes come first, which leaves none to wait for at the end.
    """
    long = set()
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "browser" in fixtures:
            item.add_marker("browser")
        if "saved" in fixtures and "megatron" in item.nodeid:
            item.add_marker("distributed")
        if "demo" in fixtures or item.get_closest_marker("distributed"):
            long.add(item.path)
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of synthetic records."""
    run = Run.open(tmp_path / "run")
    for record in synthetic_records():
        run.append(record)
    return run


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    pytest.importorskip("playwright.sync_api")
    from chromium import chromium

    try:
        with chromium() as opened:
            yield opened
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", name="smollm2")
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with SmolLM2-135M-Instruct, made once and kept in pytest's cache."""
    if (cache := getattr(request.config, "cache", None)) is not None:
        directory = cache.mkdir("real_model") / smollm2.PACKAGES[0]
    else:  # beside those of the other processes
        directory = tmp_path_factory.getbasetemp().parent / smollm2.PACKAGES[0]
    with FileLock(directory.parent / "smollm2.lock"):
        if not directory.exists():
            try:
                smollm2.make(directory)
            except RuntimeError as error:
                pytest.skip(str(error))
    return Path(directory)


@pytest.fixture(scope="session")
def demo(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A finished demo, shorter than the real one: its directory and what it printed."""
    from rich.console import Console

    from sinktrack.demo import run_demo

    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # one for the processes of pytest-xdist together
        base = base.parent
    out, text = base / "demo", base / "demo.txt"
    with FileLock(base / "demo.lock"):
        if not text.exists():
            said = io.StringIO()
            run_demo(out, Console(file=said, width=100), steps=400)
            text.write_text(said.getvalue())
    return out, text.read_text()
