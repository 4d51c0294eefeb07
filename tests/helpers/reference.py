"""An independent measurement: eager attention matrices and hidden states, plain loops."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from sinktrack import Measurement, Probe, measure
from sinktrack.archive.source import Source
from sinktrack.collect import Collector
from sinktrack.metrics import METRICS
from sinktrack.models.huggingface import decoder, watch

TOGETHER = ("llama4_text", "dbrx")
"""Families whose routed experts are reported as one MLP."""

BIASES_BESIDE = {("gpt_neox_japanese", 3)}
"""Blocks whose sublayers write more than their modules put out: a bias is added beside them."""


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


def eager_attention(
    model: Any, tokens: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """By the family's own eager code, for each block with softmax attention.

    Returns:
        ``[B, H, T, T]`` probabilities, and ``[B, G, T, Dv]`` values, none where the family's eager
        attention is no function that takes them.
    """
    name = "eager_attention_forward"
    homes: list[Any] = [sys.modules[type(one).__module__] for one in (model.get_decoder(), model)]
    module = next((home for home in homes if hasattr(home, name)), None)
    eager: Any = getattr(module, name, None)
    values: list[torch.Tensor] = []

    def whole(attention: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        """GraniteSWA scales the output for its sinks and returns the weights as they were."""
        values.append(value.detach().clone())
        output, weights = eager(attention, query, key, value, *args, **kwargs)
        if "swa" not in type(model).__name__.lower():
            return output, weights
        spread = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        ratio = (output / (weights @ spread).transpose(1, 2)).median(-1).values
        return output, weights * ratio.transpose(1, 2)[..., None]

    if module is not None:
        module.eager_attention_forward = whole
    try:
        with torch.no_grad():
            found = model(tokens, output_attentions=True, use_cache=False).attentions
    finally:
        if module is not None:
            module.eager_attention_forward = eager
    return [matrix for matrix in found if matrix is not None], values


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


def check_exact(model: Any, probe: Probe) -> Measurement:
    """Measure, and compare every field with plain computations in float64.

    Phases begin lower than they do, so that models that were not trained have some.
    """
    with (
        patch("sinktrack.metrics.phases.EPSILON", 0.12),
        patch("sinktrack.metrics.phases.GOES_ON", 0.1),
    ):
        found = measure(model, probe)
    inputs = check_attention(found, model, probe)
    check_write_ratios(found, model, probe.tokens, inputs)
    assert found.missing.get("shares", "no block reads").startswith("no block reads")
    _check_writes(model, probe.tokens, inputs)
    return found


def check_attention(found: Measurement, model: Any, probe: Probe) -> np.ndarray:
    """Compare all but what writes the P0 state with eager attention and plain hooks.

    Returns:
        ``[L + 1, B, T, D]``, the residual stream.
    """
    weights, values = eager_attention(model, probe.tokens)
    full = [block for block, kind in enumerate(found.block_kinds) if kind in ("full", "sliding")]
    assert len(weights) == len(full) > 0
    check_matrices(found, dict(zip(full, weights, strict=True)))
    check_values(found, dict(zip(full, values, strict=True)) if values else {})
    inputs = capture_inputs(model, probe.tokens)
    check_states(found, inputs, probe.tokens[:, 0])
    alone = capture_inputs(model, probe.first_tokens()[:, None])[:, :, 0]
    check_first_tokens(found, alone, inputs)
    return inputs


def check_matrices(
    found: Measurement, matrices: Mapping[int, torch.Tensor], tolerance: float = 1e-6
) -> None:
    """Compare what is computed of attention with eager probabilities ``[B, H, T, T]`` by block."""
    blocks, alphas = len(found.block_kinds), {}
    for block in range(blocks):
        if block not in matrices:
            for name in ("concentration", "uniform", "mixing", "p0_attention"):
                assert getattr(found, name)[block].isnan().all(), (name, block)
            continue
        matrix = matrices[block].double()
        heads = matrix.shape[1]
        seen = matrix > 0
        p0_seen = seen[..., 0].clone()  # of each query
        column = torch.where(p0_seen, matrix[..., 0], 0)
        alphas[block] = column.sum(-1) / p0_seen.sum(-1)
        p0_seen[..., 0] = False
        count = p0_seen.sum(-1)
        assert torch.equal(
            found.visible_queries_by_sequence[:, block].double(), count[:, 0].double()
        )
        p0 = (column * p0_seen).sum(-1) / count
        even = (p0_seen.double() / seen.sum(-1)).sum(-1) / count
        mixing = matrix[:, :, 1:].square().sum(-1).mean((0, 2))
        for name, got, wanted, slack in (
            ("p0", found.p0_attention_by_sequence[:, block, :heads], p0, 1),
            ("own", found.own_attention_by_sequence[:, block, :heads], matrix[:, :, 0, 0], 4),
            ("concentration", found.concentration[block], p0.mean(), 1),
            ("uniform", found.uniform[block], even.mean(), 1),
            ("mixing", found.mixing[block, :heads], mixing, 4),
        ):
            torch.testing.assert_close(
                got.double(), wanted, atol=slack * tolerance, rtol=0, msg=f"{name} of block {block}"
            )
        if found.sink_logit_mass is not None and not found.sink_logit_mass[block].isnan().any():
            missing = (1 - matrix.sum(-1))[:, :, 1:].mean((0, 2))
            got = found.sink_logit_mass[block].double()
            torch.testing.assert_close(got, missing, atol=10 * tolerance, rtol=0)
    _check_sinks(found, alphas)


def _check_sinks(found: Measurement, alphas: Mapping[int, torch.Tensor]) -> None:
    """Sink rates and heads, of each sequence's mean attention to P0 ``[B, H]`` by block."""
    for eps in (0.1, 0.3):
        first = None
        for block in range(len(found.block_kinds)):
            got = found.sink_heads[str(eps)][block]
            if block not in alphas:
                assert got.isnan() and found.sink_sequences[block].isnan().all()
                continue
            often = (alphas[block] > eps).double().mean(0)
            assert int(got) == int((often >= 0.5).sum()), (eps, block)
            rate = found.sink_rate_by_block(eps)[block]
            assert float(rate) == pytest.approx(float(often.mean()), abs=1e-9)
            if eps == 0.3:
                assert found.sink_sequences[block, : len(often)].tolist() == often.tolist()
            if first is None and int(got):
                first = block
        for start in (0, 2):
            later = [a.flatten() for block, a in alphas.items() if block >= start]
            rates = (torch.cat(later) > eps).double().mean() if later else torch.tensor(math.nan)
            assert found.sink_rate(eps, start_block=start) == pytest.approx(
                float(rates), abs=1e-9, nan_ok=True
            )
            if eps == 0.3 and start == 2:
                assert found.sink_rate_from_2 == pytest.approx(float(rates), abs=1e-9, nan_ok=True)
    assert found.first_sink_block == first


