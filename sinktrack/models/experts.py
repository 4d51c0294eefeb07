"""Routed experts told apart: P0's rows run again through their module, without each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sinktrack.errors import MeasurementError
from sinktrack.events import Routed

_ROUNDING = 64
"""Of a dtype's eps, in parts of the largest output: what another number of rows may change."""


class NotTold(Exception):
    """The experts of a block cannot be told apart, and why."""


@dataclass
class Expert:
    """A module that runs, and what a router inside it chose."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    chosen: tuple[int, Tensor] | None = None
    """How many experts there are, and the chosen ones of all positions, ``K`` each."""


class Layout(Protocol):
    """Who knows the order of positions and sequences."""

    batch: int
    length: int
    width: int
    time_first: bool
    flow: Any

    def rows(self, value: Any, width: int | None = None) -> Tensor | None:
        """``[B, T, width]``, or None."""


def apart(call: Expert, output: Tensor, layout: Layout) -> Routed:
    """What each chosen expert writes at P0.

    Args:
        call: the module that holds router and experts.
        output: what it gave.
        layout: of its tensors.

    Raises:
        NotTold: with the reason.
    """
    layout.flow.replaying = True
    try:
        return _apart(call, output, layout)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise NotTold(
            f"P0 alone does not run through {type(call.module).__name__}: {error}"
        ) from error
    finally:
        layout.flow.replaying = False


def _apart(call: Expert, output: Tensor, layout: Layout) -> Routed:
    assert call.chosen is not None
    count, index = call.chosen
    rows = layout.rows(index.float(), index.shape[-1])
    seen = layout.rows(output)
    assert seen is not None
    if rows is None:
        raise NotTold("the order of what its router chose cannot be told")
    chosen = rows[:, 0].long()
    each = chosen.shape[1]
    written = seen[:, 0].detach().float()
    everyone = torch.arange(layout.batch, device=chosen.device)
    rounding = _ROUNDING * torch.finfo(output.dtype).eps

    def same(one: Tensor, two: Tensor) -> bool:
        return bool(((one - two).abs() <= rounding * float(written.abs().max())).all())

    def replay(at: Tensor) -> Tensor:
        args = [_rows(value, at, layout) for value in call.args]
        kwargs = {name: _rows(value, at, layout) for name, value in call.kwargs.items()}
        result = call.module.forward(*args, **kwargs)
        if isinstance(result, tuple | list):
            result = next(v for v in result if v.numel() == len(at) * layout.width)
        rows: Tensor = result.reshape(len(at), layout.width).detach().float()
        return rows

    whole = replay(everyone)
    if not same(whole, written):
        raise NotTold("alone, P0 gets another output than in its sequence")
    without = _remover(call.module, count)
    parts = torch.zeros(len(chosen), each, layout.width, device=chosen.device)
    gates = torch.full((len(chosen), each), torch.nan, device=chosen.device)
    for expert in chosen.unique().tolist():
        at, place = (chosen == expert).nonzero(as_tuple=True)
        other = (chosen != expert).all(-1).nonzero()[:1, 0]
        with without(expert) as ungated:
            left = replay(torch.cat([at, other]))
        if not same(left[len(at) :], whole[other]):
            raise NotTold("what looks like an expert acts on tokens that did not choose it")
        parts[at, place] = whole[at] - left[: len(at)]
        gates[at, place] = _gate(parts[at, place], ungated, rounding)
    if bool((whole != 0).any()) and not bool((parts != 0).any()):
        raise NotTold("none of what looks like its experts changes its output")

    def outputs(position: int) -> Tensor:
        return parts

    def of(expert: int) -> Tensor:
        raise MeasurementError("experts of such a model are told apart at P0 alone")

    return Routed(chosen[:, None], gates[:, None], outputs, of, seen, 1.0)


def _rows(value: Any, at: Tensor, layout: Layout) -> Any:
    """Of a tensor of all positions P0's rows of some sequences, in as many dimensions."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    found = layout.rows(value, value.shape[-1])
    if found is None:
        return value
    chosen = found[at, 0]
    if value.ndim == 2:
        return chosen
    return chosen[None] if layout.time_first else chosen[:, None]


def _gate(written: Tensor, ungated: list[Tensor], rounding: float) -> Tensor:
    """``[n]``: what an expert's own output is multiplied with; nan where that is not shown."""
    unknown = torch.full((len(written),), torch.nan, device=written.device)
    if len(ungated) != 1 or ungated[0].numel() < written.numel():
        return unknown
    own = ungated[0].reshape(-1, written.shape[1])[: len(written)].float()
    gate = (own * written).sum(-1) / (own * own).sum(-1)
    error = (gate[:, None] * own - written).abs().amax()
    return gate if float(error) <= rounding * float(written.abs().max()) else unknown


def _remover(module: nn.Module, count: int) -> Callable[[int], Any]:
    """How to silence one expert."""
    for held in module.modules():
        if isinstance(held, nn.ModuleList | nn.ModuleDict) and len(held) == count:
            return _module_remover(list(held.children()))
    return _stack_remover(module, count)


def _module_remover(experts: list[nn.Module]) -> Callable[[int], Any]:
    @contextmanager
    def silent(expert: int) -> Iterator[list[Tensor]]:
        own = experts[expert]
        whole = type(own).forward is not nn.Module.forward  # else what it holds is called
        ungated: list[Tensor] = []

        def nothing(module: nn.Module, args: Any, output: Any) -> Any:
            if whole and isinstance(output, Tensor):
                ungated.append(output.detach())
            return _zero(output)

        with ExitStack() as stack:
            for part in [own] if whole else own.children():
                stack.callback(part.register_forward_hook(nothing).remove)
            yield ungated

    return silent


def _zero(output: Any) -> Any:
    if isinstance(output, tuple | list):
        return type(output)(_zero(value) for value in output)
    return torch.zeros_like(output) if isinstance(output, Tensor) else output


def _stack_remover(module: nn.Module, count: int) -> Callable[[int], Any]:
    owners = []
    for held in module.modules():
        own = dict(held.named_parameters(recurse=False))
        stacks = [value for value in own.values() if value.ndim == 3 and len(value) == count]
        flat = [value for value in own.values() if value.ndim == 2 and not len(value) % count]
        if not stacks and len(own) == len(flat) > 1 and all(len(v) > count for v in flat):
            owners += flat  # one below the other, as many rows each
        if stacks:
            beside = [
                name for name, value in own.items() if value.ndim == 2 and len(value) == count
            ]
            if beside:
                raise NotTold(f"it holds {', '.join(beside)} beside the experts' matrices")
            owners += stacks
    if not owners:
        raise NotTold(
            "they are neither a ModuleList of as many modules as the router has choices nor "
            "matrices, stacked or one below the other"
        )

    @contextmanager
    def silent(expert: int) -> Iterator[list[Tensor]]:
        with _Zeroed(owners, expert, count):
            yield []

    return silent


class _Zeroed(TorchFunctionMode):
    """Functions are given copies of stacked matrices, with zeros for one expert."""

    def __init__(self, stacks: list[nn.Parameter], expert: int, count: int) -> None:
        super().__init__()
        self._copies = {id(stack): stack.detach().clone() for stack in stacks}
        for copy in self._copies.values():
            copy.unflatten(0, (count, -1))[expert] = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {name: self._instead(value) for name, value in (kwargs or {}).items()}
        return func(*(self._instead(value) for value in args), **given)

    def _instead(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._instead(item) for item in value)
        return self._copies.get(id(value), value)
