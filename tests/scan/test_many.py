"""Many checkpoints: what they hold alike is read once, and what differs is each one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tokenizers import Tokenizer
from tokenizers import models as kinds
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from sinktrack import scan
from sinktrack.archive import huggingface
from sinktrack.archive.huggingface import config, tokenizer
from sinktrack.archive.storage.files import Files
from tests.helpers import planted


def begins(directory: Path, token: str) -> None:
    """A tokenizer with this start token."""
    words = {f"w{number}": number for number in range(planted.VOCABULARY)}
    made = Tokenizer(kinds.WordLevel(words, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token=token).save_pretrained(directory)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Four checkpoints of a model and its tokenizer, as a training leaves them."""
    first = tmp_path / "archive/checkpoint-1"
    model = planted.dense()
    planted.neuron_writer(model, 1)
    for block in range(2, planted.BLOCKS):
        planted.reader(model, block)
    model.save_pretrained(first)
    begins(first, "w0")
    for step in (2, 3, 4):
        shutil.copytree(first, first.with_name(f"checkpoint-{step}"))
    return tmp_path / "archive"


def scanned(place: Path, run: Path) -> list[dict[str, Any]]:
    """Records without what tells one scan from another."""
    huggingface._LAST.clear()
    probe = planted.probe(4)
    return [
        {name: value for name, value in record.items() if name not in ("seconds", "source")}
        for record in scan(place, probe=probe, run=run, card=True)
    ]


def test_configuration_and_tokenizer_are_made_once(archive: Path, tmp_path: Path) -> None:
    made = AutoConfig.from_pretrained, AutoTokenizer.from_pretrained
    with (
        mock.patch.object(AutoConfig, "from_pretrained", side_effect=made[0]) as configs,
        mock.patch.object(AutoTokenizer, "from_pretrained", side_effect=made[1]) as tokenizers,
    ):
        first, *others = scanned(archive, tmp_path / "run")
    assert tokenizers.call_count == 1 and configs.call_count <= 2  # a tokenizer may ask for one
    for record in others:
        assert record | {"step": 1} == first


def test_what_differs_is_each_checkpoints_own(archive: Path, tmp_path: Path) -> None:
    """In turns, so that what was read last is never the right one."""
    for step in (2, 4):
        begins(archive / f"checkpoint-{step}", "w7")
    for step in (3, 4):
        file = archive / f"checkpoint-{step}/config.json"
        said = json.loads(file.read_text())
        said["rope_parameters"] = {"rope_type": "default", "rope_theta": 50.0}
        file.write_text(json.dumps(said))
    together = scanned(archive, tmp_path / "run")
    alone = [
        record
        for step in (1, 2, 3, 4)
        for record in scanned(archive / f"checkpoint-{step}", tmp_path / f"alone-{step}")
    ]
    assert together == alone
    starts = [record["position_card"]["start_token"]["id"] for record in together]
    assert starts == [0, 7, 0, 7]
    assert together[0]["p0_attention"] == together[1]["p0_attention"]
    assert together[1]["p0_attention"] != together[2]["p0_attention"]


def test_a_tokenizer_that_is_written_over_is_read_anew(archive: Path) -> None:
    files = Files(archive / "checkpoint-1")
    before: Any = tokenizer(files)
    again: Any = tokenizer(files)
    assert again is before and before.bos_token_id == 0
    begins(archive / "checkpoint-1", "w9")
    after: Any = tokenizer(files)
    assert after.bos_token_id == 9


def test_a_configuration_that_is_changed_is_not_the_next_ones(archive: Path) -> None:
    first = config(Files(archive / "checkpoint-1"))
    first.num_hidden_layers, first.rope_parameters["rope_theta"] = 1, 1.0
    second = config(Files(archive / "checkpoint-2"))
    assert second.num_hidden_layers == planted.BLOCKS
    assert second.rope_parameters["rope_theta"] != 1.0
