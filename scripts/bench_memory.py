"""Peak memory over batch sizes, live and scanned: what is kept must not pin temporaries.

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


def worker(size: int, way: str) -> None:
    """Print the bytes that the process held at most, above what it held before the pass."""
    import tempfile

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
    if way == "live":
        start = resident()
        sinktrack.measure(model, probe, batch_size=size)
    else:
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(f"{directory}/checkpoint-1")
            small = sinktrack.scan(directory, probe=warm_up, run=f"{directory}/small")
            list(small)
            start = resident()
            list(sinktrack.scan(directory, probe=probe, run=f"{directory}/run", batch_size=size))
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(int(arguments.worker[0]), arguments.worker[1])
        return
    print(f"{platform.processor() or platform.machine()}, 256 sequences of 32 tokens, float32")
    print("| sequences at a time | live | to 256 | scanned | to 256 |")
    print("|---|---|---|---|---|")
    whole: dict[str, float] = {}
    for size in SIZES:
        cells = [str(size)]
        for way in ("live", "scanned"):
            command = [sys.executable, __file__, "--worker", str(size), way]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            most = float(found.stdout)
            cells += [f"{most / 2**20:.0f} MiB", f"{most / whole.setdefault(way, most):.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
