"""Megatron's own training loops with the callback, plugged in as the docs say.

``megatron.training`` is in the wheels of megatron-core since 0.17.1, which want Python 3.12;
Megatron Bridge is a package of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sinktrack import Run, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.source import open as open_source
from sinktrack.demo import AGREEMENT, largest_difference
from sinktrack.loggers.curves import metrics
from tests.helpers.commands import launch
from tests.helpers.wandb_files import read_back

pytest.importorskip("megatron.core")

from tests.helpers import megatron_writers
from tests.helpers.megatron_pretrain import PROBE

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron.training") is None,
        reason="this megatron-core has no megatron.training",
    ),
]

CASES = {
    "dense": (1, ""),
    "data parallel, overlapped": (
        2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "experts": (2, "--num-experts 4 --moe-router-topk 2 --expert-model-parallel-size 2 "
                   "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"),
    "stages": (2, "--pipeline-model-parallel-size 2"),
    "virtual stages": (
        2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "context": (2, "--context-parallel-size 2"),
    "tensors of experts": (2, "--num-experts 4 --moe-router-topk 2 --tensor-model-parallel-size 2 "
                              "--expert-tensor-parallel-size 2 --sequence-parallel"),
    "further tokens": (1, "--mtp-num-layers 1"),
    "half precision": (1, "--fp16 --initial-loss-scale 65536 --loss-scale-window 3"),
    "recomputed": (1, "--recompute-granularity full --recompute-method uniform "
                      "--recompute-num-layers 1 "
                      "--cross-entropy-loss-fusion --cross-entropy-fusion-impl native"),
    "hybrid": (1, "--hybrid-layer-pattern *-*E --num-experts 4 --moe-router-topk 2 "
                  "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 "
                  "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec"),
}  # fmt: skip


def losses(text: str) -> dict[str, list[str]]:
    """What Megatron printed of each iteration and evaluation, to the last digit."""
    return {
        name: re.findall(pattern, text)
        for name, pattern in (
            ("training", r"iteration +(\d+)/.*?lm loss: (\S+)"),
            ("validation", r"validation loss at (iteration .*?\| lm loss value: \S+)"),
        )
    }


@pytest.mark.parametrize("case", CASES)
def test_pretrain(case: str, tmp_path: Path) -> None:
    """Bit-identical training, over a resume; what is saved is what was measured; no row is lost."""
    if case == "hybrid":
        pytest.importorskip("megatron.core.models.hybrid")
    processes, text = CASES[case]
    arguments = text.split()
    plain, tracked, run = (str(tmp_path / name) for name in ("plain", "tracked", "run"))
    logged = ["--wandb-project", "megatron", "--wandb-exp-name", "one", "--wandb-save-dir", tracked]
    logged += ["--tensorboard-dir", str(tmp_path / "board")]  # without, nothing goes to W&B
    found: dict[str, list[dict[str, list[str]]]] = {plain: [], tracked: []}
    # With torch's Adam, as here, Megatron itself cannot resume a distributed optimizer.
    resumes = "distributed-optimizer" not in text
    for more in (["--exit-interval", "4"], []) if resumes else ([],):
        for out, written, log in ((plain, "-", []), (tracked, run, logged)):
            given = [out, written, *arguments, *log, *more]
            found[out].append(losses(launch(processes, "megatron_pretrain.py", *given)))
    assert found[plain] == found[tracked]
    # the growing loss scale overflows once, and that iteration prints no loss
    told = [4, 3 if case == "half precision" else 4] if resumes else [8]
    assert [len(half["training"]) for half in found[plain]] == told
    assert [len(half["validation"]) for half in found[plain]] == ([2, 4] if resumes else [6])

    assert_recorded(run, [2, 4, 6, 8])
    assert_saved(plain, tracked, run, tmp_path, 2e-3 if "--fp16" in arguments else 2 * AGREEMENT)
    assert_logged(tracked, run, 1 + resumes, tmp_path)


WRITERS = {
    "NVRx": (1, "", True),
    "NVRx through shared memory": (1, "--async-ckpt-use-cpu-shm", True),
    "NVRx, experts": (
        2, "--num-experts 4 --moe-router-topk 2 --expert-model-parallel-size 2", True,
    ),
    "NVRx, distributed optimizer": (
        2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", False,
    ),
    "core's own, stages": (
        2, "--async-strategy mcore --pipeline-model-parallel-size 2", True,
    ),
    "core's own, distributed optimizer": (
        2, "--async-strategy mcore --use-distributed-optimizer", False,
    ),
}  # fmt: skip


def needs_nvrx() -> None:
    """Skip where the package of NVRx's writers is not, or is too old: Megatron wants 0.6."""
    pytest.importorskip("nvidia_resiliency_ext", "0.6")


