"""The append-only record file of a run."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinktrack import atomic, text
from sinktrack.errors import AnotherModel, RecordError, require
from sinktrack.metrics import FIELDS
from sinktrack.records import lineage, locks, marks

if TYPE_CHECKING:
    from sinktrack.probe import Probe

_log = logging.getLogger("sinktrack")
_unlocked: set[Path] = set()
"""Run directories of which this process has said that they cannot be locked."""
SCHEMA = 2
"""Of the records that are written; 2 weights shares by readers, where 1 took one block's."""
READABLE = (1, SCHEMA)
_ABOUT = ("tokens", "source", "seconds", "dtype", "weights", "probe")
"""What a table shows of a record beside what was measured."""


def versions(*more: str) -> dict[str, str]:
    """Of the packages that the numbers depend on, and of some more."""
    names = ("sinktrack", "torch", "transformers", *more)
    return {name: version for name in names if (version := _installed(name)) is not None}


@cache
def _installed(name: str) -> str | None:
    """As installed when it was first asked for, which is what runs, or None where it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class Run:
    """A run directory: ``records.jsonl``, ``run.json`` and ``probe.safetensors``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._probe: Probe | None = None
        self._file = directory / "records.jsonl"
        self._seen: tuple[int, ...] = ()
        self._told = False
        self._written: list[dict[str, Any]] = []

    @property
    def probe(self) -> Probe | None:
        """The run's fixed batch; read when it is first asked for, as a probe needs torch.

        Raises:
            ProbeError: its file is damaged.
        """
        path = self.directory / "probe.safetensors"
        if self._probe is None and path.exists():
            from sinktrack.probe import Probe

            self._probe = Probe.load(path)
        return self._probe

    @classmethod
    def open(cls, directory: str | Path, probe: Probe | None = None) -> Run:
        """Open a run for reading and appending; make the directory if it is not there.

        Raises:
            RecordError: no permission, another schema, or the run holds another probe.
        """
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            run = cls(directory)
            run._check_schema()
            if probe is not None:
                run.adopt(probe)
            run._try_to_append()
            if not (directory / "run.json").exists():
                run._describe()
        except OSError as error:
            raise RecordError(
                f"cannot write to the run directory {directory}: {error.strerror}; give another"
            ) from error
        return run

    @classmethod
    def read(cls, directory: str | Path) -> Run:
        """Open an existing run for reading alone; nothing is written.

        Raises:
            RecordError: there is no run, or one of another schema.
        """
        directory = Path(directory)
        if not any((directory / name).exists() for name in ("run.json", "records.jsonl")):
            said = f"{directory} is not a run directory (no run.json, no records.jsonl)"
            below = sorted(path.parent for path in directory.glob("*/records.jsonl"))
            raise RecordError(f"{said}; there is {below[0]}" if below else said)
        run = cls(directory)
        run._check_schema()
        return run

    @property
    def records(self) -> list[dict[str, Any]]:
        """The line of training that led to the weights of today, one record a step, ascending.

        Of two records of one step the last counts; those that training left behind, when it went
        on from an older checkpoint, are in `history` alone.

        Raises:
            RecordError: a damaged line, or one of another schema.
        """
        return lineage.current(self.history)

    @property
    def written(self) -> list[dict[str, Any]]:
        """`history`, by its older name."""
        return self.history

    @property
    def history(self) -> list[dict[str, Any]]:
        """All records in the order in which they were written, also several of one step.

        Raises:
            RecordError: a damaged line, or one of another schema.
        """
        try:
            seen = _version(self._file.stat())
        except FileNotFoundError:
            return []
        if seen != self._seen:
            self._written = self._parse(self._file.read_bytes())
            self._seen = seen
        return list(self._written)

    @property
    def steps(self) -> list[int]:
        """Of `records`, ascending."""
        return [record["step"] for record in self.records]

    @property
    def marks(self) -> tuple[marks.Mark, ...]:
        """Steps at which something but the model changed, ascending.

        Raises:
            RecordError: a damaged line.
        """
        return marks.read(self.directory)

    def mark(self, step: int, what: str) -> None:
        """Note that something but the model changes at a step: a line on every curve.

        Trends are judged anew from there on. What the run has already is not noted twice.

        Args:
            step: from which on it holds.
            what: in a few words, as ``learning rate decays``.

        Raises:
            ValueError: no step, or nothing said.
            RecordError: the file cannot be written.
        """
        marks.append(self.directory, [marks.checked(step, what)])

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        steps = self.steps
        span = f", steps {steps[0]:,} to {steps[-1]:,}" if steps else ""
        return f"Run({str(self.directory)!r}: {len(steps)} records{span})"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """In a notebook: the run's figure, where plotly is installed."""
        from sinktrack import figures

        records = self.records
        return figures.shown(figures.training, records) if records else {}

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record and flush it to disk; whole or not at all. nan becomes null.

        Raises:
            AnotherModel: the run holds records of another model.
            RecordError: another schema or probe, no step, an infinity, or the write failed.
        """
        line = self._line(record)
        new = not self._file.exists()
        try:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                locks.lock(descriptor)
                known = _version(os.fstat(descriptor)) == self._seen
                end = _whole(descriptor)
                self._refuse_another(record, _last(descriptor, end))
                os.ftruncate(descriptor, end)
                os.lseek(descriptor, end, os.SEEK_SET)
                try:
                    if os.write(descriptor, line) != len(line):
                        raise OSError(28, os.strerror(28))
                    atomic.flush(descriptor)
                except OSError:
                    os.ftruncate(descriptor, end)
                    raise
                if known:  # spares a long run from being read again after each record
                    self._written.append(json.loads(line))
                    self._seen = _version(os.fstat(descriptor))
            finally:
                os.close(descriptor)
            if new:
                atomic.sync(self.directory)
        except OSError as error:
            raise RecordError(
                f"cannot append to {self._file}: {error.strerror}; earlier records are untouched"
            ) from error

    @contextmanager
    def claimed(self, part: str | None = None) -> Iterator[None]:
        """Keep other scanners off this run; a process that dies lets go.

        Args:
            part: of the archive that this scanner has; others may have the others.

        Raises:
            RecordError: another scanner has it, which is named.
        """
        path = self.directory / ("scan.lock" if part is None else f"scan-{part}.lock")
        try:
            descriptor, holder = locks.take(path)
        except OSError as error:
            raise RecordError(f"cannot write {path}: {error.strerror}") from error
        try:
            if holder is not None:
                raise RecordError(
                    f"{self.directory} is being scanned by {holder}; wait for it, or use another "
                    "run directory"
                )
            yield
        finally:
            os.close(descriptor)

    def also_recorded_by(self) -> str | None:
        """Another process in which a training records into this run; None where there is none.

        From then on others are told of this process, until it ends.
        """
        return locks.keep(self.directory.resolve() / "train.lock")

    def to_pandas(self) -> Any:
        """A DataFrame, one row per record, indexed by step; a column per block where it applies.

        Raises:
            MissingExtra: pandas is not installed.
        """
        pandas = require("pandas", "report")
        numbers = {name for name, field in FIELDS.items() if field.rows is None}
        scalars = [*_ABOUT, *(name for name in FIELDS if name in numbers and not FIELDS[name].axes)]
        by_block = [
            name
            for name, field in FIELDS.items()
            if field.axes in (("block",), ("boundary",)) and field.rows is None
        ]
        rows = []
        for record in self.records:
            row = {"step": record["step"]} | {name: record.get(name) for name in scalars}
            for name in record.get("intervals", {}).keys() & FIELDS.keys() & {*scalars}:
                low, high = record.get("intervals", {}).get(name) or (None, None)
                row |= {f"{name}_low": low, f"{name}_high": high}
            for name in by_block:
                for block, value in enumerate(record.get(name) or []):
                    row[f"{name}_{block:02d}"] = value
            rows.append(row)
        columns = None if rows else ["step", *scalars]
        return pandas.DataFrame(rows, columns=columns).set_index("step")

    def _try_to_append(self) -> None:
        """Do what `append` does, on a file without a name; say so once where nothing can be locked.

        Raises:
            OSError: one of it cannot be done here, so no record could be kept.
        """
        if self._file.exists():
            os.close(os.open(self._file, os.O_RDWR))
        with tempfile.TemporaryFile(dir=self.directory) as file:
            descriptor = file.fileno()
            locked = locks.lock(descriptor)
            os.write(descriptor, b"\n")
            atomic.flush(descriptor)
            _whole(descriptor)
            os.ftruncate(descriptor, 0)
        directory = self.directory.resolve()
        if not locked and directory not in _unlocked:
            _unlocked.add(directory)
            _log.warning(
                "the file system of %s has no locks: records are appended without; let one process "
                "at a time write into this run", self.directory,
            )  # fmt: skip

    def _line(self, record: Mapping[str, Any]) -> bytes:
        if record.get("schema") != SCHEMA:
            raise RecordError(f"record of schema {record.get('schema')}; this run has {SCHEMA}")
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise RecordError(f"record of step {step!r}; wanted an integer of 0 or more")
        return json.dumps(to_json(record), allow_nan=False).encode() + b"\n"

    def _refuse_another(self, record: Mapping[str, Any], last: Mapping[str, Any]) -> None:
        """Refuse a record of another probe or model than the last one's."""
        probe = self.probe.digest if self.probe else last.get("probe")
        if probe is not None and record.get("probe") != probe:
            raise RecordError(
                f"record of probe {record.get('probe')}, but {self.directory} holds probe {probe}; "
                "use another run directory"
            )
        if last.get("schema", SCHEMA) != SCHEMA and not self._told:
            self._told = True
            _log.warning(
                "%s holds records of schema %s, to which one of schema %s is added: depth and the "
                "first-two share of the two cannot be compared",
                self.directory, last["schema"], SCHEMA,
            )  # fmt: skip
        model, before = record.get("model") or {}, last.get("model") or {}
        names = ["blocks", "heads", "experts"]
        if (record.get("source") == "callback") == (last.get("source") == "callback"):
            names.insert(0, "type")  # Megatron's models and their checkpoints have two names
        differing = [name for name in names if name in before and before[name] != model.get(name)]
        if differing:
            theirs, ours = (
                ", ".join(f"{name} {of.get(name)}" for name in differing) for of in (model, before)
            )
            raise AnotherModel(
                f"record of a model with {theirs}, but {self.directory} holds records of one with "
                f"{ours}; use another run directory"
            )

    def _parse(self, data: bytes) -> list[dict[str, Any]]:
        records = []
        lines = data.split(b"\n")[:-1]  # what follows the last newline is torn
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                schema, _ = record["schema"], record["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise RecordError(
                    f"{self._file}, line {number} is not a record ({type(error).__name__}); remove "
                    "that line to go on with the others"
                ) from error
            if schema not in READABLE:
                raise RecordError(
                    f"{self._file}, line {number} has schema {schema}, this version reads "
                    f"{READABLE[0]} and {SCHEMA}; it was written by a newer one"
                )
            records.append(record)
        return records

    def adopt(self, probe: Probe) -> None:
        """Take a probe, where the run has none yet.

        Raises:
            RecordError: the run holds another probe.
            ProbeError, OSError: it cannot be written.
        """
        if self.probe == probe:
            return
        path = self.directory / "probe.safetensors"
        recorded = {record["probe"] for record in self.history}
        if recorded - {probe.digest}:
            raise RecordError(
                f"{self.directory} holds records of probe {', '.join(sorted(recorded))}, not "
                f"{probe.digest}; use another run directory"
            )
        held = self.probe  # another process of the same training may have saved it since
        if held is not None and held != probe:
            raise RecordError(
                f"{self.directory} holds probe {held.digest}, not {probe.digest}; use "
                f"another run directory, or remove {path}: no record was made with it yet"
            )
        probe.save(path)
        self._probe = probe
        self._describe()

    def _describe(self) -> None:
        content = {
            "schema": SCHEMA,
            "probe": self.probe.digest if self.probe else None,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        atomic.write(self.directory / "run.json", json.dumps(content).encode())

    def _check_schema(self) -> None:
        path = self.directory / "run.json"
        if not path.exists():
            return
        try:
            schema = json.loads(path.read_bytes())["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path} is damaged; remove it to have it written again") from error
        if schema not in READABLE:
            raise RecordError(
                f"{path} has schema {schema}, this version reads {READABLE[0]} and {SCHEMA}; it "
                "was written by a newer one"
            )


def to_json(value: Any, name: str = "record") -> Any:
    """Plain JSON values: tensors and arrays become lists, nan becomes None.

    Text is UTF-8; of a name, a byte that is not becomes four letters behind a backslash: ``udcXX``.

    Raises:
        RecordError: an infinity; names the field.
    """
    if isinstance(value, Mapping):
        return {str(key): to_json(item, str(key)) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [to_json(item, name) for item in value]
    if isinstance(value, str):
        return text.printable(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value):
            raise RecordError(f"{name} is infinite; nothing was recorded")
    return value


def _version(status: os.stat_result) -> tuple[int, ...]:
    """Differs whenever the file does."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _last(descriptor: int, end: int) -> dict[str, Any]:
    """The record that ends there; empty where there is none."""
    start = _whole(descriptor, max(0, end - 1))
    try:
        record = json.loads(_read(descriptor, end - start, start))
    except ValueError:  # the start of the file, or a damaged line, which reading tells of
        return {}
    return record if isinstance(record, dict) else {}


def _whole(descriptor: int, end: int | None = None) -> int:
    """Length of the file, or of its first ``end`` bytes, up to and with the last newline."""
    if end is None:
        end = os.lseek(descriptor, 0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        newline = _read(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _read(descriptor: int, size: int, start: int) -> bytes:
    os.lseek(descriptor, start, os.SEEK_SET)
    return os.read(descriptor, size)
