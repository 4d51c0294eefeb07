"""Routed experts put in place part by part, against the model as transformers loads it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from sinktrack import ArchiveError
from sinktrack.archive import huggingface
from sinktrack.archive.discover import discover
from sinktrack.archive.source import open as open_source
from sinktrack.measure import measure_streamed
from sinktrack.models import routed_experts, streaming
from sinktrack.models.huggingface import is_experts
from sinktrack.models.routed_experts import Experts
from sinktrack.models.streaming import Streamed
from tests.helpers.families import EXACT, PROBE, minutes, tiny

WHOLE = {"dbrx", "llama4_text"}
"""Their experts are not read one by one."""


def saved(family: str, directory: Path) -> Any:
    tiny(family, EXACT[family]).save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def opened(directory: Path) -> Streamed:
    return Streamed(open_source(discover(directory)[0]))


def route(module: nn.Module, experts: list[int]) -> None:
    """Run the hook before the forward, as if tokens came to these."""
    for hook in module._forward_pre_hooks.values():
        hook(module, (None, torch.tensor([experts])), {})


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Each expert by itself; which blocks' were copied."""
    copied: list[bool] = []
    tell = Experts._stand_in_a_row

    def told(self: Experts) -> bool:
        copied.append(tell(self))
        return copied[-1]

    monkeypatch.setattr(huggingface, "_EMPTY", None)  # what other tests found is not known here
    monkeypatch.setattr(routed_experts, "AT_ONCE", 1)
    monkeypatch.setattr(Experts, "_stand_in_a_row", told)
    return copied


def compare(model: Streamed, whole: nn.Module, chosen: Any = None) -> int:
    """Weights of the chosen experts, or of all, to the bit, and zero elsewhere."""
    found = 0
    blocks = list(model.decoder.blocks)
    for index in blocks:
        with model.block(index, index + 1 if index < blocks[-1] else None) as block:
            for path, module in block.named_modules():
                hooks = module._forward_pre_hooks
                if not (is_experts(module) and hooks):
                    continue
                other = whole.get_submodule(f"{model._prefixes[index]}{path}")
                count = int(module.num_experts)
                experts = list(range(count)) if chosen is None else chosen(index, count)
                route(module, experts)
                for name, weight in module.named_parameters():
                    wanted = other.get_parameter(name)
                    if weight.shape[0] != count:
                        continue
                    found += 1
                    assert weight.dtype == wanted.dtype
                    for expert in range(count):
                        right = wanted[expert] if expert in experts else torch.zeros(())
                        assert bool((weight[expert] == right).all()), (index, name, expert)
    return found


@pytest.mark.parametrize("family", minutes(sorted(EXACT)))
@pytest.mark.usefixtures("in_parts")
def test_part_by_part_as_loaded(family: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        if not any(map(is_experts, tiny(family, EXACT[family]).modules())):
            return
    whole = saved(family, tmp_path)
    assert compare(opened(tmp_path), whole) or family in WHOLE


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe"])
def test_copied_where_they_stand_in_a_row(
    family: str, tmp_path: Path, in_parts: list[bool]
) -> None:
    whole = saved(family, tmp_path)
    assert compare(opened(tmp_path), whole) > 0
    assert in_parts and all(in_parts)


def test_converted_where_the_stored_tensors_stand_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_parts: list[bool]
) -> None:
    """A conversion that a copy would not get right, though every shape fits."""
    whole = saved("qwen3_moe", tmp_path)
    convert = Experts._convert

    def turned(self: Experts, experts: list[int], tensors: Any, values: Any) -> None:
        convert(self, experts, tensors, values)
        for value in values.values():
            for expert in experts:
                value[expert] = value[expert].flip(0)

    monkeypatch.setattr(Experts, "_convert", turned)
    for module in filter(is_experts, whole.modules()):
        for weight in module.parameters():
            weight.data = weight.data.flip(1)
    assert compare(opened(tmp_path), whole) > 0
    assert in_parts and not any(in_parts)


