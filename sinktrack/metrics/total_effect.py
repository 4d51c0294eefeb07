"""Total effects: what becomes of the P0 state when one component writes nothing there.

A share is a term of a sum; what a component makes others write is not in it. Under a causal mask
the P0 state depends on token 0 alone, so ablation by zero runs in sequences of one token. Copies of
these go through the blocks side by side, each without one component's write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sinktrack.errors import MeasurementError
from sinktrack.lazy import torch
from sinktrack.metrics.base import Metric, Seen, Unmeasured
from sinktrack.metrics.localization import Sink

if TYPE_CHECKING:
    from torch import Tensor

    from sinktrack.collect import Collector
    from sinktrack.events import Write

TOKENS = 16
"""Distinct first tokens, at most."""
PARTS = 2
"""Heads or experts of a sublayer that are ablated one by one, at most."""
SLOTS = 2 * (1 + PARTS)
"""Copies that a block adds, at most."""
CARRIES = 0.5
"""Of the norm of the sublayer's write, from which a head's or expert's is ablated by itself."""
AFFORDABLE = 0.1
"""Of a probe's cost, what total effects may add in training."""
_SAME = {"torch.float64": 2**-10, "torch.float32": 2**-10}
"""How far rounding may move a state where other copies share its batch, in parts of its norm; of
narrower dtypes an eighth."""


