"""Follow the residual stream through a block's own arithmetic.

No list of model classes says what a block adds to its stream: we watch the additions. A tensor is
marked as the stream when a block receives it; when something is added to a marked tensor, the other
operand is a *write* and the sum is the stream from there on. Output norms, residual multipliers and
parallel sublayers need no special case, since a write is whatever arrives at the addition.

Marks are attributes of the intermediate tensors and vanish with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sinktrack.models.fp8 import plain

_ADD = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_JOIN = {
    "sub",
    "sub_",
    "__sub__",
    "__rsub__",
    "__isub__",
    "rsub",
    "subtract",
    "lerp",
    "lerp_",
    "where",
}
_MULTIPLY = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}
_SAME = {
    "view", "reshape", "contiguous", "to", "float", "clone", "flatten", "unflatten",
    "squeeze", "unsqueeze", "dropout", "type", "bfloat16", "half", "view_as", "reshape_as",
}  # fmt: skip
_PRODUCT = {"matmul", "__matmul__", "__rmatmul__", "bmm", "einsum"}
_MARK = "_sinktrack_mark"


@dataclass(frozen=True)
class Mark:
    """Where a tensor comes from."""

    origin: str
    """``stream``, ``weights`` (attention probabilities), ``mixed`` (heads before the output
    projection), ``attention`` or ``experts``."""
    heads: int = 0
    """How many a ``weights`` or ``mixed`` tensor holds."""
    operands: tuple[Tensor, int, Tensor, Tensor | None] | None = None
    """Of an attention's output projection: mixed, heads, weight, bias."""
    factor: float = 1.0
    """What the sublayer's output has been multiplied with since."""
    raw: Tensor | None = None
    """The value before anything but additions and factors was done to it."""
    parts: tuple[tuple[Mark | None, Tensor], ...] = ()
    """The terms of a sum that is not yet in the stream (parallel attention and MLP)."""


def mark(tensor: Tensor, value: Mark) -> None:
    """Mark a tensor's origin."""
    setattr(tensor, _MARK, value)


def mark_of(tensor: Any) -> Mark | None:
    """The mark of a tensor, or None."""
    return getattr(tensor, _MARK, None) if isinstance(tensor, Tensor) else None


class Watcher(Protocol):
    """Who is told what the arithmetic of a block shows."""

    def write(self, found: Mark | None, added: Tensor) -> Tensor | None:
        """Before ``added`` enters the stream; what is returned enters in its stead.

        Its mark tells an attention's output and one that routed experts are part of; it is None for
        anything else.
        """

    def gate(self, mixed: Tensor, gate: Tensor, heads: int) -> None:
        """Before the heads' outputs are multiplied with ``gate``, which does not stem from them."""

    def reweighted(self) -> None:
        """The probabilities that meet the values are not those of the softmax."""

    def joined(self) -> None:
        """Something is added to the heads' outputs."""

    def softmax(self, scores: Tensor) -> tuple[Tensor, Mark] | None:
        """Before a softmax over the last dimension; what enters it, and the mark of its result."""

    def scaled_dot_product_attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """In place of torch's function of that name."""