@pytest.mark.parametrize("all_in", [0, 1])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "square"])
def test_memory_of_the_last_block_is_used_again(
    family: str, all_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All experts of every other block, one of the rest: the others' weights are zero."""
    if family == "square":  # several weights of one shape
        sizes = {**EXACT["gpt_oss"], "hidden_size": 64, "intermediate_size": 32}
        model = tiny("gpt_oss", sizes)
        for name, weight in model.named_parameters():
            if "bias" in name:
                torch.nn.init.normal_(weight)
        model.save_pretrained(tmp_path)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    else:
        whole = saved(family, tmp_path)
    fresh: list[torch.Tensor] = []
    make = routed_experts.untouched

    def made(like: torch.Tensor, device: str) -> torch.Tensor:
        fresh.append(make(like, device))
        return fresh[-1]

    monkeypatch.setattr(routed_experts, "untouched", made)
    read = opened(tmp_path)
    blocks, last = len(read.decoder.blocks), len(read.decoder.blocks) - 1
    found = compare(read, whole, lambda i, n: list(range(n)) if i % 2 == all_in else [1])
    each = found // blocks
    used = sum(index % 2 == all_in for index in range(last))
    assert len(fresh) == found - used * each and not read._left


def test_no_memory_is_kept_for_a_block_that_cannot_use_it(tmp_path: Path) -> None:
    saved("jamba", tmp_path)
    model = opened(tmp_path)
    experts = {index: bool(model._experts(index)) for index in model.decoder.blocks}
    before = next(i for i in experts if experts[i] and experts.get(i + 1) is False)
    for fails in (True, False):
        with suppress(KeyError), model.block(before, before + 1) as block:
            for module in filter(is_experts, block.modules()):
                route(module, list(range(int(module.num_experts))))  # type: ignore[arg-type]
            if fails:
                raise KeyError
        assert not model._left


@pytest.mark.usefixtures("in_parts")
def test_nothing_of_another_block_stays_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = saved("qwen3_moe", tmp_path)
    fetch, failing = Experts._fetch, [True]

    def fetched(self: Experts, experts: list[int]) -> dict[str, torch.Tensor]:
        if failing[0] and self is second and 5 in experts:
            raise OSError("not now")
        return fetch(self, experts)

    second: Any = None
    monkeypatch.setattr(Experts, "_fetch", fetched)
    model = opened(tmp_path)
    with model.block(0, 1) as block:
        for module in filter(is_experts, block.modules()):
            route(module, list(range(8)))
    with model.block(1, 2) as block:
        (module,) = filter(is_experts, block.modules())
        (second,) = model._kept[1].values()
        with pytest.raises(OSError, match="not now"):
            route(module, list(range(8)))
        failing[0] = False
        route(module, [0])
        other = whole.model.layers[1].mlp.experts
        for name, weight in module.named_parameters():
            assert torch.equal(weight[0], other.get_parameter(name)[0])
            assert not bool(weight[1:].any())


@pytest.mark.usefixtures("in_parts")
def test_a_damaged_expert_is_named(tmp_path: Path) -> None:
    whole = saved("qwen3_moe", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    up = next(name for name in tensors if ".experts.2.up_proj" in name)
    gate = up.replace("up", "gate")
    both = torch.cat([tensors[gate], tensors[up]])
    for rows, other in ((16, 15), (10, 22)):  # too few; and as many as both have
        tensors[gate], tensors[up] = both[:rows].clone(), both[rows : rows + other].clone()
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ArchiveError, match=r"experts\.2\.\w+_proj.* is"):
            compare(opened(tmp_path), whole)


def test_experts_that_are_no_table(tmp_path: Path) -> None:
    saved("gpt_oss", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[next(name for name in tensors if "down_proj_bias" in name)] = torch.tensor(1.0)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ArchiveError, match="down_proj_bias"):
        measure_streamed(opened(tmp_path), PROBE)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_the_system_is_told_what_comes_next(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly the bytes of the blocks behind the first, and of few experts nothing."""
    whole = saved(family, tmp_path)
    monkeypatch.setattr(streaming, "AT_ONCE", 1)
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _, start, size, advice: advised.append((start, size))
    )

    def walk(chosen: Any = None) -> int:
        advised.clear()
        model = opened(tmp_path)
        compare(model, whole, chosen)
        model._announcer.shutdown()
        places = [model.source.slice(name).place for name in model.source.names()]  # type: ignore[attr-defined]
        later = sum(
            4 * torch.Size(place.shape).numel()
            for name, place in zip(model.source.names(), places, strict=True)
            if "layers." in name and "layers.0." not in name
        )
        starts = {place.start for place in places}
        assert len(set(advised)) == len(advised) and {start for start, _ in advised} <= starts
        return later

    assert walk() == sum(size for _, size in advised) > 0
    if family == "qwen3_moe":
        walk(lambda index, count: [0])
        assert not advised


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_a_dense_block_announces_no_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = saved("deepseek_v3", tmp_path)  # block 0 is dense
    monkeypatch.setattr(streaming, "AT_ONCE", 1)
    advised: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, advice: advised.append(start))
    model = opened(tmp_path)
    compare(model, whole, lambda index, count: [0])
    model._announcer.shutdown()
    starts = {model.source.slice(name).place.start: name for name in model.source.names()}  # type: ignore[attr-defined]
    told = {starts[start] for start in advised}
    assert told == {
        name for name in starts.values() if "layers.1." in name and ".experts." not in name
    }


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_the_first_block_is_announced_to_many_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read before the experts comes first; few tokens may not come to all of them."""
    config = saved("qwen3_moe", tmp_path).config
    monkeypatch.setattr(streaming, "AT_ONCE", 1)
    advised: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, advice: advised.append(start))

    def told(tokens: int) -> list[str]:
        advised.clear()
        model = opened(tmp_path)
        model.load_surroundings(torch.zeros(tokens, dtype=torch.int64))
        model._announcer.shutdown()
        names = {model.source.slice(name).place.start: name for name in model.source.names()}  # type: ignore[attr-defined]
        return [names[start] for start in advised]

    enough = 32 * config.num_experts // config.num_experts_per_tok
    names = told(enough)
    assert set(names) == {name for name in load_file(tmp_path / "model.safetensors")
                          if ".layers.0." in name}  # fmt: skip
    routed = [".experts." in name for name in names]
    assert any(routed) and routed == sorted(routed)
    assert told(enough - 1) == []
