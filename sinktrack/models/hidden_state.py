"""What a model keeps outside of parameters and buffers, as it was, and how to put it back.

Walked is all that hangs on the attributes of its modules, their hooks and their classes:
containers, plain objects, what functions enclose, tensors, arrays, generators of random numbers.
Objects of torch and of the frameworks around it are theirs and left alone, but for trackers of
random states: Transformer Engine's fused attention takes of them even where nothing is dropped.
"""

from __future__ import annotations

import array
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from enum import Enum
from functools import partial
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

COPIED = 256 * 2**20
"""Bytes of tensors and arrays that are copied at most; of what is larger a change is only seen."""
_FRAMEWORKS = {
    "accelerate", "apex", "bitsandbytes", "datasets", "deepspeed", "kernels", "lightning",
    "megatron", "pytorch_lightning", "sinktrack", "tokenizers", "torch", "torchao",
    "transformer_engine", "triton", "wandb", "logging", "threading", "weakref",
}  # fmt: skip
_NOT_THE_USERS = _FRAMEWORKS | {"numpy", "peft", "transformers"} | sys.stdlib_module_names
"""Classes of which no attribute is looked at."""
_TRACKER = "CudaRNGStatesTracker"
"""What Megatron-Core, Transformer Engine and DeepSpeed call the class of their random states."""
_TRACKERS = (
    "megatron.core.tensor_parallel.random",
    "deepspeed.runtime.activation_checkpointing.checkpointing",
)
"""Modules that hold the one of the process."""
_INTERNAL = {
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training",
}  # fmt: skip
_HOOKS = {
    "_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
}  # fmt: skip
"""Which are set is not ours to undo: FSDP sets its own once, in the first forward pass."""
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes, in which dtype the bits of a number can be added."""
_AT_ONCE = 2**22
"""Numbers that are added at once."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, types.ModuleType,
          torch.dtype, torch.device, torch.Size, ReferenceType)  # fmt: skip

Undo = Callable[[], bool]
"""Puts a thing back where it changed; False where that is not possible."""


def _set_anew(model: nn.Module) -> set[int]:
    """Parameters that PEFT's adapters of parameters (``target_parameters``) put in place in each
    forward pass, and back behind it: the same numbers, which torch counts as a change."""
    return {
        id(parameter)
        for module in model.modules()
        if hasattr(module, "parameter_name") and hasattr(module, "get_base_layer")
        for parameter in module.get_base_layer().parameters(recurse=False)  # type: ignore[operator]
        if type(parameter) is nn.Parameter and not parameter.is_meta
    }


def _sums(value: Tensor) -> tuple[int, ...]:
    """Of all bits and, so that an exchange is seen, of the same by their places."""
    bits = value.detach().view(_WHOLE[value.element_size()]).reshape(-1)
    places = torch.arange(1, _AT_ONCE + 1, device=bits.device)
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for part in bits.split(_AT_ONCE):  # which bounds the memory that it takes
        whole = part.long()
        placed = (whole * places[: len(whole)]).sum()
        sums = sums * 31 + torch.stack([whole.sum(), placed])
    return value.data_ptr(), *sums.tolist()


