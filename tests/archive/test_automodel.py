"""Checkpoints as NeMo Automodel's recipes leave them, around models that transformers writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from sinktrack import ArchiveError, Probe, measure, scan
from sinktrack.archive.discover import discover
from tests.helpers import models

PROBE = Probe.random(models.VOCABULARY, sequences=3, length=10)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two steps, and the link to the last one."""
    root = tmp_path / "checkpoints"
    for step in (9, 19):
        place = root / f"epoch_{step // 10}_step_{step}"
        model = models.build(models.qwen3_moe().config, seed=step)
        model.save_pretrained(place / "model/consolidated")
        (place / "optim").mkdir()
        (place / "optim/.metadata").touch()
        (place / "model/.hf_metadata").mkdir()
        (place / "model/shard-00001-model-00001-of-00001.safetensors").touch()
        (place / "config.yaml").write_text("model: {}\n")
    (root / "LATEST").symlink_to("epoch_1_step_19")
    return root


def test_steps_and_numbers(archive: Path, tmp_path: Path) -> None:
    records = list(scan(archive, probe=PROBE, run=tmp_path / "run"))
    assert [(one["step"], one["source"]) for one in records] == [
        (9, "epoch_0_step_9"), (19, "epoch_1_step_19"),
    ]  # fmt: skip
    live = measure(models.build(models.qwen3_moe().config, seed=19).eval(), PROBE)
    assert records[1]["weights"] == live.weights
    (archive / "epoch_0_step_9/optim/.metadata").unlink()
    (archive / "epoch_0_step_9/optim").rmdir()  # to save room
    (alone,) = discover(archive / "epoch_0_step_9")
    assert alone.step == 9 and alone.reason is None


def test_parts_of_processes_are_told_with_what_to_do(archive: Path, tmp_path: Path) -> None:
    first, second = (archive / name / "model" for name in ("epoch_0_step_9", "epoch_1_step_19"))
    for model in (first, second):
        shutil.rmtree(model / "consolidated")
    (first / "consolidate.sh").touch()
    for part in (second / ".hf_metadata", *second.glob("shard-*")):
        part.rmdir() if part.is_dir() else part.unlink()
    (second / "__0_0.distcp").touch()
    with pytest.raises(ArchiveError) as error:
        list(scan(archive, probe=PROBE, run=tmp_path / "run"))
    one, other = str(error.value).splitlines()[1:]
    assert "model/shard-00001" in one and "run its model/consolidate.sh, or train with" in one
    assert "model/__0_0.distcp" in other and "consolidate.sh" not in other
    assert "OLMo" not in str(error.value) and "torchtitan" not in str(error.value)


def test_adapters(archive: Path, tmp_path: Path) -> None:
    base = models.qwen3_moe()
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model = archive / "epoch_1_step_19/model"
    shutil.rmtree(model)
    adapted.save_pretrained(str(model))
    found = discover(archive, base=tmp_path / "base")
    assert [(one.step, one.format) for one in found] == [(9, "safetensors_files"), (19, "adapters")]
    (record,) = scan(model.parent, probe=PROBE, run=tmp_path / "run", base=tmp_path / "base")
    wanted = measure(adapted.merge_and_unload().eval(), PROBE).norm_ratio.tolist()
    assert record["step"] == 19 and record["norm_ratio"] == pytest.approx(wanted, rel=1e-5)
