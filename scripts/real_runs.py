"""Train the demo's model under several seeds, learning rates and troubles; keep what was recorded.

Writes, per run, a run directory with the fields of the records that the signal reads, and the loss
as a CSV. tests/data/runs holds what this wrote; docs/signal.md says what was found. With --seeds
it is ten seeds at both learning rates, half as long, as tests/data/seeds holds them.

    python scripts/real_runs.py OUT [--only NAME] [--seeds]
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from sinktrack.callbacks.huggingface import SinkTrackCallback
from sinktrack.demo import probe, tiny_moe, train
from sinktrack.records.run import Run

STEPS, EVERY = 800, 20
SEED_STEPS = 400
FIELDS = (
    "schema", "step", "tokens", "source", "probe", "model", "sink_rate", "sink_rate_by_block",
    "concentration", "formed", "reference_block", "sinks", "sink_heads", "first_sink_block",
    "sink_sequences", "first_two_share", "depth", "first_two_gain",
)  # fmt: skip
PHASE = (
    "first_block", "last_block", "mass", "peak_block", "step_up_block", "step_down_block",
)  # fmt: skip

INTERVALS = ("sink_rate", "first_two_share", "depth")


@dataclass(frozen=True)
class Setting:
    """How one run differs from the demo."""

    seed: int = 1
    learning_rate: float = 5e-3
    sliding_window: int | None = None
    spike: float | None = None
    """Learning rate from step 600 to step 640."""


SETTINGS = {
    f"seed{seed}-lr{rate:g}": Setting(seed, rate) for rate in (5e-3, 1e-2) for seed in (1, 2, 3)
} | {
    "diverges": Setting(learning_rate=1.0),
    "spike": Setting(spike=0.3),
    "sliding-window": Setting(sliding_window=16),
}


SEEDS = {f"seed{seed}-lr{rate:g}": Setting(seed, rate) for seed in range(1, 11)
         for rate in (5e-3, 1e-2)}  # fmt: skip


class Losses(TrainerCallback):  # type: ignore[misc]
    """The training loss at each logged step."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
        if "loss" in logs:
            self.rows.append((state.global_step, logs["loss"]))


class Spike(TrainerCallback):  # type: ignore[misc]
    """A learning rate far too high for a while."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        if 600 <= state.global_step < 640:
            for group in optimizer.param_groups:
                group["lr"] = self.rate


def run(setting: Setting, out: Path, steps: int = STEPS) -> None:
    """Train, and write the records and the loss to ``out``."""
    losses = Losses()
    with tempfile.TemporaryDirectory() as temporary:
        full = Path(temporary) / "run"
        tracker = SinkTrackCallback(probe(), full, every=EVERY, early=True)
        extra = [Spike(setting.spike)] if setting.spike is not None else []
        train(
            tiny_moe(setting.seed, setting.sliding_window), Path(temporary), seed=setting.seed,
            steps=steps, callbacks=[tracker, losses, *extra], save_strategy="no",
            logging_steps=EVERY, learning_rate=setting.learning_rate,
        )  # fmt: skip
        records = Run.read(full).records
    out.mkdir(parents=True, exist_ok=True)
    with (out / "records.jsonl").open("w") as file:
        for record in records:
            file.write(json.dumps(kept(record), separators=(",", ":")) + "\n")
    with (out / "loss.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("step", "loss"), *losses.rows])


def kept(record: dict[str, Any], writers: int = 0) -> dict[str, Any]:
    """The fields of a record that the signal reads, and so many writers of each phase."""
    found = {name: record[name] for name in FIELDS}
    found["sinks"] = [
        {name: sink[name] for name in PHASE} | ({"writers": sink["writers"][:writers]} if writers
        else {}) for sink in record["sinks"]
    ]  # fmt: skip
    found["intervals"] = {name: record["intervals"][name] for name in INTERVALS}
    result: dict[str, Any] = rounded(found)
    return result


def rounded(value: Any) -> Any:
    """Five decimals."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=list(SETTINGS | SEEDS))
    parser.add_argument("--seeds", action="store_true", help="ten seeds of two settings")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name, setting in (SEEDS if options.seeds else SETTINGS).items():
        if options.only in (None, name):
            run(setting, options.out / name, SEED_STEPS if options.seeds else STEPS)
            print(name, flush=True)


if __name__ == "__main__":
    main()
