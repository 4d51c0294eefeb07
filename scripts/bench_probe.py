"""Time and peak memory of ``measure`` against a plain forward and against eager attention.

An 8-block MoE of width 512, a probe of 4,096 tokens. Each way runs in its own process, rounds
interleaved; the ratios of the medians are printed as a Markdown table. Peak memory is what the
process holds above the loaded model.

    python scripts/bench_probe.py [--device cuda --dtype bfloat16 --width 2048]

With ``--decoder`` the model is one of code of our own, nanochat with routed experts; there is no
eager attention of it to compare with.
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
from typing import Any

from ratios import tell

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


def of_our_own(width: int, blocks: int = 8, experts: int = 16, chosen: int = 2) -> Any:
    """Like nanochat, with squared ReLU experts as stacked matrices."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    def norm(value: Tensor) -> Tensor:
        return F.rms_norm(value, (value.shape[-1],))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = width // 2
            self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
            self.k, self.v = (nn.Linear(width, width // 4, bias=False) for _ in range(2))
            self.router = nn.Linear(width, experts, bias=False)
            self.up = nn.Parameter(torch.randn(experts, width, inner) * width**-0.5)
            self.down = nn.Parameter(torch.randn(experts, inner, width) * width**-0.5)

        def attend(self, x: Tensor) -> Tensor:
            shape = (*x.shape[:2], -1, 64)
            q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(norm(q), norm(k), v, is_causal=True, enable_gqa=True)
            mixed: Tensor = self.o(y.transpose(1, 2).reshape(x.shape))
            return mixed

    class Experts(nn.Module):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.router, self.up, self.down = block.router, block.up, block.down

        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, width)
            gate, index = torch.softmax(self.router(flat), -1).topk(chosen, -1)
            order = index.flatten().argsort(stable=True)
            counts = torch.bincount(index.flatten(), minlength=experts).tolist()
            parts = flat[order // chosen].split(counts)
            made = torch.cat([
                F.relu(part @ up).square() @ down
                for part, up, down in zip(parts, self.up, self.down, strict=True)
            ])  # fmt: skip
            made = made * gate.flatten()[order, None]
            return torch.zeros_like(flat).index_add(0, order // chosen, made).view(x.shape)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Block()
            self.experts = Experts(self.attention)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention.attend(norm(x))
            return x + self.experts(norm(x))  # type: ignore[no-any-return]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4096, width)
            self.layers = nn.ModuleList([Layer() for _ in range(blocks)])
            self.head = nn.Linear(width, 4096, bias=False)

        def forward(self, tokens: Tensor) -> Tensor:
            x = norm(self.embed(tokens))
            for layer in self.layers:
                x = layer(x)
            return self.head(norm(x)[:, -1:])  # type: ignore[no-any-return]

    return Model()


def of_transformers(arguments: argparse.Namespace) -> Any:
    """Qwen3-MoE."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

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
    return Qwen3MoeForCausalLM(config)


def worker(arguments: argparse.Namespace) -> None:
    """Run one way once a line of standard input; print seconds and bytes."""
    import torch

    import sinktrack

    torch.manual_seed(0)
    model = of_our_own(arguments.width) if arguments.decoder else of_transformers(arguments)
    model = model.to(arguments.device, getattr(torch, arguments.dtype)).eval()
    sequences = max(1, arguments.tokens // arguments.length)
    probe = sinktrack.Probe.random(4096, sequences, arguments.length)
    tokens = probe.tokens.to(arguments.device)
    cuda = arguments.device == "cuda"

    def run() -> None:
        if arguments.worker == "measure":
            sinktrack.measure(model, probe, in_training=True)
        else:
            eager = arguments.worker == "output_attentions"
            with torch.no_grad():
                if arguments.decoder:
                    model(tokens)
                else:
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


def compare(
    arguments: argparse.Namespace, length: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of each way: seconds, and bytes held above the model."""
    ways = WAYS[:2] if arguments.decoder else WAYS
    results: dict[str, list[list[float]]] = {way: [] for way in ways}
    shared = ["--length", str(length), "--device", arguments.device, "--dtype", arguments.dtype,
              "--width", str(arguments.width), "--tokens", str(arguments.tokens)]  # fmt: skip
    shared += ["--decoder"] if arguments.decoder else []
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    processes = {
        way: subprocess.Popen(
            [sys.executable, __file__, "--worker", way, *shared],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for way in ways
    }  # fmt: skip
    for process in processes.values():
        _line(process)
    for _ in range(arguments.rounds):
        for way, process in processes.items():
            results[way].append(json.loads(_line(process, ask="\n")))
    for process in processes.values():
        process.communicate()
    seconds, memory = (
        {way: statistics.median(found[column] for found in rows) for way, rows in results.items()}
        for column in (0, 1)
    )
    return seconds, memory


def row(length: int, seconds: dict[str, float], memory: dict[str, float]) -> str:
    """Of the table."""
    slower = seconds["measure"] / seconds["forward"]

    def eager(of: dict[str, float]) -> str:
        more = of.get("output_attentions")
        return "" if more is None else f"{more / of['measure']:.1f}"

    return (
        f"| {length} | {seconds['forward']:.2f} s | {slower:.2f} | {eager(seconds)} | "
        f"{memory['forward'] / 2**20:.0f} MiB | {memory['measure'] / memory['forward']:.2f} | "
        f"{eager(memory)} |"
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
    parser.add_argument("--decoder", action="store_true", help="a model of code of our own")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="small, as JSON for bench.py")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    if arguments.short:
        arguments.width, arguments.tokens, arguments.rounds = 128, 512, 5
        seconds, memory = compare(arguments, length=128)
        slower, larger = (found["measure"] / found["forward"] for found in (seconds, memory))
        tell("time", {"probe: measure / plain forward": slower})
        tell("memory", {"probe, above the model: measure / plain forward": larger})
        return
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.dtype}"
    )
    print(
        "| T | forward | measure / forward | eager / measure | forward memory | "
        "measure / forward | eager / measure |\n|---|---|---|---|---|---|---|"
    )
    for length in arguments.lengths:
        print(row(length, *compare(arguments, length)), flush=True)


if __name__ == "__main__":
    main()
