"""Models of packages, measured as they are and held against the same model in float64.

The reference runs the package's own code in float64 with attention written out: every function that
attends is replaced by a softmax over all scores, whose probabilities are kept, and plain hooks keep
what blocks, sublayers and experts take and give. Nothing of what `sinktrack.Decoder` does is used.

    python scripts/check_packages.py litgpt               # in an environment that has the package
    python scripts/check_packages.py nanochat --source ~/nanochat
    python scripts/check_packages.py litgpt --make DIR    # make that environment, and run in it
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import math
import os
import site
import socket
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sinktrack as st

VOCABULARY, SEQUENCES, LENGTH = 64, 5, 17
PROBE = st.Probe.random(VOCABULARY, sequences=SEQUENCES, length=LENGTH)
ATTENTION, NORMS, SHARES = 5e-7, 2e-6, 5e-6
"""What a row that says "exact" may be off by: of probabilities, of norms in parts of themselves,
and of shares in parts of the largest."""

EDITED = 2e-5
"""The same of edited passes: of norms in parts of themselves, and of the loss in nats."""

REQUIREMENTS = {
    "litgpt": ["litgpt", "jsonargparse", "docstring-parser"],
    "nanochat": [],
    "nanogpt": [],
    "olmo_core": [
        "ai2-olmo-core", "cached-path", "dataclass-extensions", "bettermap", "importlib-resources",
        "google-api-core", "google-auth", "google-cloud-core", "google-cloud-storage",
        "google-crc32c", "google-resumable-media", "googleapis-common-protos", "cachetools",
        "proto-plus", "pyasn1", "pyasn1-modules", "dill",
    ],
    "torchtitan": [
        "torchtitan", "torchdata", "torch-checkpointing", "tyro", "einops", "spmd-types==0.2.3",
        "docstring-parser", "typeguard", "datasets", "dill", "multiprocess", "xxhash", "triton",
    ],
    "transformer_lens": [
        "transformer-lens", "beartype", "einops", "fancy-einsum", "jaxtyping", "wadler-lindig",
        "sentencepiece", "typeguard<5", "datasets", "dill", "multiprocess", "xxhash",
    ],
    "x_transformers": [
        "x-transformers", "einops", "einx", "loguru", "torch-einops-utils", "frozendict",
    ],
}  # fmt: skip
"""Installed without dependencies, on top of this environment: their pins fight with ours."""


NOT_INSTALLED = "cannot install "


@dataclass
class Case:
    """A model of a package."""

    name: str
    attention: str
    """How the package computes attention."""
    make: Callable[[], nn.Module]
    writes: tuple[str, str] | None = None
    """The modules in a block, from it on, whose outputs are what attention and MLP write."""
    blocks: Callable[[Any], Any] = lambda model: model.layers
    forward: Callable[[Any, Tensor], Any] = lambda model, tokens: model(tokens)
    mix: Callable[[Any, int], tuple[float, float]] = lambda model, block: (1.0, 0.0)
    """What the stream, and the first one, are multiplied with before a block."""
    experts: Callable[[Any], list[Any]] = lambda block: []
    """Of the module that writes for the MLP: what, set to zero, leaves nothing of an expert."""
    scale: float = 0.3
    """Of the weights that are matrices."""
    spread: float = 0.1
    """Of those that are none, about what the package makes them."""
    double: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What lets the package's code run in float64."""
    refused: str | None = None
    """Part of the reason, where it must be refused."""


@dataclass
class Reference:
    """A pass in float64."""

    attention: list[Tensor] = field(default_factory=list)
    """``[B, H, T, T]`` of each block."""
    states: list[Tensor] = field(default_factory=list)
    """``[B, T, D]`` at each block's input, and the last one's output."""
    writes: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """P0's rows ``[B, D]``."""
    experts: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """P0's rows of routed experts by block and number."""
    terms: list[dict[Any, Tensor]] = field(default_factory=list)
    """At each state P0's rows of what it is a sum of."""


