"""DeepSpeed's engine and the Trainer with it, over two processes on CPUs.

``pip install deepspeed`` builds against the torch that is there (``--no-build-isolation``).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from sinktrack import Probe, Run, scan
from sinktrack.demo import AGREEMENT, largest_difference
from tests.helpers import models
from tests.helpers.commands import two_processes
from tests.helpers.trainings import assert_identical

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
    ),
]
PROBE = Probe.random(models.VOCABULARY, sequences=4, length=12)
ENGINE = """
    import deepspeed
    stage, dtype, keeps = {stage}, "{dtype}", {keeps}
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    probe = Probe.random(models.VOCABULARY, sequences=4, length=12)

    def train(name):
        torch.manual_seed(0)
        model = models.mixtral(attention_dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={{
            "train_micro_batch_size_per_gpu": 2, "bf16": {{"enabled": dtype == "bfloat16"}},
            "zero_optimization": {{"stage": stage, "stage3_param_persistence_threshold": keeps}},
            "zero_allow_untested_optimizer": True,
        }})
        tracker = SinkTracker(probe, out / "run", every=2, on_error="raise") if name else None
        generator = torch.Generator().manual_seed(rank)
        torch.manual_seed(3 + rank)
        losses = []
        for step in range(1, 9):
            tokens = torch.randint(models.VOCABULARY, (2, 16), generator=generator)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
            if tracker:
                tracker.step(step, engine)
        if tracker:
            tracker.close()
            engine.save_checkpoint(str(out / "saved"), tag="global_step8")
        whole = engine.module.parameters()
        with deepspeed.zero.GatheredParameters(list(whole), enabled=stage == 3):
            weights = [value.detach().clone() for value in engine.module.parameters()]
        return {{"losses": losses, "weights": weights, "random": torch.get_rng_state()}}

    assert_identical(train(""), train("tracked"))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("stage", "keeps"), [(0, 0), (1, 0), (2, 0), (3, 0), (3, 100_000)])
def test_engine(
    stage: int, keeps: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-identical; records are those of a scan of the checkpoint, which is wider in ZeRO-3.

    Weights of up to ``keeps`` numbers DeepSpeed leaves whole on each process.
    """
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    two_processes(tmp_path, ENGINE.format(stage=stage, dtype=dtype, keeps=keeps))
    live = Run.read(tmp_path / "run")
    assert live.steps == [2, 4, 6, 8]
    models.mixtral().config.save_pretrained(tmp_path / "config")
    (offline,) = scan(
        tmp_path / "saved", probe=PROBE, run=tmp_path / "scanned", hf_config=tmp_path / "config"
    )
    online = live.records[-1]
    assert online["dtype"] == dtype
    if offline["dtype"] == dtype:
        assert online["weights"] == offline["weights"]
        for record in (online, offline):
            for name in ("model", "missing"):
                record.pop(name, None)
            for sink in record["sinks"]:
                sink.pop("total_effects", None)
        assert largest_difference(online, offline) <= AGREEMENT


TRAINER = """
    import deepspeed
    from transformers import Trainer, TrainingArguments
    stage, name = {stage}, "{name}"
    probe = Probe.random(models.VOCABULARY, sequences=4, length=12)
    generator = torch.Generator().manual_seed(0)
    data = [
        {{"input_ids": tokens, "labels": tokens}}
        for tokens in torch.randint(models.VOCABULARY, (64, 16), generator=generator)
    ]
    torch.manual_seed(0)
    model = models.mixtral(attention_dropout=0.1)
    given = TrainingArguments(
        str(out / "trainer"), per_device_train_batch_size=2, max_steps=8, logging_steps=1,
        report_to=[], use_cpu=True, ddp_backend="gloo", save_strategy="no", deepspeed={{
            "zero_optimization": {{"stage": stage}}, "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }},
    )
    callbacks = []
    if name == "tracked":
        callbacks.append(SinkTrackCallback(probe, out / "run", every=4, on_error="raise"))
    trainer = Trainer(model, given, train_dataset=data, callbacks=callbacks)
    trainer.train()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        weights = [value.detach().clone() for value in model.parameters()]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if dist.get_rank() == 0:
        torch.save({{"weights": weights, "losses": losses}}, out / f"{{name}}.pt")
    dist.barrier()
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logged losses and weights, and a record of every probe."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("plain", "tracked"):
        two_processes(tmp_path, TRAINER.format(stage=stage, name=name))
    assert_identical(*(torch.load(tmp_path / f"{name}.pt") for name in ("plain", "tracked")))
    assert Run.read(tmp_path / "run").steps == [0, 4, 8]
