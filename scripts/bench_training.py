"""Tokens per second of a real Trainer run with the callback against without it.

Interleaved rounds of a small MoE, each of one interval of 100 steps on batches of 16 times the
probe's tokens, probes at both ends of it. Beside the measured ratio stands the one computed from
the probe's own seconds, which noise cannot hide.

    python scripts/bench_training.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from ratios import tell
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

import sinktrack as st
from sinktrack.callbacks.huggingface import SinkTrackCallback

VOCABULARY, LENGTH, STEPS = 512, 64, 100


class Sequences(Dataset[dict[str, Tensor]]):
    """Random sequences; what they say does not change what they cost."""

    def __init__(self, count: int) -> None:
        self.tokens = st.Probe.random(VOCABULARY, count, LENGTH, seed=1).tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def train(out: Path, probe: st.Probe, callbacks: list[Any], steps: int) -> float:
    """Seconds of one run."""
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
        per_device_train_batch_size=16 * probe.sequences,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Sequences(1024), callbacks=callbacks)
    return float(trainer.train().metrics["train_runtime"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="small, as JSON for bench.py")
    arguments = parser.parse_args()
    rounds, steps = (1, 20) if arguments.short else (arguments.rounds, STEPS)
    logging.disable(logging.WARNING)
    probe = st.Probe.random(VOCABULARY, sequences=4, length=LENGTH)
    plain, tracked, probes = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        for index in range(rounds):
            out = Path(directory) / str(index)
            plain.append(train(out, probe, [], steps))
            tracked.append(train(out, probe, [SinkTrackCallback(probe, out / "run")], steps))
            probes += [record["seconds"] for record in st.Run.read(out / "run").records]
    before, after = statistics.median(plain), statistics.median(tracked)
    if arguments.short:
        step = before / steps
        tell(
            "time",
            {"training: a probe / a step of 16 times its tokens": statistics.median(probes) / step},
        )
        return
    tokens = STEPS * 16 * probe.tokens.numel()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {rounds} rounds")
    print(f"without the callback {tokens / before:,.0f} tokens/s, with it {tokens / after:,.0f}")
    print(f"measured: {after / before - 1:+.2%} for two probes in {STEPS} steps")
    print(f"computed: {statistics.median(probes) / before:+.2%} for one probe every {STEPS} steps")


if __name__ == "__main__":
    main()