def attended(scores: Tensor, value: Tensor, kept: list[Tensor]) -> Tensor:
    """Softmax attention of scores ``[B, H, T, T]``, written out."""
    high = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = high / high.sum(-1, keepdim=True)
    kept.append(weights)
    return weights @ value.repeat_interleave(scores.shape[1] // value.shape[1], 1)


def scores_of(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return torch.einsum("bhid,bhjd->bhij", query, key) * (scale or query.shape[-1] ** -0.5)


@contextmanager
def written_out(kept: list[Tensor]) -> Iterator[None]:
    """Every function that attends is replaced, wherever a package has put its name."""
    from torch.nn.attention import flex_attention as flex

    softmax, tensor_softmax, length = F.softmax, torch.Tensor.softmax, LENGTH

    def causal(query: Tensor) -> Tensor:
        return torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()

    def sdpa(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        scores = scores_of(query, key, scale)
        mask = causal(query) if is_causal else attn_mask
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return attended(scores, value, kept)

    def flexible(
        query: Tensor, key: Tensor, value: Tensor, score_mod: Any = None, block_mask: Any = None,
        scale: float | None = None, enable_gqa: bool = False, **rest: Any,
    ) -> Any:  # fmt: skip
        assert score_mod is None
        scores = scores_of(query, key, scale)
        at = torch.meshgrid(*(torch.arange(size) for size in scores.shape), indexing="ij")
        seen = block_mask.mask_mod(*at)
        result = attended(scores.masked_fill(~seen, -math.inf), value, kept)
        return (result, None) if "return_aux" in rest else result

    def soft(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("dtype", None)
        found: Tensor = tensor_softmax(values, args[0] if args else kwargs["dim"])
        if found.ndim == 4 and tuple(found.shape[-2:]) == (length, length):
            kept.append(found)
        return found

    replaced = {
        F.scaled_dot_product_attention: sdpa, flex.flex_attention: flexible, softmax: soft,
    }  # fmt: skip
    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if callable(value) and name[:2] != "__":
                    own = next((new for old, new in replaced.items() if value is old), None)
                    if own is not None:
                        stack.enter_context(mock.patch.object(module, name, own))
        stack.enter_context(mock.patch.object(torch.Tensor, "softmax", soft))
        stack.enter_context(mock.patch.object(torch, "softmax", soft))
        titan = sys.modules.get("torchtitan.models.common.attention")
        if titan is not None:
            stack.enter_context(
                mock.patch.object(titan.FlexAttention, "_compiled_flex_attn", flexible)
            )
        yield


def first(value: Any) -> Tensor:
    found: Tensor = value if isinstance(value, Tensor) else value[0]
    return found


def ends(block: Any) -> tuple[nn.Module, nn.Module]:
    """The modules with which a block begins and ends."""
    if isinstance(block, nn.Module) and not isinstance(block, nn.ModuleList):
        return block, block
    leaves = [module for module in block if module is not None]
    return ends(leaves[0])[0], ends(leaves[-1])[1]


def named(block: Any, path: str) -> Any:
    """A module of a block: ``1.fc`` of a list of modules, ``mlp|moe`` of which it has one."""
    for names in path.split("."):
        for name in names.split("|"):
            if name.isdecimal():
                block = block[int(name)]
                break
            if hasattr(block, name):
                block = getattr(block, name)
                break
    return block


@torch.no_grad()
def reference(model: nn.Module, case: Case) -> Reference:
    """The model's own code in float64, watched by plain hooks."""
    with torch.no_grad():
        model = copy.deepcopy(model).double().eval()
    found, calls, handles = Reference(), {}, []
    blocks = case.blocks(model)
    blocks = list(blocks.values() if isinstance(blocks, nn.ModuleDict) else blocks)

    def keep(place: Any) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            calls[place] = (args, kwargs, first(output).clone())

        return hook

    def entered(module: Any, args: Any, kwargs: Any) -> None:
        found.states.append(first(args or tuple(kwargs.values())).clone())

    for index, block in enumerate(blocks):
        start, end = ends(block)
        handles.append(start.register_forward_pre_hook(entered, with_kwargs=True))
        if index == len(blocks) - 1:
            handles.append(end.register_forward_hook(keep("end"), with_kwargs=True))
        for kind, path in zip(("attention", "mlp"), case.writes or (), strict=False):
            hook = named(block, path).register_forward_hook(keep((kind, index)), with_kwargs=True)
            handles.append(hook)
    with written_out(found.attention), case.double():
        case.forward(model, PROBE.tokens)
    for handle in handles:
        handle.remove()
    found.states.append(calls.pop("end")[2])
    for index, block in enumerate(blocks):
        if case.writes is None:
            break
        for kind in ("attention", "mlp"):
            found.writes[kind, index] = calls[kind, index][2].reshape(SEQUENCES, LENGTH, -1)[:, 0]
        module = named(block, case.writes[1])
        for number, weights in enumerate(case.experts(module)):
            args, kwargs, whole = calls["mlp", index]
            before = weights.clone()
            weights.zero_()
            with case.double():
                without = first(module(*args, **kwargs))
            weights.copy_(before)
            found.experts[index, number] = (whole - without).reshape(SEQUENCES, LENGTH, -1)[:, 0]
    if case.writes is not None:
        add_up(found, model, case)
    return found


def add_up(found: Reference, model: nn.Module, case: Case) -> None:
    """What each state is a sum of, which must make it."""
    begin = sum(case.mix(model, 0))
    terms: dict[Any, Tensor] = {"embedding": found.states[0][:, 0]}
    for index, state in enumerate(found.states):
        if 0 < index < len(found.attention):
            stream, start = case.mix(model, index)
            terms = {key: stream * term for key, term in terms.items()}
            terms["embedding"] = terms["embedding"] + start / begin * found.states[0][:, 0]
        found.terms.append(terms)
        total = torch.stack(list(terms.values())).sum(0)
        torch.testing.assert_close(
            total, state[:, 0], rtol=1e-5, atol=1e-6 * float(state.abs().max())
        )
        terms = terms | {key: value for key, value in found.writes.items() if key[1] == index}


def shares(found: Reference) -> dict[Any, float]:
    """By the definition: along each block's P0 direction, weighted by how much it reads P0."""
    readers = []
    for weights in found.attention:
        rows = weights[:, :, 1:]
        seen = rows[0, 0, :, 0] > 0
        even = (1 / (rows[0, 0] > 0).sum(-1)[seen]).mean()
        readers.append(max(0.0, float(rows[:, :, seen, 0].mean() - even)))
    total: dict[Any, float] = {}
    for block, state in enumerate(found.states[:-1]):
        mean = state[:, 0].mean(0)
        direction = F.normalize(mean - state[:, 1:].mean((0, 1)), dim=0)
        weight = readers[block] / sum(readers) / float(mean @ direction)
        parts = {
            ("expert", *key): part * scale_of(found, block, key[0])
            for key, part in found.experts.items() if key[0] < block
        }  # fmt: skip
        for key, term in (found.terms[block] | parts).items():
            total[key] = total.get(key, 0) + weight * float(term.mean(0) @ direction)
    return total


def scale_of(found: Reference, block: int, of: int) -> float:
    """What an MLP's write has been multiplied with until a block."""
    now, whole = found.terms[block]["mlp", of], found.writes["mlp", of]
    return float((now * whole).sum() / (whole * whole).sum())


def off(found: st.Measurement, wanted: Reference) -> dict[str, float]:
    """How far a measurement is from the reference."""
    off = {"attention": 0.0, "norms": 0.0}
    for block, weights in enumerate(wanted.attention):
        visible = int((weights[0, 0, 1:, 0] > 0).sum())
        assert found.visible_queries[block] == visible
        p0 = weights[:, :, 1:, 0].sum(-1) / visible
        error = (found.p0_attention_by_sequence[:, block].double() - p0).abs().max()
        off["attention"] = max(off["attention"], float(error))
    for block, state in enumerate(wanted.states):
        size = state[:, 0].norm(dim=-1).mean()
        error = (found.p0_norm[block].double() - size).abs() / size
        off["norms"] = max(off["norms"], float(error))
    if not wanted.terms or found.localization.share_sum is None:
        return off
    expected = shares(wanted)
    told: dict[Any, float] = {}
    for part in (*found.localization.shares, *found.localization.parts):
        if part.kind == "expert":
            told["expert", part.block, part.index] = part.share
        elif part.kind in ("embedding", "attention", "mlp"):
            told[part.kind if part.block is None else (part.kind, part.block)] = part.share
    largest = max(abs(value) for value in expected.values())
    experts = any(key[0] == "expert" for key in told)
    for name, wanted_kind in (("shares", False), ("experts", True)):
        keys = [key for key in expected if (key[0] == "expert") is wanted_kind]
        if keys and (experts or not wanted_kind):
            errors = [abs(expected[key] - told.get(key, 0.0)) for key in keys]
            off[name] = max(errors) / largest
    return off


def edited(model: nn.Module, case: Case) -> str:
    """Writes at P0 set to nothing, and a state put elsewhere: against hooks in the own forward."""
    from sinktrack.interventions.patching import Patch, Term
    from sinktrack.interventions.replay import replaying

    blocks = case.blocks(model)
    blocks = list(blocks.values() if isinstance(blocks, nn.ModuleDict) else blocks)
    assert case.writes is not None
    first_at, rows = torch.zeros(SEQUENCES, dtype=torch.long), torch.arange(SEQUENCES)
    with replaying(st.Decoder(model, blocks=case.blocks, forward=case.forward), PROBE) as replay:
        replay.plain({1, 2})
        at = replay.position
        edits = [
            Patch([Term("attention", 1)], first_at, "zero"),
            Patch([Term("mlp", 1)], first_at, "zero"),
            Patch([Term("state", 2)], at, first_at),
        ]
        outcomes = replay.run(edits, loss=True)

    def by_row(value: Tensor) -> Tensor:
        return value.view(SEQUENCES, LENGTH, -1)

    def nothing(module: Any, args: Any, output: Any) -> Any:
        value = first(output).clone()
        by_row(value)[:, 0] = 0
        return value if isinstance(output, Tensor) else (value, *output[1:])

    def moved(module: Any, args: Any, kwargs: Any) -> Any:
        stream = first(args or tuple(kwargs.values())).clone()
        by_row(stream)[rows, at] = by_row(stream)[:, 0].clone()
        if args:
            return (stream, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): stream}

    worst: dict[str, float] = {"norms": 0.0}
    for number, outcome in enumerate(outcomes):
        states: list[Tensor] = []

        def entered(module: Any, args: Any, kwargs: Any, states: list[Tensor] = states) -> None:
            states.append(by_row(first(args or tuple(kwargs.values()))).clone())

        if number < 2:
            module = named(blocks[1], case.writes[number])
            handles = [module.register_forward_hook(nothing)]
        else:
            start, _ = ends(blocks[2])
            handles = [start.register_forward_pre_hook(moved, with_kwargs=True)]
        for block in blocks:
            handles.append(ends(block)[0].register_forward_pre_hook(entered, with_kwargs=True))
        with torch.no_grad():
            output = case.forward(model, PROBE.tokens)
        for handle in handles:
            handle.remove()
        for block in range(2, len(blocks)):
            norms = states[block].float().norm(dim=-1)
            ratio = norms[:, 0] / norms[:, 1:].quantile(0.5, -1)
            error = (outcome.norm_ratio[:, block] / ratio - 1).abs().max()
            worst["norms"] = max(worst["norms"], float(error))
        if not bool(outcome.loss.isnan().any()):
            logits = first(getattr(output, "logits", output))
            loss = F.cross_entropy(logits[:, :-1].float().mT, PROBE.tokens[:, 1:], reduction="none")
            error = (outcome.loss - loss[:, 1:].mean(1)).abs().max()
            worst["loss"] = max(worst.get("loss", 0.0), float(error))
    good = all(value <= EDITED for value in worst.values())
    text = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    return f"edits {'exact' if good else 'WRONG'}: {text}"


def seeded(case: Case, seed: int) -> nn.Module:
    """A model whose attention is uneven, so that some block reads P0."""
    torch.manual_seed(seed)
    model = case.make().eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(0, case.scale)
            elif value.numel() > 1:
                value.add_(torch.randn_like(value), alpha=case.spread)
    return model


def mixed(found: st.Measurement) -> bool:
    """Do blocks that others wrote for read P0?"""
    return any(
        part.kind != "embedding" and abs(part.share) > 0.02 for part in found.localization.shares
    )


def row(case: Case) -> tuple[str, bool]:
    """The table's last column, and is it as it must be?"""
    for seed in range(20):
        model = seeded(case, seed)
        decoder = st.Decoder(model, blocks=case.blocks, forward=case.forward)
        try:
            found = st.measure(decoder, PROBE)
        except st.MeasurementError as error:
            return f"refused: {error}", case.refused is not None and case.refused in str(error)
        if "reads P0" not in found.missing.get("shares", "") and (
            found.localization.share_sum is None or mixed(found)
        ):
            break
    errors = off(found, reference(model, case))
    limits = {"attention": ATTENTION, "norms": NORMS, "shares": SHARES, "experts": SHARES}
    good = case.refused is None and all(value <= limits[name] for name, value in errors.items())
    text = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
    lost = [
        f"{name}: {found.missing[name]}" for name in ("shares", "parts") if name in found.missing
    ]
    told = [f"{'exact' if good else 'WRONG'}: {text}"]
    if case.writes is not None:
        try:
            told.append(edited(model, case))
        except st.MeasurementError as error:
            told.append(f"edits refused: {error}")
        good = good and "edits WRONG" not in told[-1]
    return "; ".join([*told, *lost]), good


# The packages


def litgpt() -> Iterator[Case]:
    from litgpt.config import Config
    from litgpt.model import GPT

    small = dict(
        n_layer=3, n_embd=32, n_head=4, head_size=8, intermediate_size=48, block_size=64,
        vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY,
    )  # fmt: skip
    few = {"n_expert": 4, "n_expert_per_token": 2}
    models: dict[str, dict[str, Any]] = {
        "pythia-14m": {}, "Llama-3.2-1B": {"n_query_groups": 2}, "phi-2": {}, "falcon-7b": {},
        "Gemma-2-2b": {"n_query_groups": 2, "sliding_window_size": 6},
        "Gemma-3-1b-it": {"n_query_groups": 2, "sliding_window_size": 6},
        "OLMo-2-1124-7B": {"n_query_groups": 4}, "Mixtral-8x7B-v0.1": {"n_query_groups": 2} | few,
        "Qwen3-30B-A3B": {"n_query_groups": 2, "moe_intermediate_size": 16} | few,
    }  # fmt: skip
    for name, changes in models.items():
        config = Config.from_name(name, **small | changes)
        capped = config.attention_logit_softcapping is not None
        sandwich = config.post_attention_norm
        yield Case(
            f"{name} (GPT)",
            "softmax with a soft cap" if capped else "SDPA",
            partial(GPT, config),
            ("post_attention_norm", "post_mlp_norm") if sandwich else ("attn", "mlp"),
            lambda model: model.transformer.h,
            experts=lambda moe: [expert.proj.weight for expert in getattr(moe, "experts", ())],
            spread=1.0 if "OLMo" in name else 0.1,
        )


def nanogpt() -> Iterator[Case]:
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    def make() -> nn.Module:
        config = GPTConfig(
            block_size=64, vocab_size=VOCABULARY, n_layer=3, n_head=4, n_embd=32, dropout=0.1
        )
        return GPT(config)  # type: ignore[no-any-return]

    def plain() -> nn.Module:
        model = make()
        for block in model.transformer.h:  # type: ignore[union-attr]
            block.attn.flash = False
            block.attn.register_buffer("bias", torch.ones(64, 64).tril().view(1, 1, 64, 64))
        return model

    for name, how in (("SDPA", make), ("softmax", plain)):
        yield Case("GPT", name, how, ("attn", "mlp"), lambda model: model.transformer.h)


def nanochat() -> Iterator[Case]:
    from nanochat import gpt
    from nanochat.gpt import GPT, GPTConfig

    def make(pattern: str) -> Callable[[], nn.Module]:
        def made() -> nn.Module:
            config = GPTConfig(
                sequence_len=64, vocab_size=VOCABULARY, n_layer=4, n_head=4, n_kv_head=2,
                n_embd=32, window_pattern=pattern,
            )  # fmt: skip
            model = GPT(config)
            model.init_weights()
            model.window_sizes = [(5, 0) if w == "S" else (64, 0) for w in (pattern * 4)[:4]]
            nn.init.normal_(model.smear_lambda)
            return model  # type: ignore[no-any-return]

        return made

    def mix(model: Any, block: int) -> tuple[float, float]:
        return float(model.resid_lambdas[block]), float(model.x0_lambdas[block])

    for pattern in ("L", "SSSL"):
        yield Case(
            f"GPT, windows {pattern}", "SDPA", make(pattern), ("attn", "mlp"),
            lambda model: model.transformer.h, mix=mix, scale=0.25,
            double=lambda: mock.patch.object(gpt, "COMPUTE_DTYPE", torch.float64),
        )  # fmt: skip


def x_transformers() -> Iterator[Case]:
    from x_transformers import Decoder, TransformerWrapper

    kinds: dict[str, dict[str, Any]] = {
        "rotary": {"rotary_pos_emb": True},
        "rotary, GQA, RMSNorm": {
            "rotary_pos_emb": True, "attn_kv_heads": 2, "use_rmsnorm": True, "attn_flash": True,
        },
        "gated values": {"rotary_pos_emb": True, "attn_gate_values": True},
        "ALiBi": {"alibi_pos_bias": True, "alibi_num_heads": 4},
        "ALiBi, flash": {"alibi_pos_bias": True, "alibi_num_heads": 4, "attn_flash": True},
        "talking heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
        "memory keys": {"attn_num_mem_kv": 2},
    }  # fmt: skip

    def make(options: dict[str, Any]) -> Callable[[], nn.Module]:
        def made() -> nn.Module:
            layers = Decoder(dim=32, depth=3, heads=4, attn_dim_head=8, **options)
            return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=64, attn_layers=layers)  # type: ignore[no-any-return]

        return made

    def blocks(model: Any) -> list[Any]:
        layers = model.attn_layers.layers
        return list(zip(layers[::2], layers[1::2], strict=True))

    for name, options in kinds.items():
        yield Case(
            f"TransformerWrapper, {name}",
            "SDPA" if options.get("attn_flash") else "softmax",
            make(options), ("0.1", "1.1"), blocks, scale=0.35 if "ALiBi" in name else 0.2,
            refused={"talking heads": "after the softmax", "memory keys": "softmax"}.get(name),
        )  # fmt: skip


def torchtitan() -> Iterator[Case]:
    titan_on_cpu()
    import torchtitan.models.deepseek_v3 as deepseek
    import torchtitan.models.llama3 as llama
    import torchtitan.models.qwen3 as qwen
    from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.moe import GroupedExperts

    def product(self: Any, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        parts = A.tensor_split(offs[:-1].tolist())
        return torch.cat([part @ of for part, of in zip(parts, B_t, strict=True)])

    shared: dict[str, Any] = {"n_layers": 3, "dim": 64, "n_heads": 4, "attn_backend": "flex"}
    few = {"moe_hidden_dim": 32, "num_experts": 4, "moe_comm_backend": "standard"}
    yarn = ComplexRoPE.Config(
        dim=8, max_seq_len=16384, theta=1e4, scaling="yarn", rope_factor=40.0, beta_fast=32.0,
        beta_slow=1.0, original_seq_len=4096,
    )  # fmt: skip
    layers = {
        "Llama 3": lambda: (
            llama.Llama3Model,
            llama._build_llama3_layers(
                **shared, n_kv_heads=2, hidden_dim=96,
                rope=ComplexRoPE.Config(dim=16, max_seq_len=64, theta=5e5, scaling="llama"),
            ),
        ),
        "Qwen3-MoE": lambda: (
            qwen.Qwen3Model,
            qwen._build_qwen3_moe_layers(
                **shared, **few, n_kv_heads=2, head_dim=16, top_k=2,
                rope=CosSinRoPE.Config(dim=16, max_seq_len=64, theta=1e6),
            ),
        ),
        "DeepSeek-V3": lambda: (
            deepseek.DeepSeekV3Model,
            deepseek._build_dsv3_layers(
                **shared, **few, n_dense_layers=1, q_lora_rank=0, kv_lora_rank=32, rope=yarn,
                qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, mscale=0.7,
                dense_hidden_dim=96, num_shared_experts=1, router_top_k=2,
                router_score_func="softmax", non_blocking_capacity_factor=None,
            ),
        ),
    }  # fmt: skip
    for (name, built), backend in itertools.product(layers.items(), ("flex", "SDPA")):
        kind, blocks = built()
        for block in blocks if backend == "SDPA" else ():
            block.attention.inner_attention = ScaledDotProductAttention.Config()
        config = kind.Config(
            dim=64, vocab_size=VOCABULARY, layers=blocks,
            tok_embeddings=Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=64),
            norm=RMSNorm.Config(normalized_shape=64, eps=blocks[0].ffn_norm.eps),
            lm_head=Linear.Config(in_features=64, out_features=VOCABULARY),
        )  # fmt: skip

        def make(config: Any = config) -> nn.Module:
            model = config.build()
            for key, buffer in model.named_buffers():
                if "expert" in key:
                    buffer.zero_()
            return model  # type: ignore[no-any-return]

        moe = name != "Llama 3"
        case = Case(
            name, backend, make, ("attention", "feed_forward|moe"), scale=0.2, spread=0.5,
            forward=titan_forward if backend == "flex" else titan_causal,
            experts=lambda moe: list(moe.routed_experts.inner_experts.w2_EDF)
            if hasattr(moe, "routed_experts") else [],
        )  # fmt: skip
        if moe:  # the package multiplies in bfloat16, whose rounding two computations do not share
            with (
                mock.patch.object(torch.Tensor, "bfloat16", lambda value: value),
                mock.patch.object(GroupedExperts, "_grouped_mm", product),
            ):
                yield replace(case, name=f"{name}, experts multiplied in float32")
        else:
            yield case


def titan_forward(model: Any, tokens: Tensor) -> Any:
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, model.get_attention_masks(positions))


def titan_causal(model: Any, tokens: Tensor) -> Any:
    return model(tokens, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))


