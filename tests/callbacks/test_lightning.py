"""A real Lightning training, with and without the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch.utils.data import DataLoader

from sinktrack import Decoder, MeasurementError, Probe, Run, measure
from sinktrack.callbacks.lightning import SinkTrackLightning
from tests.helpers import models, torch_models
from tests.helpers.lightning_modules import Module
from tests.helpers.trainings import PROBE, assert_identical


def train(
    directory: Path, callbacks: list[Any], module: type[Module] = Module, **changes: Any
) -> dict[str, Any]:
    torch.manual_seed(0)
    made = module()
    data: Any = torch.randint(models.VOCABULARY, (24, 4, 16))
    trainer = Trainer(
        accumulate_grad_batches=2, accelerator="cpu", logger=False,
        callbacks=callbacks, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=directory, **{"max_steps": 10} | changes,
    )  # fmt: skip
    trainer.fit(made, DataLoader(data, batch_size=None))
    return {
        "weights": made.inner.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "random": torch.get_rng_state(),
        "model": made.inner,
    }


def test_bit_identical_and_recorded(tmp_path: Path) -> None:
    plain = train(tmp_path, [])
    callback = SinkTrackLightning(PROBE, tmp_path / "run", every=4, on_error="raise")
    tracked = train(tmp_path, [callback])
    model = tracked.pop("model")
    del plain["model"]
    assert_identical(plain, tracked)
    records = Run.read(tmp_path / "run").records
    assert [record["step"] for record in records] == [0, 4, 8, 10]
    assert records[-1]["weights"] == measure(model.eval(), PROBE).weights


@pytest.mark.parametrize(
    ("length", "steps"),
    [({"max_steps": 8}, [0, 5, 8]), ({"max_steps": -1, "max_epochs": 1}, [0, 5, 10])],
)
def test_averaged_weights_are_not_those_of_the_last_step(
    length: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    """Of an epoch of 12 steps nothing tells beforehand which is the last."""
    plain = train(tmp_path, [], **length)
    callback = SinkTrackLightning(PROBE, tmp_path / "run", every=5, on_error="raise")
    averaged = train(tmp_path, [WeightAveraging(), callback], **length)
    digests = {record["step"]: record["weights"] for record in Run.read(tmp_path / "run").records}
    assert list(digests) == steps
    last = measure(plain["model"].eval(), PROBE).weights
    assert (digests[steps[-1]] == last) == (steps[-1] == 8)
    assert measure(averaged["model"].eval(), PROBE).weights not in {last, *digests.values()}


def test_a_learned_prompt_is_refused_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft")

    class Prompted(Module):
        def __init__(self) -> None:
            super().__init__()
            prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
            self.inner = peft.get_peft_model(self.inner, prompt)

    callback = SinkTrackLightning(PROBE, tmp_path / "run", every=4)
    train(tmp_path, [callback], module=Prompted)
    assert Run.read(tmp_path / "run").records == []
    assert caplog.text.count("a prompt that PEFT learned stands before") == 1
    with pytest.raises(MeasurementError, match="a prompt that PEFT learned stands before"):
        measure(Prompted(), PROBE)


def test_a_module_of_several_models_is_refused(tmp_path: Path) -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = models.llama()

    callback = SinkTrackLightning(PROBE, tmp_path / "run", on_error="raise")
    with pytest.raises(MeasurementError, match="Two holds 2 transformers models"):
        train(tmp_path, [callback], module=Two)


def test_a_decoder_of_ones_own(tmp_path: Path) -> None:
    """It is found in the module, whose forward is run; a model that is not only warns."""

    class Own(Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch_models.Net(torch_models.Kind())

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(tokens)
            return logits

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss: torch.Tensor = self(batch % torch_models.VOCABULARY).square().mean()
            return loss

    probe = Probe.random(torch_models.VOCABULARY, sequences=4, length=16)
    decoder = Decoder(blocks=lambda module: module.inner.layers)
    callback = SinkTrackLightning(
        probe, tmp_path / "run", every=4, on_error="raise", decoder=decoder
    )
    plain, tracked = train(tmp_path, [], module=Own), train(tmp_path, [callback], module=Own)
    model = tracked.pop("model")
    del plain["model"]
    assert_identical(plain, tracked)
    records = Run.read(tmp_path / "run").records
    assert [record["step"] for record in records] == [0, 4, 8, 10]
    assert records[-1]["weights"] == measure(model.eval(), probe).weights
