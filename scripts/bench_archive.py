"""CPU seconds of a scan for each of many small checkpoints, against those of its passes in memory.

Checkpoints of a 4-block model of width 128, a probe of 16 x 64 tokens, in one process; rounds
interleaved, medians. "In memory" is ``measure`` of the loaded model: every pass of the probe and
nothing else. The rest of a scan is to find, open and read a checkpoint and to build its model.

    python scripts/bench_archive.py [--checkpoints 50] [--rounds 5]
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
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
        model.save_pretrained(directory / "archive/checkpoint-1")
        first = directory / "archive/checkpoint-1"
        for step in range(2, checkpoints + 1):
            shutil.copytree(first, first.with_name(f"checkpoint-{step}"))

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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="small, as JSON for bench.py")
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
    heads = "| model | forward | measure | scan | scan / measure | scan / forward |\n"
    print(heads + 6 * "|---" + "|")
    for name, make in (("dense", dense), ("MoE", mixture)):
        found = compare(make(), arguments.checkpoints, arguments.rounds)
        cells = [f"{1000 * found[way]:.0f} ms" for way in ("forward", "measure", "scan")]
        cells += [f"{found['scan'] / found[way]:.2f}" for way in ("measure", "forward")]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