def olmo_core() -> Iterator[Case]:
    from olmo_core import ops
    from olmo_core.nn.attention import AttentionBackendName, SlidingWindowAttentionConfig
    from olmo_core.nn.moe.parallel_mlp import ParallelDroplessMLP
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig

    def counted(experts: Tensor, count: int) -> Tensor:
        return F.one_hot(experts, count).sum(dim=-2)

    def one_by_one(self: Any, x: Tensor, scores: Tensor, experts: Tensor, _: Tensor) -> Tensor:
        flat, order = x.flatten(0, -2), experts.flatten().argsort(stable=True)
        rows = order // experts.shape[-1]
        counts = torch.bincount(experts.flatten(), minlength=self.mlp.num_experts)
        written = self.mlp(flat[rows], counts) * scores.flatten()[order, None]
        return torch.zeros_like(flat).index_add(0, rows, written).view_as(x)

    common: dict[str, Any] = {
        "d_model": 32, "vocab_size": VOCABULARY, "n_layers": 3, "n_heads": 4,
        "attn_backend": AttentionBackendName.torch,
    }  # fmt: skip
    dense = common | {"hidden_size_multiple_of": 16}
    window = SlidingWindowAttentionConfig(
        force_full_attention_on_first_layer=False,
        force_full_attention_on_last_layer=True,
        pattern=[6, -1],
    )
    reordered = TransformerBlockType.reordered_norm
    like, moe = TransformerConfig.llama_like, TransformerConfig.llama_like_moe
    few = common | {"num_experts": 4, "top_k": 2, "expert_hidden_size": 16, "dropless": True}
    configs = {
        "olmo3": like(**dense, block_name=reordered, qk_norm=True, sliding_window=window),
        "llama, grouped queries": like(**dense, n_kv_heads=2),
        "llama, norms before and after": like(**dense, block_name=TransformerBlockType.peri_norm),
        "flex_olmo (moe_reordered_norm)": moe(**few, reordered_norm=True),
        "moe": moe(**few),
        "moe, one expert": moe(**(few | {"top_k": 1})),
        "moe, shared expert": moe(**few, shared_expert_hidden_size=16),
        "moe_hybrid": moe(**few, hybrid=True, feed_forward=like(**dense).block.feed_forward),
    }
    for name, config in configs.items():
        after = "reordered" in name or name == "olmo3"
        mlp = "feed_forward_moe" if "moe" in name else "feed_forward"
        writes: Any = ("attention_norm", "feed_forward_norm") if after else ("attention", mlp)
        writes = ("post_attention_norm", "post_feed_forward_norm") if "before" in name else writes
        case = Case(
            f"Transformer, {name}",
            "SDPA",
            partial(config.build, init_device="cpu"),
            None if name == "moe_hybrid" else writes,
            lambda model: model.blocks,
            experts=lambda moe: list(moe.experts.mlp.w2.view(4, 16, 32))
            if hasattr(moe, "experts") else [],
            # at 0.4 the scores reach 26, and the float32 model is itself 4.6e-7 off
            scale=0.3 if name == "moe_hybrid" else 0.4,
        )  # fmt: skip
        if "moe" not in name:
            yield case
        else:  # its own code sorts and scatters by Triton
            with (
                mock.patch.object(ops, "batched_histc", counted, create=True),
                mock.patch.object(ParallelDroplessMLP, "forward", one_by_one),
            ):
                yield replace(case, name=f"{case.name}; experts one by one, without Triton")


