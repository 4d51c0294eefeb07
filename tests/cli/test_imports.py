"""What is light stays light: the command and the records do without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import sinktrack
from sinktrack.signal.quantiles import ranks, student_t, theil_sen
from tests.helpers.synthetic import synthetic_records

HEAVY = "torch", "transformers", "scipy", "lightning", "pandas", "plotly", "wandb"
COMMANDS = "demo", "scan", "show", "report", "export", "publish", "probe"


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(*arguments: str) -> str:
    """What the command prints; fails where it imports what is heavy."""
    return python(
        "import sys\n"
        "from sinktrack.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"heavy = set({HEAVY}) & sys.modules.keys()\n"
        "assert not heavy, heavy\n",
        *arguments,
    )


def test_version_and_help_import_nothing_heavy() -> None:
    assert command("--version") == f"sinktrack {sinktrack.__version__}\n"
    assert "Exit codes" in command("--help")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str) -> None:
    said = command(name, "--help")
    assert f"Example: sinktrack {name}" in said
    assert "<bool>" not in said


def test_show_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in synthetic_records())
    )
    assert "sink rate" in command("show", str(tmp_path))
    assert '"signal"' in command("show", "--json", str(tmp_path))


def test_records_are_read_and_written_long_without_torch() -> None:
    python(
        "import sys\n"
        "import sinktrack.metrics, sinktrack.records.rows, sinktrack.signal\n"
        "import sinktrack.views.terminal, sinktrack.views.export, sinktrack.views.report\n"
        "import sinktrack.loggers.curves\n"
        "assert sinktrack.metrics.FIELDS and sinktrack.Run\n"
        f"heavy = set({HEAVY}) & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )


@pytest.mark.parametrize(
    "first", ["sinktrack.scan", "sinktrack.measure", "sinktrack.scan.engines", "sinktrack.figures"]
)
def test_names_are_what_they_are_in_whatever_order(first: str) -> None:
    python(
        f"import {first}\n"
        "import importlib, sys, types\n"
        "import sinktrack as st\n"
        "for name in ('measure', 'scan'):\n"
        "    importlib.import_module(f'sinktrack.{name}')\n"
        "    assert isinstance(getattr(st, name), types.FunctionType), name\n"
        "    assert isinstance(sys.modules[f'sinktrack.{name}'], types.ModuleType)\n"
        "assert isinstance(st.signal, types.ModuleType)\n"
        "assert isinstance(st.figures, types.ModuleType)\n"
        "from sinktrack import *\n"
        "assert set(st.__all__) <= set(dir(st)) and set(st.__all__) <= set(globals())\n"
        "assert scan is st.scan and Run is st.Run\n"
        "try:\n"
        "    st.nothing\n"
        "except AttributeError as error:\n"
        "    assert 'nothing' in str(error)\n"
    )


def test_all_names_are_there() -> None:
    for name in sinktrack.__all__:
        assert getattr(sinktrack, name) is not None
    assert not hasattr(sinktrack, "nothing")


def test_without_fcntl() -> None:
    python(
        "import sys\n"
        "sys.modules['fcntl'] = None\n"
        "import sinktrack as st\n"
        "from sinktrack.records import locks\n"
        "assert locks.fcntl is None\n"
        "st.Run, st.Probe\n"
    )


@pytest.mark.parametrize(("missing", "extra"), [("typer", "cli"), ("rich", "cli")])
def test_the_command_names_the_extra_that_it_lacks(missing: str, extra: str) -> None:
    done = subprocess.run(
        [
            sys.executable, "-c",
            f"import sys; sys.modules[{missing!r}] = None\n"
            "from sinktrack.cli import main; main()",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        f"sinktrack: {missing} is not installed; run: pip install 'sinktrack[{extra}]'\n"
    )


@pytest.mark.parametrize("free", [1, 2, 3, 4, 5, 24, 25, 1000, 1001])
@pytest.mark.parametrize("tail", [0.5, 0.3, 0.025, 0.025 / 7, 0.025 / 5000])
def test_student_t(tail: float, free: int) -> None:
    assert student_t(tail, free) == pytest.approx(stats.t.isf(tail, free), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_theil_sen_and_ranks(tied: bool) -> None:
    random = np.random.default_rng(3)
    for _ in range(50):
        count = int(random.integers(2, 25))
        x = np.cumsum(random.integers(1, 9, count)).astype(float)
        y = random.integers(0, 4, count).astype(float) if tied else random.normal(size=count)
        slope, _, low, high = stats.theilslopes(y, x, alpha=0.95)
        assert theil_sen(x, y, 0.95) == pytest.approx((slope, low, high), abs=0)
        assert (ranks(y) == stats.rankdata(y)).all()