@dataclass(frozen=True)
class TotalEffect:
    """What ablation of one component's write at P0 takes from the P0 state."""

    kind: str
    """``attention``, ``mixer``, ``mlp``, ``head``, ``expert`` or ``shared_expert``."""
    block: int
    index: int | None
    effect: float
    """1 minus the projection of the P0 state without the write, over that with it. 1: the state is
    gone; below 0: it grows."""

    def to_record(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {name: getattr(self, name) for name in ("kind", "block", "index", "effect")}


def thinned(tokens: Tensor) -> Tensor:
    """At most `TOKENS` of distinct tokens ``[n]``, evenly taken."""
    if len(tokens) <= TOKENS:
        return tokens
    return tokens[torch.arange(TOKENS) * (len(tokens) - 1) // (TOKENS - 1)]


def is_affordable(blocks: int, tokens: int, whole: bool = False) -> bool:
    """Would total effects cost at most `AFFORDABLE` of a probe of so many tokens?

    Counted are tokens times blocks, where every block adds `SLOTS` copies; in ``whole`` passes each
    copy goes through all blocks, as two tokens.
    """
    copies = sum(1 + SLOTS * (block + 1) for block in range(blocks))
    if whole:
        copies = 2 * blocks * (1 + SLOTS * blocks)
    return TOKENS * copies <= AFFORDABLE * tokens * blocks


def direction_at(collected: Collector, block: int) -> Tensor:
    """``[D]`` float64: unit vector from the others' mean state to P0's, at a block's input.

    Args:
        collected: of the probe's pass, which has been there.
        block: whose input.
    """
    rows = torch.cat(collected.of("state", "row")[block]).double()
    batches = zip(
        collected.of("state", "sum")[block], collected.of("state", "norms")[block], strict=True
    )
    others = torch.cat([total.double() / norms.shape[1] for total, norms in batches])
    return torch.nn.functional.normalize(rows.mean(0) - others.mean(0), dim=-1)


class Ablations:
    """Single-token sequences in copies, each of which lacks one component's write at P0.

    The copies of a block begin as the unedited states at its input, which come first.

    Args:
        first: int64 ``[N]``, distinct first tokens, in the order in which ``alone`` saw them.
    """

    def __init__(self, first: Tensor) -> None:
        self.tokens = thinned(first)
        """``[n]``."""
        self._places = torch.isin(first, self.tokens).nonzero()[:, 0]
        self._ablated: list[tuple[str, int, int | None]] = []
        self._projected: dict[int, Tensor] = {}
        self._block = -1
        self._fresh: list[tuple[str, int, int | None]] = []
        self.open = False
        """Does the block that runs hold fresh copies?"""

    def enter(self, block: int, stream: Tensor, collected: Collector, alone: Collector) -> None:
        """Note where all copies stand on the direction of P0 at the input of a block.

        Args:
            block: that runs next.
            stream: ``[(1 + copies) * n, 1, D]``.
            collected: of the probe's pass.
            alone: of the pass of single first tokens.

        Raises:
            MeasurementError: unedited sequences are not what they are in a batch of their own.
        """
        states = self.states(block, stream, alone)
        self._projected[block] = (states @ direction_at(collected, block)).mean(-1)
        self._block, self._fresh = block, []

    def states(self, block: int, stream: Tensor, alone: Collector) -> Tensor:
        """float64 ``[1 + copies, n, D]``: P0's states at a block's input, the unedited ones first.

        Raises:
            MeasurementError: as of `enter`.
        """
        states: Tensor = stream[:, 0].detach().cpu().double().unflatten(0, (-1, len(self.tokens)))
        own = torch.cat(alone.of("state", "row")[block])[self._places].double()
        apart = (states[0] - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-30)
        if not bool((apart <= _SAME.get(str(stream.dtype), 2**-3)).all()):
            raise MeasurementError(
                f"the P0 state of single tokens at the input of block {block} depends on what else "
                "is in the batch, as where routing does"
            )
        return states

    def fill(
        self, ablated: list[tuple[str, int, int | None]], projected: Mapping[int, Tensor]
    ) -> None:
        """Take what whole passes showed.

        Args:
            ablated: kind, block and index of components, in the order of blocks.
            projected: by block, where the unedited states and those without each component before
                it stand on the direction of P0, ``[1 + components]``.
        """
        self._ablated, self._projected = ablated, dict(projected)

    def write(self, block: int, write: Write) -> Tensor | None:
        """Take a component's write from its own copy."""
        if not self.open:
            return None
        count = len(self.tokens)
        result = write.added.clone()
        parts = _Parts(write)
        for name, index in parts.largest(count):
            component = (name, self._block, index)
            if component not in self._fresh:
                self._fresh.append(component)
            start = count * (1 + self._fresh.index(component))
            rows = slice(start, start + count)
            left = write.added[rows, 0].float() - parts.of(name, index, rows)
            result[rows, 0] = left.to(result.dtype)
        return result

    def components(self, write: Write) -> list[tuple[str, int | None]]:
        """The sublayer, and the largest of the parts that carry its write at P0."""
        return _Parts(write).largest(len(self.tokens))

    def leave(self) -> int:
        """The fresh copies that the block used; the rest are of no use."""
        self._ablated += self._fresh
        return len(self._fresh)

    def effects(self, peak: int) -> list[TotalEffect]:
        """On the state at the input of a block, of all components before it, largest first."""
        projected = self._projected[peak]
        if not abs(float(projected[0])) > 0:
            return []
        left = (projected[1:] / projected[0]).tolist()
        effects = [
            TotalEffect(*component, 1 - value)
            for component, value in zip(self._ablated, left, strict=False)
        ]
        return sorted(effects, key=lambda effect: -abs(effect.effect))


class _Parts:
    """What a write at P0 is made of: of many parts few tensors, as a GPU waits for each."""

    def __init__(self, write: Write) -> None:
        self._write, self._routed, self._projection = write, write.routed, write.projection
        if write.raw is not None and write.raw is not write.added:  # a norm stands between
            self._routed = self._projection = None
        if self._routed is not None:
            self._chosen = self._routed.index[:, 0]
            self._outputs = self._routed.outputs(0).float() * self._routed.factor
            total = self._routed.total()[:, 0].float() * self._routed.factor
            self._shared = write.added[:, 0].float() - total

    def of(self, kind: str, index: int | None, rows: slice) -> Tensor:
        """float32 ``[n, D]``: what a part writes in some sequences."""
        if kind == "head" and self._projection is not None and index is not None:
            of = self._projection
            mixed = of.mixed[rows, 0].unflatten(-1, (of.heads, -1))[:, index]
            weight = of.weight.unflatten(1, (of.heads, -1))[:, index]
            written: Tensor = mixed.to(weight.dtype) @ weight.T * of.factor
            return written.float()
        if kind == "expert" and index is not None:
            chosen = self._chosen[rows].eq(index)[..., None]
            return torch.where(chosen, self._outputs[rows], 0.0).sum(1)
        if kind == "shared_expert":
            return self._shared[rows]
        return self._write.added[rows, 0].float()

    def largest(self, count: int) -> list[tuple[str, int | None]]:
        """The sublayer, and the largest of the parts that carry its write in ``count`` sequences.

        Args:
            count: sequences, the first.
        """
        whole = self._write.added[:count, 0].float().norm(dim=-1).mean()
        sizes: dict[tuple[str, int | None], float] = {}
        if self._projection is not None:
            of = self._projection
            mixed = of.mixed[:count, 0].unflatten(-1, (of.heads, -1))
            weight = of.weight.unflatten(1, (of.heads, -1))
            written = torch.einsum("nhv,dhv->hnd", mixed.to(weight.dtype), weight) * of.factor
            own = written.float().norm(dim=-1).mean(1)
            size, *found = torch.cat([whole[None], own]).tolist()
            sizes = {("head", head): norm for head, norm in enumerate(found)}
        elif self._routed is not None:
            own = self._outputs[:count].norm(dim=-1)
            shared = self._shared[:count].norm(dim=-1).mean()
            size, sizes["shared_expert", None], *found = torch.cat(
                [whole[None], shared[None], own.flatten() / count]
            ).tolist()
            for expert, norm in zip(self._chosen[:count].flatten().tolist(), found, strict=True):
                sizes["expert", expert] = sizes.get(("expert", expert), 0.0) + norm
        components: list[tuple[str, int | None]] = [(self._write.sublayer, None)]
        if len(sizes) > 1 and size > 0:
            large = [key for key in sizes if sizes[key] >= CARRIES * size]
            components += sorted(large, key=lambda key: -sizes[key])[:PARTS]
        return components


class TotalEffects(Metric):
    """Total effects on each sink phase's state at its peak; ``total_effects`` of ``sinks``."""

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """``sinks`` anew, and why they have none in ``missing``."""
        sinks = found["sinks"]
        if not sinks or not all(isinstance(sink, Sink) for sink in sinks):
            return {}
        if not isinstance(seen.ablated, Ablations):
            raise Unmeasured(str(seen.ablated))
        told = [
            replace(sink, total_effects=tuple(seen.ablated.effects(sink.peak_block)))
            for sink in sinks
        ]
        main = max(told, key=lambda sink: sink.mass)
        return {"sinks": tuple(told), "main": main}