def transformer_lens() -> Iterator[Case]:
    from transformer_lens.model_bridge.sources import boot_native

    def make() -> nn.Module:
        sizes = {"d_model": 32, "n_layers": 3, "n_heads": 4, "d_head": 8, "d_mlp": 64, "n_ctx": 64}
        return boot_native(sizes | {"d_vocab": VOCABULARY, "act_fn": "gelu"})  # type: ignore[no-any-return]

    yield Case(
        "TransformerBridge, native", "softmax", make, ("attn", "mlp"), lambda model: model.blocks
    )


# In their training loops


def agrees(live: st.Run, archive: Path, directory: Path, **options: Any) -> str:
    """Live records of a training against the scan of the checkpoints that it saved."""
    scanned = list(st.scan(archive, probe=PROBE, run=directory / "scanned", **options))
    records = {record["step"]: record for record in live.records}
    worst = {"attention": 0.0, "norms": 0.0}
    for record in scanned:
        own = records[record["step"]]
        assert own["tokens"] == record["step"] * live_tokens
        one, two = (torch.tensor(r["p0_attention"]) for r in (own, record))
        worst["attention"] = max(worst["attention"], float((one - two).abs().max()))
        one, two = (torch.tensor(r["p0_norm"]) for r in (own, record))
        worst["norms"] = max(worst["norms"], float(((one - two) / two).abs().max()))
    steps = ", ".join(str(record["step"]) for record in scanned)
    text = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    good = bool(scanned) and worst["attention"] < 1e-6 and worst["norms"] < 1e-5
    return f"{'agrees' if good else 'WRONG'} with the scan of steps {steps}: {text}"


