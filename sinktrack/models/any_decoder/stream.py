"""The residual stream as a linear form: the factor of each of its terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sinktrack.models.tracer import Mark

Term = tuple[int, int]
"""Of the stream: the n-th write of block k is ``(k, n)``, the input of block 0 ``(-1, 0)``."""
EMBEDDING: Term = (-1, 0)


@dataclass(frozen=True)
class Stream(Mark):
    """A tensor that is the residual stream."""

    form: Mapping[Term, float] = field(default_factory=dict)
    """The factor of each of its terms."""

    def plus(self, other: Stream, factor: float = 1.0) -> Stream:
        """A sum of two, the other one multiplied with a number."""
        form = dict(self.form)
        for term, value in other.form.items():
            form[term] = form.get(term, 0.0) + value * factor
        return Stream("stream", form={term: value for term, value in form.items() if value})

    def times(self, factor: float) -> Stream:
        """Multiplied with a number."""
        return Stream("stream", form={term: value * factor for term, value in self.form.items()})


@dataclass(frozen=True)
class Restart:
    """A pass begins with a later block than the first."""

    block: int
    stream: Tensor
    """``[B, T, D]`` at its input."""
    dims: int
    """Of the model's own tensor of it: 3, or 2 where positions and sequences are one."""
    time_first: bool


class Reached(Exception):
    """The input of block 0, where no more is wanted of a pass."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__("block 0")
        self.stream = stream


class Undecided(Exception):
    """Several tensors at the input of block 0 may be the stream."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} tensors")
        self.count = count


class Decided(Exception):
    """Block 0 is over, and by now it is known which of its outputs is the stream.

    Args:
        places: of those among its outputs in which a write of the block is.
    """

    def __init__(self, places: tuple[int, ...]) -> None:
        super().__init__("block 0 is over")
        self.places = places
