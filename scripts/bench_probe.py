"""Time and peak memory of ``measure`` against a plain forward and against eager attention.

An 8-block MoE of width 512, a probe of 4,096 tokens. Each way runs in its own process, rounds
interleaved; the ratios of the medians are printed as a Markdown table. Peak memory is what the
process holds above the loaded model.

    python scripts/bench_probe.py [--device cuda --dtype bfloat16 --width 2048]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

WAYS = ("forward", "measure", "output_attentions")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """Largest resident size while the body runs, above its start."""

    def __enter__(self) -> Peak:
        self.start = self.most = resident()
        self.done = False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done:
            self.most = max(self.most, resident())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.done = True
        self.thread.join()
        self.most = max(self.most, resident())


def worker(arguments: argparse.Namespace) -> None:
    """Run one way once a line of standard input; print seconds and bytes."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    import sinktrack

    torch.manual_seed(0)
    heads = arguments.width // 64
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=arguments.width,
        moe_intermediate_size=arguments.width // 2,
        num_hidden_layers=8,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=arguments.length,
        attn_implementation="eager" if arguments.worker == "output_attentions" else "sdpa",
        experts_implementation="grouped_mm",
    )
    model = Qwen3MoeForCausalLM(config).to(arguments.device, getattr(torch, arguments.dtype)).eval()
    sequences = max(1, arguments.tokens // arguments.length)
    probe = sinktrack.Probe.random(4096, sequences, arguments.length)
    tokens = probe.tokens.to(arguments.device)
    cuda = arguments.device == "cuda"

    def run() -> None:
        if arguments.worker == "measure":
            sinktrack.measure(model, probe)
        else:
            eager = arguments.worker == "output_attentions"
            with torch.no_grad():
                model(tokens, use_cache=False, logits_to_keep=1, output_attentions=eager)
        if cuda:
            torch.cuda.synchronize()

    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        with Peak() as peak:
            run()
        seconds = time.perf_counter() - start
        used = torch.cuda.max_memory_allocated() - before if cuda else peak.most - peak.start
        print(json.dumps([seconds, used]), flush=True)


def _line(process: subprocess.Popen[str], ask: str = "") -> str:
    """The next line that a worker prints, once it was asked."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(ask)
    process.stdin.flush()
    return process.stdout.readline()


def compare(arguments: argparse.Namespace, length: int) -> str:
    """One row of the table."""
    results: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    shared = ["--length", str(length), "--device", arguments.device, "--dtype", arguments.dtype,
              "--width", str(arguments.width), "--tokens", str(arguments.tokens)]  # fmt: skip
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    processes = {
        way: subprocess.Popen(
            [sys.executable, __file__, "--worker", way, *shared],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for way in WAYS
    }  # fmt: skip
    for process in processes.values():
        _line(process)
    for _ in range(arguments.rounds):
        for way, process in processes.items():
            results[way].append(json.loads(_line(process, ask="\n")))
    for process in processes.values():
        process.communicate()
    seconds, memory = (
        {way: statistics.median(row[column] for row in rows) for way, rows in results.items()}
        for column in (0, 1)
    )
    slower = seconds["measure"] / seconds["forward"]
    return (
        f"| {length} | {seconds['forward']:.2f} s | {slower:.2f} | "
        f"{seconds['output_attentions'] / seconds['measure']:.1f} | "
        f"{memory['forward'] / 2**20:.0f} MiB | {memory['measure'] / memory['forward']:.2f} | "
        f"{memory['output_attentions'] / memory['measure']:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the probe")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.dtype}"
    )
    print(
        "| T | forward | measure / forward | eager / measure | forward memory | "
        "measure / forward | eager / measure |\n|---|---|---|---|---|---|---|"
    )
    for length in arguments.lengths:
        print(compare(arguments, length), flush=True)


if __name__ == "__main__":
    main()