def check_values(found: Measurement, values: Mapping[int, torch.Tensor]) -> None:
    """Compare the value ratio with values ``[B, G, T, Dv]`` by block; nan where none are shown."""
    if found.value_ratio is None:
        assert not values
        return
    for block in range(len(found.block_kinds)):
        if block not in values:
            assert found.value_ratio[block].isnan().all(), block
            continue
        size = values[block].double().norm(dim=-1).numpy()
        wanted = [group[:, 0].mean() / np.median(group[:, 1:]) for group in size.swapaxes(0, 1)]
        np.testing.assert_allclose(found.value_ratio[block, : len(wanted)], wanted, rtol=1e-5)
        assert found.value_ratio[block, len(wanted) :].isnan().all()


def check_states(
    found: Measurement, inputs: np.ndarray, first_tokens: torch.Tensor, tolerance: float = 1e-5
) -> None:
    """Compare what is computed of the stream ``[L + 1, B, T, D]``."""
    norms = np.linalg.norm(inputs, axis=-1)
    own, rest = norms[:, :, 0], norms[:, :, 1:].reshape(len(norms), -1)
    np.testing.assert_allclose(found.p0_norm, own.mean(1), rtol=tolerance)
    ratio = own.mean(1) / np.median(rest, axis=1)
    np.testing.assert_allclose(found.norm_ratio, ratio, rtol=2 * tolerance)
    gain = np.diff(np.log(ratio))
    np.testing.assert_allclose(found.gain, gain, atol=10 * tolerance)
    rivals = (norms[:, :, 1:] >= own[..., None] / 2).mean((1, 2))
    np.testing.assert_allclose(found.rivals, rivals, atol=1e-7)
    unit = inputs[:, :, 0] / own[..., None]
    centre = unit.mean(1, keepdims=True)
    centre /= np.linalg.norm(centre, axis=-1, keepdims=True)
    towards = (unit * centre).sum(-1).mean(1)
    np.testing.assert_allclose(found.direction_to_mean, towards, atol=tolerance)
    cosines = unit @ unit.swapaxes(1, 2)
    pairs = (first_tokens[:, None] != first_tokens).numpy()
    np.testing.assert_allclose(
        found.direction_consistency, cosines[:, pairs].mean(1), atol=tolerance
    )
    size = np.abs(inputs)
    largest = {"p0": size[:, :, 0].max(1), "others": size[:, :, 1:].max((1, 2))}
    for name, channels in largest.items():
        top = channels.max(-1)
        np.testing.assert_allclose(found.max_activation[name], top, rtol=tolerance)
        for at, channel in enumerate(found.max_activation[f"{name}_channel"]):
            assert channels[at, channel] == pytest.approx(top[at], rel=tolerance)
    middle = np.median(_lower_median(size[:, :, 1:]).reshape(len(size), -1), axis=1)
    top = np.maximum(largest["p0"].max(-1), largest["others"].max(-1))
    np.testing.assert_allclose(found.max_activation["ratio"], top / middle, rtol=4 * tolerance)
    if found.main_sink is None:
        assert found.p0_channels is None
        return
    state = inputs[found.main_sink.peak_block, :, 0]
    share = (state**2 / (state**2).sum(-1, keepdims=True)).mean(0)
    order = np.argsort(-share)[:3]
    assert [each["channel"] for each in found.p0_channels] == order.tolist()
    shares = [each["share"] for each in found.p0_channels]
    np.testing.assert_allclose(shares, share[order], rtol=10 * tolerance)


