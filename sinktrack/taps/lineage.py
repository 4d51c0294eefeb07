"""Follow the residual stream through a block's own arithmetic.

No list of model classes says what a block adds to its stream: we watch the additions. A tensor is
marked as the stream when a block receives it; when something is added to a marked tensor, the other
operand is a *write* and the sum is the stream from there on. Output norms, residual multipliers and
parallel sublayers need no special case, since a write is whatever arrives at the addition.

Marks are attributes of the intermediate tensors and vanish with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ADD = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_MULTIPLY = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}
_SAME = {
    "view", "reshape", "contiguous", "to", "float", "clone", "flatten", "unflatten",
    "squeeze", "unsqueeze", "dropout", "type", "bfloat16", "half", "view_as",
}  # fmt: skip
_MARK = "_sinktrack_mark"


@dataclass(frozen=True)
class Mark:
    """Where a tensor comes from."""

    origin: str
    """``stream``, ``mixed`` (attention before its output projection) or ``attention``."""
    heads: int = 0
    """Heads in the last dimension of a ``mixed`` tensor."""
    factor: float = 1.0
    """What the sublayer's output has been multiplied with since."""
    parts: tuple[tuple[str, Tensor], ...] = ()
    """The sublayers of a sum that is not yet in the stream (parallel attention and MLP)."""


def mark(tensor: Tensor, value: Mark) -> None:
    """Mark a tensor's origin."""
    setattr(tensor, _MARK, value)


def mark_of(tensor: Any) -> Mark | None:
    """The mark of a tensor, or None."""
    return getattr(tensor, _MARK, None) if isinstance(tensor, Tensor) else None


class Lineage(TorchFunctionMode):
    """While active, reports writes (``on_write``) and output projections (``on_projection``).

    ``on_write(sublayer, added)`` gets ``attention`` or ``mlp`` and the tensor about to be added;
    ``on_projection(mixed, heads, weight)`` the operands of an attention's output projection.
    """

    def __init__(
        self,
        on_write: Callable[[str, Tensor], None],
        on_projection: Callable[[Tensor, int, Tensor], None],
    ) -> None:
        super().__init__()
        self._on_write = on_write
        self._on_projection = on_projection
        self.following = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.following:
            return func(*args, **kwargs)
        marks = [found for value in _tensors(args, kwargs) if (found := mark_of(value))]
        if not marks:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _ADD and len(args) > 1 and isinstance(args[1], Tensor):
            after = self._added(args[0], args[1], kwargs)
        else:
            after = self._passed(name, args, kwargs, marks)
        result = func(*args, **kwargs)
        if after is not None:
            for value in _tensors((result,), {}):
                if value.is_floating_point():
                    mark(value, after)
        elif name.endswith("_") and isinstance(result, Tensor) and mark_of(result):
            delattr(result, _MARK)
        return result

    def _added(self, left: Any, right: Tensor, kwargs: Any) -> Mark | None:
        if not isinstance(left, Tensor):
            return mark_of(right)
        a, b = mark_of(left), mark_of(right)
        for stream, other, value in ((a, b, right), (b, a, left)):
            if stream and stream.origin == "stream":
                added = value * kwargs["alpha"] if "alpha" in kwargs else value
                for sublayer, part in _parts(other, added):
                    self._on_write(sublayer, part)
                return stream
        if left.shape != right.shape:
            return a or b
        if a and b and not (a.parts or b.parts):
            return a if a == b else replace(a, origin="attention", factor=1.0)
        # A sum of sublayers that is not the stream yet: keep the terms, which an addition in
        # place would overwrite.
        return Mark("attention", parts=(*_parts(a, left.clone()), *_parts(b, right.clone())))

    def _passed(
        self, name: str, args: tuple[Any, ...], kwargs: Any, marks: list[Mark]
    ) -> Mark | None:
        first = mark_of(args[0]) if args else None
        if any(found.origin == "stream" for found in marks):
            same = name in _SAME and first is not None and first.origin == "stream"
            return first if same else None
        if first and first.origin == "mixed":
            weight = None
            if name == "linear":
                weight = args[1] if len(args) > 1 else kwargs["weight"]
            if weight is not None:
                self._on_projection(args[0], first.heads, weight)
                return Mark("attention")
        elif name == "addmm" and (mixed := mark_of(args[1])) and mixed.origin == "mixed":
            self._on_projection(args[1], mixed.heads, args[2].T)
            return Mark("attention")
        found = first or marks[0]
        if name in _MULTIPLY and found.origin == "attention" and not found.parts:
            number = [value for value in args[:2] if isinstance(value, int | float)]
            if number:
                return replace(found, factor=found.factor * number[0])
        if found.parts and name not in _SAME:
            return Mark("attention")
        return found


def _parts(found: Mark | None, value: Tensor) -> list[tuple[str, Tensor]]:
    if found is None:
        return [("mlp", value)]
    return list(found.parts) or [("attention", value)]


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (item for item in value if isinstance(item, torch.Tensor))
