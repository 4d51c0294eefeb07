"""A pass from a block on shows what a whole pass with the same change does, family by family."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from reference import blocks_of, eager_attention

from sinktrack import Probe
from sinktrack.interventions.edits import Change, Sight, Term
from sinktrack.interventions.replay import replaying

PROBE = Probe.random(models.VOCABULARY, sequences=6, length=12)
FAMILIES = {
    "llama": models.llama,
    "mixtral": models.mixtral,
    "qwen3_moe": models.qwen3_moe,
    "deepseek_v3": models.deepseek_v3,
    "gpt2": models.gpt2,
    "gpt_neox": models.gpt_neox,
    "sliding": models.mistral_sliding,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restart_equals_a_whole_pass(family: str) -> None:
    model = FAMILIES[family]()
    first = torch.zeros(PROBE.sequences, dtype=torch.long)
    kind = "head" if family != "mixtral" else "expert"
    with replaying(model, PROBE) as replay:
        plain = replay.plain({1, 2, 3})
        assert set(replay._kept) == {1, 2, 3}
        blocks = len(replay.found.blocks)
        for block in (1, 3):
            for term in (Term("mlp", block), Term("attention", block), Term(kind, block, 1)):
                before = replay.blocks_run
                change = Change([term], first, "zero")
                short = replay.run(change)
                assert replay.blocks_run - before == blocks - block
                kept, replay._kept = replay._kept, {}
                whole = replay.run(change)
                replay._kept = kept
                for one, other in zip(short, whole, strict=True):
                    torch.testing.assert_close(one, other, atol=1e-6, rtol=0, equal_nan=True)
                if term.kind == "mlp":
                    assert not torch.allclose(short.p0_loss, plain.p0_loss, atol=1e-6)
        moved = replay.run(Sight(replay.position, 2, lambda at, length: torch.arange(length) == at))
        assert not torch.allclose(moved.p0[:, 1:], plain.p0[:, 1:], atol=1e-6)
        again = replay.plain(())
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "sliding"])
def test_attention_to_any_position_equals_eager(family: str) -> None:
    model = FAMILIES[family]()
    with replaying(model, PROBE) as replay:
        found, position = replay.plain(()), replay.position
    for block, matrix in enumerate(eager_attention(model, PROBE.tokens)):
        for row, at in enumerate(position.tolist()):
            column = matrix[row, :, at + 1 :, at]
            seen = (column[0] > 0).sum().clamp(min=1)
            wanted = float(column.sum(-1).mean() / seen)
            assert float(found.also[row, block]) == pytest.approx(wanted, abs=1e-6)


def test_where_blocks_share_more_than_the_stream_passes_are_whole() -> None:
    """Then nothing is kept to restart from, and results stay those of whole passes."""
    model = models.llama()
    blocks = blocks_of(model)
    shared: dict[str, torch.Tensor] = {}

    def keep(module: Any, args: Any, output: Any) -> None:
        shared["from block 0"] = output

    def use(module: Any, args: Any, output: Any) -> Any:
        return output + shared.pop("from block 0")

    handles = [
        blocks[0].mlp.register_forward_hook(keep),
        blocks[2].mlp.register_forward_hook(use),
    ]
    with replaying(model, PROBE) as replay:
        plain = replay.plain({1, 3})
        assert set(replay._kept) == {3}
        change = Change([Term("mlp", 1)], torch.zeros(PROBE.sequences, dtype=torch.long), "zero")
        assert not torch.allclose(replay.run(change).loss, plain.loss)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["head", "expert"])
def test_parts_equal_plain_hooks(kind: str) -> None:
    """A head's values, or an expert's gate weights, set to zero at P0 by hand."""
    model = models.mixtral()
    block = blocks_of(model)[1]
    first = torch.zeros(PROBE.sequences, dtype=torch.long)
    with replaying(model, PROBE) as replay:
        replay.plain({1})
        found = replay.run(Change([Term(kind, 1, 2)], first, "zero"))

    def no_head(module: Any, args: Any) -> Any:
        mixed = args[0].clone()
        width = mixed.shape[-1] // 4
        mixed[:, 0, 2 * width : 3 * width] = 0
        return (mixed, *args[1:])

    def no_expert(module: Any, args: Any) -> Any:
        stream, index, gate = args
        at_zero = torch.zeros(PROBE.sequences, PROBE.length, 1, dtype=torch.bool)
        at_zero[:, 0] = True
        return stream, index, gate.masked_fill((index == 2) & at_zero.view(-1, 1), 0)

    module, hook = {
        "head": (block.self_attn.o_proj, no_head),
        "expert": (block.mlp.experts, no_expert),
    }[kind]
    handle = module.register_forward_pre_hook(hook)
    with torch.no_grad():
        wanted = model(PROBE.tokens, output_attentions=True, use_cache=False)
    handle.remove()
    for later in (2, 3):
        p0 = wanted.attentions[later][:, :, 1:, 0].mean((1, 2)).double()
        torch.testing.assert_close(found.p0[:, later], p0, atol=1e-6, rtol=0)
    loss = torch.nn.functional.cross_entropy(
        wanted.logits[:, :-1].mT, PROBE.tokens[:, 1:], reduction="none"
    )
    torch.testing.assert_close(found.p0_loss, loss[:, 0].double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.loss, loss[:, 1:].mean(1).double(), atol=1e-5, rtol=0)