class Kept:
    """The state of a model outside of parameters and buffers.

    Args:
        model: whose modules are walked. Its parameters are only looked at: what a forward pass
            changes in them cannot be put back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._undo: list[tuple[str, Undo]] = []
        self._seen: dict[int, Any] = {}
        """By id, and kept alive, so that nothing else takes the id."""
        self._todo: list[tuple[str, Any]] = []
        self._left = COPIED
        anew = _set_anew(model)
        for name, parameter in model.named_parameters():
            self._seen[id(parameter)] = parameter
            if id(parameter) in anew:
                self._sum(name, parameter)
            else:
                self._watch(name, parameter)
        for buffer in model.buffers():
            self._seen[id(buffer)] = buffer
        for name, module in model.named_modules():
            self._seen[id(module)] = module
            self._module(name, module)
        for name in _TRACKERS:
            self._walk(name, getattr(sys.modules.get(name), "_CUDA_RNG_STATE_TRACKER", None))
        while self._todo:
            self._take(*self._todo.pop())

    def undo(self) -> list[str]:
        """Put back what changed.

        Returns:
            Where that was not possible: module path and attribute.
        """
        failed = []
        for name, undo in self._undo:
            try:
                done = undo()
            except Exception:  # whatever a class of the user's raises
                done = False
            if not done and name not in failed:
                failed.append(name)
        return failed

    def _walk(self, name: str, value: Any) -> None:
        if isinstance(value, type):
            self._classes(value)
        elif not isinstance(value, _PLAIN) and id(value) not in self._seen:
            self._seen[id(value)] = value
            self._todo.append((name, value))

    def _take(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensor(name, value)
        elif isinstance(value, np.ndarray):
            self._array(name, value)
        elif isinstance(value, torch.Generator):
            self._number(name, value.get_state, value.set_state)
        elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            self._number(name, value.getstate, value.setstate)
            self._members(name, value)
        elif isinstance(value, np.random.RandomState):
            self._number(name, value.get_state, value.set_state)
        elif isinstance(value, np.random.Generator | np.random.BitGenerator):
            bits: Any = getattr(value, "bit_generator", value)
            self._number(name, lambda: bits.state, partial(setattr, bits, "state"))
            self._walk(name, bits.seed_seq)
        elif isinstance(value, np.random.SeedSequence):
            spawned = value.n_children_spawned
            self._undo.append((name, lambda: value.n_children_spawned == spawned))
        elif isinstance(value, ContextVar):
            self._context(name, value)
        elif isinstance(value, dict):
            self._items(name, value, "{}[{!r}]")
            self._members(name, value)
        elif isinstance(value, WeakKeyDictionary | WeakValueDictionary):
            self._items(name, vars(value)["data"], "{}[{!r}]")
        elif isinstance(value, WeakSet):
            self._elements(name, vars(value)["data"])
        elif isinstance(value, memoryview):
            self._walk(name, value.obj)
        elif isinstance(value, list | set | deque):
            self._elements(name, value)
            self._members(name, value)
        elif isinstance(value, bytearray | array.array):
            self._number(name, lambda: value[:], partial(value.__setitem__, slice(None)))
        elif isinstance(value, tuple | frozenset):
            for index, item in enumerate(value):
                self._walk(f"{name}[{index}]", item)
        elif isinstance(value, types.FunctionType):
            self._function(name, value)
        elif isinstance(value, types.MethodType):
            self._walk(name, value.__self__)
            self._walk(name, value.__func__)
        elif isinstance(value, partial):
            for part in (value.func, value.args, value.keywords):
                self._walk(name, part)
        elif isinstance(value, Iterator) and _root(type(value)) in ("builtins", "itertools"):
            before = _position(value)
            self._undo.append((name, lambda: _position(value) == before))
        elif isinstance(value, nn.Module):  # hangs on the model by a list or a function
            self._module(name, value)
            for key, child in value.named_children():
                self._walk(f"{name}.{key}", child)
            for key, buffer in value.named_buffers(recurse=False):
                self._walk(f"{name}.{key}", buffer)
            for key, parameter in value.named_parameters(recurse=False):
                self._watch(f"{name}.{key}", parameter)
        elif not any(_root(kind) in _FRAMEWORKS for kind in type(value).__mro__) or any(
            kind.__name__ == _TRACKER for kind in type(value).__mro__
        ):
            self._members(name, value)

    def _module(self, name: str, module: nn.Module) -> None:
        """Its attributes; which ones it has is put back elsewhere."""
        self._classes(type(module))
        for key, value in vars(module).items():
            path = f"{name}.{key}" if name else key
            if key not in _HOOKS:
                if key not in _INTERNAL:
                    self._walk(path, value)
            elif value:
                for hook in value.values():
                    self._walk(path, hook)

    def _number(self, name: str, get: Callable[[], Any], put: Callable[[Any], Any]) -> None:
        before = get()

        def undo() -> bool:
            if not _equal(get(), before):
                put(before)
            return True

        self._undo.append((name, undo))

    def _tensor(self, name: str, value: Tensor) -> None:
        size = value.numel() * value.element_size()
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
        if not plain or value.is_meta or size > self._left:
            self._watch(name, value)
            return
        self._left -= size
        before = value.detach().clone()

        def undo() -> bool:
            if value.shape != before.shape or value.dtype != before.dtype:
                return False
            if not _equal(value.detach(), before):
                value.detach().copy_(before)
            return True

        self._undo.append((name, undo))

    def _watch(self, name: str, value: Tensor) -> None:
        """Of a tensor that is not copied a change is seen by torch's count of them."""
        if not value.is_inference() and not hasattr(value, "_is_flat_param"):  # FSDP moves it
            version = value._version
            self._undo.append((name, lambda: value._version == version))

    def _sum(self, name: str, value: Tensor) -> None:
        """Of a parameter whose count says nothing a change is seen by its bits."""
        before = _sums(value)
        self._undo.append((name, lambda: _sums(value) == before))

    def _array(self, name: str, value: np.ndarray[Any, Any]) -> None:
        if value.dtype.hasobject:
            for index, item in enumerate(value.flat):
                self._walk(f"{name}[{index}]", item)
        if value.nbytes > self._left:
            total = hash(value.tobytes())
            self._undo.append((name, lambda: hash(value.tobytes()) == total))
            return
        self._left -= value.nbytes
        self._number(name, value.copy, partial(value.__setitem__, ...))

    def _items(self, name: str, value: Any, path: str) -> None:
        kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
        before = list(kind.items(value))

        def undo() -> bool:
            now = list(kind.items(value))
            if len(now) != len(before) or any(
                one[0] is not other[0] or one[1] is not other[1]
                for one, other in zip(now, before, strict=True)
            ):
                kind.clear(value)
                for key, item in before:
                    kind.__setitem__(value, key, item)
            return True

        self._undo.append((name, undo))
        for key, item in before:
            if not isinstance(key, _PLAIN):
                self._walk(name, key)
            if not isinstance(item, _PLAIN):
                self._walk(path.format(name, key), item)

    def _elements(self, name: str, value: Any) -> None:
        before = list(value)

        def undo() -> bool:
            now = list(value)
            if len(now) != len(before) or any(map(_is_not, now, before)):
                value.clear()
                (value.update if isinstance(value, set) else value.extend)(before)
            return True

        self._undo.append((name, undo))
        for index, item in enumerate(before):
            if not isinstance(item, _PLAIN):
                self._walk(f"{name}[{index}]", item)

    def _members(self, name: str, value: Any) -> None:
        """The attributes of a plain object, in its dictionary and in slots."""
        self._classes(type(value))
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._items(name, attributes, "{}.{}")
        for kind in type(value).__mro__:
            for slot in vars(kind).values() if "__slots__" in vars(kind) else ():
                if isinstance(slot, types.MemberDescriptorType):
                    self._place(f"{name}.{slot.__name__}", slot, value)

    def _place(self, name: str, slot: Any, value: Any) -> None:
        nothing = object()

        def get() -> Any:
            try:
                return slot.__get__(value)
            except AttributeError:
                return nothing

        before = get()

        def undo() -> bool:
            if get() is not before:
                slot.__delete__(value) if before is nothing else slot.__set__(value, before)
            return True

        self._undo.append((name, undo))
        if before is not nothing:
            self._walk(name, before)

    def _context(self, name: str, value: ContextVar[Any]) -> None:
        nothing = object()
        before = value.get(nothing)

        def undo() -> bool:
            if value.get(nothing) is before:
                return True
            if before is not nothing:  # else it can be set, but not be without
                value.set(before)
            return before is not nothing

        self._undo.append((name, undo))
        self._walk(name, before)

    def _classes(self, of: type) -> None:
        """The attributes of a class and of those above it that are the user's."""
        for kind in of.__mro__:
            if id(kind) in self._seen:
                continue
            self._seen[id(kind)] = kind
            if _root(kind) not in _NOT_THE_USERS:
                self._class(kind)

    def _class(self, kind: type) -> None:
        before = {key: value for key, value in vars(kind).items() if not key.startswith("__")}

        def undo() -> bool:
            now = {key: value for key, value in vars(kind).items() if not key.startswith("__")}
            for key in now.keys() - before.keys():
                delattr(kind, key)
            for key, value in before.items():
                if now.get(key) is not value:
                    setattr(kind, key, value)
            return True

        self._undo.append((kind.__qualname__, undo))
        for key, value in before.items():
            if not isinstance(value, property | classmethod | staticmethod):
                self._walk(f"{kind.__qualname__}.{key}", value)

    def _function(self, name: str, value: types.FunctionType) -> None:
        """What it encloses, its attributes and default arguments; its globals are not the model."""
        for cell in value.__closure__ or ():
            if id(cell) not in self._seen:
                self._seen[id(cell)] = cell
                self._cell(name, cell)
        for part in (value.__dict__, value.__defaults__, value.__kwdefaults__):
            if part:
                self._walk(name, part)

    def _cell(self, name: str, cell: types.CellType) -> None:
        try:
            before = cell.cell_contents
        except ValueError:  # nothing in it yet
            return

        def undo() -> bool:
            if cell.cell_contents is not before:
                cell.cell_contents = before
            return True

        self._undo.append((name, undo))
        self._walk(name, before)


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _is_not(left: Any, right: Any) -> bool:
    return left is not right


def _equal(left: Any, right: Any) -> bool:
    """Bit for bit: a nan equals itself."""
    if isinstance(left, Tensor):
        return torch.equal(_bits(left), _bits(right))
    if isinstance(left, np.ndarray):
        return bool(left.shape == right.shape and left.tobytes() == right.tobytes())
    if isinstance(left, dict):
        return all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, tuple):
        return all(map(_equal, left, right))
    return bool(left == right)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def _position(value: Any) -> Any:
    """How far an iterator has gone, to be compared."""
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        if frame is None:
            return None
        names = frame.f_locals.items()
        return frame.f_lasti, [(k, v if isinstance(v, _PLAIN) else id(v)) for k, v in names]
    try:
        return repr(value.__reduce__()), repr(value)
    except TypeError:  # itertools from Python 3.14 on
        return repr(value)
