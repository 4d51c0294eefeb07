"""An independent measurement: eager attention matrices and hidden states, plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch


def measured_by_hand(model: Any, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Everything of the definitions that eager outputs alone can give, in float64."""
    with torch.no_grad():
        found = model(tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
    blocks = len(found.attentions)
    sequences, length = tokens.shape
    inputs = capture_inputs(model, tokens)
    matrices = [matrix.double().numpy() for matrix in found.attentions]
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
    return {
        "p0": p0,
        "alpha": alpha,
        "p0_norm": norms[:, :, 0].mean(1),
        "norm_ratio": np.array(ratio),
        "direction_consistency": np.array(consistency),
        "inputs": inputs,
    }


def blocks_of(model: Any) -> torch.nn.ModuleList:
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
                (out[0] if isinstance(out, tuple) else out).double().numpy().copy()
            )
        )
    )
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack(seen)
