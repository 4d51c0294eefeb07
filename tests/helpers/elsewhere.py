"""A device other than the CPU, where there is none: tensors that say ``cuda`` and count on the CPU.

As on a GPU, tensors of both devices in one function are an error, but for numbers, indices and
copies. No kernel of CUDA runs here, and no gradient flows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from sinktrack.models.huggingface import PLAIN

DEVICE = torch.device("cuda", 0)
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_MAY_MIX = {Tensor.copy_, *_INDEXING}
_OF_THE_CPU: set[Any] = {Tensor.numpy, Tensor.__array__}


class Elsewhere(Tensor):
    """A tensor on the device."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device("meta"),
        )  # fmt: skip
        made.on_cpu = inner
        return made

    device = DEVICE
    is_cuda = True
    is_meta = False

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:  # of what makes a parameter
            return Elsewhere(args[0].on_cpu)
        raise NotImplementedError(f"{func} outside of `elsewhere`")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.on_cpu!r})"


class _Mode(TorchFunctionMode):
    """Counts on the CPU, and makes there what is asked for on the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        away = any(isinstance(x, Elsewhere) for x in given)
        if func is Tensor.cpu:
            return _inner(args[0])
        if func is Tensor.to:
            return _to(*args, **kwargs)
        named = [x for x in (*args[1:], kwargs.get("device")) if _is_device(x)]
        if not away and not any(_is_away(x) for x in named):
            return func(*args, **kwargs)
        if func in _OF_THE_CPU or (func in _INDEXING and not isinstance(args[0], Elsewhere)):
            raise TypeError(f"{func} of a tensor on cuda:0: copy it to the host first")
        here = [x for x in given if not isinstance(x, Elsewhere) and x.dim() > 0]
        if away and here and func not in _MAY_MIX:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({func})"
            )
        away = all(_is_away(x) for x in named)
        args, kwargs = (
            tree_map(lambda x: torch.device("cpu") if _is_away(x) else _inner(x), tree)
            for tree in (args, kwargs)
        )
        out = func(*args, **kwargs)
        if not away or (given and func is Tensor.copy_ and not isinstance(given[0], Elsewhere)):
            return out
        for tensor in given:
            if out is _inner(tensor):  # in place
                return tensor
        return tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, out)


def _inner(value: Any) -> Any:
    return value.on_cpu if isinstance(value, Elsewhere) else value


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (
        isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda")
    )


def _is_away(value: Any) -> bool:
    return _is_device(value) and str(value).startswith("cuda")


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``: to a device, a dtype, both, or where another tensor is."""
    away = isinstance(tensor, Elsewhere)
    inner: Tensor = _inner(tensor)
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            away = isinstance(value, Elsewhere)
            inner = inner.to(value.dtype)
        elif _is_device(value):
            away = _is_away(value)
        elif isinstance(value, torch.dtype):
            inner = inner.to(value)
    if isinstance(tensor, Elsewhere) and away and inner is tensor.on_cpu:
        return tensor
    return Elsewhere(inner) if away else inner


@contextmanager
def elsewhere() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """A context with the device; gives what moves a model there."""

    def move(model: nn.Module) -> nn.Module:
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    moved = Elsewhere(_inner(value.detach()))
                    module._parameters[name] = nn.Parameter(moved, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = Elsewhere(buffer)
        return model

    PLAIN.add(Elsewhere)  # on a device it would be torch's own
    try:
        with _Mode(), torch.no_grad():
            yield move
    finally:
        PLAIN.remove(Elsewhere)