class ResidualTracer(TorchFunctionMode):
    """While active and `following`, tells a `Watcher` what it sees."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self._watcher = watcher
        self.following = False
        self.copying = False
        """Are weights gone before their block is over, as those of FSDP's units in it?"""
        self._softmax: tuple[Tensor, int] | None = None
        """The last one's result, and how often that had been changed in place; under inference
        mode, which does not count that, a copy. Not in its mark, which would keep it alive."""

    def forget(self) -> None:
        """Let go of what was kept of a block."""
        self._softmax = None

    def _kept(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Of an output projection, as numbers that last until its block is over."""
        weight = plain(weight)
        if self.copying:
            return weight.clone(), None if bias is None else bias.clone()
        return weight, bias

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.following:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._watcher.scaled_dot_product_attention(*args, **kwargs)
        marks = [carried for value in _tensors(args, kwargs) if (carried := mark_of(value))]
        if not marks and name != "softmax":
            return func(*args, **kwargs)
        if name in _ADD and len(args) > 1 and isinstance(args[1], Tensor):
            after, args, kwargs = self._added(args, kwargs)
        elif name == "softmax":
            entered = self._watcher.softmax(args[0]) if _last(args, kwargs) else None
            after = None if entered is None else entered[1]
            args = args if entered is None else (entered[0], *args[1:])
        else:
            after = self._passed(name, args, kwargs, marks)
        result = func(*args, **kwargs)
        if after is not None:
            for value in _tensors((result,), {}):
                if value.is_floating_point():
                    mark(value, after)
            if name == "softmax" and after.origin == "weights":
                counts = not result.is_inference()
                self._softmax = (result, result._version) if counts else (result.clone(), 0)
        elif name.endswith("_") and mark_of(result):
            delattr(result, _MARK)
        return result

    def _added(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Mark | None, tuple[Any, ...], dict[str, Any]]:
        """The mark of a sum, and what to add up: the operands, or a write in place of one."""
        left, right = args[:2]
        a, b = mark_of(left), mark_of(right)
        if not isinstance(left, Tensor):
            return b, args, kwargs
        for stream, other, place in ((a, b, 1), (b, a, 0)):
            if stream and stream.origin == "stream":
                if other and other.origin == "stream":
                    return None, args, kwargs
                value = args[place] * kwargs["alpha"] if "alpha" in kwargs else args[place]
                written = self._written(other, value)
                if written is None:
                    return stream, args, kwargs
                rest = {key: value for key, value in kwargs.items() if key != "alpha"}
                return stream, (left, written) if place else (written, right), rest
        return self._sum(left, right, a, b), args, kwargs

    def _written(self, found: Mark | None, added: Tensor) -> Tensor | None:
        """What to add in place of a write; None where nobody changes it."""
        terms = (found.parts if found else ()) or ((found, added),)
        changed = [(self._watcher.write(part, tensor), tensor) for part, tensor in terms]
        if all(new is None for new, _ in changed):
            return None
        total = torch.zeros_like(added)
        for new, old in changed:
            total += (old if new is None else new).view(added.shape)
        return total

    def _sum(self, left: Tensor, right: Tensor, a: Mark | None, b: Mark | None) -> Mark | None:
        """The mark of a sum that is not the stream's."""
        if left.shape != right.shape:
            return _biased(a, right) if a else b
        if a and b and (joined := _joined(a, b)):
            return joined
        if {mark.origin for mark in (a, b) if mark} <= {"experts"}:
            return a or b  # a shared expert joins the routed ones
        if any(mark and mark.origin in ("weights", "mixed") for mark in (a, b)):
            if any(mark and mark.origin == "mixed" for mark in (a, b)):
                self._watcher.joined()
            return a or b
        # Sublayers side by side: keep the terms, which an addition in place would overwrite.
        terms = [*_terms(a, left.clone()), *_terms(b, right.clone())]
        return Mark("sum", parts=tuple(terms))

    def _passed(
        self, name: str, args: tuple[Any, ...], kwargs: Any, marks: list[Mark]
    ) -> Mark | None:
        first = mark_of(args[0]) if args else None
        if any(mark.origin == "stream" for mark in marks):
            same = name in _SAME and first is not None and first.origin == "stream"
            return first if same else None
        if name == "linear" and first and first.origin == "mixed":
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return Mark("attention", operands=(args[0], first.heads, *self._kept(weight, bias)))
        if name == "linear" and first and first.operands and first.raw is None:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return _composed(first, *self._kept(weight, bias))
        if name == "addmm" and (mixed := mark_of(args[1])) and mixed.heads:
            weight, bias = self._kept(args[2], args[0])
            return Mark("attention", operands=(args[1], mixed.heads, weight.T, bias))
        if name in _PRODUCT and first and first.origin == "mixed" and args[1].ndim == 2:
            weight, _ = self._kept(args[1], None)
            return Mark("attention", operands=(args[0], first.heads, weight.T, None))
        mark = first or marks[0]
        if mark.origin == "weights":
            if name not in _PRODUCT:
                return mark
            weights = next(v for v in _tensors(args, kwargs) if mark_of(v) is mark)
            if not _over_keys(name, args, weights) or not self._is_softmax(weights):
                self._watcher.reweighted()
            return replace(mark, origin="mixed")
        if mark.origin == "mixed" and name in _JOIN:
            self._watcher.joined()
        if mark.origin == "mixed" and name in _MULTIPLY:
            for mixed, gate in (args[:2], args[1::-1]):
                if _is_gate(gate) and mark_of(mixed):
                    self._watcher.gate(mixed, gate, mark.heads)
        if mark.origin == "mixed" or name in _SAME:
            return mark
        if name in _MULTIPLY and mark.raw is None and not mark.parts:
            number = [value for value in args[:2] if isinstance(value, int | float)]
            if number:
                return replace(mark, factor=mark.factor * number[0])
        if mark.origin == "sum":
            return None
        if mark.raw is None:
            marked = (value for value in _tensors(args, kwargs) if mark_of(value) is mark)
            return replace(mark, raw=next(marked))
        return mark

    def _is_softmax(self, weights: Tensor) -> bool:
        """Are these the probabilities that the softmax gave, perhaps of another shape or dtype?"""
        if self._softmax is None:
            return False
        before, version = self._softmax
        if before.numel() != weights.numel():
            return False
        if not before.is_inference() and before._version != version:
            return False
        before, weights = before.to(weights.dtype), weights.reshape(before.shape)
        return torch.equal(before, weights) or torch.equal(
            before.nan_to_num(), weights.nan_to_num()
        )


def _over_keys(name: str, args: tuple[Any, ...], weights: Tensor) -> bool:
    """Is it the keys, the last dimension of the weights, that a product sums over?"""
    if name != "einsum":
        left = args[1] if name == "__rmatmul__" else args[0]
        return left is weights
    if not isinstance(args[0], str):
        return False
    terms, arrow, result = args[0].replace(" ", "").partition("->")
    place = next(i for i, value in enumerate(args[1:]) if value is weights)
    of = terms.split(",")[place]
    return bool(arrow) and of[-1] not in result and all(letter in result for letter in of[:-1])


def makes(found: Mark, rows: Tensor, whole: Tensor) -> bool:
    """Does an attention's output projection make ``[B, D]`` of its heads' rows ``[B, H * Dv]``?"""
    assert found.operands is not None
    _, _, weight, bias = found.operands
    made = rows.float() @ weight.float().T
    if bias is not None:
        made = made + bias.float()
    eps = max(torch.finfo(value.dtype).eps for value in (rows, whole, made))
    slack = 32 * eps * whole.float().abs().max()
    return bool(((made * found.factor - whole.float()).abs() <= slack).all())


def _biased(found: Mark, added: Tensor) -> Mark:
    """An attention's output whose bias comes after the product."""
    if found.operands is None or found.raw is not None or added.ndim != 1:
        return found
    mixed, heads, weight, bias = found.operands
    return replace(found, operands=(mixed, heads, weight, added if bias is None else bias + added))


def _composed(found: Mark, weight: Tensor, bias: Tensor | None) -> Mark:
    """One linear map after another, as in the low-rank factors of an adapter."""
    assert found.operands is not None
    mixed, heads, first, offset = found.operands
    if offset is not None:
        bias = weight @ offset * found.factor + (0 if bias is None else bias)
    operands = (mixed, heads, weight @ (first * found.factor), bias)
    return replace(found, operands=operands, factor=1.0)


def _joined(a: Mark, b: Mark) -> Mark | None:
    """Two linear maps of the same heads, added: an output projection and its adapter."""
    if a.operands is None or b.operands is None or a.raw is not None or b.raw is not None:
        return None
    (mixed, heads, left, one), (other, _, right, two) = a.operands, b.operands
    if mixed.data_ptr() != other.data_ptr() or left.shape != right.shape:
        return None
    biases = [bias * mark.factor for bias, mark in ((one, a), (two, b)) if bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    weight = left * a.factor + right * b.factor
    return Mark("attention", operands=(mixed, heads, weight, bias))


def _is_gate(value: Any) -> bool:
    """One number for each position, and not of the heads' own making as a norm's factor is."""
    return isinstance(value, Tensor) and value.ndim > 2 and mark_of(value) is None


def _last(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return dim in (-1, args[0].ndim - 1)


def _terms(found: Mark | None, value: Tensor) -> tuple[tuple[Mark | None, Tensor], ...]:
    return found.parts if found and found.parts else ((found, value),)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (item for item in value if isinstance(item, Tensor))
