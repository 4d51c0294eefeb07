"""torchtitan's checkpoints against the model whose weights they hold."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sinktrack import ArchiveError, Probe, measure, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.follow import lack
from sinktrack.archive.huggingface import load
from sinktrack.archive.source import Source
from sinktrack.archive.source import open as open_source
from sinktrack.archive.storage.files import Files
from sinktrack.records.run import to_json
from tests.helpers import models
from tests.helpers import torchtitan_checkpoints as titan
from tests.helpers.reference import check_slices
from tests.helpers.torchtitan_checkpoints import FAMILIES, qwen3

PROBE = Probe.random(models.VOCABULARY, sequences=4, length=12)


def saved(model: Any, root: Path, *, newer: bool = True, **changes: Any) -> dict[str, Any]:
    """What discover and scan need: an archive of one checkpoint, and the configuration."""
    titan.save(titan.weights(model, newer=newer) | changes, root / "checkpoint" / "step-7")
    model.config.save_pretrained(root / "hf")
    return {"archive": root / "checkpoint", "hf_config": root / "hf"}


def source(where: dict[str, Any]) -> Source:
    (checkpoint,) = discover(**where)
    assert (checkpoint.format, checkpoint.step, checkpoint.name) == ("torchtitan", 7, "step-7")
    return open_source(checkpoint)


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_measured_as_the_model_that_was_saved(family: str, newer: bool, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    where = saved(model, tmp_path, newer=newer)
    (record,) = scan(**where, probe=PROBE, run=tmp_path / "run")
    live = to_json(measure(model, PROBE).to_record(7, "step-7", record["versions"]))
    assert record | {"seconds": 0} == live | {"seconds": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_slices(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    where = saved(model, tmp_path)
    model.save_pretrained(tmp_path / "plain")
    plain, found = open_source(discover(tmp_path / "plain")[0]), source(where)
    check_slices(found, plain)


def test_only_the_rows_that_are_wanted_are_read(tmp_path: Path) -> None:
    model = models.qwen3_moe(vocab_size=4096, moe_intermediate_size=256, mlp_only_layers=[])
    found = source(saved(model, tmp_path))
    read: list[int] = []

    class Counting:
        def __init__(self, files: Files) -> None:
            self.files = files

        def read(self, name: str, start: int, end: int) -> memoryview:
            read.append(end - start)
            return self.files.read(name, start, end)

    for name, index, wanted in (
        ("model.embed_tokens.weight", slice(7, 9), 2 * 32),
        ("model.layers.2.mlp.experts.5.gate_proj.weight", ..., 256 * 32),
    ):
        part = found.slice(name)
        files = Counting(part.files)  # type: ignore[attr-defined]
        read.clear()
        assert replace(part, files=files)[index].numel() == wanted  # type: ignore[type-var]
        assert wanted * 4 <= sum(read) <= wanted * 4 + 2 * 4096  # a chunk's two ends


def test_tied_embeddings_and_bfloat16(tmp_path: Path) -> None:
    model = qwen3(tie_word_embeddings=True).to(torch.bfloat16)
    where = saved(model, tmp_path)
    loaded = load(discover(**where)[0])
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_steps_of_an_archive(tmp_path: Path) -> None:
    """One that is still being written has no ``.metadata`` yet."""
    where = saved(models.llama(), tmp_path)
    for step in (9, 10, 11):
        shutil.copytree(where["archive"] / "step-7", where["archive"] / f"step-{step}")
    (where["archive"] / "step-11" / ".metadata").unlink()
    *whole, last = discover(**where)
    assert [checkpoint.step for checkpoint in whole] == [7, 9, 10]
    assert not any(map(lack, whole))
    assert last.step == 11 and ".distcp" in str(last.reason) and ".metadata" in str(last.reason)


def test_nothing_but_an_unfinished_checkpoint(tmp_path: Path) -> None:
    where = saved(models.llama(), tmp_path)
    (where["archive"] / "step-7" / ".metadata").unlink()
    (checkpoint,) = discover(**where)
    with pytest.raises(ArchiveError, match="step-7 holds shards .* without .metadata, which is"):
        open_source(checkpoint)


def test_without_a_configuration_the_way_out_is_named(tmp_path: Path) -> None:
    where = saved(models.llama(), tmp_path)
    with pytest.raises(ArchiveError, match=r"step-7 holds no config.json.*--hf-config"):
        open_source(discover(where["archive"])[0])


BIAS = "layers.2.moe.expert_bias_E"


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"num_hidden_layers": 5}, {}, "has no layers.4.attention_norm.weight"),
        ({"num_hidden_layers": 3}, {}, "holds layers.3.attention.k_norm.weight, and 11 more"),
        ({"num_experts": 9}, {}, r"shape \[8, 32\], the configuration says \[9, 32\]"),
        ({"moe_intermediate_size": 8}, {}, r"w1_EFD has shape \[8, 16, 32\], .* \[8, 8, 32\]"),
        ({"vocab_size": 64}, {}, "tok_embeddings.weight has shape"),
        ({"mlp_only_layers": []}, {}, "has no layers.1.moe.router.gate.weight"),
        ({"num_key_value_heads": 4}, {}, "wk.weight has shape"),
        ({}, {"layers.0.attention.sinks": torch.zeros(4)}, "holds layers.0.attention.sinks"),
        ({}, {"layers.0.attention.wo.bias": torch.zeros(32)}, "holds layers.0.attention.wo.bias"),
        ({}, {"norm.weight": torch.zeros(33)}, r"norm.weight has shape \[33\]"),
        ({}, {BIAS: torch.eye(8)[0]}, f"chosen with the bias {BIAS}, which qwen3_moe has no"),
        ({}, {BIAS: torch.zeros(7)}, f"{BIAS} has shape"),
    ],
)
def test_what_does_not_fit_is_refused(
    config: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = models.qwen3_moe()
    where = saved(model, tmp_path, **changes)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.config.save_pretrained(tmp_path / "hf")
    with pytest.raises(ArchiveError, match=message):
        source(where)


def test_a_bias_of_zeros_changes_nothing(tmp_path: Path) -> None:
    extra: dict[str, Any] = {BIAS: torch.zeros(8)}
    assert BIAS not in source(saved(models.qwen3_moe(), tmp_path, **extra)).names()


def test_a_weight_that_is_missing(tmp_path: Path) -> None:
    model = models.llama()
    state = titan.weights(model, newer=True)
    del state["layers.1.feed_forward.w2.weight"]
    titan.save(state, tmp_path / "step-7")
    model.config.save_pretrained(tmp_path / "hf")
    with pytest.raises(ArchiveError, match="has no layers.1.feed_forward.w2.weight"):
        source({"archive": tmp_path, "hf_config": tmp_path / "hf"})


def test_other_families_and_other_frameworks(tmp_path: Path) -> None:
    where = saved(models.llama(), tmp_path)
    models.mixtral().config.save_pretrained(tmp_path / "hf")
    with pytest.raises(ArchiveError, match="of mixtral; checkpoints of torchtitan are read as"):
        source(where)
    models.deepseek_v3().config.save_pretrained(tmp_path / "hf")
    with pytest.raises(ArchiveError, match="of deepseek_v3; .* compute otherwise"):
        source(where)
    titan.save({"decoder.weight": torch.ones(2)}, tmp_path / "other" / "step-7")
    with pytest.raises(ArchiveError, match="not of torchtitan: .* but decoder.weight"):
        source({"archive": tmp_path / "other"})


def test_the_last_one_in_the_format_of_hugging_face(tmp_path: Path) -> None:
    """As ``last_save_in_hf`` leaves it: without a configuration either."""
    model = models.llama()
    where = saved(model, tmp_path)
    model.save_pretrained(where["archive"] / "step-30")
    (where["archive"] / "step-30" / "config.json").unlink()
    first, last = discover(**where)
    assert (first.format, last.format) == ("torchtitan", "safetensors_files")
    one, other = open_source(first), open_source(last)
    assert set(one.names()) == set(other.names())
    assert all(torch.equal(one.slice(name)[...], other.slice(name)[...]) for name in one.names())


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    where = saved(models.llama(), tmp_path)
    (file,) = (where["archive"] / "step-7").glob("*.distcp")
    if damage == "shorter":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    assert lack(discover(**where)[0])
    with pytest.raises(ArchiveError, match=file.name):
        load(discover(**where)[0])


def test_a_path_that_python_3_13_pickled(tmp_path: Path) -> None:
    """There ``PosixPath`` is of ``pathlib._local``; other versions have no such module."""
    where = saved(models.llama(), tmp_path)
    file = where["archive"] / "step-7" / ".metadata"
    names = source(where).names()
    moved = pickle.dumps(pickle.loads(file.read_bytes()), protocol=2)  # names, a line each
    written = moved.replace(b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath")
    assert b"cpathlib._local\n" in written
    file.write_bytes(written)
    assert source(where).names() == names


def test_a_pickle_that_calls_something_is_refused(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "called",))

    where = saved(models.llama(), tmp_path)
    (where["archive"] / "step-7" / ".metadata").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ArchiveError, match="pathlib"):
        source(where)
    assert not (tmp_path / "called").exists()
