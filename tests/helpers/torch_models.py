"""Decoders as people write them by hand, and the same by plain sums in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, KEY_HEADS, BLOCKS, EXPERTS, CHOSEN = 61, 32, 4, 2, 4, 5, 2


@dataclass(frozen=True)
class Kind:
    """What a model does; the defaults are nanoGPT's block with a Llama's norms."""

    parallel: bool = False
    squared_relu: bool = False
    qk_norm: bool = False
    residual: float = 1.0
    """What the writes are multiplied with."""
    lambdas: bool = False
    """Before a block the stream is a sum of itself and the first stream, with learned factors."""
    value_residual: bool = False
    skips: bool = False
    """The later half of the blocks gets the streams of the earlier half, times a half."""
    window: int | None = None
    attention: str = "sdpa"
    gated: bool = False
    output_norm: bool = False
    experts: str | None = None
    shared: bool = False
    time_first: bool = False
    flat: bool = False
    carried: bool = False
    """A block returns its last write beside the stream, and the next one adds it."""


def rotate(value: Tensor) -> Tensor:
    """Rotary positions of ``[B, H, T, d]``."""
    length, width = value.shape[-2:]
    speed = 100.0 ** (-torch.arange(0, width, 2, dtype=value.dtype) / width)
    angle = torch.arange(length, dtype=value.dtype)[:, None] * speed
    left, right = value.chunk(2, -1)
    return torch.cat(
        [left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()], -1
    )


def norm(value: Tensor) -> Tensor:
    return F.rms_norm(value, (value.shape[-1],), eps=1e-6)


class Attention(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        each = WIDTH // HEADS
        self.kind = kind
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, KEY_HEADS * each, bias=False)
        self.v = nn.Linear(WIDTH, KEY_HEADS * each, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, HEADS)

    def forward(self, x: Tensor, first_value: Tensor | None) -> tuple[Tensor, Tensor]:
        kind, (batch, length, _) = self.kind, x.shape
        q, k, v = (
            f(x).view(batch, length, -1, WIDTH // HEADS).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        if kind.value_residual and first_value is not None:
            v = 0.5 * v + 0.5 * first_value
        q, k = rotate(q), rotate(k)
        if kind.qk_norm:
            q, k = 3 * norm(q), norm(k)
        y = self.attend(q, k, v).transpose(1, 2)
        if kind.gated:
            y = y * torch.sigmoid(self.gate(x)).unsqueeze(-1)
        return self.o(y.reshape(batch, length, WIDTH)), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kind, length = self.kind, q.shape[2]
        at = torch.arange(length)
        seen = at[:, None] >= at
        if kind.window is not None:
            seen = seen & (at[:, None] - at < kind.window)
        group = HEADS // KEY_HEADS
        if kind.attention == "sdpa":
            mask = None if kind.window is None else seen
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if kind.attention == "flex":
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            window = length if kind.window is None else kind.window
            block = create_block_mask(
                lambda b, h, i, j: (i >= j) & (i - j < window), None, None, length, length, "cpu"
            )
            return flex_attention(q, k, v, block_mask=block)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if kind.attention == "einsum":
            weights = F.softmax(scores.masked_fill(~seen, float("-inf")), -1)
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        hidden = torch.where(seen, 0.0, -1e9)
        return torch.softmax(scores + hidden, -1) @ v


class Dense(nn.Module):
    def __init__(self, squared: bool, inner: int = 48) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH, bias=False)
        self.squared = squared

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        return self.down(F.relu(inner).square() if self.squared else F.gelu(inner))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Experts as a list of modules, or stacked matrices over rows sorted by expert."""

    def __init__(self, how: str, shared: bool) -> None:
        super().__init__()
        self.how, self.router = how, nn.Linear(WIDTH, EXPERTS, bias=False)
        self.shared = Dense(False) if shared else None
        if how == "list":
            self.experts = nn.ModuleList([Dense(True, 16) for _ in range(EXPERTS)])
        else:
            self.up = nn.Parameter(torch.empty(EXPERTS, WIDTH, 16))
            self.down = nn.Parameter(torch.empty(EXPERTS, 16, WIDTH))

    def one(self, expert: int, x: Tensor) -> Tensor:
        if self.how == "list":
            return self.experts[expert](x)  # type: ignore[no-any-return]
        return F.relu(x @ self.up[expert]).square() @ self.down[expert]

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, index = torch.softmax(self.router(x), -1).topk(CHOSEN, -1)
        return gate / gate.sum(-1, keepdim=True), index

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        gate, index = self.choose(flat)
        total = torch.zeros_like(flat)
        if self.how == "list":
            for expert in range(EXPERTS):
                row, slot = torch.where(index == expert)
                total.index_add_(0, row, self.one(expert, flat[row]) * gate[row, slot, None])
        else:
            order = index.flatten().argsort(stable=True)
            counts = torch.bincount(index.flatten(), minlength=EXPERTS).tolist()
            rows = flat[order // CHOSEN].split(counts)
            made = torch.cat([self.one(expert, part) for expert, part in enumerate(rows)])
            made = made * gate.flatten()[order, None]
            total = total.scatter_add(0, (order // CHOSEN)[:, None].expand(-1, WIDTH), made)
        if self.shared is not None:
            total = total + self.shared(flat)
        return total.view(x.shape)


class Block(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind, self.attention = kind, Attention(kind)
        self.mlp = Experts(kind.experts, kind.shared) if kind.experts else Dense(kind.squared_relu)
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, value: Any = None, late: Any = None) -> Any:
        kind = self.kind
        if kind.carried and late is not None:
            x = x + late
        rows = x.transpose(0, 1) if kind.time_first else x
        rows = rows.view(-1, Net.length, WIDTH) if kind.flat else rows
        wrote, value = self.attention(norm(rows), value)
        wrote = norm(wrote) * self.weight if kind.output_norm else wrote
        wrote = wrote.transpose(0, 1) if kind.time_first else wrote
        wrote = wrote.view(-1, WIDTH) if kind.flat else wrote
        if kind.parallel:
            return x + wrote + self.mlp(norm(x)), value
        x = torch.add(x, wrote, alpha=kind.residual) if kind.residual != 1 else x + wrote
        if kind.carried:
            return self.mlp(norm(x)), x
        x = x + kind.residual * self.mlp(norm(x))
        return x, value


class Net(nn.Module):
    length = 0

    def __init__(self, kind: Kind, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind = kind
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.start = nn.Parameter(torch.randn(WIDTH))
        self.layers = nn.ModuleList([Block(kind) for _ in range(BLOCKS)])
        self.lambdas = nn.Parameter(torch.tensor([[1.1, 0.2], [0.9, 0.3], [1.2, -0.1], [0.8, 0.4]]))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        with torch.no_grad():
            for value in self.parameters():
                if value.ndim > 1 and value is not self.lambdas:
                    value.normal_(0, 0.3)
            self.start.normal_(0, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        kind = self.kind
        x = self.embed(tokens)
        x = torch.cat([x[:, :1] + self.start, x[:, 1:]], 1)
        Net.length = tokens.shape[1]
        x = x.transpose(0, 1) if kind.time_first else x
        x = x.reshape(-1, WIDTH) if kind.flat else x
        kept: list[Any] = []
        x0, value, late = x, None, None
        for index, block in enumerate(self.layers):
            if kind.lambdas:
                x = self.lambdas[index, 0] * x + self.lambdas[index, 1] * x0
            if kind.skips and index >= BLOCKS // 2:
                x = x + 0.5 * kept.pop()
            if kind.carried:
                late, x = block(x, None, late)
            else:
                x, own = block(x, value)
                value = own if value is None else value
            if kind.skips and index < BLOCKS // 2:
                kept.append(x)
        x = x + late if kind.carried else x
        x = x.view(-1, Net.length, WIDTH) if kind.flat else x
        return self.head(norm(x.transpose(0, 1) if kind.time_first else x))  # type: ignore[no-any-return]


@dataclass
class ByHand:
    """Float64."""

    attention: list[Tensor] = field(default_factory=list)
    """``[B, H, T, T]`` of each block."""
    states: list[Tensor] = field(default_factory=list)
    """``[B, T, D]`` at each block's input, and the last one's output."""
    terms: list[dict[Any, Tensor]] = field(default_factory=list)
    """At each of these P0's rows ``[B, D]`` of what the state is a sum of."""
    parts: dict[Any, Tensor] = field(default_factory=dict)
    """P0's rows of heads and experts."""
    logits: Tensor | None = None
    """``[B, T, V]``."""
    written: dict[Any, Tensor] = field(default_factory=dict)
    """P0's rows of the writes as they enter the stream."""


class Unedited:
    """What a pass by hand is changed by: nothing."""

    def state(self, block: int, x: Tensor) -> Tensor:
        return x

    def write(self, sublayer: str, block: int, wrote: Tensor) -> Tensor:
        return wrote

    def seen(self, block: int, seen: Tensor) -> Tensor:
        """``[B, T, T]``."""
        return seen


def by_hand(model: Net, tokens: Tensor, edit: Unedited | None = None) -> ByHand:
    """The model's arithmetic once more, with none of torch's attention or experts' code."""
    edit = edit or Unedited()
    kind = model.kind
    weights = {name: value.detach().double() for name, value in model.named_parameters()}
    found, length = ByHand(), tokens.shape[1]
    at = torch.arange(length)
    seen = at[:, None] >= at
    if kind.window is not None:
        seen = seen & (at[:, None] - at < kind.window)
    x = weights["embed.weight"][tokens]
    x[:, 0] += weights["start"]
    x0 = x
    terms: dict[Any, Tensor] = {"embedding": x[:, 0]}
    kept: list[Any] = []
    first = None
    for index in range(BLOCKS):
        w = {
            name.removeprefix(f"layers.{index}."): value
            for name, value in weights.items() if name.startswith(f"layers.{index}.")
        }  # fmt: skip
        if kind.lambdas:
            one, two = weights["lambdas"][index]
            x = one * x + two * x0
            terms = {key: one * term for key, term in terms.items()}
            terms["embedding"] = terms["embedding"] + two * x0[:, 0]
        if kind.skips and index >= BLOCKS // 2:
            skip, skipped = kept.pop()
            x = x + skip / 2
            terms = {key: terms.get(key, 0) + skipped.get(key, 0) / 2 for key in terms | skipped}
        x = edit.state(index, x)
        found.states.append(x)
        found.terms.append(terms)
        y = _norm(x)
        q, k, v = (
            (y @ w[f"attention.{name}.weight"].T)
            .unflatten(-1, (-1, WIDTH // HEADS))
            .transpose(1, 2)
            for name in "qkv"
        )
        if kind.value_residual and first is not None:
            v = (v + first) / 2
        first = v if first is None else first
        q, k = rotate(q), rotate(k)
        if kind.qk_norm:
            q, k = 3 * _norm(q), _norm(k)
        k, v = (value.repeat_interleave(HEADS // KEY_HEADS, 1) for value in (k, v))
        scores = (q @ k.mT) / (WIDTH // HEADS) ** 0.5
        shown = edit.seen(index, seen.expand(len(tokens), -1, -1))
        a = scores.masked_fill(~shown[:, None], -torch.inf).exp()
        a = a / a.sum(-1, keepdim=True)
        found.attention.append(a)
        z = a @ v
        if kind.gated:
            gate = torch.sigmoid(y @ w["attention.gate.weight"].T + w["attention.gate.bias"])
            z = z * gate.transpose(1, 2)[..., None]
        out = w["attention.o.weight"].unflatten(1, (HEADS, -1))
        by_head = torch.einsum("bhtv,dhv->bhtd", z, out)
        wrote = by_head.sum(1) + w["attention.o.bias"]
        scale = kind.residual
        if not kind.output_norm:
            for head in range(HEADS):
                found.parts["head", index, head] = by_head[:, head, 0] * scale
        if kind.output_norm:
            wrote = _norm(wrote) * w["weight"]
        wrote = edit.write("attention", index, wrote * scale)
        middle = x if kind.parallel else x + wrote
        made = edit.write("mlp", index, _mlp(kind, w, _norm(middle), found, index) * scale)
        x = x + wrote + made
        written = {("attention", index): wrote[:, 0], ("mlp", index): made[:, 0]}
        terms = {**terms, **written}
        found.written |= written
        if kind.skips and index < BLOCKS // 2:
            kept.append((x, terms))
    found.states.append(x)
    found.terms.append(terms)
    found.logits = _norm(x) @ weights["head.weight"].T
    return found


def _norm(value: Tensor) -> Tensor:
    return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _mlp(kind: Kind, w: Mapping[str, Tensor], x: Tensor, found: ByHand, index: int) -> Tensor:
    def dense(prefix: str, squared: bool, y: Tensor) -> Tensor:
        inner = y @ w[f"{prefix}.up.weight"].T + w[f"{prefix}.up.bias"]
        inner = inner.clamp(min=0).square() if squared else F.gelu(inner)
        return inner @ w[f"{prefix}.down.weight"].T

    if kind.experts is None:
        return dense("mlp", kind.squared_relu, x)
    share = torch.softmax(x @ w["mlp.router.weight"].T, -1)
    best = share.sort(-1, descending=True).indices[..., :CHOSEN]
    gate = torch.zeros_like(share).scatter(-1, best, 1.0) * share
    gate = gate / gate.sum(-1, keepdim=True)
    total = torch.zeros_like(x)
    for expert in range(EXPERTS):
        if kind.experts == "list":
            own = dense(f"mlp.experts.{expert}", True, x)
        else:
            own = (x @ w["mlp.up"][expert]).clamp(min=0).square() @ w["mlp.down"][expert]
        own = own * gate[..., expert : expert + 1]
        found.parts["expert", index, expert] = own[:, 0] * kind.residual
        total = total + own
    return total + dense("mlp.shared", False, x) if kind.shared else total


def read(found: ByHand) -> list[float]:
    """How much each block reads P0 beyond even attention."""
    readers = []
    for a in found.attention:
        column = a[:, :, 1:, 0]
        visible = (a[0, 0, 1:, 0] > 0).sum()
        even = 1 / (a[0, 0, 1:] > 0).sum(-1)[a[0, 0, 1:, 0] > 0]
        readers.append(max(0.0, float(column.sum(-1).mean() / visible - even.mean())))
    return readers


def reading(kind: Kind, tokens: Tensor) -> Net:
    """A model whose last block reads P0, so that all blocks have shares."""
    for seed in range(40):
        model = Net(kind, seed)
        if min(read(by_hand(model, tokens))[-1:]) > 0.05:
            return model
    raise AssertionError


def shares(found: ByHand) -> tuple[dict[Any, float], dict[Any, float]]:
    """Shares of all terms and parts, by the definition."""
    readers = read(found)
    total: dict[Any, float] = {}
    parts: dict[Any, float] = {}
    for block in range(BLOCKS):
        state = found.states[block]
        mean, others = state[:, 0].mean(0), state[:, 1:].mean((0, 1))
        direction = (mean - others) / (mean - others).norm()
        weight = readers[block] / sum(readers) / float(mean @ direction)
        for key, term in found.terms[block].items():
            total[key] = total.get(key, 0) + weight * float(term.mean(0) @ direction)
        for key, part in found.parts.items():
            of = ("attention" if key[0] == "head" else "mlp", key[1])
            if key[1] < block:  # a part is scaled on its way as the whole write is
                whole = found.written[of]
                factor = float((found.terms[block][of] * whole).sum() / (whole * whole).sum())
                parts[key] = parts.get(key, 0) + weight * factor * float(part.mean(0) @ direction)
    return total, parts


KINDS = {
    "plain": Kind(),
    "parallel": Kind(parallel=True),
    "nanochat": Kind(squared_relu=True, qk_norm=True, lambdas=True),
    "modded": Kind(squared_relu=True, qk_norm=True, lambdas=True, value_residual=True, skips=True),
    "residual scale": Kind(residual=0.4),
    "residual scale and experts": Kind(residual=0.4, experts="list", shared=True),
    "gated": Kind(gated=True),
    "output norm": Kind(output_norm=True),
    "window": Kind(window=6),
    "softmax": Kind(attention="softmax", window=6),
    "einsum": Kind(attention="einsum"),
    "flex": Kind(attention="flex"),
    "flex window": Kind(attention="flex", window=6),
    "experts": Kind(experts="list"),
    "stacked experts": Kind(experts="stacked", shared=True, lambdas=True),
    "time first": Kind(time_first=True),
    "flat": Kind(flat=True),
    "carried": Kind(carried=True),
}
