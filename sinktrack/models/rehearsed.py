"""Was this very model rehearsed already, with all that its attention's outcome hangs on?

A rehearsal says whether attention in training is attention under taps. With code of transformers
and torch alone that hangs on classes, functions, settings and types of numbers, and not on the
values of weights: so it is noted what those are, and the rehearsal is repeated where any of them
is another. Where code of others runs, which may change without a sign, it is always repeated.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sinktrack.models.huggingface import LIBRARIES, Decoder, configs, foreign

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_GLOBAL = ("softmax", "scaled_dot_product_attention")
_BASE = "transformers.modeling_utils"
"""Of what all families inherit: it computes no attention, and names what loads models."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_WALKED = ("_parameters", "_buffers", "_modules")

_ELSEWHERE = {
    *sys.stdlib_module_names, "huggingface_hub", "numpy", "packaging", "safetensors", "tqdm",
    *(name.rstrip(".") for name in LIBRARIES),
}  # fmt: skip
"""Whose functions a family's modules name; nobody else's."""

_passed: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


class _Unknown(Exception):
    """Something runs that may change without a sign."""


class _Same:
    """An object that equals itself alone."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._of is other._of

    def __hash__(self) -> int:
        return id(self._of)


def passed(found: Decoder, tokens: int) -> bool:
    """Did it pass a rehearsal of so many tokens, and is it what it was then?"""
    noted = _passed.get(found.model)
    return noted is not None and noted == _state(found, tokens)


def note(found: Decoder, tokens: int) -> None:
    """It passed."""
    state = _state(found, tokens)
    if state is None:
        _passed.pop(found.model, None)
    else:
        _passed[found.model] = state


def _state(found: Decoder, tokens: int) -> Any:
    """What the outcome hangs on, to be compared; None where it may hang on more."""
    try:
        return [tokens, list(_functions()), list(_settings(found)), list(_modules(found.model))]
    except _Unknown:
        return None


def _functions() -> Iterator[Any]:
    """What torch and transformers run attention with, whatever the model."""
    for name in _GLOBAL:
        yield _known(getattr(nn.functional, name))
    yield from map(_Same, (torch.softmax, Tensor.softmax, torch.matmul, torch.baddbmm))
    attend = sys.modules[_BASE].ALL_ATTENTION_FUNCTIONS
    for name in sorted(attend):
        yield name, _known(attend[name])
        if scope := getattr(attend[name], "__globals__", {}).get("__name__"):
            yield from _names(scope)


def _settings(found: Decoder) -> Iterator[Any]:
    for config in configs(found.model):
        yield _value({name: value for name, value in vars(config).items() if name[0] != "_"})
        yield config._attn_implementation


def _modules(model: nn.Module) -> Iterator[Any]:
    kinds: dict[type, None] = {}
    for name, module in model.named_modules():
        kinds[type(module)] = None
        own = vars(module)
        if "forward" in own or any(own.get(hooks) for hooks in _HOOKS):
            raise _Unknown
        yield name, type(module)
        for held in ("_parameters", "_buffers"):
            yield [(key, _value(value)) for key, value in own[held].items()]
        for key, value in own.items():
            if key not in _WALKED and not isinstance(value, nn.Module):
                yield key, _value(value)
    scopes: dict[str, None] = {}
    for kind in kinds:
        for one in kind.__mro__:
            if one is nn.Module:
                break
            if foreign(one) is not None:
                raise _Unknown
            if one.__module__ != _BASE:
                scopes[one.__module__] = None
            yield one, [(key, _known(value)) for key, value in vars(one).items()]
    for scope in scopes:
        if not scope.startswith("torch."):
            yield from _names(scope)


def _names(scope: str) -> Iterator[Any]:
    """What the functions of a module find by name."""
    yield scope, [(key, _known(value)) for key, value in vars(sys.modules[scope]).items()]


def _known(value: Any) -> Any:
    """A function of a library, or anything that does not run by itself.

    Raises:
        _Unknown: a function of somebody else.
    """
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, functools.partial):
        return _known(value.func), _values(value.args), _value(value.keywords)
    if isinstance(value, types.MethodType):
        raise _Unknown
    if isinstance(value, types.FunctionType):
        names = value.__module__, value.__globals__.get("__name__")
        if not all(str(name).split(".")[0] in _ELSEWHERE for name in names):
            raise _Unknown
    return _Same(value)


def _value(value: Any) -> Any:
    """By value where it is plain, else by what it is."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), value.dtype, value.device
    if isinstance(value, Mapping):
        return [(key, _value(inner)) for key, inner in value.items()]
    if isinstance(value, list | tuple | set):
        return _values(value)
    return _known(value)


def _values(values: Iterable[Any]) -> list[Any]:
    return [_value(inner) for inner in values]
