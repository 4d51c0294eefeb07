"""Every function that a watched pass calls: whose business it is, and what it makes of marks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinktrack.errors import MeasurementError
from sinktrack.models.any_decoder.attention import UNMASKED
from sinktrack.models.any_decoder.by_value import close, is_view
from sinktrack.models.any_decoder.linear import DIVIDE, LinearForm
from sinktrack.models.any_decoder.routers import CHOOSES, PAIRS
from sinktrack.models.any_decoder.stream import Reached, Stream
from sinktrack.models.tracer import _ADD, _MULTIPLY, _SAME, _tensors, mark, mark_of

if TYPE_CHECKING:
    from sinktrack.models.any_decoder.tap import Tap

_READS = {
    "__get__", "__len__", "__repr__", "data_ptr", "dim", "element_size", "is_contiguous",
    "is_floating_point", "ndimension", "numel", "register_hook", "requires_grad_", "size",
    "storage_offset", "stride", "untyped_storage", "get_device", "is_complex", "item", "tolist",
}  # fmt: skip
"""Functions of tensors that compute nothing."""
_ACROSS = {
    "conv1d",
    "conv2d",
    "cumsum",
    "cumprod",
    "roll",
    "lstm",
    "gru",
    "rnn_tanh",
    "logcumsumexp",
}
"""Functions that mix positions without a softmax."""
_MAPS = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum", "addmm", "baddbmm",
}  # fmt: skip
"""Functions that apply a linear map."""
_BLENDS = {
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "where", "lerp", "lerp_", "sub",
    "sub_", "__sub__", "__rsub__", "__isub__", "rsub", "subtract", "addcmul", "addcmul_", "addcdiv",
    "addmm", "baddbmm", "addbmm",
}  # fmt: skip
"""Functions that make one tensor of several, by more than a sum."""
_PARTS = ("mixed", "attention", "experts", "sum")
_NORMS = {"rms_norm", "layer_norm", "linear", "float", "to", "norm", "pow", "square"}
"""Functions that take the stream in any block, and give what is computed from it."""
_SCORED = "_sinktrack_scored"
"""The block in whose attention's scores a tensor was summed up over the keys, or computed from."""
_OVER_KEYS = {"logsumexp", "sum", "amax", "max", "mean", "norm", "vector_norm", "std", "var"}


