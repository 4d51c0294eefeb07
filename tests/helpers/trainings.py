"""A small Trainer training, and what must be the same with the callback and without."""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from sinktrack import Probe
from sinktrack.callbacks.loop import SinkTracker
from tests.helpers import models

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=16, seed=5)


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.tokens = Probe.random(models.VOCABULARY, sequences=64, length=16, seed=9).tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name == "sinktrack"]


class Outcome(TrainerCallback):  # type: ignore[misc]
    """What a run leaves behind, taken at its end."""

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any
    ) -> None:
        self.weights = copy.deepcopy(model.state_dict())
        self.optimizer = copy.deepcopy(optimizer.state_dict())
        self.buffers = {k: v.clone() for k, v in model.named_buffers()}
        self.random = (random.getstate(), numpy_state(), torch.get_rng_state())
        self.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]


def run_trainer(
    model: Any, out: Path, callbacks: list[Any], resume: Any = None, **changes: Any
) -> Outcome:
    set_seed(11)
    outcome = Outcome()
    arguments = TrainingArguments(
        output_dir=str(out),
        **{
            "max_steps": 50,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_steps": 20,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 11,
        }
        | changes,
    )
    trainer = Trainer(model, arguments, train_dataset=Data(), callbacks=[*callbacks, outcome])
    trainer.train(resume_from_checkpoint=resume)
    return outcome


def assert_identical(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_identical(left, right, f"{where}[{index}]")
    else:
        assert one == other, where


def numpy_state() -> Any:
    return np.random.get_state()[1].tolist()  # type: ignore[index]


def fingerprint(model: Any) -> dict[str, object]:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "buffers": {k: (id(v), v.clone()) for k, v in model.named_buffers()},
        "grads": {
            k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()
        },
        "training": [m.training for m in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "attributes": [
            {k: id(v) for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()
        ],
        "attention": model.config._attn_implementation,
        "rng": torch.get_rng_state(),
        "numpy": numpy_state(),
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "grad_enabled": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def train(
    model: Any, tracker: SinkTracker | None, context: Any = nullcontext, scaler: Any = None
) -> dict[str, Any]:
    """Eleven steps of AdamW with dropout; the state of everything afterwards."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, 12):
        tokens = torch.randint(models.VOCABULARY, (4, 16))
        with context():
            loss = model(tokens, labels=tokens).loss
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        if tracker:
            tracker.step(step, model)
    return {
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "scaler": scaler.state_dict() if scaler else None,
    }
