"""What the callback costs a real Trainer run of ten minutes, and what 1,000 probes leave in memory.

One run of a small MoE on batches of 16 times the probe's tokens. Of its intervals of 100 steps
every other pair has the callback, with a probe each: pauses and changes of the clock meet both
alike. The ratio of the means comes with its interval over pairs; beside it stands the one computed
from the probes' own seconds, which noise cannot hide. A second run probes after every step, and
shows the process's memory over its probes.

    python scripts/bench_training.py [--minutes 10 --probes 1000]
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_probe import resident
from ratios import tell
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

import sinktrack as st
from sinktrack.callbacks.huggingface import SinkTrackCallback

VOCABULARY, LENGTH = 512, 64
MIB = 2**20


class Sequences(Dataset[dict[str, Tensor]]):
    """Random sequences; what they say does not change what they cost."""

    def __init__(self, count: int) -> None:
        self.tokens = st.Probe.random(VOCABULARY, count, LENGTH, seed=1).tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Alternating(SinkTrackCallback):
    """The callback in intervals 0, 3, 4, 7, 8, ... of the run; none in the others."""

    def __init__(self, probe: st.Probe, run: Path, every: int, seconds: float) -> None:
        super().__init__(probe, run, every, early=False)
        self.every, self.seconds = every, seconds
        self.taken: list[float] = []
        """Seconds of each interval."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.begun = self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if len(self.taken) % 4 in (0, 3):
            super().on_step_end(args, state, control, **kwargs)
        if state.global_step % self.every == 0:
            now = time.perf_counter()
            self.taken.append(now - self.last)
            self.last = now
            whole = len(self.taken) % 4 == 0
            control.should_training_stop = whole and now - self.begun > self.seconds


class Memory(SinkTrackCallback):
    """The callback, and what the process holds after each step."""

    held: list[int]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.held = []
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self.held.append(resident())


def train(out: Path, rows: int, callback: SinkTrackCallback, steps: int) -> list[float]:
    """Train with a callback; the seconds of its probes."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY, hidden_size=128, moe_intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8,
            num_experts_per_tok=2, experts_implementation="grouped_mm",
        )
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=rows,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Sequences(1024), callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [record["seconds"] for record in st.Run.read(out / "run").records]


def ratio(taken: list[float]) -> tuple[float, float, float]:
    """Seconds of intervals with a probe over those without, and its 95 % interval over pairs."""
    pairs = np.array(taken).reshape(-1, 2)
    pairs[::2] = pairs[::2, ::-1]  # without, with
    drawn = np.random.default_rng(0).integers(len(pairs), size=(10_000, len(pairs)))
    means = pairs[drawn].mean(1)
    low, high = np.quantile(means[:, 1] / means[:, 0], [0.025, 0.975])
    plain, tracked = pairs.mean(0)
    return float(tracked / plain), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--probes", type=int, default=1000)
    parser.add_argument("--short", action="store_true", help="small, as JSON for bench.py")
    arguments = parser.parse_args()
    every = 10 if arguments.short else 100
    logging.disable(logging.WARNING)
    probe = st.Probe.random(VOCABULARY, sequences=4, length=LENGTH)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        seconds = 0 if arguments.short else 60 * arguments.minutes
        timed = Alternating(probe, out / "timed" / "run", every, seconds)
        probes = train(out / "timed", 16 * probe.sequences, timed, 10**9)[1:]
        taken = timed.taken[4:] or timed.taken  # the first ones warm up
        step = float(np.mean(taken)) / every
        if arguments.short:
            cost = float(np.median(probes)) / step
            tell("time", {"training: a probe / a step of 16 times its tokens": cost})
            return
        memory = Memory(probe, out / "memory" / "run", 1)
        train(out / "memory", 4, memory, arguments.probes)
    middle, low, high = ratio(taken)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {sum(taken) / 60:.1f} minutes")
    print(
        f"measured: {middle - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%}), {len(taken)} intervals"
    )
    print(f"computed: {float(np.median(probes)) / (every * step):+.2%}")
    for at in np.linspace(arguments.probes / 10, arguments.probes, 10).astype(int):
        print(f"after {at} probes {memory.held[at - 1] / MIB:,.0f} MiB")


if __name__ == "__main__":
    main()
