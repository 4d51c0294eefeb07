"""The passes of a probe through a model, whatever its framework, and the digest of its weights."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sinktrack.collect import Collector, Copies
from sinktrack.errors import SinktrackError
from sinktrack.measurement import Measurement, assemble
from sinktrack.metrics import ALONE, METRICS
from sinktrack.metrics.total_effect import Ablations, is_affordable
from sinktrack.models.parallel import computed_in
from sinktrack.probe import Probe

if TYPE_CHECKING:  # transformers is slow to import
    from sinktrack.models.blockwise import AblatedForward
    from sinktrack.models.editable import Editable
    from sinktrack.models.huggingface import Decoder


class Shown(Protocol):
    """What a measurement says of the model that it is of."""

    @property
    def model(self) -> nn.Module:
        """With all parameters."""

    @property
    def type(self) -> str:
        """What kind of model it is."""

    @property
    def blocks(self) -> Mapping[int, nn.Module]:
        """By number."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the blocks, see `Measurement.block_kinds`."""

    @property
    def most_heads(self) -> int | None:
        """Query heads per block; where blocks differ, the most."""

    @property
    def experts(self) -> int | None:
        """Routed experts per block, None for a dense model."""


class Passes:
    """A probe on its way through a model: its sequences, and its first tokens one by one."""

    def __init__(self, probe: Probe, batch_size: int | None) -> None:
        self._started = time.perf_counter()
        self._probe = probe
        self.size = batch_size or probe.sequences
        self.first = probe.first_tokens()
        self.collected, self._singles = Collector(METRICS), Collector(ALONE)
        self._batches = probe.batches(self.size)
        self._walk: AblatedForward | None = None
        self._ablated: Ablations | str = (
            "its blocks are not run one by one; only transformers' decoders are"
        )

    def ablate(self, found: Decoder, base: nn.Module, in_training: bool) -> None:
        """Begin the total effects, or note why they cannot be had."""
        from sinktrack.models.blockwise import AblatedForward

        tokens = self._probe.tokens.numel()
        if in_training and not is_affordable(len(found.blocks), tokens):
            self._ablated = dear(tokens)
        elif any(isinstance(value, DTensor) for value in found.model.parameters()):
            self._ablated = _SHARED
        else:
            ablations = Ablations(self.first)
            with self._told():
                self._walk = AblatedForward(found, base, ablations, self.size * self._probe.length)
                self._ablated = ablations

    def ablate_whole(self, model: Editable, in_training: bool) -> None:
        """Find the total effects by whole passes, or note why they cannot be had.

        Args:
            model: that is edited.
            in_training: leave them out where they would cost over a tenth of the rest.
        """
        from sinktrack.models.ablated import ablate

        tokens = self._probe.tokens.numel()
        if in_training and not is_affordable(model.blocks, tokens, whole=True):
            self._ablated = dear(tokens)
            return
        with self._told():
            ablations = Ablations(self.first)
            rows = max(self.size * self._probe.length // 2, 2 * len(ablations.tokens))
            ablate(model, ablations, self.collected, self._singles, rows)
            self._ablated = ablations

    def step_ablated(self, index: int) -> None:
        """Take the ablated copies through a block, after the others have been at its input."""
        if self._walk is not None:
            with self._told():
                self._walk.step(index, self.collected, self._singles)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Give up the total effects with the reason; the rest of the measurement stands."""
        try:
            yield
        except (MemoryError, RuntimeError, SinktrackError) as error:
            self._ablated, self._walk = str(error) or type(error).__name__, None

    @property
    def both(self) -> list[tuple[Collector, Sequence[Tensor]]]:
        """Who observes a pass, and its batches ``[b, T]``."""
        singles = self.first[:, None].split(max(self.size, 256))
        return [(self.collected, self._batches), (self._singles, singles)]

    def measurement(self, found: Shown, weights: str | None) -> Measurement:
        """What the passes showed; errors as of `assemble`."""
        measured = assemble(
            self.collected,
            self._singles,
            torch.cat([tokens[:, 0] for tokens in self._batches]),
            found.kinds,
            computed_in(found.model),
            self._ablated,
            model={
                "type": found.type,
                "blocks": len(found.blocks),
                "heads": found.most_heads,
                "experts": found.experts,
            },
            probe=self._probe.digest,
            weights=weights,
            seconds=time.perf_counter() - self._started,
        )
        if self._probe.repeats and self._probe.weakness is not None:
            measured.missing["probe"] = self._probe.weakness
        return measured


_SHARED = (
    "several processes share the blocks of this model, which do not run one by one; scan the "
    "checkpoints"
)


def dear(tokens: int) -> str:
    """Why total effects are left out in training."""
    return f"they would cost over a tenth of this probe of {tokens:,} tokens; scan the checkpoints"


class Digest:
    """Of the probe's embedding rows and the blocks' vectors (norms, biases): cheap to compare."""

    def __init__(self, weight: Tensor, tokens: Tensor) -> None:
        self._hasher, self._copies = hashlib.blake2b(digest_size=16), Copies()
        embedding = _whole(weight)
        self._keep(embedding[tokens.to(embedding.device)])

    def add(self, block: nn.Module) -> None:
        """The vectors of the next block."""
        for value in block.parameters():
            if value.ndim == 1:
                self._keep(_whole(value))

    def _keep(self, value: Tensor) -> None:
        self._copies.keep({"value": value}, lambda copies: self._update(copies["value"]))

    def _update(self, value: Tensor) -> None:
        data = value.contiguous()
        self._hasher.update(f"{data.dtype}{tuple(data.shape)}".encode())
        self._hasher.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())

    def hex(self) -> str:
        """The digest of what was added."""
        self._copies.settle()
        return self._hasher.hexdigest()


def _whole(value: Tensor) -> Tensor:
    """A parameter's values, gathered where FSDP shards it; then every process must be here."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
