"""What others read: record fields, W&B keys, TensorBoard tags, `show --json`, the public names.

They are compared with the files of ``tests/golden/``, so that a change shows what it adds or takes
away. Renew them, and look at the difference: ``python -m tests.project.test_golden``.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sinktrack
from sinktrack import Probe, Run, measure
from sinktrack.cli import app
from sinktrack.loggers import curves
from sinktrack.loggers.tensorboard_events import publish
from sinktrack.records.run import to_json
from tests.helpers import models, planted
from tests.helpers.paths import DOCS, ROOT

GOLDEN = ROOT / "tests" / "golden"
RENEW = "if that is meant: python -m tests.project.test_golden"
OLD_KEYS = ("sink_rate", "first_two_share", "first_two_gain", "reference_block", "depth",
            "concentration/block_00", "norm_ratio/block_00", "step")  # fmt: skip
"""W&B keys that keep their names for good."""


def shape(value: Any) -> Any:
    """Names and nesting: of a list what its entries have, of a number that it is one."""
    if isinstance(value, dict):
        return {key: shape(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        found: list[Any] = []
        for entry in map(shape, value):
            if entry not in found:
                found.append(entry)
        return sorted(found, key=json.dumps)
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "bool"
    return "text" if isinstance(value, str) else "number"


@cache
def record(formed: bool) -> dict[str, Any]:
    """Of a tiny model with a sink whose weights are set by hand, or of an untrained one."""
    if formed:
        model, probe = planted.dense(), planted.probe(8)
        planted.neuron_writer(model, 1, size=12.0)
        for block in range(2, planted.BLOCKS):
            planted.reader(model, block)
    else:
        torch.manual_seed(0)
        model, probe = models.mixtral(), Probe.random(models.VOCABULARY, sequences=4, length=16)
    found: dict[str, Any] = to_json(measure(model, probe).to_record(8, "callback", {"torch": "2"}))
    assert found["formed"] is formed
    return found


def wandb_keys() -> list[str]:
    keys: set[str] = set()
    for formed in (False, True):
        keys |= {*curves.metrics(record(formed)), *curves.summary([record(formed)])}
    return sorted(keys)


def tensorboard_tags() -> dict[str, list[str]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as directory:
        run = Run.open(Path(directory) / "run")
        run.append(record(True))
        publish(run, Path(directory) / "events")
        tags = EventAccumulator(str(Path(directory) / "events")).Reload().Tags()
    return {kind: sorted(tags[kind]) for kind in ("scalars", "images", "tensors")}


def show_json() -> Any:
    with tempfile.TemporaryDirectory() as directory:
        run = Run.open(directory)
        for step in (8, 16):
            run.append(record(True) | {"step": step})
        lines = CliRunner().invoke(app, ["show", directory, "--json"]).output.splitlines()
    before, last = map(json.loads, lines)
    assert shape(before) == shape(record(True))
    return {"signal": shape(last["signal"]), "beside": sorted({*last} - {*before})}


SURFACES: dict[str, Callable[[], Any]] = {
    "record_formed": lambda: shape(record(True)),
    "record_unformed": lambda: shape(record(False)),
    "wandb_keys": wandb_keys,
    "tensorboard_tags": tensorboard_tags,
    "show_json": show_json,
    "public_names": lambda: sorted(sinktrack.__all__),
}


CLI_PAGE = DOCS / "cli.md"


def cli_page() -> str:
    """Typer's page of all commands."""
    command = [sys.executable, "-m", "typer", "sinktrack.cli.commands", "utils", "docs"]
    done = subprocess.run(
        [*command, "--name", "sinktrack"], capture_output=True, text=True, check=True
    )
    text = html.unescape(done.stdout).replace("# `sinktrack`", "# Command line", 1)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def test_the_page_of_the_command_line_is_that_of_its_help() -> None:
    if tuple(map(int, version("typer").split(".")[:2])) < (0, 26):
        pytest.skip("this typer writes `FILE` where later ones write `{FILE}`")
    assert CLI_PAGE.read_text() == cli_page(), RENEW


def test_the_api_page_has_every_public_name() -> None:
    page = (CLI_PAGE.parent / "api.md").read_text()
    callbacks = {
        name
        for file in (CLI_PAGE.parents[1] / "callbacks").glob("*.py")
        for name in re.findall(r"^class (SinkTrack\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(callbacks) > 4
    lacking = [name for name in (*sinktrack.__all__, *callbacks) if f".{name}\n" not in page]
    assert not lacking


@pytest.mark.parametrize("name", SURFACES)
def test_what_others_read_stays(name: str) -> None:
    wanted = json.loads((GOLDEN / f"{name}.json").read_text())
    assert SURFACES[name]() == wanted, RENEW


def test_the_old_keys_are_there() -> None:
    assert {f"sinktrack/{key}" for key in OLD_KEYS} <= {*wandb_keys()}


if __name__ == "__main__":
    for surface, of in SURFACES.items():
        text = json.dumps(of(), indent=1) + "\n"
        (GOLDEN / f"{surface}.json").write_text(text)
    CLI_PAGE.write_text(cli_page())