def check_first_tokens(found: Measurement, alone: np.ndarray, inputs: np.ndarray) -> None:
    """Compare with states of single tokens ``[L + 1, N, D]``, beside those of the probe."""
    norms = np.linalg.norm(alone, axis=-1)
    others = np.linalg.norm(inputs[:, :, 1:], axis=-1).reshape(len(inputs), -1)
    ratio = norms / np.median(others, axis=1, keepdims=True)
    for quantile, got in found.first_token.norm_ratio.items():
        np.testing.assert_allclose(got, np.percentile(ratio, quantile, axis=1), rtol=1e-4)
    if (main := found.main_sink) is None:
        assert found.position_share is None
        return
    own = np.linalg.norm(inputs[main.peak_block, :, 0], axis=-1).mean()
    share = (norms[main.peak_block] >= own / 2).mean()
    assert found.position_share == pytest.approx(share, abs=1e-9)


def check_write_ratios(
    found: Measurement, model: Any, tokens: torch.Tensor, inputs: np.ndarray
) -> None:
    """Compare with outputs of two modules of a block that add up to what the block adds.

    Which they are is found by trying, in the order in which they ran.
    """
    for block, outputs in enumerate(block_outputs(model, tokens)):
        kind = found.block_kinds[block]
        if (found.model["type"], block) in BIASES_BESIDE:
            continue
        sublayers = _adding_up(outputs, inputs[block + 1] - inputs[block], kind, model.config)
        if kind == "linear":  # the first mixes tokens without softmax
            sublayers.pop("attention", None)
        for name in ("attention", "mlp"):
            got = float(getattr(found, f"{name}_write_ratio")[block])
            if name not in sublayers:
                assert math.isnan(got), (block, name, got)
                continue
            norms = np.linalg.norm(sublayers[name], axis=-1)
            ratio = norms[:, 0].mean() / np.median(norms[:, 1:])
            assert got == pytest.approx(ratio, rel=1e-4), (block, name)


def block_outputs(model: Any, tokens: torch.Tensor) -> list[list[tuple[str, np.ndarray]]]:
    """Of every block the outputs of its modules that have the stream's size, by plain hooks."""
    seen: list[list[tuple[str, np.ndarray]]] = []
    handles = []

    def look(into: list[tuple[str, np.ndarray]], name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor) and value.numel() % tokens.numel() == 0:
                into.append((name, value.double().reshape(*tokens.shape, -1).numpy().copy()))

        return hook

    for block in blocks_of(model):
        seen.append([])
        for name, module in block.named_modules():
            if name:
                handles.append(module.register_forward_hook(look(seen[-1], name)))
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def _adding_up(
    outputs: list[tuple[str, np.ndarray]], added: np.ndarray, kind: str, config: Any
) -> dict[str, np.ndarray]:
    """The writes by sublayer. The last may be of two modules, experts and shared experts."""
    scale = np.abs(added).max()
    fitting = [out for _, out in outputs if out.shape == added.shape]
    for times in {factor(config, "head"), factor(config, "expert"), 1.0}:
        written = [times * out for out in fitting]
        for count in (1, 2, 3):
            for chosen in itertools.combinations(written, count):
                if np.abs(sum(chosen) - added).max() < 1e-5 * scale:
                    if count == 1:
                        return {"mlp" if kind == "mlp" else "attention": chosen[0]}
                    return {"attention": chosen[0], "mlp": np.sum(chosen[1:], 0)}
    return {}


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
