"""The live report, served by the real command to a real browser."""

from __future__ import annotations

import re
import signal
import socket
import struct
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sinktrack import Run
from tests.helpers.commands import COMMAND
from tests.helpers.report_page import curve
from tests.helpers.scanner import PROBE, save_archive
from tests.helpers.synthetic import synthetic_records

pytest.importorskip("plotly")


@pytest.fixture
def serve() -> Iterator[Any]:
    """Start ``sinktrack report --live`` and return the page's address."""
    started = []

    def start(*runs: Path) -> str:
        command = [*COMMAND, "report", *map(str, runs), "--live"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stderr is not None
        found = re.match(r"http://127\.0\.0\.1:\d+/", process.stderr.readline())
        assert found
        return found[0]

    yield start
    for process in started:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_a_browser_that_goes_away_is_no_news(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run")
    for record in synthetic_records():
        run.append(record)
    command = [*COMMAND, "report", str(tmp_path / "run"), "--live"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as serving:
        assert serving.stderr is not None
        port = re.search(r":(\d+)/", serving.stderr.readline())
        assert port
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", int(port[1]))) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                client.recv(10)
        with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/") as answer:
            assert answer.status == 200
        serving.send_signal(signal.SIGINT)
        assert serving.communicate(timeout=30)[1] == ""


def test_the_page_takes_in_new_records(serve: Any, browser: Any, tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run")
    Run.open(tmp_path / "later")
    records = synthetic_records()
    address = serve(tmp_path / "run", tmp_path / "later")
    context = browser.new_context()
    page = context.new_page()
    troubles: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    assert "No records yet" in page.inner_text("body")
    for record in records[:3]:
        run.append(record)
    page.get_by_text("Live: 3 records so far").wait_for()
    assert curve(page, "sink_rate")["x"] == [0, 100, 200]
    assert page.input_value("#record") == "2"
    run.append(records[3])
    page.get_by_text("Live: 4 records so far").wait_for()
    assert curve(page, "sink_rate")["x"] == [0, 100, 200, 300]
    assert page.input_value("#record") == "3", "the newest is followed"
    page.locator("#record").press("Home")
    Run.open(tmp_path / "later").append(records[0])
    run.append(records[4])
    page.get_by_text("Live: 6 records so far").wait_for()
    assert page.input_value("#record") == "0", "what was chosen stays"
    assert page.locator("#compared tbody tr").count() == 2
    context.close()
    assert troubles == []
    assert {url for url in requests if not url.startswith("data:")} == {address, f"{address}data"}


def test_a_scan_that_follows_an_archive_is_watched(
    serve: Any, browser: Any, tmp_path: Path
) -> None:
    """Three commands' worth: checkpoints arrive, the scanner measures them, the page shows them."""
    archive, run = save_archive(tmp_path / "archive", [1]), tmp_path / "run"
    Run.open(run, PROBE)
    follow = ["scan", str(archive), "--run", str(run), "--follow", "--poll", "0.1"]
    with subprocess.Popen([*COMMAND, *follow]) as scanner:
        page = browser.new_page()
        page.goto(serve(run))
        page.get_by_text("Live: 1 record so far").wait_for(timeout=60_000)
        save_archive(archive, [2, 3])
        page.get_by_text("Live: 3 records so far").wait_for(timeout=60_000)
        assert curve(page, "sink_rate")["x"] == [1, 2, 3]
        scanner.send_signal(signal.SIGINT)
        assert scanner.wait(60) == 130
    page.close()


def test_only_this_machine_is_answered(serve: Any, tmp_path: Path) -> None:
    Run.open(tmp_path / "run").append(synthetic_records()[0])
    address = serve(tmp_path / "run")
    foreign = urllib.request.Request(address, headers={"Host": "example.org"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(foreign)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{address}../records.jsonl")
    with urllib.request.urlopen(f"{address}data") as answer:
        version = answer.headers["ETag"]
    unchanged = urllib.request.Request(f"{address}data", headers={"If-None-Match": version})
    with pytest.raises(urllib.error.HTTPError, match="304"):
        urllib.request.urlopen(unchanged)