live_tokens = 64
"""Of a step of the trainings."""


def live_olmo_core(directory: Path) -> str:
    import numpy
    from olmo_core.data import (
        NumpyDataLoaderConfig,
        NumpyFSLDatasetConfig,
        TokenizerConfig,
    )  # fmt: skip
    from olmo_core.nn.attention import AttentionBackendName
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig
    from olmo_core.optim import AdamWConfig
    from olmo_core.train import Duration, TrainerConfig
    from olmo_core.train.callbacks import CheckpointerCallback, ConfigSaverCallback
    from olmo_core.train.train_module import TransformerTrainModuleConfig

    from sinktrack.callbacks.olmo_core import SinkTrackOLMoCore

    config = TransformerConfig.llama_like(
        d_model=32, vocab_size=VOCABULARY, n_layers=3, n_heads=4, hidden_size_multiple_of=16,
        block_name=TransformerBlockType.reordered_norm, qk_norm=True,
        attn_backend=AttentionBackendName.torch, layer_norm_eps=1e-6,
    )  # fmt: skip
    tokens = numpy.random.default_rng(0).integers(1, VOCABULARY, 4096).astype(numpy.uint16)
    tokens.tofile(directory / "tokens.npy")
    data = NumpyFSLDatasetConfig(
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=0),
        paths=[str(directory / "tokens.npy")], sequence_length=16, work_dir=str(directory / "work"),
    )  # fmt: skip
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=live_tokens, max_sequence_length=16, optim=AdamWConfig(lr=1e-2)
    ).build(config.build(init_device="cpu"), device=torch.device("cpu"))
    loader = NumpyDataLoaderConfig(global_batch_size=live_tokens, seed=0, num_workers=0)
    trainer = TrainerConfig(
        save_folder=str(directory / "checkpoints"), save_overwrite=True,
        max_duration=Duration.steps(4), metrics_collect_interval=1,
    ).with_callback(
        "checkpointer", CheckpointerCallback(save_interval=2, save_async=False)
    ).with_callback("config_saver", ConfigSaverCallback()).with_callback(
        "sinktrack", SinkTrackOLMoCore(PROBE, directory / "live", every=100, on_error="raise")
    ).build(module, loader.build(data.build()))  # fmt: skip
    experiment = {"run_name": "tiny", "model": config.as_config_dict()}
    trainer.callbacks["config_saver"].config = experiment
    trainer.fit()
    return agrees(st.Run.read(directory / "live"), directory / "checkpoints", directory)


