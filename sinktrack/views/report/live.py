"""The report of runs that still go on, served on loopback; the page refreshes itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sinktrack.errors import RecordError, SinktrackError, require
from sinktrack.records.marks import Mark
from sinktrack.records.run import Run
from sinktrack.signal.loss import Losses
from sinktrack.views.report import page
from sinktrack.views.report.data import Records, embedded

_WAITING = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="refresh" content="2">
<link rel="icon" href="data:,">
<title>sinktrack</title>
<p>No records yet: the page appears with the first.</p>
</html>
"""
_LOCAL = {"127.0.0.1", "localhost"}


def server(
    runs: Mapping[str, Run],
    port: int = 0,
    losses: Mapping[str, Losses] | None = None,
    settings: Mapping[str, str] | None = None,
) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 that sends the page, and new records when the page asks.

    Call ``serve_forever()`` on what is returned; its ``server_port`` is the port.

    Args:
        runs: by name; runs without a record are left out until they have one.
        port: 0 takes a free one.
        losses: by the run's name, the training loss by step.
        settings: by the run's name, what it is a seed of.

    Raises:
        RecordError: the port is taken.
        MissingExtra: plotly is not installed.
    """
    require("plotly", "report")
    watched = _Watched(runs, losses, settings or {})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rsplit(":", 1)[0]
            if host not in _LOCAL:  # another site's name that resolves to this machine
                self.send_error(403)
            elif self.path == "/":
                self._send(200, watched.page().encode(), "text/html; charset=utf-8")
            elif self.path == "/data":
                self._send_data()
            else:
                self.send_error(404)

        def _send_data(self) -> None:
            try:
                version, data = watched.data()
            except SinktrackError as error:
                self._send(503, str(error).encode(), "text/plain; charset=utf-8")
                return
            if self.headers.get("If-None-Match") == version:
                self.send_response(304)
                self.end_headers()
            else:
                self._send(200, data.encode(), "application/json", version)

        def _send(self, status: int, body: bytes, kind: str, version: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            if version is not None:
                self.send_header("ETag", version)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the page asks every few seconds."""

    try:
        return _Server(("127.0.0.1", port), Handler)
    except OSError as error:
        raise RecordError(f"cannot serve on port {port}: {error.strerror}") from error


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a browser that went away in the middle of an answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Watched:
    """The runs, read again where their files have changed."""

    def __init__(
        self,
        runs: Mapping[str, Run],
        losses: Mapping[str, Losses] | None,
        settings: Mapping[str, str],
    ) -> None:
        self.runs, self.losses, self.settings = runs, losses, settings
        self._lock = threading.Lock()
        self._version, self._data = "", ""

    def _marks(self) -> dict[str, tuple[Mark, ...]]:
        return {name: run.marks for name, run in self.runs.items()}

    def page(self) -> str:
        with self._lock:
            runs = self._found()
        if not runs:
            return _WAITING
        return page(runs, self.losses, self._marks(), live=True, settings=self._of(runs))

    def data(self) -> tuple[str, str]:
        """What the page draws, and a name for its version."""
        with self._lock:
            version = f'"{"-".join(map(_changed, self.runs.values()))}"'
            if version != self._version:
                runs = self._found()
                self._data = embedded(runs, self.losses, self._marks(), True, self._of(runs))
                self._version = version
            return self._version, self._data

    def _of(self, found: Mapping[str, Records]) -> dict[str, str]:
        return {name: setting for name, setting in self.settings.items() if name in found}

    def _found(self) -> dict[str, Records]:
        return {name: run.history for name, run in self.runs.items() if len(run)}


def _changed(run: Run) -> str:
    """Differs whenever the records or the marks do."""
    changed = []
    for name in ("records.jsonl", "marks.jsonl"):
        try:
            status = (run.directory / name).stat()
        except FileNotFoundError:
            changed.append("0")
        else:
            changed.append(f"{status.st_size:x}.{status.st_mtime_ns:x}")
    return ".".join(changed)
