"""An independent measurement: eager attention matrices and hidden states, plain loops."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch

from sinktrack import Measurement, Probe, measure
from sinktrack.archive.source import Source
from sinktrack.collect import Collector
from sinktrack.metrics import METRICS
from sinktrack.models.huggingface import decoder, watch

TOGETHER = ("llama4_text", "dbrx")
"""Families whose routed experts are reported as one MLP."""


def measured_by_hand(model: Any, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Everything of the definitions that eager outputs alone can give, in float64."""
    with torch.no_grad():
        found = model(tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
    blocks = len(found.attentions)
    sequences, length = tokens.shape
    inputs = capture_inputs(model, tokens)
    matrices = [matrix.double().numpy() for matrix in found.attentions]
    concentration = np.zeros((blocks,))
    uniform = np.zeros((blocks,))
    heads = matrices[0].shape[1]
    p0 = np.zeros((sequences, blocks, heads))
    alpha = np.zeros((sequences, blocks, heads))
    for b in range(sequences):
        for block in range(blocks):
            for head in range(heads):
                column = matrices[block][b, head, :, 0]
                seen = [i for i in range(length) if column[i] > 0]
                p0[b, block, head] = sum(column[i] for i in seen if i >= 1) / (len(seen) - 1)
                alpha[b, block, head] = sum(column[i] for i in seen) / len(seen)
    for block in range(blocks):
        concentration[block] = p0[:, block].mean()
        even = []
        for b in range(sequences):
            for head in range(heads):
                rows = matrices[block][b, head]
                even.append(np.mean([1 / (r > 0).sum() for r in rows[1:] if r[0] > 0]))
        uniform[block] = np.mean(even)
    norms = np.linalg.norm(inputs, axis=-1)
    ratio = [
        norms[block, :, 0].mean() / np.median(norms[block, :, 1:]) for block in range(blocks + 1)
    ]
    consistency = []
    for block in range(blocks + 1):
        cosines = []
        for a in range(sequences):
            for b in range(sequences):
                if tokens[a, 0] != tokens[b, 0]:
                    left, right = inputs[block, a, 0], inputs[block, b, 0]
                    cosines.append(left @ right / np.linalg.norm(left) / np.linalg.norm(right))
        consistency.append(np.mean(cosines) if cosines else math.nan)
    unit = inputs[:, :, 0] / norms[:, :, :1]
    centre = unit.mean(1)
    centre /= np.linalg.norm(centre, axis=-1, keepdims=True)
    mixing = [(matrix[:, :, 1:] ** 2).sum(-1).mean((0, 2)) for matrix in matrices]
    largest = np.abs(inputs)
    return {
        "concentration": concentration,
        "uniform": uniform,
        "mixing": np.array(mixing),
        "rivals": (norms[:, :, 1:] >= norms[:, :, :1] / 2).mean((1, 2)),
        "max_p0": largest[:, :, 0].max((1, 2)),
        "max_others": largest[:, :, 1:].max((1, 2, 3)),
        "median": np.median(_lower_median(largest[:, :, 1:]), axis=(1, 2)),
        "direction_to_mean": np.einsum("lbd,ld->lb", unit, centre).mean(1),
        "write_ratios": write_ratios(model, tokens),
        "p0": p0,
        "alpha": alpha,
        "p0_norm": norms[:, :, 0].mean(1),
        "norm_ratio": np.array(ratio),
        "direction_consistency": np.array(consistency),
        "inputs": inputs,
    }


def write_ratios(model: Any, tokens: torch.Tensor) -> dict[str, list[float]]:
    """Norms of what attentions and MLPs put out at P0 over the median elsewhere, by plain hooks."""
    found: dict[str, list[float]] = {"attention": [], "mlp": []}

    def hook(name: str) -> Any:
        def look(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            norms = np.linalg.norm(value.double().numpy().reshape(*tokens.shape, -1), axis=-1)
            found[name].append(norms[:, 0].mean() / np.median(norms[:, 1:]))

        return look

    handles = []
    for block in blocks_of(model):
        children = dict(block.named_children())
        for name, keys in (("attention", ("self_attn", "attn", "attention")), ("mlp", ("mlp",))):
            module = next(children[key] for key in keys if key in children)
            handles.append(module.register_forward_hook(hook(name)))
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _lower_median(values: np.ndarray) -> np.ndarray:
    """Over the last axis; of an even number the lower of the middle two, as torch has it."""
    return np.sort(values, axis=-1)[..., (values.shape[-1] - 1) // 2]


def localized_by_hand(
    inputs: np.ndarray, readers: np.ndarray
) -> tuple[np.ndarray, float, list[float]]:
    """What blocks write, weighted by who reads: by block, of the embedding, and the sums.

    Args:
        inputs: ``[L + 1, B, T, D]``.
        readers: ``[L]``.
    """
    blocks = len(readers)
    by_block, embedding, sums = np.zeros(blocks), 0.0, []
    for reader in range(blocks):
        state = inputs[reader, :, 0].mean(0)
        direction = state - inputs[reader, :, 1:].mean((0, 1))
        total = state @ direction
        shares = [inputs[0, :, 0].mean(0) @ direction / total]
        for block in range(reader):
            write = (inputs[block + 1, :, 0] - inputs[block, :, 0]).mean(0)
            shares.append(write @ direction / total)
        sums.append(sum(shares))
        weight = readers[reader] / readers.sum()
        embedding += weight * shares[0]
        by_block[:reader] += weight * np.array(shares[1:])
    return by_block, embedding, sums


def blocks_of(model: Any) -> Any:
    """The list of its blocks, a ModuleList."""
    count = model.config.get_text_config().num_hidden_layers
    return next(
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    )


def capture_inputs(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """``[L + 1, B, T, D]`` residual stream, by plain hooks."""
    seen: list[np.ndarray] = []
    blocks = blocks_of(model)
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(
                (args[0] if args else kwargs["hidden_states"]).double().numpy().copy()
            ),
            with_kwargs=True,
        )
        for block in blocks
    ]
    handles.append(
        blocks[-1].register_forward_hook(
            lambda _, __, out: seen.append(
                (out[0] if isinstance(out, tuple | list) else out).double().numpy().copy()
            )
        )
    )
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack(seen)


class PlainWrites:
    """What heads and routed experts write at P0, by plain hooks and loops over the parameters.

    The output projection of an attention is the last linear map that runs inside of it. Writes are
    compared up to `factor`.
    """

    def __init__(self, model: Any, tokens: torch.Tensor) -> None:
        self.heads: dict[tuple[int, int], torch.Tensor] = {}
        self.experts: dict[tuple[int, int], torch.Tensor] = {}
        self._shape = tuple(tokens.shape)
        handles = []
        for index, block in enumerate(blocks_of(model)):
            for name, module in block.named_modules():
                if type(module).__name__.endswith("Attention") or name.endswith("attn"):
                    for inner in module.modules():
                        if "Linear" in type(inner).__name__ or type(inner).__name__ == "Conv1D":
                            handles.append(inner.register_forward_hook(self._project(index, model)))
                if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):
                    handles.append(
                        module.register_forward_hook(self._route(index), with_kwargs=True)
                    )
        with torch.no_grad():
            model(tokens, use_cache=False)
        for handle in handles:
            handle.remove()

    def _project(self, block: int, model: Any) -> Any:
        config = model.config.get_text_config()
        heads = config.num_attention_heads

        def hook(module: Any, args: Any, output: Any) -> None:
            if not hasattr(module, "weight") or module.weight.ndim != 2:
                return
            weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            if not args or args[0].ndim < 2 or args[0].shape[-1] % heads:
                return
            at_zero = args[0].detach().reshape(*self._shape, -1)[:, 0].mean(0)
            if at_zero.numel() != weight.shape[1]:
                return
            size = len(at_zero) // heads
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                self.heads[block, head] = weight.detach()[:, part] @ at_zero[part]

        return hook

    def _route(self, block: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            names = ("hidden_states", "top_k_index", "top_k_weights")
            given = dict(zip(names, args, strict=False)) | kwargs
            sequences, length = self._shape
            stream, index, gate = (
                given[name].detach().reshape(sequences, length, -1)[:, 0] for name in names
            )
            for row in range(sequences):
                for expert, weight in zip(index[row].tolist(), gate[row], strict=True):
                    write = weight * _expert(module, expert, stream[row]) / sequences
                    key = block, expert
                    self.experts[key] = self.experts.get(key, torch.zeros(())) + write

        return hook


def _expert(module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    def times(name: str, value: torch.Tensor) -> torch.Tensor:
        weight = getattr(module, name)[expert].detach()
        value = value @ weight if module.is_transposed else weight @ value
        return (
            value + getattr(module, name + "_bias")[expert].detach() if module.has_bias else value
        )

    if module.has_gate:
        inner = module._apply_gate(times("gate_up_proj", x)[None])[0]
    else:
        inner = module.act_fn(times("up_proj", x))
    return times("down_proj", inner)


def factor(config: Any, kind: str) -> float:
    """What a family multiplies an attention's or the experts' output with."""
    if config.model_type == "minicpm3":
        return float(config.scale_depth / math.sqrt(config.num_hidden_layers))
    if config.model_type.startswith("minimax_m3") and kind == "expert":
        return float(config.routed_scaling_factor)
    return float(getattr(config, "residual_multiplier", 1.0))


def eager_attention(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """``[B, H, T, T]`` for each block with softmax attention, by the family's own eager code."""
    module: Any = sys.modules[type(model).__module__]
    eager: Any = getattr(module, "eager_attention_forward", None)

    def whole(attention: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        """GraniteSWA scales the output for its sinks and returns the weights as they were."""
        output, weights = eager(attention, query, key, value, *args, **kwargs)
        spread = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        ratio = (output / (weights @ spread).transpose(1, 2)).median(-1).values
        return output, weights * ratio.transpose(1, 2)[..., None]

    if "Swa" in type(model).__name__ or "SWA" in type(model).__name__:
        module.eager_attention_forward = whole
    try:
        with torch.no_grad():
            found = model(tokens, output_attentions=True, use_cache=False).attentions
    finally:
        if eager is not None:
            module.eager_attention_forward = eager
    return [matrix for matrix in found if matrix is not None]


def check_slices(found: Source, plain: Source) -> None:
    """Every tensor of float32, and every part of it, is what the other source has whole."""
    assert set(found.names()) == set(plain.names())
    for name in plain.names():
        part, whole = found.slice(name), plain.slice(name)[...]
        rows = whole.shape[0]
        assert part.get_shape() == list(whole.shape) and part.get_dtype() == "F32"
        several = (slice(3, rows - 1), slice(rows, rows), slice(rows, 0), slice(0, rows, 2))
        for index in (..., slice(None), *several, 2, -1):
            assert torch.equal(part[index], whole[index]), (name, index)
        if whole.ndim == 2:
            for first in (slice(1, 4), slice(5, 7)):
                assert torch.equal(part[first, 2:5], whole[first, 2:5]), (name, first)


def check_attention(found: Measurement, model: Any, probe: Probe) -> np.ndarray:
    """Compare attention and norms with eager weights and plain hooks.

    Returns:
        ``[L + 1, B, T, D]``, the residual stream.
    """
    weights = eager_attention(model, probe.tokens)
    full = [block for block, kind in enumerate(found.block_kinds) if kind in ("full", "sliding")]
    assert len(weights) == len(full) > 0
    for block, matrix in zip(full, weights, strict=True):
        column, heads = matrix[:, :, 1:, 0], matrix.shape[1]
        p0 = column.sum(-1) / found.visible_queries_by_sequence[:, block, None]
        got = found.p0_attention_by_sequence[:, block, :heads]
        torch.testing.assert_close(got, p0.float(), atol=1e-6, rtol=0)
        own = found.own_attention_by_sequence[:, block, :heads]
        torch.testing.assert_close(own, matrix[:, :, 0, 0].float(), atol=4e-6, rtol=0)
        if found.sink_logit_mass is not None and not found.sink_logit_mass[block].isnan().any():
            missing = (1 - matrix.sum(-1))[:, :, 1:].mean((0, 2))
            torch.testing.assert_close(found.sink_logit_mass[block], missing, atol=1e-5, rtol=0)
    inputs = capture_inputs(model, probe.tokens)
    norms = np.linalg.norm(inputs, axis=-1)
    np.testing.assert_allclose(found.p0_norm, norms[:, :, 0].mean(1), rtol=1e-5)
    return inputs


def check_exact(model: Any, probe: Probe) -> Measurement:
    """Measure, and compare attention, states, heads and experts with plain computations."""
    found = measure(model, probe)
    inputs = check_attention(found, model, probe)
    assert found.missing.get("shares", "no block reads").startswith("no block reads")
    _check_writes(model, probe.tokens, inputs)
    return found


def _check_writes(model: Any, tokens: torch.Tensor, inputs: np.ndarray) -> None:
    """Every block's parts make its whole write; heads and experts equal plain loops."""
    found, collected = decoder(model), Collector(METRICS)
    with torch.no_grad(), watch(found, collected):
        model(tokens, use_cache=False)
    parts = collected.writes.contributions()
    leaves = {(part.kind, part.block, part.index): part.write for part in parts}
    scale = float(np.linalg.norm(inputs[:, :, 0], axis=-1).max())
    for block in found.blocks:
        total = sum(write for (_, where, _), write in leaves.items() if where == block)
        wanted = (inputs[block + 1] - inputs[block])[:, 0].mean(0)
        np.testing.assert_allclose(total, wanted, atol=2e-5 * scale)
    plain = PlainWrites(model, tokens)
    for (kind, block, index), write in leaves.items():
        if kind in ("head", "expert"):
            assert index is not None
            wanted = {"head": plain.heads, "expert": plain.experts}[kind][block, index]
            wanted = wanted * factor(found.config, kind)
            torch.testing.assert_close(write, wanted, atol=2e-5 * scale, rtol=1e-4)
    experts = {(block, index) for kind, block, index in leaves if kind == "expert"}
    assert experts == set(plain.experts)
    if found.type not in TOGETHER:
        assert bool(experts) == (found.experts is not None), "routed experts are told apart"