def titan_on_cpu() -> None:
    """torchtitan takes its device as it is imported: that of CUDA, where there is none."""
    torch._utils._get_available_device_type = lambda: "cpu"  # type: ignore[attr-defined]
    properties = SimpleNamespace(total_memory=2**30)
    for name, result in {
        "get_device_name": "cpu", "get_device_properties": properties, "memory_stats": {},
        "reset_peak_memory_stats": None, "empty_cache": None,
    }.items():  # fmt: skip
        setattr(torch.cpu, name, lambda *_, result=result: result)


def live_torchtitan(directory: Path) -> str:
    """By its own trainer, over its own checkpoints; only the device and the data are stand-ins."""
    from torch.distributed.tensor import DTensor

    titan_on_cpu()
    import torchtitan.models.llama3 as llama
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.distributed import utils
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3.config_registry import llama3_debugmodel
    from transformers import LlamaConfig

    from sinktrack.callbacks.loop import SinkTracker

    utils.set_pg_timeouts = lambda **_: None
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    length = 32  # at least the probe's: the trainer cuts the rotary table to it
    sequences = live_tokens // length

    class NoTokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config: Any, **_: Any) -> None:
            super().__init__()

        def encode(self, *_: Any, **__: Any) -> list[int]:
            raise NotImplementedError

        def decode(self, *_: Any, **__: Any) -> str:
            raise NotImplementedError

        def get_vocab_size(self) -> int:
            return VOCABULARY

    class Batches(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Any, **_: Any) -> None:
            self.given = 0

        def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            while True:
                self.given += 1
                random = torch.Generator().manual_seed(self.given)
                tokens = torch.randint(VOCABULARY, (sequences, length + 1), generator=random)
                positions = torch.arange(length).repeat(sequences, 1)
                yield {"input": tokens[:, :-1], "positions": positions}, tokens[:, 1:]

        def state_dict(self) -> dict[str, Any]:
            return {"given": self.given}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.given = state["given"]

    def trained(where: Path, tracker: Any) -> list[Tensor]:
        os.environ["MASTER_PORT"] = str(free_port())
        config = llama3_debugmodel()
        assert config.model_spec is not None
        blocks = llama._build_llama3_layers(
            n_layers=3, dim=64, n_heads=4, attn_backend="flex", n_kv_heads=2, hidden_dim=96,
            rope=ComplexRoPE.Config(dim=16, max_seq_len=64, theta=5e5, scaling="llama"),
        )  # fmt: skip
        for block in blocks:  # flex attention has no backward pass on a CPU
            block.attention.inner_attention = ScaledDotProductAttention.Config()
        config.model_spec.model = llama.Llama3Model.Config(
            dim=64, vocab_size=VOCABULARY, layers=blocks,
            tok_embeddings=Embedding.Config(
                num_embeddings=VOCABULARY, embedding_dim=64, param_init=llama._EMBEDDING_INIT
            ),
            norm=RMSNorm.Config(normalized_shape=64, eps=1e-5, param_init=llama._NORM_INIT),
            lm_head=Linear.Config(
                in_features=64, out_features=VOCABULARY, param_init=llama._output_linear_init(64)
            ),
        )  # fmt: skip
        config.tokenizer, config.dataloader = NoTokenizer.Config(), Batches.Config()
        config.training.local_batch_size, config.training.seq_len = sequences, length
        config.training.steps, config.training.disable_cuda_graphs = 4, True
        config.training.mixed_precision_param = "float32"
        config.loss.loss_fn.global_vocab_size = VOCABULARY  # type: ignore[attr-defined]
        config.dump_folder, config.debug.seed = str(where), 0
        config.checkpoint.enable, config.checkpoint.interval = True, 2
        config.validator.enable, config.activation_checkpoint = False, None
        trainer = config.build()
        train_step = trainer.train_step

        def tracked(batches: Any) -> None:
            train_step(batches)
            of = trainer.parallel_dims
            seen = trainer.ntokens_seen * of.dp_replicate * of.dp_shard * of.cp
            tracker.step(trainer.step, trainer.model_parts[0], tokens=seen)

        if tracker is not None:
            trainer.train_step = tracked  # type: ignore[method-assign]
        trainer.train()
        values = trainer.model_parts[0].state_dict().values()
        final = [(v.full_tensor() if isinstance(v, DTensor) else v).clone() for v in values]
        trainer.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return final

    scaled = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=96, rms_norm_eps=1e-5,
        max_position_embeddings=131072, rope_parameters=scaled, tie_word_embeddings=False,
    ).save_pretrained(directory / "hf")  # fmt: skip
    tracker = SinkTracker(
        PROBE, directory / "live", every=2, on_error="raise",
        decoder=st.Decoder(forward=titan_causal),
    )  # fmt: skip
    own, plain = trained(directory / "tracked", tracker), trained(directory / "plain", None)
    tracker.finish()
    good = all(map(torch.equal, own, plain))
    text = agrees(
        st.Run.read(directory / "live"), directory / "tracked" / "checkpoint", directory,
        hf_config=directory / "hf",
    )  # fmt: skip
    return f"its trainer: {text}; weights {'the same to the bit' if good else 'WRONG'}"


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def same_to_the_bit(train: Callable[[Any], nn.Module], directory: Path, steps: int = 4) -> str:
    """Trainings with and without a tracker."""
    from sinktrack.callbacks.loop import SinkTracker

    tracker = SinkTracker(PROBE, directory, every=2, on_error="raise")
    plain, tracked = train(None), train(tracker)
    pairs = zip(plain.state_dict().values(), tracked.state_dict().values(), strict=True)
    good = all(torch.equal(one, two) for one, two in pairs)
    records = st.Run.read(directory).records
    good = good and [record["step"] for record in records] == list(range(2, steps + 1, 2))
    good = good and all(record["tokens"] == record["step"] * live_tokens for record in records)
    return f"{len(records)} records; weights {'the same to the bit' if good else 'WRONG'}"


