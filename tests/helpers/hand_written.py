"""A Llama and a Mixtral as people write them by hand, with the weights of transformers' models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.library.custom_op("sinktrack_tests::attend_causally", mutates_args=())
def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of ``[B, T, H, D]``, as a kernel of somebody's own."""
    q, k, v = (value.transpose(1, 2) for value in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


class Attention(nn.Module):
    """Rotary attention by torch's own function, an operator, or scores that are masked by hand."""

    def __init__(self, of: Any, config: Any, how: str) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = of.q_proj, of.k_proj, of.v_proj, of.o_proj
        self.each, self.how = of.head_dim, how
        self.base = config.rope_parameters["rope_theta"]

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            f(x).view(batch, length, -1, self.each).transpose(1, 2)
            for f in (self.wq, self.wk, self.wv)
        )
        q, k = self.rotated(q), self.rotated(k)
        k, v = (value.repeat_interleave(q.shape[1] // k.shape[1], 1) for value in (k, v))
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.how == "operator":
            y = causal(*(value.transpose(1, 2) for value in (q, k, v))).transpose(1, 2)
        else:
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = q @ k.mT / self.each**0.5
            if self.how == "assigned":
                scores[..., hidden] = float("-inf")
            else:
                scores = scores.masked_fill(hidden, float("-inf"))
            y = scores.softmax(-1) @ v
        return self.wo(y.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]

    def rotated(self, value: Tensor) -> Tensor:
        even = torch.arange(0, self.each, 2, dtype=torch.float32)
        angle = torch.arange(value.shape[2])[:, None] * self.base ** (-even / self.each)
        angle = torch.cat([angle, angle], -1)
        half = self.each // 2
        turned = torch.cat([-value[..., half:], value[..., :half]], -1)
        return (value * angle.cos() + turned * angle.sin()).to(value.dtype)


class Dense(nn.Module):
    def __init__(self, of: Any) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = of.gate_proj, of.up_proj, of.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class Expert(nn.Module):
    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down)


class Mixture(nn.Module):
    """Experts in a list, those of the router's two largest scores."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        own = of.experts
        self.gate = nn.Parameter(of.gate.weight.detach().clone())
        self.experts = nn.ModuleList(
            Expert(up, down)
            for up, down in zip(own.gate_up_proj.data, own.down_proj.data, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        weight, index = F.linear(rows, self.gate).softmax(-1).topk(2, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            at, place = torch.where(index == number)
            if len(at):
                out.index_add_(0, at, expert(rows[at]) * weight[at, place, None])
        return out.view(x.shape)


class Block(nn.Module):
    def __init__(self, of: Any, config: Any, how: str) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = (
            of.input_layernorm.weight,
            of.post_attention_layernorm.weight,
        )
        self.attention = Attention(of.self_attn, config, how)
        self.feed_forward = Mixture(of.mlp) if hasattr(of.mlp, "experts") else Dense(of.mlp)
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(F.rms_norm(x, x.shape[-1:], self.attention_norm, self.eps))
        x = x + self.feed_forward(F.rms_norm(x, x.shape[-1:], self.ffn_norm, self.eps))
        return x


class Transformer(nn.Module):
    """The same function as a ``LlamaForCausalLM`` or ``MixtralForCausalLM``."""

    def __init__(self, of: Any, how: str = "sdpa") -> None:
        super().__init__()
        self.tok_embeddings, self.output = of.model.embed_tokens, of.lm_head
        self.layers = nn.ModuleList(Block(block, of.config, how) for block in of.model.layers)
        self.norm, self.eps = of.model.norm.weight, of.config.rms_norm_eps

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            x = block(x)
        return self.output(F.rms_norm(x, x.shape[-1:], self.norm, self.eps))  # type: ignore[no-any-return]
