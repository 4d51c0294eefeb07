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

from ratios import tell

SIZES = (256, 64, 16)
WAYS = ("live", "scanned")


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


def most(size: int, way: str) -> float:
    """What a worker prints."""
    command = [sys.executable, __file__, "--worker", str(size), way]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true", help="small, as JSON for bench.py")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(int(arguments.worker[0]), arguments.worker[1])
        return
    if arguments.short:
        for way in WAYS:
            ratio = most(SIZES[-1], way) / most(SIZES[1], way)
            tell("memory", {f"{way}, {SIZES[-1]} sequences at a time / {SIZES[1]}": ratio})
        return
    print(f"{platform.processor() or platform.machine()}, 256 sequences of 32 tokens, float32")
    print("| sequences at a time | live | to 256 | scanned | to 256 |")
    print("|---|---|---|---|---|")
    whole: dict[str, float] = {}
    for size in SIZES:
        cells = [str(size)]
        for way in WAYS:
            peak = most(size, way)
            cells += [f"{peak / 2**20:.0f} MiB", f"{peak / whole.setdefault(way, peak):.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
