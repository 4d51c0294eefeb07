"""Archives behind URLs: the same numbers, read by byte ranges from a server that counts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import boto3
import pytest
import torch
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from sinktrack import ArchiveError, Probe, Run, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.follow import Watch
from sinktrack.archive.huggingface import tokenizer
from sinktrack.archive.source import open as open_checkpoint
from sinktrack.archive.storage.files import Files
from sinktrack.models import routed_experts
from tests.helpers import models
from tests.helpers.commands import COMMAND

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=12)


class Counting:
    """A WSGI application that counts the bytes of files it answers GET with, and can fail."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.client: Any = None
        self.sent = 0
        self.asked: list[str] = []
        self.requests: list[str] = []
        self.failures = 0
        self.forbidden = False
        self.unlisted = False

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "GET" and self.failures:
            self.failures -= 1
            start("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        if self.forbidden or (self.unlisted and "list-type" in environ["QUERY_STRING"]):
            body = [b"<Error><Code>AccessDenied</Code><Message>No, you\n</Message></Error>"]
            start("403 Forbidden", [("Content-Length", str(len(body[0])))])
            return body
        body = list(self.application(environ, start))
        self.requests.append(f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}")
        if environ["REQUEST_METHOD"] == "GET" and "list-type" not in environ["QUERY_STRING"]:
            self.sent += sum(map(len, body))
            self.asked.append(environ["PATH_INFO"])
        return body


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("archive")
    for step, size in ((3, "20KB"), (12, "5GB")):
        torch.manual_seed(step)
        model = models.qwen3_moe(num_experts=32)
        model.model.embed_tokens.weight.data.normal_()
        model.save_pretrained(root / f"checkpoint-{step}", max_shard_size=size)
    return root


@pytest.fixture(scope="module")
def counting(local: Path) -> Iterator[Counting]:
    """A bucket named `runs` that holds the archive, behind moto's server."""
    application = Counting(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b", "NO_PROXY": "127.0.0.1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="runs")
        for file in local.rglob("*.*"):
            client.upload_file(str(file), "runs", f"one/{file.relative_to(local)}")
        application.client = client
        yield application
    server.shutdown()


def test_a_scan_of_a_bucket_equals_a_local_one(
    local: Path, counting: Counting, tmp_path: Path
) -> None:
    there = list(scan("s3://runs/one", probe=PROBE, run=tmp_path / "remote"))
    here = list(scan(local, probe=PROBE, run=tmp_path / "local"))
    assert [record["step"] for record in there] == [3, 12]
    assert [record | {"seconds": 0} for record in there] == [r | {"seconds": 0} for r in here]


def test_the_next_checkpoint_is_begun_while_one_is_measured(
    counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(scan("s3://runs/one", probe=PROBE, run=tmp_path / "run"))  # what comes first is known
    asked = []
    for name in ("ahead", "not"):
        counting.asked.clear()
        assert len(list(scan("s3://runs/one", probe=PROBE, run=tmp_path / name))) == 2
        asked.append([path for path in counting.asked if "checkpoint-" in path])
        module = sys.modules["sinktrack.scan"]  # whose name in the package is the function's
        monkeypatch.setattr(module, "_begin", lambda checkpoint, ended: None)
    assert sorted(asked[0]) == sorted(asked[1])  # nothing is asked for twice
    first, second = ("/runs/one/checkpoint-3/", "/runs/one/checkpoint-12/")
    last = max(at for at, path in enumerate(asked[0]) if path.startswith(first))
    begun = [path for path in asked[0][:last] if path == f"{second}model.safetensors"]
    assert len(begun) > 1  # its header, and what is read first


def test_requests_are_few(counting: Counting, tmp_path: Path) -> None:
    """One for the list of a directory, and of a block five: what stands before and behind its
    experts, and experts as the passes come to them."""
    scanned = partial(scan, "s3://runs/one/checkpoint-12", probe=PROBE)
    counting.requests.clear()
    (record,) = scanned(run=tmp_path / "run")
    own = [path for path in counting.requests if "checkpoint-12" in path]
    listed = [path for path in own if "list-type" in path]
    weights = [path for path in own if "model.safetensors?" in path]
    assert len(listed) <= 2 and len(own) - len(listed) - len(weights) == 1  # its config.json
    assert len(weights) <= 4 + 5 * len(record["concentration"])


@pytest.mark.parametrize("at_once", [1, 2**25])
def test_experts_are_on_their_way_part_by_part(
    at_once: int, counting: Counting, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routed_experts, "AT_ONCE", at_once)
    monkeypatch.setattr(routed_experts, "_EXPECTED", 50_000)
    found = discover("s3://runs/one")
    monkeypatch.setattr(sys.modules["sinktrack.scan"], "discover", lambda *_: found)
    there = list(scan("s3://runs/one", probe=PROBE, run=tmp_path / "remote"))
    monkeypatch.undo()
    here = list(scan(local, probe=PROBE, run=tmp_path / "local"))
    assert [record | {"seconds": 0} for record in there] == [r | {"seconds": 0} for r in here]
    assert [checkpoint.files._ahead._bytes for checkpoint in found] == [0, 0]


def test_a_scan_that_ends_early_leaves_nothing_on_its_way(
    counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(scan("s3://runs/one", probe=PROBE, run=tmp_path / "run"))  # what comes first is known
    found = discover("s3://runs/one")
    monkeypatch.setattr(sys.modules["sinktrack.scan"], "discover", lambda *_: found)
    records = scan("s3://runs/one", probe=PROBE, run=tmp_path / "other")
    next(records)
    records.close()  # type: ignore[attr-defined]
    assert [checkpoint.files._ahead._bytes for checkpoint in found] == [0, 0]


def test_a_file_that_is_not_there_is_asked_for_once_a_minute(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("sinktrack.archive.storage.files.time.monotonic", lambda: now[0])
    files = Files("s3://runs/one/checkpoint-12")
    try:
        for _ in range(3):
            assert not files.exists("late.json") and files.exists("config.json")
        counting.client.put_object(Bucket="runs", Key="one/checkpoint-12/late.json", Body=b"{}")
        counting.requests.clear()
        assert not files.exists("late.json") and counting.requests == []
        now[0] += 61
        assert files.exists("late.json") and files.read_json("late.json") == {}
        assert Files(files.location).exists("late.json")
        files.refresh()
        assert files.exists("late.json")
    finally:
        counting.client.delete_object(Bucket="runs", Key="one/checkpoint-12/late.json")


def test_bytes_are_read_by_range_and_counted(local: Path, counting: Counting) -> None:
    files = discover("s3://runs/one")[1].files
    assert files.name == "checkpoint-12"
    size = files.size("model.safetensors")
    assert size == (local / "checkpoint-12/model.safetensors").stat().st_size > 250_000
    data = (local / "checkpoint-12/model.safetensors").read_bytes()
    for start, stop in ((0, 8), (1000, 1100), (size - 100, size), (5, 5), (0, size)):
        assert bytes(files.read("model.safetensors", start, stop)) == data[start:stop]
    files = Files(files.location)
    before = counting.sent
    files.read("model.safetensors", 100, 200_100)
    assert files.bytes_read == counting.sent - before == 200_000
    for start in range(0, 60_000, 3_000):  # small neighbours share one read-ahead of 64 KiB
        files.read("model.safetensors", start, start + 100)
    assert files.bytes_read - 200_000 == counting.sent - before - 200_000 <= 2 * 65_536
    with pytest.raises(ArchiveError, match="truncated"):
        files.read("model.safetensors", size - 10, size + 10)


def test_one_tensor_costs_its_header_and_its_bytes(counting: Counting) -> None:
    source = open_checkpoint(discover("s3://runs/one")[1])
    before = counting.sent
    embedding = source.slice("model.embed_tokens.weight")[...]
    assert counting.sent - before <= max(embedding.nbytes, 65_536)


def test_large_reads_go_in_parts(
    counting: Counting, monkeypatch: pytest.MonkeyPatch, local: Path
) -> None:
    monkeypatch.setattr("sinktrack.archive.storage.files._PART", 50_000)
    data = (local / "checkpoint-12/model.safetensors").read_bytes()
    found = Files("s3://runs/one/checkpoint-12").read("model.safetensors", 7, len(data))
    assert bytes(found) == data[7:]


def test_a_server_that_is_busy_is_asked_again(counting: Counting) -> None:
    counting.failures = 2
    assert (
        Files("s3://runs/one/checkpoint-12").read_json("config.json")["model_type"] == "qwen3_moe"
    )
    assert counting.failures == 0


def test_what_is_not_there(counting: Counting) -> None:
    with pytest.raises(ArchiveError, match="one/checkpoint-12/no.json is missing"):
        Files("s3://runs/one/checkpoint-12").read_json("no.json")
    with pytest.raises(ArchiveError, match="s3://runs/two"):
        discover("s3://runs/two")
    with pytest.raises(ArchiveError, match="s3://none/one"):
        discover("s3://none/one")
    with pytest.raises(ArchiveError, match="wanted a directory, or a URL"):
        discover("ftp://runs/one")
    assert tokenizer(Files("s3://runs/one/checkpoint-12")) is None


@pytest.mark.parametrize(
    ("url", "said"),
    {
        "s3://runs/onne": "nothing at s3://runs/onne: s3://runs holds one; there is s3://runs/one",
        "s3://runs/ONE/checkpoint-3": "nothing at s3://runs/ONE/checkpoint-3: s3://runs holds one",
        "s3://runs/one/checkpoint_3": "s3://runs/one holds checkpoint-12, checkpoint-3; "
        "there is s3://runs/one/checkpoint-3",
        "s3://runs/one/checkpoint-12/config.json": "s3://runs/one/checkpoint-12/config.json is a "
        "file; name the directory that it is in: s3://runs/one/checkpoint-12",
        "s3://empty": "there is nothing at s3://empty: s3://empty is empty",
        "s3://empty/a/b": "there is nothing at s3://empty/a/b: s3://empty is empty",
        "s3://none/one": "there is no bucket none at http://127.0.0.1:PORT (AWS_ENDPOINT_URL), "
        "looked for s3://none/one: are its name and the endpoint right?",
    }.items(),
)
def test_a_wrong_name_is_told_with_what_stands_beside(
    counting: Counting, url: str, said: str
) -> None:
    counting.client.create_bucket(Bucket="empty")
    with pytest.raises(ArchiveError) as error:
        discover(url)
    told = re.sub(r":\d+ \(", ":PORT (", str(error.value))
    assert said in told and "written?" not in told and "<" not in told


def test_what_is_forbidden_is_told_without_the_answers_xml(counting: Counting) -> None:
    counting.forbidden = True
    try:
        with pytest.raises(ArchiveError, match="^cannot read s3://runs/one: AccessDenied: No, you"):
            discover("s3://runs/one")
    finally:
        counting.forbidden = False


def test_files_may_be_read_where_none_may_be_listed(counting: Counting) -> None:
    counting.unlisted = True
    try:
        files = Files("s3://runs/one/checkpoint-12")
        assert files.read_json("config.json")["model_type"] == "qwen3_moe"
        counting.requests.clear()
        assert files.exists("model.safetensors") and files.exists("generation_config.json")
        assert not [path for path in counting.requests if "prefix=one%2Fcheckpoint-12%2F&" in path]
    finally:
        counting.unlisted = False


def test_a_bucket_that_is_written_to_is_followed(local: Path, counting: Counting) -> None:
    counting.client.create_bucket(Bucket="growing")
    watch = Watch("s3://growing", partial(discover, "s3://growing"))
    found = []
    files = sorted((local / "checkpoint-3").iterdir(), key=lambda f: f.name.endswith(".index.json"))
    for file in files:
        counting.client.upload_file(str(file), "growing", f"checkpoint-3/{file.name}")
        found.append([checkpoint.name for checkpoint in watch.look()])
    assert not any(found)
    assert [checkpoint.name for checkpoint in watch.look()] == ["checkpoint-3"]


class Ranges(SimpleHTTPRequestHandler):
    """Serves a directory, ranges included, once it has refused a few times."""

    refusals = 0

    def send_head(self) -> Any:
        if Ranges.refusals:
            Ranges.refusals -= 1
            return self.send_error(503)
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not wanted or not path.is_file():
            return super().send_head()
        first, last = wanted.removeprefix("bytes=").split("-")
        data = path.read_bytes()
        part = data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        return None

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_directory_on_the_web(local: Path, tmp_path: Path) -> None:
    with serving(partial(Ranges, directory=str(local))) as url:
        records = list(scan(url, probe=PROBE, run=tmp_path / "run"))
        assert [record["step"] for record in records] == [3, 12]
        Ranges.refusals = 1
        assert Files(f"{url}/checkpoint-3").read_json("config.json")["vocab_size"] == 65
        assert Ranges.refusals == 0
        with pytest.raises(ArchiveError, match=r"no.json is missing"):
            Files(f"{url}/checkpoint-3").read_json("no.json")


class Hub(BaseHTTPRequestHandler):
    """The few answers of the Hugging Face Hub that reading a repository takes.

    Serves `directory`, whose subdirectories are the revisions of the repository a/b, and notes
    every range that is asked of a file.
    """

    directory: Path
    ranges: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = unquote(self.path).partition("?")[0]
        if path == "/api/models/a/b/refs":
            names = sorted(revision.name for revision in self.directory.iterdir())
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": n} for n in names]
            self.answer({"branches": branches, "tags": [], "converts": []})
        elif found := re.fullmatch(r"/api/models/a/b/revision/([^/]+)", path):
            self.answer({"id": "a/b", "sha": found[1], "siblings": []})
        elif path == "/api/models/a/b":
            self.answer({"id": "a/b", "sha": "main", "siblings": []})
        elif found := re.fullmatch(r"/api/models/a/b/tree/([^/]+)", path):
            files = [self.entry(file) for file in (self.directory / found[1]).iterdir()]
            self.answer(files)
        elif found := re.fullmatch(r"/a/b/resolve/([^/]+)/([^/]+)", path):
            wanted = self.headers["Range"]
            self.ranges.append(f"{found[2]} {wanted}")
            first, last = wanted.removeprefix("bytes=").split("-")
            data = (self.directory / found[1] / found[2]).read_bytes()
            self.answer(data[int(first) : int(last) + 1], 206)
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        found = re.fullmatch(r"/api/models/a/b/paths-info/([^/]+)", self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer([]) if found else self.send_error(404)

    def entry(self, file: Path) -> dict[str, Any]:
        return {"type": "file", "oid": "0", "size": file.stat().st_size, "path": file.name}

    def answer(self, value: Any, status: int = 200) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def test_the_revisions_of_a_repository(local: Path, tmp_path: Path) -> None:
    revisions = tmp_path / "revisions"
    for source, name in (("3", "step3-tokens1B"), ("12", "step12-tokens4B"), ("12", "main")):
        shutil.copytree(local / f"checkpoint-{source}", revisions / name)
    Hub.directory = revisions
    PROBE.save(tmp_path / "probe")
    with serving(Hub) as url:
        done = subprocess.run(
            [*COMMAND, "scan", "hf://a/b",
             "--run", tmp_path / "run", "--probe", tmp_path / "probe", "--blocks", "1"],
            capture_output=True, text=True, timeout=200,
            env=os.environ | {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = Run.read(tmp_path / "run").records
    assert [(r["source"], r["step"], r["tokens"]) for r in records] == [
        ("step3-tokens1B", 3, 10**9), ("step12-tokens4B", 12, 4 * 10**9),
    ]  # fmt: skip
    size = (local / "checkpoint-12/model.safetensors").stat().st_size
    asked = [line.split("=")[1].split("-") for line in Hub.ranges if line.startswith("model.")]
    assert 0 < sum(int(last) + 1 - int(first) for first, last in asked) < size
