"""GGUF of a finished model, written by the package gguf: transformers' own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sinktrack import ArchiveError, Probe, Run, measure, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.huggingface import load
from tests.helpers import models
from tests.helpers.commands import sinktrack_here

pytestmark = pytest.mark.slow  # gguf is no package of the tests
PROBE = Probe.random(models.VOCABULARY, sequences=2, length=8)
FILE = "model-q8_0.gguf"


def written(path: Path, file: str = FILE) -> Path:
    """A Llama as llama.cpp's converter lays it out, its matrices in Q8_0."""
    gguf = pytest.importorskip("gguf")
    model = models.llama(num_hidden_layers=2)
    config: Any = model.config
    path.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path / file, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    eight = gguf.GGMLQuantizationType.Q8_0
    for name, value in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        turned = next((rotary(value, heads[of]) for of in heads if of in name), value).numpy()
        own = names.get_name(name, try_suffixes=(".weight",))
        if turned.ndim > 1 and turned.shape[-1] % 32 == 0:
            writer.add_tensor(own, gguf.quants.quantize(turned, eight), raw_dtype=eight)
        else:
            writer.add_tensor(own, turned)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rotary(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order in which llama.cpp turns pairs of them."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def test_it_is_what_transformers_reads(tmp_path: Path) -> None:
    archive = written(tmp_path / "model")
    wanted = AutoModelForCausalLM.from_pretrained(archive, gguf_file=FILE).eval()
    for place in (archive, archive / FILE):
        (found,) = discover(place)
        assert found.name == FILE
        weights = load(found).state_dict()
        assert all(torch.equal(weights[key], value) for key, value in wanted.state_dict().items())
    (record,) = scan(archive, probe=PROBE, run=tmp_path / "run")
    assert record["dtype"] == "float32 from gguf"
    assert record["weights"] == measure(wanted, PROBE).weights


def test_of_several_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = written(written(tmp_path / "model"), "other.gguf")
    (found,) = discover(archive)
    assert "name the one to measure" in str(found.reason)
    code, _ = sinktrack_here(
        "scan", archive / "other.gguf", "--run", tmp_path / "run", capsys=capsys
    )
    assert code == 0 and Run.read(tmp_path / "run").steps == [0]


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    archive = written(tmp_path / "model")
    whole = (archive / FILE).read_bytes()
    for data in (whole[:2000], whole[:-400], b"GGUX" + whole[4:], whole[:4] + b"\xff" * 40):
        (archive / FILE).write_bytes(data)
        with pytest.raises(ArchiveError, match=r"cannot be read by transformers|does not begin"):
            load(discover(archive)[0])
