"""Causal tests of a checkpoint, a block at a time: what they say of the model in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sinktrack import Probe, measure
from sinktrack.archive.discover import discover
from sinktrack.archive.source import open as open_source
from sinktrack.errors import ArchiveError
from sinktrack.interventions import run_causal_tests
from sinktrack.interventions.card import measured_beside, start_of
from sinktrack.models import streamed_passes, streaming
from sinktrack.models.streaming import Streamed
from sinktrack.scan import scan
from tests.helpers import models, planted


def _short(seed: int = 3) -> Probe:
    """So short that chance alone makes a sink, and so something to test."""
    return Probe.random(models.VOCABULARY, sequences=10, length=6, seed=seed)


def _circuit() -> Any:
    """Two heads that stand in for each other, a neuron, and their readers."""
    model = planted.dense()
    planted.head_writer(model, 0, 0)
    planted.head_writer(model, 0, 1)
    for block in (2, 3, 4):
        planted.reader(model, block)
    return model


def _routed() -> Any:
    model = planted.mixture()
    planted.expert_writer(model, 1, expert=2, size=8.0)
    for block in (2, 3, 4):
        planted.reader(model, block)
    return model


def _tied() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**models.small(tie_word_embeddings=True))).eval()


CASES: dict[str, tuple[Callable[[], Any], Probe]] = {
    "circuit": (_circuit, planted.probe(10)),
    "routed": (_routed, planted.probe(10)),
    "llama": (models.llama, _short()),
    "tied": (_tied, _short()),
    "mixtral": (models.mixtral, _short()),
    "qwen3_moe": (models.qwen3_moe, _short(0)),
    "deepseek_v3": (models.deepseek_v3, _short(5)),
    "sliding": (models.mistral_sliding, _short()),
    "gpt2": (lambda: models.gpt2(bos_token_id=0), _short()),
}


def close(one: Any, other: Any, where: str = "") -> None:
    """Equal, numbers to 1e-6."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one.keys() - {"seconds"}:
            close(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            close(a, b, f"{where}/{place}")
    elif isinstance(one, float) and isinstance(other, float):
        assert math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6), (where, one, other)
    else:
        assert one == other, where


def streamed_of(model: Any, directory: Path) -> Streamed:
    model.save_pretrained(directory)
    return Streamed(open_source(discover(directory)[0]), head=True)


@pytest.mark.parametrize("case", CASES)
def test_streamed_equals_in_memory(case: str, tmp_path: Path) -> None:
    made, probe = CASES[case]
    model = made()
    measured = measure(model, probe)
    wanted = run_causal_tests(model, probe, measured)
    streamed = streamed_of(model, tmp_path)
    found = run_causal_tests(streamed, probe, measure(streamed, probe))
    assert found["phases"], "nothing was tested"
    close(found, wanted)


def readings(streamed: Streamed) -> list[list[int]]:
    """Which blocks are entered, reading by reading, from now on."""
    found: list[list[int]] = []
    own = streamed.block

    @contextmanager
    def block(index: int, last: int | None = None) -> Iterator[Any]:
        if not found or found[-1][-1] >= index:
            found.append([])
        found[-1].append(index)
        with own(index, last) as entered:
            yield entered

    streamed.block = block  # type: ignore[method-assign]
    return found


def test_a_reading_serves_all_that_do_not_wait_for_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain passes; all trials; all controls. Parts and sets of what has a verdict come after."""
    monkeypatch.setattr(streaming, "KEPT", 0)
    model, probe = models.mixtral(), _short()
    measured = measure(model, probe)
    streamed = streamed_of(model, tmp_path / "none")
    found = readings(streamed)
    beside = measured_beside(streamed, probe, start_of(probe, model.config))
    assert found.pop(0) == [0, 1, 2, 3]
    before = streamed.bytes_read
    told = run_causal_tests(streamed, probe, measured, beside=beside)
    assert len(found) <= 3
    assert all(blocks == list(range(blocks[0], blocks[-1] + 1)) for blocks in found)
    size = sum(path.stat().st_size for path in (tmp_path / "none").glob("*.safetensors"))
    assert 1 < (streamed.bytes_read - before) / size < 3.1
    assert {row["verdict"] for row in told["necessity"]} == {None}

    streamed = streamed_of(_circuit(), tmp_path / "several")
    measured = measure(streamed, planted.probe(10))
    found = readings(streamed)
    run_causal_tests(streamed, planted.probe(10), measured)
    assert len(found) <= 7 + 1  # the card's, which a scan measures in its own reading


def test_a_small_model_is_read_once(tmp_path: Path) -> None:
    probe = _short()
    streamed = streamed_of(models.mixtral(), tmp_path)
    measured = measure(streamed, probe)
    run_causal_tests(streamed, probe, measured)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert streamed.bytes_read < 1.5 * size


def test_what_waits_is_bounded_whatever_the_number_of_edits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More readings then; the same numbers, and never more than the limit between two blocks."""
    model, probe = _routed(), planted.probe(10)
    measured = measure(model, probe)
    streamed = streamed_of(model, tmp_path)
    found = readings(streamed)
    free = run_causal_tests(streamed, probe, measured)
    most = len(found)
    limit = 8 * probe.tokens.numel() * planted.WIDTH * 4
    assert limit > streamed.largest_block // 2
    monkeypatch.setattr(streamed_passes, "WAITING", limit)
    held: list[int] = []
    own = streamed_passes._Passes._step

    def step(self: Any, going: Any, index: int) -> bool:
        going_on = own(self, going, index)
        group.add(going)
        held.append(sum(0 if one.stream is None else one.stream.nbytes for one in group))
        return going_on

    group: set[Any] = set()
    monkeypatch.setattr(streamed_passes._Passes, "_step", step)
    close(run_causal_tests(streamed, probe, measured), free)
    assert 0 < max(held) <= limit
    assert len(found) - most > most


def test_a_scan_never_loads_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _routed()
    model.save_pretrained(tmp_path / "archive" / "checkpoint-1")

    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the whole checkpoint was loaded")

    monkeypatch.setattr("sinktrack.archive.huggingface.load", load)
    (record,) = scan(
        tmp_path / "archive", probe=planted.probe(10), run=tmp_path / "run", causal=True
    )
    measured = measure(model, planted.probe(10))
    wanted = run_causal_tests(model, planted.probe(10), measured)
    card = wanted.pop("position_card")
    close(record["causal"], wanted)
    close(record["position_card"]["as_is"], card["as_is"])
    totals = measured.to_record(0, "", {})["sinks"][0]["total_effects"]
    assert totals
    close(record["sinks"][0]["total_effects"], totals)


def test_a_checkpoint_without_a_head_is_named(tmp_path: Path) -> None:
    model = models.llama()
    model.model.save_pretrained(tmp_path)  # the base model alone
    source = open_source(discover(tmp_path)[0])
    Streamed(source)
    with pytest.raises(ArchiveError, match=r"1 weights missing \(lm_head.weight\)"):
        Streamed(source, head=True)
