"""Models whose circuit is known because their weights are set by hand.

Dimensions of the stream: `ONE` is 1 for every token and `BOS` for the first alone; a writer puts
`SINK` there, and the heads of later blocks look for it. `DECOY` is written and read by nobody.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from sinktrack import Probe

ONE, BOS, SINK, DECOY, NORM, NOISE = 0, 1, 2, 3, 4, 8
SIGNS = 8
WIDTH, HEADS, VOCABULARY, LENGTH, BLOCKS = 40, 2, 257, 24, 5
HEAD_WIDTH = WIDTH // HEADS
THRESHOLD = 3.7


def probe(sequences: int = 24, seed: int = 0) -> Probe:
    """Sequences behind token 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 1 + torch.randint(VOCABULARY - 1, (sequences, LENGTH), generator=generator)
    tokens[:, 0] = 0
    return Probe.from_tokens(tokens)


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    } | changes


def _empty(model: Any, seed: int) -> Any:
    """Small random weights, noise tokens, `ONE` for all and `BOS` for token 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.003 * torch.randn(parameter.shape, generator=generator))
        embedding = model.model.embed_tokens.weight
        embedding.zero_()
        noise = torch.randn(VOCABULARY, embedding.shape[1] - NOISE, generator=generator)
        embedding[:, NOISE:] = 0.3 * noise
        embedding[:, ONE] = 4.0
        embedding[0, BOS] = 4.0
    return model.eval()


def dense(seed: int = 0, **changes: Any) -> Any:
    return _empty(LlamaForCausalLM(LlamaConfig(**_config(**changes))), seed)


def mixture(seed: int = 0, **changes: Any) -> Any:
    shape = {"intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**_config(**shape, sliding_window=None) | changes)
    return _empty(MixtralForCausalLM(config), seed)


@torch.no_grad()
def reader(model: Any, block: int, strength: float = 2.0) -> None:
    """All heads of a block look for `SINK`."""
    attention = model.model.layers[block].self_attn
    width = attention.head_dim
    for head in range(attention.q_proj.weight.shape[0] // width):
        row = head * width + width // 2 - 1  # the channel that position embeddings turn least
        attention.q_proj.weight[row, ONE] = strength
        attention.k_proj.weight[row, SINK] = strength


@torch.no_grad()
def head_writer(model: Any, block: int, head: int, size: float = 3.0, to: int = SINK) -> None:
    """A head that looks at [BOS] hands its value on; at P0 that is [BOS] itself.

    Elsewhere it looks for tokens like the query's own, so it writes nothing there.
    """
    attention = model.model.layers[block].self_attn
    rows = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
    attention.v_proj.weight[head * HEAD_WIDTH, BOS] = 1.0
    attention.o_proj.weight[to, head * HEAD_WIDTH] = size
    generator = torch.Generator().manual_seed(1)
    look = 2 * torch.randn(HEAD_WIDTH, WIDTH - NOISE, generator=generator)
    attention.q_proj.weight[rows, NOISE:] = look
    attention.k_proj.weight[rows, NOISE:] = look


@torch.no_grad()
def neuron_writer(
    model: Any, block: int, size: float = 0.5, to: int = SINK, neuron: int = 5
) -> None:
    """One neuron that fires at [BOS] alone."""
    mlp = model.model.layers[block].mlp
    mlp.gate_proj.weight[neuron, BOS] = 4.0
    mlp.up_proj.weight[neuron, BOS] = 1.0
    mlp.down_proj.weight[to, neuron] = size / 4


@torch.no_grad()
def expert_writer(
    model: Any, block: int, expert: int, size: float = 0.5, to: int = SINK, gate: float = 6.0
) -> None:
    """[BOS] is routed to an expert, which writes when it is asked."""
    mlp = model.model.layers[block].mlp
    mlp.gate.weight[expert, BOS] = gate
    inner = mlp.experts.gate_up_proj.shape[1] // 2
    mlp.experts.gate_up_proj[expert, 0, BOS] = 4.0
    mlp.experts.gate_up_proj[expert, inner, BOS] = 1.0
    mlp.experts.down_proj[expert, to, 0] = size / 4


@torch.no_grad()
def marker(model: Any, block: int) -> None:
    """One neuron that fires at all tokens but [BOS] and writes the opposite of `SINK`."""
    mlp = model.model.layers[block].mlp
    mlp.gate_proj.weight[5, ONE] = 1.0
    mlp.gate_proj.weight[5, BOS] = -3.0
    mlp.up_proj.weight[5, ONE] = 1.0
    mlp.down_proj.weight[SINK, 5] = -0.3


@torch.no_grad()
def unmixed(model: Any) -> None:
    """No [BOS]: block 0 averages signs and squares the average, block 1 asks for a large square.

    The average of one token's signs, P0's own, has the largest square.
    """
    generator = torch.Generator().manual_seed(2)
    signs = torch.randint(0, 2, (VOCABULARY, SIGNS), generator=generator) * 2.0 - 1
    embedding = model.model.embed_tokens.weight
    embedding[:, BOS] = 0
    embedding[:, NOISE : NOISE + SIGNS] = 0.5 * signs
    embedding[:, NOISE + SIGNS :] *= 0.1
    first, second = model.model.layers[:2]
    mean = slice(NOISE + SIGNS, NOISE + 2 * SIGNS)
    first.self_attn.q_proj.weight.zero_()
    for sign in range(SIGNS):
        first.self_attn.v_proj.weight[sign, NOISE + sign] = 2.0
        first.self_attn.o_proj.weight[mean.start + sign, sign] = 1.0
        for turn, neuron in ((1.0, 2 * sign), (-1.0, 2 * sign + 1)):
            first.mlp.gate_proj.weight[neuron, mean.start + sign] = 6.0 * turn
            first.mlp.up_proj.weight[neuron, mean.start + sign] = turn
            first.mlp.down_proj.weight[NORM, neuron] = 0.2
    second.mlp.gate_proj.weight[5, NORM] = 4.0
    second.mlp.gate_proj.weight[5, ONE] = -4.0 * THRESHOLD
    second.mlp.up_proj.weight[5, ONE] = 1.0
    second.mlp.down_proj.weight[SINK, 5] = 1.0


def without_bos(sequences: int = 24, seed: int = 5) -> Probe:
    """Random tokens, the first ones too."""
    generator = torch.Generator().manual_seed(seed)
    return Probe.from_tokens(torch.randint(VOCABULARY, (sequences, LENGTH), generator=generator))


def random_model(seed: int) -> tuple[Any, Probe]:
    """Weights that know no circuit, small to large, and sequences with and without [BOS].

    Over so few positions chance alone gives P0 three tenths of a block's attention.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = _config(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=3)
    if seed % 2:
        model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        shape |= {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
        model = MixtralForCausalLM(MixtralConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, (0.1, 0.3, 0.6)[seed % 3], generator=generator)
    tokens = torch.randint(64, (12, 6), generator=generator)
    if seed % 4 < 2:
        tokens[:, 0] = 0
    return model.eval(), Probe.from_tokens(tokens)


def readers(model: Any, start: int) -> Any:
    for block in range(start, BLOCKS):
        reader(model, block)
    return model


def in_series() -> Any:
    """Block 0 writes what block 1 looks for, block 2 erases it, block 3 writes for block 4."""
    model = dense()
    neuron_writer(model, 0)
    reader(model, 1)
    neuron_writer(model, 2, size=-0.5)
    neuron_writer(model, 3, to=DECOY)
    attention = model.model.layers[4].self_attn
    with torch.no_grad():
        for head in range(HEADS):
            row = head * attention.head_dim + attention.head_dim // 2 - 1
            attention.q_proj.weight[row, ONE] = 2.0
            attention.k_proj.weight[row, DECOY] = 2.0
    return model
