"""A pass from a block on shows what a whole pass with the same change does, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sinktrack import Probe
from sinktrack.interventions.knockout import AttentionKnockout
from sinktrack.interventions.patching import Patch, Term
from sinktrack.interventions.replay import Edit, Outcome, replaying
from tests.helpers import models
from tests.helpers.reference import blocks_of, eager_attention

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


def same(one: Outcome, other: Outcome, atol: float = 1e-6) -> None:
    for name in Outcome.__dataclass_fields__:
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), atol=atol, rtol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restart_equals_a_whole_pass(family: str) -> None:
    model = FAMILIES[family]()
    first = torch.zeros(PROBE.sequences, dtype=torch.long)
    kind = "head" if family != "mixtral" else "expert"
    with replaying(model, PROBE) as replay:
        plain = replay.plain({1, 2, 3})
        assert set(replay.kept) == {1, 2, 3}
        blocks = replay.blocks
        for block in (1, 3):
            for term in (Term("mlp", block), Term("attention", block), Term(kind, block, 1)):
                before = replay.blocks_run
                change = Patch([term], first, "zero")
                short = replay.run([change], loss=True)[0]
                assert replay.blocks_run - before == PROBE.sequences * (blocks - block)
                kept, replay.kept = replay.kept, {}
                whole = replay.run([change], loss=True)[0]
                replay.kept = kept
                same(short, whole)
                if term.kind == "mlp":
                    assert not torch.allclose(short.p0_loss, plain.p0_loss, atol=1e-6)
        (moved,) = replay.run(
            [
                AttentionKnockout(
                    replay.position, (0, 2), lambda row, at, length: torch.arange(length) == at
                )
            ]
        )
        assert not torch.allclose(moved.p0[:, 1:], plain.p0[:, 1:], atol=1e-6)
        again = replay.plain(())
    same(plain, again)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "sliding"])
def test_attention_to_any_position_equals_eager(family: str) -> None:
    model = FAMILIES[family]()
    with replaying(model, PROBE) as replay:
        found, position = replay.plain(()), replay.position
    for block, matrix in enumerate(eager_attention(model, PROBE.tokens)[0]):
        for row, at in enumerate(position.tolist()):
            column = matrix[row, :, at + 1 :, at]
            seen = (column[0] > 0).sum().clamp(min=1)
            wanted = float(column.sum(-1).mean() / seen)
            assert float(found.second[row, block]) == pytest.approx(wanted, abs=1e-6)


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
        assert set(replay.kept) == {3}
        change = Patch([Term("mlp", 1)], torch.zeros(PROBE.sequences, dtype=torch.long), "zero")
        assert not torch.allclose(replay.run([change], loss=True)[0].loss, plain.loss)
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
        (found,) = replay.run([Patch([Term(kind, 1, 2)], first, "zero")], loss=True)

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


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_edits_equal_one_by_one(family: str) -> None:
    """Whatever they change, and whether the pass ends early or in batches."""
    model = FAMILIES[family]()
    first = torch.zeros(PROBE.sequences, dtype=torch.long)
    kind = "head" if family != "mixtral" else "expert"
    for batch_size in (None, 4):
        with replaying(model, PROBE, batch_size) as replay:
            replay.look({2, 3})
            replay.plain({1, 2})
            edits: list[Edit] = [
                Patch([Term("mlp", 1)], first, "zero"),
                Patch([Term("attention", 1), Term("mlp", 2)], first, replay.position),
                Patch([Term(kind, 1, 1)], first, "mean", aside=3),
                Patch([Term("state", 2)], replay.position, first),
                AttentionKnockout(
                    replay.position, (1, 3), lambda row, at, n: torch.arange(n) == at
                ),
                AttentionKnockout(first, (0, 2), lambda row, at, n: torch.ones(n).bool()),
            ]
            together = replay.run(edits, loss=True)
            alone = [replay.run([edit], loss=True)[0] for edit in edits]
            until = replay.run(edits, until=2)
        for one, other, short in zip(together, alone, until, strict=True):
            same(one, other, atol=1e-5)
            torch.testing.assert_close(short.p0[:, :3], one.p0[:, :3], atol=1e-6, rtol=0)
            assert short.p0[:, 3].isnan().all() and short.loss.isnan().all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "sliding"])
def test_the_set_in_the_sink_state_equals_eager(family: str) -> None:
    model = FAMILIES[family]()
    with replaying(model, PROBE) as replay:
        replay.look({1, 3})
        found = replay.plain(())
    matrices, _ = eager_attention(model, PROBE.tokens)
    with torch.no_grad():
        states = model(PROBE.tokens, output_hidden_states=True, use_cache=False).hidden_states
    for block in (1, 3):
        stream = states[block].double()
        apart = stream[:, 0].mean(0) - stream[:, 1:].mean((0, 1))
        towards = stream @ (apart / apart.norm())
        inside = towards >= towards[:, :1] / 2
        assert found.set_size[:, block].tolist() == inside.sum(-1).tolist()
        for row in range(PROBE.sequences):
            queries = [i for i in range(1, PROBE.length) if not inside[row, i]]
            onto = [float(matrices[block][row, :, i, inside[row]].sum(-1).mean()) for i in queries]
            if queries:
                wanted = sum(onto) / len(onto)
                assert float(found.in_set[row, block]) == pytest.approx(wanted, abs=1e-5)
            else:
                assert found.in_set[row, block].isnan()
        norms = stream.norm(dim=-1)
        middle = norms[:, 1:].sort(-1).values[:, 5]
        assert found.norm_ratio[:, block].tolist() == pytest.approx(
            (norms[:, 0] / middle).tolist(), rel=1e-4
        )
    assert found.in_set[:, [0, 2]].isnan().all()
