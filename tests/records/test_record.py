"""Records survive crashes, concurrency and full disks; nothing wrong is let in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinktrack import Probe, ProbeError, RecordError, Run
from sinktrack.records.locks import let_go
from sinktrack.records.run import to_json, versions
from tests.helpers.commands import child
from tests.helpers.records import PROBE, record
from tests.helpers.synthetic import synthetic_records


def test_round_trip(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "a" / "run", PROBE)
    run.append(record(20, gain=torch.tensor([0.5, torch.nan])))
    run.append(record(3, p0=np.float32(0.25)))
    again = Run.open(tmp_path / "a" / "run")
    assert again.probe == PROBE and again.steps == [3, 20] and len(again) == 2
    assert again.records[1]["gain"] == [0.5, None]
    assert again.records[0]["p0"] == 0.25
    assert json.loads((tmp_path / "a" / "run" / "run.json").read_text())["probe"] == PROBE.digest


def test_the_last_of_two_counts(tmp_path: Path) -> None:
    run = Run.open(tmp_path, PROBE)
    run.append(record(5, sink_rate=0.1))
    run.append(record(5, sink_rate=0.2))
    assert [found["sink_rate"] for found in Run.read(tmp_path).records] == [0.2]
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2


@given(st.integers(1, 200))
def test_a_torn_last_line_is_dropped_and_overwritten(kept: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        run = Run.open(directory, PROBE)
        run.append(record(1))
        line = (Path(directory) / "records.jsonl").read_bytes()
        with (Path(directory) / "records.jsonl").open("ab") as file:
            file.write(line[: min(kept, len(line) - 1)])
        assert Run.read(directory).steps == [1]
        run.append(record(2))
        assert Run.read(directory).steps == [1, 2]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"schema": 1}, "record of schema 1; this run has 2"),
        ({"probe": "feed"}, "record of probe feed, but .* another run directory"),
        ({"step": -1}, "step -1"),
        ({"step": 1.5}, "step 1.5"),
        ({"step": True}, "step True"),
        ({"gain": [1.0, float("inf")]}, "gain is infinite"),
    ],
)
def test_refusals_write_nothing(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    run = Run.open(tmp_path, PROBE)
    run.append(record(1))
    before = (tmp_path / "records.jsonl").read_bytes()
    with pytest.raises(RecordError, match=message):
        run.append(record(2) | bad)
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_another_probe_is_refused(tmp_path: Path) -> None:
    other = Probe.random(9, sequences=2, length=4, seed=1)
    Run.open(tmp_path, PROBE)
    path = tmp_path / "probe.safetensors"
    with pytest.raises(RecordError, match=f"{PROBE.digest}, not .* another .*, or remove {path}"):
        Run.open(tmp_path, other)
    with pytest.raises(RecordError, match=f"record of probe {other.digest}, but .*{PROBE.digest}"):
        Run.open(tmp_path, PROBE).append(record(1, probe=other.digest))
    path.unlink()
    assert Run.open(tmp_path, other).probe == other
    path.unlink()
    run = Run.open(tmp_path, PROBE)
    run.append(record(1))
    with pytest.raises(RecordError, match=f"records of probe {PROBE.digest}, not .* another run"):
        Run.open(tmp_path, other)


def test_two_trainings_on_one_run_are_told(tmp_path: Path) -> None:
    mine = Run.open(tmp_path, PROBE)
    assert mine.also_recorded_by() is None
    assert Run.open(tmp_path).also_recorded_by() is None, "another tracker of this process"
    code = """
        import sys; sys.path.insert(0, sys.argv[1])
        from tests.records.test_record import *
        print(Run.open(sys.argv[2]).also_recorded_by())
    """

    def other() -> str:
        done = subprocess.run(child(code, tmp_path), capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1]

    assert other().startswith(f"process {os.getpid()} on ")
    del mine  # as when a notebook's cell runs again
    assert other().startswith(f"process {os.getpid()} on ")
    started = os.fork()
    if not started:  # it holds nothing of its parent's, and is not told of it
        os._exit(0 if Run.open(tmp_path).also_recorded_by() is None else 1)
    assert os.waitpid(started, 0)[1] == 0
    let_go()
    assert other() == "None"


def test_a_run_without_a_probe_keeps_to_that_of_its_records(tmp_path: Path) -> None:
    """As when records were copied without ``probe.safetensors``; the probe itself may come back."""
    run = Run.open(tmp_path)
    run.append(record(1))
    with pytest.raises(RecordError, match="record of probe feed, but"):
        run.append(record(2, probe="feed"))
    with pytest.raises(RecordError, match=f"holds records of probe {PROBE.digest}, not"):
        Run.open(tmp_path, Probe.random(9, sequences=2, length=4, seed=1))
    assert Run.open(tmp_path, PROBE).steps == [1] and Run.read(tmp_path).probe == PROBE


def test_what_was_read_before_grows_with_the_file(tmp_path: Path) -> None:
    """Also where another process writes, and where both do in turns."""
    one, other = Run.open(tmp_path, PROBE), Run.open(tmp_path)
    for step in range(0, 8, 2):
        assert one.steps == other.steps == list(range(step))
        one.append(record(step))
        assert one.steps == list(range(step + 1))
        other.append(record(step + 1))
        assert other.steps == list(range(step + 2))
    one.records.clear()
    assert len(one) == len(other) == 8


def test_damage_is_named(tmp_path: Path) -> None:
    run = Run.open(tmp_path, PROBE)
    run.append(record(1))
    file = tmp_path / "records.jsonl"
    good = file.read_bytes()
    for bad in (b"{not json}\n", b"[1]\n", b"{}\n"):
        file.write_bytes(good + bad)
        with pytest.raises(RecordError, match="line 2 is not a record"):
            _ = Run.read(tmp_path).records
    file.write_bytes(good + good.replace(b'"schema": 2', b'"schema": 7'))
    with pytest.raises(RecordError, match="line 2 has schema 7, this version reads 1"):
        _ = Run.read(tmp_path).records
    (tmp_path / "run.json").write_text('{"schema": 3}')
    with pytest.raises(RecordError, match="run.json has schema 3"):
        Run.open(tmp_path)


def test_not_a_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RecordError, match="not a run directory"):
            Run.read(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot write to the run directory .*file"):
        Run.open(tmp_path / "file")
    assert not (tmp_path / "missing").exists()


APPEND = """
    import sys; sys.path.insert(0, sys.argv[1])
    from tests.records.test_record import *
    run = Run.open(sys.argv[2], PROBE)
    for step in range(int(sys.argv[3]), int(sys.argv[4]), 2):
        run.append(record(step, filler="x" * 20000))
        print(step, flush=True)
