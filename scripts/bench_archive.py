"""CPU seconds of a scan for each of many small checkpoints, against those of its passes in memory.

Checkpoints of a 4-block model of width 128, a probe of 16 x 64 tokens, in one process; rounds
interleaved, medians. "In memory" is ``measure`` of the loaded model: every pass of the probe and
nothing else. The rest of a scan is to find, open and read a checkpoint and to build its model.

    python scripts/bench_archive.py [--checkpoints 50] [--rounds 5]

With ``--remote`` it scans six checkpoints of 105 MiB from a disk and from a server on this machine,
which waits 30 ms before each answer and gives 100 MB a second, and prints the ratio of their times.
"""

from __future__ import annotations

import argparse
import io
import logging
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from ratios import tell
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import sinktrack as st

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


def dense() -> Any:
    return LlamaForCausalLM(LlamaConfig(intermediate_size=256, **SIZES))


def mixture() -> Any:
    sizes = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **SIZES))


def seconds(run: Callable[[], Any]) -> float:
    """Of this process's CPU time."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(model: Any, checkpoints: int, rounds: int) -> dict[str, float]:
    """Medians of a plain forward, of ``measure``, and of a scan for each checkpoint."""
    probe = st.Probe.random(SIZES["vocab_size"], sequences=16, length=64)
    model = model.eval()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for step in range(1, checkpoints + 1):
            model.save_pretrained(directory / f"archive/checkpoint-{step}")
            with torch.no_grad():  # equal weights would be told of
                model.model.layers[0].input_layernorm.weight.mul_(1.001)

        def forward() -> None:
            with torch.no_grad():
                model.model(probe.tokens, use_cache=False)

        def measure() -> None:
            st.measure(model, probe)

        def scan(archive: str = "archive") -> None:
            with tempfile.TemporaryDirectory() as run:
                list(st.scan(directory / archive, probe=probe, run=run))

        scan("archive/checkpoint-1")  # what a process does once
        ways = {"forward": forward, "measure": measure, "scan": scan}
        times: dict[str, list[float]] = {way: [] for way in ways}
        measure()
        for _ in range(rounds):
            for way, run in ways.items():
                times[way].append(seconds(run))
    median = {way: statistics.median(found) for way, found in times.items()}
    return median | {"scan": median["scan"] / checkpoints}


class Slow(SimpleHTTPRequestHandler):
    """Answers after a while, with ranges of files, at no more than so many bytes a second."""

    protocol_version = "HTTP/1.1"
    DELAY, RATE = 0.03, 100e6
    turn, free = Lock(), 0.0

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def send_head(self) -> Any:
        """Begin an answer."""
        time.sleep(self.DELAY)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().send_head()
        first, last = 0, path.stat().st_size - 1
        if wanted := self.headers["Range"]:
            start, stop = wanted.removeprefix("bytes=").split("-")
            first, last = int(start), min(int(stop or last), last)
        count = last - first + 1
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(count))
        self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return None
        with self.turn:
            Slow.free = end = max(self.free, time.monotonic()) + count / self.RATE
        time.sleep(max(0.0, end - time.monotonic()))
        with path.open("rb") as file:
            file.seek(first)
            return io.BytesIO(file.read(count))


def serve(directory: str, send: Any) -> None:
    """Serve a directory, in a process of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=directory))
    send.send(server.server_port)
    server.serve_forever()


def remote(rounds: int) -> None:
    """Print the seconds of a scan from a disk and from a server."""
    checkpoints, vocabulary = 6, 8192
    sizes = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=vocabulary, intermediate_size=1408, **sizes)
    probe = st.Probe.random(vocabulary, sequences=16, length=64)
    with tempfile.TemporaryDirectory() as name:
        archive = Path(name) / "archive"
        for step in range(1, checkpoints + 1):
            torch.manual_seed(step)
            LlamaForCausalLM(config).save_pretrained(archive / f"checkpoint-{step}")
        receive, send = multiprocessing.Pipe(duplex=False)
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(name, send), daemon=True
        )
        server.start()
        places = {"disk": str(archive), "server": f"http://127.0.0.1:{receive.recv()}/archive"}
        times: dict[str, list[float]] = {way: [] for way in places}
        for turn in range(rounds + 1):
            for way, place in places.items():
                start = time.monotonic()
                with tempfile.TemporaryDirectory() as run:
                    list(st.scan(place, probe=probe, run=run))
                if turn:  # the first imports
                    times[way].append(time.monotonic() - start)
        server.kill()
    disk, far = (statistics.median(times[way]) for way in places)
    print(f"{checkpoints} checkpoints: disk {disk:.1f} s, server {far:.1f} s, {far / disk:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="small, as JSON for bench.py")
    parser.add_argument("--remote", action="store_true", help="from a server, against a disk")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    if arguments.short:
        for name, make in (("dense", dense), ("MoE", mixture)):
            found = compare(make(), checkpoints=10, rounds=3)
            ratio = found["scan"] / found["measure"]
            tell("time", {f"scan of many, {name}: a checkpoint / measure in memory": ratio})
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, float32")
    if arguments.remote:
        remote(arguments.rounds)
        return
    heads = "| model | forward | measure | scan | scan / measure | scan / forward |\n"
    print(heads + 6 * "|---" + "|")
    for name, make in (("dense", dense), ("MoE", mixture)):
        found = compare(make(), arguments.checkpoints, arguments.rounds)
        cells = [f"{1000 * found[way]:.0f} ms" for way in ("forward", "measure", "scan")]
        cells += [f"{found['scan'] / found[way]:.2f}" for way in ("measure", "forward")]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