class Flow(LinearForm):
    """Follows streams, and tells a `Tap` what it meets."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(tap)
        self.probing = self.replaying = False

    def probe(self, tokens: Tensor) -> Tensor:
        """The input of block 0 for other tokens."""
        self.probing, pauses, self._pauses = True, self._pauses, 0
        try:
            with self:
                self.tap.decoder.run(tokens)
        except Reached as reached:
            return reached.stream
        finally:
            self.probing, self._pauses = False, pauses
        raise MeasurementError("a second pass of the model does not reach block 0")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._pauses:
            return func(*args, **kwargs)
        name = _name(func)
        if name in ("embedding", "__getitem__") and len(args) > 1:
            weight, index = args[:2]
            if isinstance(weight, Tensor) and not weight.is_floating_point():
                weight, index = index, weight
            self.tap.embedded(index, weight)
        if not self.following or self.probing:
            return func(*args, **kwargs)
        values = list(_tensors(args, kwargs))
        scored = any(map(self._scored, values)) or (
            name in _OVER_KEYS and bool(values) and self._is_scores(values[0])
        )
        result = self._followed(name, func, types, args, kwargs)
        if any(self.derived(value) for value in values):
            changed = args[0] if name == "__setitem__" else result
            self.derive(changed)
            if scored:
                self.score((changed,))
        return result

    def _scored(self, value: Tensor) -> bool:
        """Is it computed from what the present block's scores sum up to?"""
        return getattr(value, _SCORED, None) == self.tap.block and mark_of(value) is None

    def score(self, results: Any) -> None:
        """These are."""
        for value in _tensors(results, {}):
            if value.is_floating_point():
                setattr(value, _SCORED, self.tap.block)

    def _is_scores(self, value: Tensor) -> bool:
        """Are they attention's, ``[B, H, T, T]``, by the shape?"""
        length = self.tap.length
        wide = value.ndim > 3 or (value.ndim == 3 and self.tap.width != length)
        return wide and tuple(value.shape[-2:]) == (length, length) and self.derived(value)

    def _followed(
        self, name: str, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tap = self.tap
        if type(func).__name__ == "FlexAttentionHOP":
            return tap.flex(func, args, kwargs)
        if name == "scaled_dot_product_attention":
            tap.settle()
            return tap.scaled_dot_product_attention(*args, **kwargs)
        if name == "multi_head_attention_forward":
            tap.settle()
            return tap.multi_head(func, args, kwargs)
        values = list(_tensors(args, kwargs))
        mixes = name in _ACROSS and not _is_pointwise(name, args, kwargs, tap.length)
        if mixes and tap.inside and any(map(self._of_positions, values)):
            tap.lose(f"{name} mixes positions beside its attention")
        if any(isinstance(mark_of(value), Stream) for value in values):
            return self._on_stream(name, func, args, kwargs)
        if name in _READS:
            return func(*args, **kwargs)
        marks = [carried for value in values if (carried := mark_of(value))]
        if any(carried.origin == "mixed" for carried in marks) and any(map(self._scored, values)):
            raise tap.refuse(
                "what its heads attend to is changed by what their scores add up to (a sink's "
                "logit, softmax1), so it is not softmax attention over its keys alone; not "
                "supported"
            )
        with self.paused():
            combined = self._combined(name, args, kwargs) if marks and tap.inside else None
        if combined is not None:
            result = func(*args, **kwargs)
            mark(result, combined)
            return result
        if name in _BLENDS and tap.inside and any(carried.origin in _PARTS for carried in marks):
            beside = [value for value in values if mark_of(value) is None]
            if any(self.derived(value) and value.is_floating_point() for value in beside):
                tap.lose(f"{name} joins its attention or experts with something else it computes")
        if name in _MAPS and any(m.origin == "attention" and m.raw is not None for m in marks):
            return func(*args, **kwargs)  # a layer of its own on the attention's output
        before = self._unmasked(name, func, args, kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        if before is not None and isinstance(result, Tensor):
            setattr(result, UNMASKED, before)
        if name in CHOOSES and args and (isinstance(result, tuple) or name not in PAIRS):
            with self.paused():
                tap.chose(name, args[0], result)
        if any(carried.origin == "weights" for carried in marks) and name in _MAPS:
            tap.yields(self._mixed(result), result)
            tap.unmixed = False
        if _is_opaque(func, name):
            with self.paused():
                tap.opaque(name, args, kwargs, result)
        return result

    def _of_positions(self, value: Tensor) -> bool:
        """Is it computed for each position, and no count such as of an expert's tokens?"""
        large = value.numel() >= self.tap.batch * self.tap.length
        return large and value.is_floating_point() and self.derived(value)

    def _mixed(self, result: Any) -> Tensor | None:
        """float32 ``[B, H * Dv]``: P0's rows of what probabilities and values make."""
        known = mark_of(result)
        if known is None or known.origin != "mixed" or result.ndim not in (4, 5):
            return None
        with self.paused():
            batch, length = self.tap.batch, self.tap.length
            by_head = result.flatten(1, -3)
            by_position = result.flatten(2, -2)
            first = tuple(by_head.shape[:3]) == (batch, known.heads, length)
            second = tuple(by_position.shape[:3]) == (batch, length, known.heads)
            if first == second:
                return None
            rows: Tensor = by_head[:, :, 0] if first else by_position[:, 0]
            return rows.detach().float().flatten(1)

    def _on_stream(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tap = self.tap
        if tap.settling is not None and name not in _READS:
            handled, result = self._carried(name, func, args, kwargs)
            if handled:
                return result
            tap.settle()
        values = list(_tensors(args, kwargs))
        streams = [value for value in values if isinstance(mark_of(value), Stream)]
        before = {id(value): mark_of(value) for value in streams}
        versions = self._versions(values)
        tap.changes = []
        with self.paused():
            new = None if name in _READS else self._form(name, args, kwargs)
            sums = self._sums(values) if new is None and _is_opaque(func, name) else []
            if tap.changes and name in ("addcmul", "addcmul_"):  # of a product there is no operand
                ((stream, whole, _),) = tap.changes
                func = torch.Tensor.add_ if _is_in_place(name) else torch.add
                args, kwargs = (stream, tap.like(whole.to(stream.dtype), stream)), {}
            else:
                args, kwargs = self._edited(name, args, kwargs)
        result = func(*args, **kwargs)
        outputs = [v for v in _tensors((result,), {}) if v.is_floating_point()]
        with self.paused():
            if name == "__setitem__" or (new is None and name.endswith("_") and name[:2] != "__"):
                _unmark(args[0])
                return result
            for value in outputs:
                if any(value is one for one in streams) and new is None:
                    continue
                form = new if new is not None and tap.rows(value) is not None else None
                if form is None and len(streams) == 1 and is_view(value, streams[0]):
                    form = before[id(streams[0])]  # type: ignore[assignment]
                if form is None and sums:
                    form = self._by_value(value, sums)
                if form is not None:
                    mark(value, form)
                elif tap.rows(value) is not None and name not in _NORMS:
                    tap.went.append(name)
            if sums and tap.changes:
                result = self._again(name, func, args, kwargs, result, sums, versions)
            if _is_opaque(func, name):
                tap.opaque(name, args, kwargs, result)
        return result

    def _carried(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bool, Any]:
        """Is the last block's write added to the stream first of all? Then that is the stream."""
        tap = self.tap
        assert tap.settling is not None
        stream, beside = tap.settling
        values = list(_tensors(args, kwargs))
        other = next((v for v in values if any(v is one for one in beside)), None)
        if other is None or not any(value is stream for value in values):
            return False, None
        if (name not in _ADD or kwargs) and not _is_opaque(func, name):
            return False, None
        versions = self._versions(values)
        tap.changes = []
        with self.paused():
            sums = self._sums(values)
        result = func(*args, **kwargs)
        with self.paused():
            for value in _tensors((result,), {}):
                form = self._by_value(value, sums)
                if form is not None:
                    mark(value, form)
                    if tap.changes:
                        result = self._again(name, func, args, kwargs, result, sums, versions)
                        made = [v for v in _tensors((result,), {}) if mark_of(v) is form]
                        (value,) = made
                    self.derive(result)
                    tap.carries = True
                    changed = tap._settle(value)
                    if changed is not None and result is not value:
                        raise tap.uneditable(f"its input is made by {name}, with more than the sum")
                    return True, result if changed is None else changed
        raise tap.refuse(
            f"{name} takes the stream and the last block's output, and gives no sum of them; not "
            "supported"
        )

    def _edited(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a sum, with the writes that the editor wants in the place of their own."""
        tap = self.tap
        for value, whole, factor in tap.changes:
            rows = tap.rows(value)
            assert rows is not None
            if factor != 1:
                whole = torch.where(whole == rows * factor, rows, whole / factor)
            new = tap.like(whole.to(value.dtype), value)
            if args and args[0] is value and _is_in_place(name):
                value.copy_(new)  # the sum is written there
                continue
            args = swapped(args, value, new)
            kwargs = {key: swapped(own, value, new) for key, own in kwargs.items()}
        return args, kwargs

    def _versions(self, values: list[Tensor]) -> list[int]:
        """How often tensors were changed in place, where a pass may be edited."""
        if self.tap.editor is None:
            return []
        return [-1 if value.is_inference() else value._version for value in values]

    def _unmasked(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Of scores that are about to be masked, or were, what they are without a mask."""
        tap = self.tap
        if tap.editor is None or not tap.inside:
            return None
        square = [
            value
            for value in _tensors(args[:3], {})
            if value.ndim > 3 and value.shape[-2:] == (tap.length, tap.length)
            if value.is_floating_point() and self.derived(value)
        ]
        if len(square) != 1:
            return None
        (scores,) = square
        before = getattr(scores, UNMASKED, None)
        if name in ("masked_fill", "masked_fill_", "where") or name in _ADD:
            if before is not None:
                return before  # type: ignore[no-any-return]
            return scores.clone() if _is_in_place(name) else scores
        if before is not None and (name in _SAME or name in _MULTIPLY or name in DIVIDE):
            with self.paused():
                own: Tensor = func(*swapped(args, scores, before.clone()), **kwargs)
            return own
        return None

    def _again(
        self,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        sums: list[tuple[Tensor, Tensor, Tensor]],
        versions: list[int],
    ) -> Any:
        """An operator that was found to be a sum by its value, once more with edited writes.

        Raises:
            Uneditable: it works in place, or does not give their sum.
        """
        tap = self.tap
        if -1 in versions:
            raise tap.uneditable(f"{name} adds its write to the stream under inference mode")
        if self._versions(list(_tensors(args, kwargs))) != versions:
            raise tap.uneditable(f"{name} adds its write to the stream in place")
        args, kwargs = self._edited(name, args, kwargs)
        again = func(*args, **kwargs)
        ((edited, whole, _),) = tap.changes
        for old, new in zip(_tensors((result,), {}), _tensors((again,), {}), strict=True):
            before = mark_of(old)
            if not isinstance(before, Stream):
                continue
            mark(new, before)
            stream = next(one for one, other, _ in sums if other is edited)
            left, right = tap.rows(stream), tap.rows(new)
            if left is None or right is None:
                continue
            if not close(right.float(), (left + whole).float(), new.dtype):
                raise tap.uneditable(f"{name} gives no sum of the stream and another write")
        return again


def swapped(value: Any, old: Tensor, new: Tensor) -> Any:
    """The same with another tensor in the place of one."""
    if isinstance(value, tuple | list):
        items = [swapped(item, old, new) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return new if value is old else value


def _is_in_place(name: str) -> bool:
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "") or str(func)
    return name if isinstance(name, str) else type(func).__name__


def _is_opaque(func: Any, name: str) -> bool:
    """A function that is none of torch's own for tensors."""
    if type(func).__name__ in ("OpOverload", "OpOverloadPacket", "CustomOpDef"):
        return True
    return not any(hasattr(place, name) for place in (Tensor, torch, F))


def _is_pointwise(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], length: int) -> bool:
    """A convolution whose kernel is one place large: a linear map of each place by itself.

    Not where positions are moved, or may be the channels that it maps.
    """
    if name[:4] != "conv":
        return False
    names = ("input", "weight", "bias", "stride", "padding")
    given = dict(zip(names, args, strict=False)) | kwargs
    value, weight = given.get("input"), given.get("weight")
    if not isinstance(value, Tensor) or not isinstance(weight, Tensor):
        return False
    stride, padding = (
        {number} if isinstance(number, int | str) else set(number)
        for number in (given.get("stride", 1), given.get("padding", 0))
    )
    moved = stride != {1} or not padding <= {0, "valid", "same"}
    channels = value.ndim == weight.ndim and value.shape[1] % length != 0
    return set(weight.shape[2:]) == {1} and not moved and channels


def _unmark(value: Any) -> None:
    if mark_of(value) is not None:
        delattr(value, "_sinktrack_mark")
