"""Sums, differences and factors: what a function makes of the stream's linear form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinktrack.models.any_decoder.by_value import close, distinct
from sinktrack.models.any_decoder.stream import Stream
from sinktrack.models.tracer import (
    _ADD,
    _MULTIPLY,
    _SAME,
    Mark,
    ResidualTracer,
    _tensors,
    mark_of,
)

if TYPE_CHECKING:
    from sinktrack.models.any_decoder.tap import Tap

_SUBTRACT = {"sub", "sub_", "__sub__", "__isub__", "subtract"}
DIVIDE = {"div", "div_", "__truediv__", "__itruediv__", "true_divide", "divide"}
_DERIVED = "_sinktrack_derived"


class LinearForm(ResidualTracer):
    """Knows the forms of results, and what is derived from a stream."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(tap)
        self.tap = tap
        self._pauses = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is computed inside is our own."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    @staticmethod
    def derived(value: Tensor) -> bool:
        """Does it depend on the stream?"""
        return bool(getattr(value, _DERIVED, False)) or mark_of(value) is not None

    @staticmethod
    def derive(result: Any) -> None:
        """It depends on the stream."""
        for value in _tensors((result,), {}):
            setattr(value, _DERIVED, True)

    def _combined(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mark | None:
        """The mark of sublayers' outputs side by side, added up with factors or multiplied.

        None where they are not, or are added up plainly.
        """
        left, right = (*args, None, None)[:2] if args else (None, None)
        a, b = mark_of(left), mark_of(right)
        marks = [known for known in (a, b) if known is not None]
        if not any(known.origin in ("sum", "attention", "experts") for known in marks):
            return None
        if name in _MULTIPLY or name in DIVIDE:
            value, factor = (left, right) if a is not None else (right, left)
            known = mark_of(value)
            fits = known is not None and known.origin == "sum" and isinstance(value, Tensor)
            if not fits or (name in DIVIDE and value is not left) or kwargs:
                return None
            if isinstance(factor, Tensor):
                if self.derived(factor) or torch.broadcast_shapes(
                    factor.shape, value.shape
                ) != tuple(value.shape):
                    return None
                factor = float(factor) if factor.numel() == 1 else factor
            elif not isinstance(factor, int | float):
                return None
            return self._scaled(known, value, 1 / factor if name in DIVIDE else factor)
        if name in ("neg", "__neg__") and a is not None and a.origin == "sum":
            return self._scaled(a, left, -1.0)
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return None
        if left.shape != right.shape or self.tap.rows(left) is None:
            return None
        alpha = kwargs.get("alpha", 1)
        if name in _SUBTRACT:
            one, two = 1.0, -float(alpha)
        elif name in _ADD and alpha != 1:
            one, two = 1.0, float(alpha)
        elif name in ("lerp", "lerp_"):
            weight = self._number(args[2] if len(args) > 2 else kwargs.get("weight"))
            if weight is None:
                return None
            one, two = 1 - weight, weight
        else:
            return None
        if not self.derived(left) or not self.derived(right):
            return None
        terms = [*self._scaled(a, left, one).parts, *self._scaled(b, right, two).parts]
        return Mark("sum", parts=tuple(terms))

    def _scaled(self, found: Mark | None, value: Tensor, factor: Any) -> Mark:
        """A sum's mark, each term of it multiplied with a number or a constant tensor."""
        terms: list[tuple[Mark | None, Tensor]] = []
        for known, part in found.parts if found and found.parts else ((found, value),):
            scaled = part.view(value.shape) * factor
            self.derive(scaled)
            if known is not None and known.raw is None:
                number = isinstance(factor, int | float)
                known = (
                    replace(known, factor=known.factor * factor)
                    if number
                    else replace(known, raw=part)
                )
            terms.append((known, scaled))
        return Mark("sum", parts=tuple(terms))

    def _sums(self, values: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """A stream, another value, and their sum ``[B, T, D]``."""
        like = [value for value in distinct(values) if self.tap.rows(value) is not None]
        streams = [value for value in like if isinstance(mark_of(value), Stream)]
        sums = []
        for stream in streams:
            for other in like:
                if other is not stream:
                    left, right = self.tap.rows(stream), self.tap.rows(other)
                    assert left is not None
                    assert right is not None
                    sums.append((stream, other, left + right))
        return sums

    def _by_value(self, value: Tensor, sums: list[tuple[Tensor, Tensor, Tensor]]) -> Stream | None:
        """The form of an operator's output that is a sum of what went in."""
        rows = self.tap.rows(value)
        if rows is None:
            return None
        for stream, other, total in sums:
            if close(rows.float(), total.float(), value.dtype):
                known, term = mark_of(stream), self._term(other)
                assert isinstance(known, Stream)
                return None if term is None else known.plus(term)
        return None

    def _form(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stream | None:
        """The linear form of a result; None where it is none."""
        left = args[0] if args else kwargs.get("input")
        right = args[1] if len(args) > 1 else kwargs.get("other")
        a, b = mark_of(left), mark_of(right)
        if name in _ADD or name in _SUBTRACT:
            sign = -1.0 if name in _SUBTRACT else 1.0
            return self._sum_of(left, right, sign * kwargs.get("alpha", 1))
        if name in _MULTIPLY:
            stream, other = (a, right) if isinstance(a, Stream) else (b, left)
            factor = self._number(other)
            return (
                stream.times(factor) if isinstance(stream, Stream) and factor is not None else None
            )
        if name in DIVIDE and isinstance(a, Stream) and not kwargs.get("rounding_mode"):
            factor = self._number(right)
            return a.times(1 / factor) if factor else None
        if name in ("neg", "__neg__") and isinstance(a, Stream):
            return a.times(-1.0)
        if name in ("lerp", "lerp_"):
            factor = self._number(args[2] if len(args) > 2 else kwargs.get("weight"))
            if factor is None or not isinstance(left, Tensor) or not isinstance(right, Tensor):
                return None
            one, two = self._term(left, 1 - factor), self._term(right, factor)
            return one.plus(two) if one and two else None
        if name in ("addcmul", "addcmul_") and isinstance(a, Stream) and len(args) > 2:
            scaled = args[1] * args[2] * kwargs.get("value", 1)
            marked = next((v for v in args[1:3] if mark_of(v)), None)
            known = None if marked is None else replace(_known(marked), raw=marked)
            if isinstance(known, Stream) or self.tap.rows(scaled) is None:
                return None
            self.derive(scaled)
            term = self.tap.write_of(known, scaled)
            if term is None:
                return None
            if term[1] is not None:
                assert isinstance(left, Tensor)
                self.tap.changes.append((left, term[1], 1.0))
            return a.plus(term[0])
        if name in _SAME and isinstance(a, Stream):
            return a
        return None

    def _sum_of(self, left: Any, right: Any, factor: float) -> Stream | None:
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            number = right if isinstance(left, Tensor) else left
            known = mark_of(left) or mark_of(right)
            return known if number == 0 and factor == 1 else None  # type: ignore[return-value]
        if self.tap.rows(left) is None or self.tap.rows(right) is None:
            return None
        one, two = self._term(left), self._term(right, factor)
        return one.plus(two) if one is not None and two is not None else None

    def _term(self, value: Tensor, factor: float = 1.0) -> Stream | None:
        """An operand of a sum: a stream, or a write."""
        found = mark_of(value)
        if isinstance(found, Stream):
            return found.times(factor)
        parts = found.parts if found and found.parts else ((found, value),)
        total = Stream("stream")
        whole, edited = [], False
        for known, part in parts:
            scaled = part if factor == 1 else part * factor
            if self.derived(value):
                self.derive(scaled)
            if known is not None and factor != 1:
                known = replace(known, factor=known.factor * factor)
            term = self.tap.write_of(known, scaled)
            if term is None:
                return None
            total = total.plus(term[0])
            whole.append(self.tap.rows(scaled) if term[1] is None else term[1])
            edited = edited or term[1] is not None
        if edited:
            self.tap.changes.append((value, sum(whole), factor))  # type: ignore[arg-type]
        return total

    def _number(self, value: Any) -> float | None:
        """A factor that does not depend on the tokens."""
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, Tensor) and value.numel() == 1 and not self.derived(value):
            return float(value)
        return None


def _known(value: Tensor) -> Mark:
    mark = mark_of(value)
    assert mark is not None
    return mark
