"""Time of the causal tests, in plain forward passes, against one whole pass per component.

An MoE of width 256 with 8 heads and 8 experts in each block, a probe of 32 x 64 tokens. An expert
of block 1, or of a block in the middle, writes the P0 state; later blocks rest on it. Ways, rounds
interleaved, medians:

* necessity: screen, interventions restarted at the changed block, controls, all replacements;
* naive: for every sublayer, head and routed expert before the reference block (and, second number,
  of the whole model) one forward pass with that component removed at P0, without any control.

    python scripts/bench_causal.py [--blocks 8 24] [--rounds 3]
    python scripts/bench_causal.py --model DIRECTORY

The second way takes a checkpoint with its tokenizer and 16 x 64 tokens of the built-in prose, and
tells the CPU seconds of a measurement and of all tests.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sinktrack
from sinktrack.interventions import necessity, run_causal_tests
from sinktrack.prose import passages

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import planted

HEADS, EXPERTS = 8, 8


def build(blocks: int, writer: int) -> Any:
    model = planted.mixture(
        hidden_size=256, intermediate_size=128, num_hidden_layers=blocks,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, num_local_experts=EXPERTS,
    )  # fmt: skip
    planted.expert_writer(model, writer, expert=2, size=8.0)
    for block in range(writer + 1, blocks):
        planted.reader(model, block, strength=2.0)
    return model


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(blocks: int, writer: int, rounds: int) -> str:
    """One row of the table."""
    model = build(blocks, writer)
    tokens = torch.randint(1, planted.VOCABULARY, (32, 64))
    tokens[:, 0] = 0
    probe = sinktrack.Probe.from_tokens(tokens)
    measured = sinktrack.measure(model, probe)
    reference = measured.reference_block
    assert reference == writer + 1
    mlp = model.model.layers[writer].mlp

    def forward() -> None:
        with torch.no_grad():
            model(tokens, use_cache=False)

    def removed() -> None:
        """A naive intervention costs a forward pass and a hook."""

        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, 0] = output[:, 1:].mean(1)
            return output

        handle = mlp.register_forward_hook(hook)
        forward()
        handle.remove()

    ways = {
        "forward": forward,
        "naive": removed,
        "measure": lambda: sinktrack.measure(model, probe),
        "necessity": lambda: necessity(model, probe, measured),
        "all": lambda: run_causal_tests(model, probe, measured),
    }
    forward()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            seconds[way].append(timed(run))
    median = {way: statistics.median(times) for way, times in seconds.items()}
    plain = median["forward"]
    per_block = 2 + HEADS + EXPERTS
    before, whole = (count * per_block * median["naive"] / plain for count in (reference, blocks))
    cost = median["necessity"] / plain
    return (
        f"| {blocks} | {writer} | {plain:.2f} s | {median['measure'] / plain:.2f} | {cost:.1f} | "
        f"{median['all'] / plain:.1f} | {before:.0f} | {whole:.0f} | {before / cost:.1f} | "
        f"{whole / cost:.1f} |"
    )


def checkpoint(directory: Path) -> str:
    """CPU seconds of a measurement and of all causal tests of a real model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    probe = sinktrack.Probe.from_texts(tokenizer, passages()[:16], length=64)
    start = time.process_time()
    measured = sinktrack.measure(model, probe)
    between = time.process_time()
    found = run_causal_tests(model, probe, measured)
    end = time.process_time()
    return (
        f"{model.config.model_type}, {model.config.num_hidden_layers} blocks, {probe!r}: measure "
        f"{between - start:.0f} s of CPU, causal tests {end - between:.0f} s of CPU, "
        f"{found['forwards']:.1f} forward passes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    if arguments.model is not None:
        print(checkpoint(arguments.model))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, float32")
    print(
        "| blocks | writer in block | forward | measure | necessity | all tests | naive before | "
        "naive all | before / necessity | all / necessity |\n" + 10 * "|---" + "|"
    )
    for blocks in arguments.blocks:
        for writer in (1, blocks // 2):
            print(compare(blocks, writer, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
