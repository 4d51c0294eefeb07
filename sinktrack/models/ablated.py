"""Total effects by whole passes: for models whose blocks are not run one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from sinktrack.collect import Collector
from sinktrack.events import Editor, Observer, Write
from sinktrack.metrics.total_effect import Ablations, direction_at
from sinktrack.models.editable import Editable

_Component = tuple[str, int, int | None]
"""Kind, block and index."""


def ablate(
    model: Editable, ablations: Ablations, collected: Collector, alone: Collector, rows: int
) -> None:
    """Ablate each component's write at P0 in single-token sequences.

    Args:
        model: that is edited.
        ablations: what is filled.
        collected: of the probe's pass.
        alone: of the pass of single first tokens.
        rows: sequences that go through the model at once.

    Raises:
        MeasurementError: what a component writes cannot be told, or what else is in a batch makes a
            difference.
    """
    tokens, count = ablations.tokens[:, None], len(ablations.tokens)
    seen = _Seen(ablations, collected, alone)
    model.run(tokens, seen)
    components, each = seen.components, max(1, rows // count - 1)
    without: dict[int, list[Tensor]] = {block: [own] for block, own in seen.projected.items()}
    for first in range(0, len(components), each):
        some = components[first : first + each]
        seen = _Seen(ablations, collected, alone)
        model.run(tokens.repeat(1 + len(some), 1), seen, _Without(some, count))
        for block, own in seen.projected.items():
            reached = sum(of < block for _, of, _ in some)
            without[block].append(own[1 : 1 + reached])
    ablations.fill(components, {block: torch.cat(own) for block, own in without.items()})


class _Seen(Observer):
    """Where the states stand on the direction of P0, and what there is to ablate."""

    def __init__(self, ablations: Ablations, collected: Collector, alone: Collector) -> None:
        self._ablations, self._collected, self._alone = ablations, collected, alone
        self.components: list[_Component] = []
        self.projected: dict[int, Tensor] = {}
        """By block, ``[1 + copies]``."""

    def state(self, block: int, stream: Tensor) -> None:
        if block in self._collected.of("state", "row"):
            states = self._ablations.states(block, stream, self._alone)
            self.projected[block] = (states @ direction_at(self._collected, block)).mean(-1)

    def write(self, block: int, write: Write) -> None:
        for kind, index in self._ablations.components(write):
            if (kind, block, index) not in self.components:
                self.components.append((kind, block, index))


class _Without(Editor):
    """Each copy but the first lacks what one component writes."""

    def __init__(self, components: list[_Component], count: int) -> None:
        self._components, self._count = components, count

    def write(self, block: int, write: Write) -> Tensor | None:
        places = [
            (place, kind, index)
            for place, (kind, of, index) in enumerate(self._components)
            if of == block and (kind, index) in [(write.sublayer, None), *write.parts()]
        ]
        if not places:
            return None
        result = write.added.clone()
        for place, kind, index in places:
            part = write.part(kind, index)
            assert part is not None
            rows = slice(self._count * (1 + place), self._count * (2 + place))
            result[rows] = (write.added[rows].float() - part[rows].float()).to(result.dtype)
        return result
