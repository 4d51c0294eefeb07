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

    python scripts/bench_causal.py --stream SCRATCH [--depth 3] [--tokens 512]

The third makes a checkpoint with the geometry of Qwen3-30B-A3B (see `bench_scan`), cut to a few
blocks, in whose block 0 the heads write the P0 state that the others rest on. A scan without and
one with the causal tests run in a process each: peak memory, bytes read over bytes of the
checkpoint, seconds per edit, and what follows for all 48 blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sinktrack
from sinktrack.interventions import necessity, run_causal_tests
from sinktrack.prose import passages

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_probe import Peak
from bench_scan import GIB, make
from ratios import tell

from tests.helpers import planted

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


def compare(blocks: int, writer: int, rounds: int) -> dict[str, float]:
    """The numbers of one row of the table."""
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
    return {
        "forward": plain, "measure": median["measure"] / plain, "necessity": cost,
        "all": median["all"] / plain, "before": before, "whole": whole,
    }  # fmt: skip


def row(blocks: int, writer: int, rounds: int) -> str:
    """Of the table."""
    found = compare(blocks, writer, rounds)
    cost = found["necessity"]
    return (
        f"| {blocks} | {writer} | {found['forward']:.2f} s | {found['measure']:.2f} | {cost:.1f} | "
        f"{found['all']:.1f} | {found['before']:.0f} | {found['whole']:.0f} | "
        f"{found['before'] / cost:.1f} | {found['whole'] / cost:.1f} |"
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


def plant(directory: Path, depth: int) -> None:
    """Let the heads of block 0 write a state at token 0 that those of all others look for."""
    from safetensors.torch import load_file, save_file

    one, begin, sink, slow = 0, 1, 2, 63  # channels; and that which positions turn least
    changes: dict[str, Callable[[Any], None]] = {}

    def embedding(value: torch.Tensor) -> None:
        value[:, one], value[0, begin] = 3.0, 3.0

    def evenly(value: torch.Tensor) -> None:
        """What all tokens have in common sends none of them to the same experts, itself or as a
        value: the probe comes to nearly all experts."""
        value[:, [one, begin, sink]] = 0

    def heads(channel: int, strength: float) -> Callable[[Any], None]:
        def change(value: torch.Tensor) -> None:
            value.unflatten(0, (-1, 128))[:, slow, channel] = strength

        return change

    def into(row: int, column: int, strength: float) -> Callable[[Any], None]:
        def change(value: torch.Tensor) -> None:
            if not row:  # a value of its own, else nothing
                value[row] = 0
            value[row, column] = strength

        return change

    changes["model.embed_tokens.weight"] = embedding
    for block in range(depth):
        attention = f"model.layers.{block}.self_attn"
        key = heads(sink, 2.0) if block else heads(begin, -2.0)  # in block 0 P0 is left alone
        changes[f"{attention}.q_proj.weight"] = heads(one, 10.0)
        changes[f"{attention}.k_proj.weight"] = key
        changes[f"model.layers.{block}.mlp.gate.weight"] = evenly
        changes[f"{attention}.v_proj.weight"] = evenly

    def own(value: torch.Tensor) -> None:
        evenly(value)
        into(0, begin, 1.0)(value)

    changes["model.layers.0.self_attn.v_proj.weight"] = own
    changes["model.layers.0.self_attn.o_proj.weight"] = into(sink, 0, 20.0)
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    for file in {weight_map[name] for name in changes}:
        tensors = load_file(directory / file)
        for name in tensors.keys() & changes.keys():
            changes[name](tensors[name])
        save_file(tensors, directory / file, {"format": "pt"})


def scanned(directory: Path, tokens: int, causal: bool) -> None:
    """Scan the checkpoint; print what it took as JSON."""
    from sinktrack.archive.discover import discover
    from sinktrack.archive.source import open as open_source
    from sinktrack.measure import measure_streamed
    from sinktrack.models.streaming import Streamed

    ids = torch.randint(1, 151_936, (tokens // 64, 64), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    probe = sinktrack.Probe.from_tokens(ids)
    source = open_source(discover(directory)[0])
    result: dict[str, Any] = {}
    with Peak() as peak:
        start = time.perf_counter()
        streamed = Streamed(source, head=causal)
        measured = measure_streamed(streamed, probe)
        result["measured"], result["scan"] = source.files.bytes_read, time.perf_counter() - start
        result["sinks"] = [(sink.first_block, sink.last_block) for sink in measured.sinks]
        if causal:
            start = time.perf_counter()
            found = run_causal_tests(streamed, probe, measured)
            result["tests"] = time.perf_counter() - start
            result["forwards"] = found["forwards"]
            result["verdicts"] = [row["verdict"] for row in found["necessity"]]
    result["peak"], result["bytes"] = peak.most - peak.start, source.files.bytes_read
    print(json.dumps(result), flush=True)


def stream(directory: Path, depth: int, tokens: int) -> None:
    """Both scans, and what follows for the whole model."""
    if not (directory / "model.safetensors.index.json").exists():
        make(directory, depth)
        plant(directory, depth)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    results = {}
    for way in ("plain", "causal"):
        command = [sys.executable, __file__, "--stream", str(directory), "--worker", way]
        done = subprocess.run(
            [*command, "--tokens", str(tokens)], stdout=subprocess.PIPE, text=True, check=True,
            env=os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"},  # as of `sinktrack`
        )  # fmt: skip
        results[way] = json.loads(done.stdout.splitlines()[-1])
        print(way, results[way], file=sys.stderr)
    plain, causal = results["plain"], results["causal"]
    readings = (causal["bytes"] - causal["measured"]) / size
    each = causal["tests"] / causal["forwards"]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, bfloat16, {depth} "
        f"blocks, {size / GIB:.1f} GiB, {tokens} tokens\n"
        f"peak memory: plain {plain['peak'] / GIB:.2f} GiB, with the causal tests "
        f"{causal['peak'] / GIB:.2f} GiB, {causal['peak'] / plain['peak']:.2f} times\n"
        f"bytes read by the tests, over the checkpoint's: {readings:.1f}\n"
        f"time: scan {causal['scan']:.0f} s, tests {causal['tests']:.0f} s for what computes as "
        f"much as {causal['forwards']:.1f} passes of the whole model, {each:.1f} s each\n"
        f"for 48 blocks: {each * 48 / depth:.0f} s for each pass"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--stream", type=Path)
    parser.add_argument("--depth", type=int, default=3, help="blocks of the streamed checkpoint")
    parser.add_argument("--tokens", type=int, default=512, help="of its probe")
    parser.add_argument("--worker", choices=("plain", "causal"), help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true", help="small, as JSON for bench.py")
    arguments = parser.parse_args()
    if arguments.short:
        found = compare(blocks=4, writer=1, rounds=1)
        names = ("measure", "necessity", "all")
        tell("time", {f"causal tests: {name} / plain forward": found[name] for name in names})
        return
    if arguments.worker is not None:
        scanned(arguments.stream, arguments.tokens, arguments.worker == "causal")
        return
    if arguments.stream is not None:
        stream(arguments.stream, arguments.depth, arguments.tokens)
        return
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
            print(row(blocks, writer, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
