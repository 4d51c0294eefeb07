"""Peak memory of ``measure`` over batch sizes: what is kept of a pass must not pin its temporaries.

A small, wide model and many sequences. Each batch size runs in its own process; the peaks above the
loaded model are printed as ratios to that of one batch for all.

    python scripts/bench_memory.py
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys

SIZES = (256, 64, 16)


def worker(size: int) -> None:
    """Print the bytes that the process held at most, above the loaded model."""
    import torch
    from bench_probe import resident
    from transformers import LlamaConfig, LlamaForCausalLM

    import sinktrack

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    warm_up = sinktrack.Probe.random(512, sequences=2, length=32)
    sinktrack.measure(model, warm_up)
    probe = sinktrack.Probe.random(512, sequences=256, length=32)
    start = resident()
    sinktrack.measure(model, probe, batch_size=size)
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    print(f"{platform.processor() or platform.machine()}, 256 sequences of 32 tokens, float32")
    print("| sequences at a time | peak memory | to 256 at a time |")
    print("|---|---|---|")
    whole: float | None = None
    for size in SIZES:
        command = [sys.executable, __file__, "--worker", str(size)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        most = float(found.stdout)
        whole = whole or most
        print(f"| {size} | {most / 2**20:.0f} MiB | {most / whole:.2f} |", flush=True)


if __name__ == "__main__":
    main()