@pytest.mark.parametrize("case", WRITERS)
def test_saved_later(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of asynchronous saves, which training, or its end, overtakes; no writer is left."""
    processes, text, resumes = WRITERS[case]
    if "mcore" not in text:
        needs_nvrx()
    plain, tracked, run = (str(tmp_path / name) for name in ("plain", "tracked", "run"))
    monkeypatch.setenv("LAUNCHED_FOR", run)
    arguments = ["--async-save", "--use-persistent-ckpt-worker", *text.split()]
    arguments += ["--train-iters", "14", "--lr-decay-iters", "14"]
    found: dict[str, list[dict[str, list[str]]]] = {plain: [], tracked: []}
    for last, more in ((8, ["--exit-interval", "8"]), (14, []))[not resumes :]:
        for out, written in ((plain, "-"), (tracked, run)):
            said = launch(processes, "megatron_pretrain.py", out, written, *arguments, *more)
            found[out].append(losses(said))
            assert processes_of(run) == []
            assert_overtaken(said, last)
    assert found[plain] == found[tracked]
    assert sum(len(half["training"]) for half in found[plain]) == 14
    assert_recorded(run, [2, 4, 6, 8, 10, 12, 14])
    assert_saved(plain, tracked, run, tmp_path, saved_at=[4, 8, 12, 14])


def processes_of(run: str) -> list[str]:
    """The commands that still run of those launched for a test."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"LAUNCHED_FOR={run}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def assert_overtaken(said: str, last: int) -> None:
    """Training went on during each save, up to its last iteration."""
    told = re.findall(r"(scheduled|successfully|\](?= iteration)) [^\]\n]*?iteration +(\d+)", said)
    events = [(what, int(step)) for what, step in told]
    saved = [step for what, step in events if what == "successfully"]
    assert saved == [step for what, step in events if what == "scheduled"] != []
    for step in saved:
        begun, ended = (events.index((what, step)) for what in ("scheduled", "successfully"))
        meanwhile = [what for what, _ in events[begun:ended]].count("]")
        assert meanwhile >= min(megatron_writers.ITERATIONS, last - step)


LOGGED = {
    "every third line, in the default directory": (1, "--log-interval 3", False),
    "resumed under one id by two": (2, "--log-interval 3", True),
}  # fmt: skip


@pytest.mark.parametrize("case", LOGGED)
def test_no_row_is_lost(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's rows with the callback are those of a training without it, and ours."""
    processes, text, resumes = LOGGED[case]
    where, run = tmp_path / "wandb", str(tmp_path / "run")
    if resumes:
        monkeypatch.setenv("WANDB_RUN_ID", "one")
        monkeypatch.setenv("WANDB_RESUME", "allow")
    found = []
    for out, written in ((tmp_path / "plain", "-"), (tmp_path / "tracked", run)):
        given = [str(out), written, *text.split(), "--tensorboard-dir", str(out / "board")]
        given += ["--wandb-project", "megatron", "--wandb-exp-name", "one"]
        if resumes:
            given += ["--wandb-save-dir", str(where / out.name)]
        for more in (["--exit-interval", "4"], []) if resumes else ([],):
            launch(processes, "megatron_pretrain.py", *given, *more)
        files = where / out.name if resumes else out / "wandb"
        found.append(rows_below(files, tmp_path / f"read-{out.name}"))
        assert len(list(files.glob("wandb/offline-run-*"))) == 1 + resumes
    plain, tracked = found
    steps = sorted({row["_step"] for row in plain})
    assert steps and all(plain)
    for step in steps:
        theirs, with_ours = (
            {key: value for row in rows if row["_step"] == step for key, value in row.items()}
            for rows in (plain, tracked)
        )
        assert theirs.keys() <= with_ours.keys()
        for key in theirs:
            if "loss" in key or key == "learning-rate":
                assert with_ours[key] == theirs[key]
    assert_ours(run, tracked)


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None, reason="Megatron Bridge is not installed"
)
@pytest.mark.parametrize("processes", [1, 2])
def test_bridge(processes: int, tmp_path: Path) -> None:
    """The same of Megatron Bridge's `pretrain` with its callbacks, over a resume."""
    plain, tracked, run = (str(tmp_path / name) for name in ("plain", "tracked", "run"))
    found: dict[str, list[dict[str, list[str]]]] = {plain: [], tracked: []}
    for until in ("4", "99"):
        for out, written, project in ((plain, "-", []), (tracked, run, ["bridge"])):
            given = [out, written, until, *project]
            found[out].append(losses(launch(processes, "megatron_bridge_pretrain.py", *given)))
    assert found[plain] == found[tracked]
    assert [len(half["training"]) for half in found[plain]] == [4, 4]
    assert all(half["validation"] for half in found[plain])
    assert_recorded(run, [0, 3, 4, 6, 8])
    assert_saved(plain, tracked, run, tmp_path)
    assert_logged(tracked, run, 2, tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None, reason="Megatron Bridge is not installed"
)
@pytest.mark.parametrize(("strategy", "processes"), [("nvrx", 2), ("mcore", 1)])
def test_bridge_saved_later(
    strategy: str, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same of Megatron Bridge's, announced later, or when training waits to exit."""
    needs_nvrx()  # Bridge imports it whichever writes
    plain, tracked, run = (str(tmp_path / name) for name in ("plain", "tracked", "run"))
    monkeypatch.setenv("LAUNCHED_FOR", run)
    found: dict[str, list[dict[str, list[str]]]] = {plain: [], tracked: []}
    for last, until in ((7, "-7"), (14, "99")):  # a signal in the seventh iteration: not foretold
        for out, written in ((plain, "-"), (tracked, run)):
            given = [out, written, until, "", strategy]
            said = launch(processes, "megatron_bridge_pretrain.py", *given)
            found[out].append(losses(said))
            assert processes_of(run) == []
            assert_overtaken(said, last)
    assert found[plain] == found[tracked]
    assert [len(half["training"]) for half in found[plain]] == [7, 7]
    assert_recorded(run, [0, 3, 4, 6, 7, 8, 9, 12, 14])
    assert_saved(plain, tracked, run, tmp_path, saved_at=[4, 7, 8, 12, 14])


def assert_recorded(run: str, steps: list[int]) -> None:
    records = Run.read(run).records
    assert [record["step"] for record in records] == steps
    assert [record["tokens"] for record in records] == [step * 8 * 16 for step in steps]


def assert_saved(
    plain: str,
    tracked: str,
    run: str,
    tmp_path: Path,
    within: float = 2 * AGREEMENT,
    saved_at: Sequence[int] = (4, 8),
) -> None:
    """Both saved the same weights, and their scan gives the records of the training."""
    records = Run.read(run).records
    saved = [discover(Path(where)) for where in (plain, tracked)]
    assert [checkpoint.step for checkpoint in saved[0]] == list(saved_at)
    for one, other in zip(*saved, strict=True):
        assert one.step == other.step
        left, right = open_source(one), open_source(other)
        assert left.names() == right.names()
        assert all(torch.equal(left.slice(n)[...], right.slice(n)[...]) for n in left.names())
    for offline in scan(tracked, probe=PROBE, run=tmp_path / "scanned"):
        (online,) = (record for record in records if record["step"] == offline["step"])
        assert online["weights"] == offline["weights"] is not None
        for record in (online, offline):
            for name in ("model", "weights", "missing"):
                record.pop(name, None)
            for sink in record["sinks"]:
                sink.pop("total_effects", None)
        assert largest_difference(online, offline) <= within


def assert_logged(tracked: str, run: str, parts: int, tmp_path: Path) -> None:
    """Every row of Megatron's is in W&B, and every record with its keys."""
    rows = rows_below(Path(tracked), tmp_path)
    assert len(list(Path(tracked).glob("wandb/offline-run-*"))) == parts
    assert {row["_step"] for row in rows if "lm loss" in row} == set(range(1, 9))
    assert any("validation" in key for row in rows for key in row)
    assert_ours(run, rows)


def rows_below(directory: Path, apart: Path) -> list[dict[str, Any]]:
    """All rows of the offline runs in a directory, in their order."""
    rows = []
    for part, file in enumerate(sorted(directory.glob("wandb/offline-run-*"))):
        here = apart / str(part)
        shutil.copytree(file, here / "wandb" / file.name)
        rows += read_back(here)[0]
    return rows


def assert_ours(run: str, rows: list[dict[str, Any]]) -> None:
    """Every record is in the rows, once, with all its keys."""
    measured = {record["step"]: metrics(record) for record in Run.read(run).records}
    ours = [row for row in rows if "sinktrack/step" in row]
    assert [row["sinktrack/step"] for row in ours] == sorted(measured)
    for row in ours:
        assert all(row[key] == value for key, value in measured[row["sinktrack/step"]].items())