def live_litgpt(directory: Path) -> str:
    """As its pretraining does: by Fabric, over accumulated batches."""
    from lightning.fabric import Fabric
    from litgpt.config import Config
    from litgpt.model import GPT

    def train(tracker: Any) -> nn.Module:
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", devices=1)
        config = Config.from_name(
            "pythia-14m", n_layer=3, n_embd=32, n_head=4, head_size=8, intermediate_size=48,
            block_size=64, vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY,
        )  # fmt: skip
        compiled: Any = torch.compile(GPT(config), backend="eager")
        model = fabric.setup(compiled)
        optimizer: Any = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
        state = {"iter_num": 0, "step_count": 0}
        while state["step_count"] < 4:
            tokens = torch.randint(VOCABULARY, (2, live_tokens // 4))
            state["iter_num"] += 1
            is_accumulating = state["iter_num"] % 2 != 0
            with fabric.no_backward_sync(model, enabled=is_accumulating):
                logits = model(tokens)
                fabric.backward(
                    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
                )
            if is_accumulating:
                continue
            optimizer.step()
            optimizer.zero_grad()
            state["step_count"] += 1
            if tracker is not None:
                seen = state["iter_num"] * tokens.numel() * fabric.world_size
                tracker.step(state["step_count"], model, tokens=seen)
        return model  # type: ignore[no-any-return]

    return same_to_the_bit(train, directory / "live")


def live_nanochat(directory: Path) -> str:
    """With its own optimizer, whose compiled functions run eagerly here."""
    from nanochat.gpt import GPT, GPTConfig

    def train(tracker: Any) -> nn.Module:
        torch.manual_seed(0)
        config = GPTConfig(
            sequence_len=64, vocab_size=VOCABULARY, n_layer=4, n_head=4, n_kv_head=2, n_embd=32
        )
        orig_model: Any = GPT(config)
        orig_model.init_weights()
        model: Any = torch.compile(orig_model, backend="eager", dynamic=False)
        optimizer = orig_model.setup_optimizer()
        for step in range(1, 5):
            tokens = torch.randint(VOCABULARY, (4, live_tokens // 4 + 1))
            model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
            if tracker is not None:
                tracker.step(step, orig_model, tokens=step * live_tokens)
        return orig_model  # type: ignore[no-any-return]

    with torch.compiler.set_stance("force_eager"):
        return same_to_the_bit(train, directory / "live")


LIVE: dict[str, Callable[[Path], str]] = {
    "litgpt": live_litgpt,
    "nanochat": live_nanochat,
    "olmo_core": live_olmo_core,
    "torchtitan": live_torchtitan,
}

PACKAGES: dict[str, Callable[[], Iterator[Case]]] = {
    "litgpt": litgpt,
    "nanochat": nanochat,
    "nanogpt": nanogpt,
    "olmo_core": olmo_core,
    "torchtitan": torchtitan,
    "transformer_lens": transformer_lens,
    "x_transformers": x_transformers,
}


def version(package: str, source: Path | None) -> str:
    if source is not None:
        command = ["git", "-C", str(source), "log", "-1", "--format=%h, %cs"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return found.stdout.strip() or "as given"
    return importlib.metadata.version(REQUIREMENTS[package][0])


def environment(package: str, directory: Path) -> Path:
    """An environment on top of this one that has a package; its Python."""
    venv.create(directory, with_pip=True, symlinks=True)
    python = directory / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
    below = "\n".join(f"import site; site.addsitedir({path!r})" for path in site.getsitepackages())
    (Path(own.stdout.strip()) / "below.pth").write_text(below + "\n")
    if REQUIREMENTS[package]:
        install: list[str | Path] = [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--retries",
            "1",
        ]
        if subprocess.run([*install, *REQUIREMENTS[package]], check=False).returncode:
            sys.exit(f"{NOT_INSTALLED}{package}")
    return python


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure a package's models, beside a reference.")
    parser.add_argument("package", choices=sorted(PACKAGES))
    parser.add_argument("--source", type=Path, help="a checkout, of what is no package")
    parser.add_argument("--make", type=Path, metavar="DIR", help="make an environment, and use it")
    parser.add_argument("--only", default="", help="models whose name holds this")
    given = parser.parse_args(arguments)
    if given.make is not None:
        command: list[Any] = [environment(given.package, given.make), __file__, given.package]
        command += ["--source", given.source] if given.source else []
        command += ["--only", given.only]
        return subprocess.run(command, check=False).returncode
    if given.source is not None:
        sys.path.insert(0, str(given.source))
    torch.set_num_threads(1)
    of = f"{given.package} {version(given.package, given.source)}"
    bad = 0
    for case in PACKAGES[given.package]():
        if given.only in case.name:
            text, good = row(case)
            bad += not good
            print(f"| {of} | {case.name} | {case.attention} | {text} |", flush=True)
    if given.package in LIVE and given.only in "live":
        with tempfile.TemporaryDirectory() as directory:
            text = LIVE[given.package](Path(directory))
        bad += "WRONG" in text
        print(f"| {of} | in its training loop | | {text} |", flush=True)
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