"""


@pytest.mark.parametrize("after", [1, 3, 7, 12])
def test_a_killed_process_loses_nothing_it_reported(tmp_path: Path, after: int) -> None:
    process = subprocess.Popen(
        child(APPEND, tmp_path, 0, 100000), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    reported = [int(process.stdout.readline()) for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    run = Run.open(tmp_path, PROBE)
    assert set(reported) <= set(run.steps)
    run.append(record(99999))
    assert run.steps == [*range(0, 2 * (len(run) - 1), 2), 99999]


def test_two_processes_append_side_by_side(tmp_path: Path) -> None:
    Run.open(tmp_path, PROBE)
    both = [subprocess.Popen(child(APPEND, tmp_path, start, 80), stdout=subprocess.DEVNULL)
            for start in (0, 1)]  # fmt: skip
    assert [process.wait() for process in both] == [0, 0]
    assert Run.read(tmp_path).steps == list(range(80))


def test_a_full_disk_leaves_earlier_records(tmp_path: Path) -> None:
    run = Run.open(tmp_path, PROBE)
    run.append(record(1))
    before = (tmp_path / "records.jsonl").read_bytes()
    code = """
        import sys; sys.path.insert(0, sys.argv[1])
        import resource, signal
        from tests.records.test_record import *
        run = Run.open(sys.argv[2], PROBE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            run.append(record(2, filler="x" * 20000))
        except RecordError as error:
            print(error)
    """
    done = subprocess.run(child(code, tmp_path), capture_output=True, text=True, check=True)
    assert "earlier records are untouched" in done.stdout
    assert (tmp_path / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("type", "llama"), ("blocks", 5), ("heads", 1), ("experts", None)],
)
def test_another_model_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    model = {"type": "mixtral", "blocks": 4, "heads": 4, "experts": 8}
    run = Run.open(tmp_path, PROBE)
    run.append(record(1, model=model, source="callback"))
    run.append(record(2, model=model, source="checkpoint-2"))
    with pytest.raises(RecordError, match=f"with {name} {value}, but .* of one with {name}"):
        run.append(record(3, model=model | {name: value}, source="checkpoint-3"))
    assert run.steps == [1, 2]
    run.append(record(3, model=model, source="checkpoint-3"))
    run.append(record(4, model=model | {"type": "MixtralModel"}, source="callback"))
    with pytest.raises(RecordError, match="with type GPTModel, but .* with type MixtralModel"):
        run.append(record(5, model=model | {"type": "GPTModel"}, source="callback"))
    with pytest.raises(RecordError, match="with blocks None, heads None, experts None, but"):
        run.append(record(5, model=None, source="checkpoint-5"))


def test_a_record_without_a_model_is_followed_by_any(tmp_path: Path) -> None:
    run = Run.open(tmp_path, PROBE)
    run.append(record(1, model=None))
    run.append(record(2, model={"type": "llama", "blocks": 2}))
    assert run.steps == [1, 2]


def test_a_model_and_its_checkpoints_may_be_named_differently(tmp_path: Path) -> None:
    model = {"type": "GPTModel", "blocks": 4, "heads": 4, "experts": 8}
    run = Run.open(tmp_path, PROBE)
    run.append(record(1, model=model, source="callback"))
    run.append(record(1, model=model | {"type": "mixtral"}, source="iter_0000001"))
    assert run.records[0]["model"]["type"] == "mixtral"


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PROBE.save(tmp_path / "probe")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProbeError, match="No space left on device"):
        Probe.random(9, 2, 4).save(tmp_path / "probe")
    assert [file.name for file in tmp_path.iterdir()] == ["probe"]
    assert Probe.load(tmp_path / "probe") == PROBE


def test_no_permission_to_write(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", PROBE)
    run.append(record(1))
    for path in (tmp_path / "run" / "records.jsonl", tmp_path / "run"):
        path.chmod(0o555)
    for parent in tmp_path.parents:  # let an unprivileged user in
        if os.access(parent, os.W_OK) and str(parent).startswith("/tmp/pytest"):
            parent.chmod(0o755)
    tmp_path.chmod(0o755)
    code = """
        import os, sys; sys.path.insert(0, sys.argv[1])
        from tests.records.test_record import *
        if os.getuid() == 0:
            os.setuid(65534)
        for directory in (sys.argv[2], sys.argv[2] + "/new"):
            try:
                Run.open(directory, PROBE)
            except RecordError as error:
                print(error)
    """
    done = subprocess.run(child(code, tmp_path / "run"), capture_output=True, text=True)
    assert done.stdout.count("cannot write to the run directory") == 2, done.stderr
    assert done.stdout.count("Permission denied; give another") == 2
    assert Run.read(tmp_path / "run").steps == [1]


def test_to_pandas(tmp_path: Path) -> None:
    run = Run.open(tmp_path, PROBE)
    assert list(run.to_pandas().columns)[:2] == ["tokens", "source"]
    run.append(record(4, norm_ratio=[1.0, 2.0], intervals={"sink_rate": [0.4, 0.6]}))
    run.append(record(2, norm_ratio=[1.0, float("nan")]))
    table = run.to_pandas()
    assert table.index.tolist() == [2, 4]
    assert table.loc[4, "norm_ratio_01"] == 2.0 and np.isnan(table.loc[2, "norm_ratio_01"])
    assert table.loc[4, ["sink_rate_low", "sink_rate_high"]].tolist() == [0.4, 0.6]


def test_to_pandas_has_every_number_of_a_record_but_lists(tmp_path: Path) -> None:
    run = Run.open(tmp_path)
    (first,) = synthetic_records(steps=[7])
    run.append(first)
    (row,) = run.to_pandas().reset_index().to_dict("records")
    wanted = {
        name: value
        for name, value in first.items()
        if not isinstance(value, list | dict) and name != "schema"
    }
    for name, bounds in first["intervals"].items():
        if name != "concentration":
            wanted |= {f"{name}_low": bounds[0], f"{name}_high": bounds[1]}
    for name, values in first.items():
        if isinstance(values, list) and not any(isinstance(v, dict | list | str) for v in values):
            wanted |= {f"{name}_{block:02d}": value for block, value in enumerate(values)}
    assert row.keys() == wanted.keys()
    for name, value in wanted.items():
        assert row[name] == value or (value is None and np.isnan(row[name])), name


def test_versions_of_what_is_installed() -> None:
    found = versions("numpy", "nonesuch")
    assert found.keys() == {"sinktrack", "torch", "transformers", "numpy"}
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__


def test_a_run_without_a_probe_is_described(tmp_path: Path) -> None:
    Run.open(tmp_path / "run")
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["schema"] == 2 and described["probe"] is None
    created = datetime.strptime(described["created"], "%Y-%m-%dT%H:%M:%S%z")
    assert 0 <= time.time() - created.timestamp() < 60
    Run.open(tmp_path / "run", PROBE)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["probe"] == PROBE.digest


@pytest.mark.parametrize("length", [9000, 65535, 65536, 65537, 200_000])
def test_a_torn_line_longer_than_the_next_record_leaves_nothing(
    tmp_path: Path, length: int
) -> None:
    """Also where its start is just, or just not, in the part of the file that is read at once."""
    run = Run.open(tmp_path, PROBE)
    run.append(record(1))
    with (tmp_path / "records.jsonl").open("ab") as file:
        file.write(b'{"schema": 2, "step": 2, "filler": "'.ljust(length, b"x"))
    run.append(record(3))
    assert (tmp_path / "records.jsonl").read_bytes().count(b"x") == 0
    assert run.steps == [1, 3] and Run.read(tmp_path).steps == [1, 3]


def test_a_run_that_is_opened_again_keeps_its_description(tmp_path: Path) -> None:
    Run.open(tmp_path, PROBE)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"created": "long ago"}))
    Run.open(tmp_path, PROBE)
    Run.open(tmp_path)
    assert json.loads(file.read_text())["created"] == "long ago"


def test_a_run_is_read_by_its_records_alone(tmp_path: Path) -> None:
    run = Run.open(tmp_path, PROBE)
    assert repr(run) == f"Run({str(tmp_path)!r}: 0 records)"
    run.append(record(5))
    run.append(record(1200))
    (tmp_path / "run.json").unlink()
    assert repr(Run.read(tmp_path)) == f"Run({str(tmp_path)!r}: 2 records, steps 5 to 1,200)"
    (tmp_path / "run.json").write_text('{"schema": 4}')
    for opening in (Run.read, Run.open, lambda path: Run.open(path, PROBE)):
        with pytest.raises(RecordError, match="run.json has schema 4, this version reads 1"):
            opening(tmp_path)
        assert (tmp_path / "run.json").read_text() == '{"schema": 4}'
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RecordError, match="run.json is damaged; remove it"):
        Run.read(tmp_path)


def test_json_values() -> None:
    value = {"a": torch.tensor([1, 2]), "b": (np.int64(3), float("nan")), "c": {"d": None}}
    assert to_json(value) == {"a": [1, 2], "b": [3, None], "c": {"d": None}}


@pytest.mark.parametrize("same", [True, False])
def test_another_process_saves_its_probe_meanwhile(
    same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for a probe and the records: the same one is no other."""
    theirs = PROBE if same else Probe.random(9, sequences=2, length=4, seed=8)
    run = Run(tmp_path)
    path = tmp_path / "probe.safetensors"

    def history(run: Run) -> list[Any]:
        theirs.save(path)
        return []

    monkeypatch.setattr(Run, "history", property(history))
    if same:
        run.adopt(PROBE)
        assert run.probe == PROBE
    else:
        with pytest.raises(RecordError, match=f"holds probe {theirs.digest}, not {PROBE.digest}"):
            run.adopt(PROBE)
