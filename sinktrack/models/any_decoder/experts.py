"""Routed experts told apart: rows run again through their module, without each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sinktrack.errors import MeasurementError
from sinktrack.events import Routed, Uneditable

_ROUNDING = 64
"""Of a dtype's eps, in parts of the largest output: what another number of rows may change."""

_SUM_ROUNDING = 4
"""Of a dtype's eps, for each chosen expert, in parts of a row's norm."""


_NO_SUM = "its output is no sum of what its chosen experts write and of what needs none"


class NotTold(Exception):
    """The experts of a block cannot be told apart, and why."""


class NoExperts(NotTold):
    """Nothing in a module is of as many parts as what looks like its router has choices."""


@dataclass
class Expert:
    """A module that runs, and what a router inside it chose."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    chosen: tuple[int, Tensor] | None = None
    """How many experts there are, and the chosen ones of all positions, ``K`` each."""
    ranked: tuple[int, Tensor] | None = None
    """The same where all are sorted, and how many of them are taken is not said."""
    attended: int = 0
    """How many attentions the block had by then."""
    rows: dict[int, int] = field(default_factory=dict)
    """Of modules that ran inside, by id: on how many rows."""
    told: bool = False
    """Has a module inside of it been told apart, or not?"""

    def chose(self, count: int, index: Tensor) -> None:
        """A router took these: beside those that it took before, if all are others."""
        if self.chosen is not None and self.chosen[0] == count:
            before = self.chosen[1]
            if before.shape[:-1] == index.shape[:-1]:
                same = before[..., :, None] == index[..., None, :]
                if bool(same.any(-2).all()):
                    return
                if not bool(same.any()):
                    index = torch.cat([before, index], -1)
        self.chosen = (count, index)

    def unseen(self, total: int) -> int | None:
        """Of how many modules alike some ran on fewer rows than there are, if any did."""
        for held in self.module.modules():
            items = list(held.children()) if isinstance(held, nn.ModuleList | nn.ModuleDict) else []
            if len(items) < 2 or len({type(item) for item in items}) > 1:
                continue
            ran = [self.rows.get(id(item), 0) for item in items]
            if any(ran) and any(rows < total for rows in ran):
                return len(items)
        return None


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


class _Rerun:
    """Some rows run once more through a module that routes."""

    def __init__(self, call: Expert, output: Tensor, layout: Layout) -> None:
        chosen = call.chosen or call.ranked
        assert chosen is not None
        self._call, self._layout = call, layout
        self.count, index = chosen
        rows = layout.rows(index.float(), index.shape[-1])
        seen = layout.rows(output)
        assert seen is not None
        if rows is None:
            raise NotTold("the order of what its router chose cannot be told")
        self.chosen = rows.long()
        """``[B, T, K]``."""
        self.seen = seen.detach().clone()  # what comes to it may be added in place
        """``[B, T, D]``: what the module gave."""
        self._eps = torch.finfo(output.dtype).eps
        self._rounding = _ROUNDING * self._eps
        self.experts = _remover(call.module, self.count)
        if call.chosen is None:
            self.chosen = self._taken(self.chosen)

    def _taken(self, ranked: Tensor) -> Tensor:
        """``[B, T, K]`` of all experts in an order: the first or the last ones, as P0's rows tell.

        Raises:
            NotTold: neither.
        """
        layout = self._layout
        everyone = torch.arange(layout.batch, device=ranked.device) * layout.length
        whole = self(everyone)
        acts = torch.zeros(len(whole), self.count, dtype=torch.bool, device=ranked.device)
        for expert in range(self.count):
            with self.experts(expert):
                off = (whole - self(everyone)).abs().amax(-1)
            acts[:, expert] = off > self._eps * whole.abs().amax()
        taken = acts.gather(1, ranked[:, 0])
        each = int(taken.sum(1).amax())
        for columns in (slice(0, each), slice(self.count - each, None)):
            if 0 < each < self.count and bool(taken[:, columns].all()):
                return ranked[..., columns]
        raise NotTold("which of those that it sorts it takes cannot be told")

    def __call__(self, at: Tensor) -> Tensor:
        """float32 ``[n, D]`` of rows by their number among those of all sequences."""
        layout, call = self._layout, self._call
        args = [_rows(value, at, layout) for value in call.args]
        kwargs = {name: _rows(value, at, layout) for name, value in call.kwargs.items()}
        result = call.module.forward(*args, **kwargs)
        if isinstance(result, tuple | list):
            result = next(v for v in result if v.numel() == len(at) * layout.width)
        rows: Tensor = result.reshape(len(at), layout.width).detach().float()
        return rows

    def same(self, one: Tensor, two: Tensor, like: Tensor) -> bool:
        """Equal to rounding, in parts of the largest number of another?"""
        return bool(((one - two).abs() <= self._rounding * float(like.abs().max())).all())

    def sums(self, rest: Tensor, whole: Tensor, parts: Tensor) -> bool:
        """Is the whole ``[n, D]`` what is left without experts, and ``[n, K, D]`` of these?"""
        scale = torch.cat([whole[:, None], parts], 1).norm(dim=-1).amax(1)
        off = (whole - parts.sum(1) - rest).norm(dim=-1)
        each = max(2, parts.shape[1])
        return bool((off <= _SUM_ROUNDING * each * self._eps * scale).all())

    def is_linear(self, at: Tensor, expert: int | None, whole: Tensor, left: Tensor) -> bool:
        """Does half of what an expert yields, or all of them, make half of the difference?"""
        wanted = (whole + left) / 2
        scale = torch.maximum(whole.norm(dim=-1), left.norm(dim=-1))
        for place in range(self.experts.ways):
            with self.experts(expert, 0.5, place):
                off = (self(at) - wanted).norm(dim=-1)
            if bool((off <= 2 * _SUM_ROUNDING * self._eps * scale).all()):
                return True
        return False

    def gate(self, written: Tensor, ungated: list[Tensor]) -> Tensor:
        """As of `_gate`."""
        return _gate(written, ungated, self._rounding)


def _apart(call: Expert, output: Tensor, layout: Layout) -> Routed:
    again = _Rerun(call, output, layout)
    chosen = again.chosen[:, 0]
    each = chosen.shape[1]
    written = again.seen[:, 0].float()
    everyone = torch.arange(layout.batch, device=chosen.device) * layout.length
    whole = again(everyone)
    if not again.same(whole, written, written):
        raise NotTold("alone, P0 gets another output than in its sequence")
    without = again.experts
    parts = torch.zeros(len(chosen), each, layout.width, device=chosen.device)
    gates = torch.full((len(chosen), each), torch.nan, device=chosen.device)
    for expert in chosen.unique().tolist():
        at, place = (chosen == expert).nonzero(as_tuple=True)
        other = (chosen != expert).all(-1).nonzero()[:1, 0]
        with without(expert) as ungated:
            left = again(everyone[torch.cat([at, other])])
        if not again.same(left[len(at) :], whole[other], written):
            raise NotTold("what looks like an expert acts on tokens that did not choose it")
        parts[at, place] = whole[at] - left[: len(at)]
        gates[at, place] = again.gate(parts[at, place], ungated)
    if bool((whole != 0).any()) and not bool((parts != 0).any()):
        raise NotTold("none of what looks like its experts changes its output")
    with without(None):
        rest = again(everyone)
    alone = bool(((parts != 0).any(-1).sum(-1) < 2).any())  # of one part any sum would do
    if not again.sums(rest, whole, parts) or (
        alone and not again.is_linear(everyone, None, whole, rest)
    ):
        raise NotTold(_NO_SUM)

    def outputs(position: int) -> Tensor:
        return parts

    def of(expert: int) -> Tensor:
        raise MeasurementError("of a measurement, experts are told apart at P0 alone")

    return Routed(chosen[:, None], lambda: gates[:, None], outputs, of, lambda: again.seen, 1.0)


def everywhere(call: Expert, output: Tensor, layout: Layout) -> Routed:
    """What each expert writes at every position, told when it is asked for.

    Args:
        call: the module that holds router and experts.
        output: what it gave.
        layout: of its tensors.

    Raises:
        NotTold: with the reason; what it gives raises `Uneditable`.
    """
    layout.flow.replaying = True
    try:
        again = _Rerun(call, output, layout)
    finally:
        layout.flow.replaying = False
    chosen, whole = again.chosen, again.seen.flatten(0, 1).float()
    name, without = type(call.module).__name__, again.experts

    @cache
    def check() -> None:
        """Do the parts make the whole, at the first and the last position?"""
        shown = torch.tensor([0, layout.length - 1], device=chosen.device)
        at = torch.arange(layout.batch, device=chosen.device)[:, None] * layout.length + shown
        at = at.flatten()
        own = chosen.flatten(0, 1)[at]
        layout.flow.replaying = True
        try:
            before = again(at)
            with without(None):
                rest = again(at)
            parts = torch.zeros(*own.shape, layout.width, device=chosen.device)
            for expert in own.unique().tolist():
                with without(expert):
                    part = before - again(at)
                parts = torch.where((own == expert)[..., None], part[:, None], parts)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise Uneditable(f"some tokens do not run through {name}: {error}") from error
        finally:
            layout.flow.replaying = False
        if not again.sums(rest, before, parts):
            raise Uneditable(f"of {name}, {_NO_SUM}")

    @cache
    def told(expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Its part ``[B, T, D]``, its gates ``[B, T]``, and what it yields before them."""
        flat = chosen.flatten(0, 1)
        part = torch.zeros_like(whole)
        gate, own = torch.full_like(whole[:, 0], torch.nan), torch.full_like(whole, torch.nan)
        at = (flat == expert).any(-1).nonzero()[:, 0]
        other = (flat != expert).all(-1).nonzero()[:1, 0]
        rows = torch.cat([at, other])
        if len(at):
            layout.flow.replaying = True
            try:
                before = again(rows)
                with without(expert) as ungated:
                    left = again(rows)
                linear = again.is_linear(rows, expert, before, left)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise Uneditable(f"some tokens do not run through {name}: {error}") from error
            finally:
                layout.flow.replaying = False
            if not again.same(before, whole[rows], whole[rows]):
                raise Uneditable(f"in {name} some tokens get another output than among the others")
            if not again.same(left[len(at) :], before[len(at) :], before):
                raise Uneditable(
                    f"what looks like an expert of {name} acts on tokens that did not choose it"
                )
            if not linear:
                raise Uneditable(f"of {name}, {_NO_SUM}")
            check()
            part[at] = before[: len(at)] - left[: len(at)]
            factor = again.gate(part[at], ungated)
            gate[at] = factor.where(factor != 0, torch.nan)  # lost in rounding
            if not bool(factor.isnan().any()):
                own[at] = ungated[0].reshape(-1, layout.width)[: len(at)].float()
        shape = chosen.shape[:2]
        return part.unflatten(0, shape), gate.unflatten(0, shape), own.unflatten(0, shape)

    def of(expert: int) -> Tensor:
        return told(expert)[0]

    def gates() -> Tensor:
        found = torch.full(chosen.shape, torch.nan, device=chosen.device)
        for expert in chosen.unique().tolist():
            found = torch.where(chosen == expert, told(expert)[1][..., None], found)
        return found

    def total() -> Tensor:
        return sum((of(expert) for expert in chosen.unique().tolist()), torch.zeros(()))

    def outputs(position: int) -> Tensor:
        own = chosen[:, position]
        found = torch.zeros(*own.shape, layout.width, device=chosen.device)
        for expert in own.unique().tolist():
            found = torch.where((own == expert)[..., None], of(expert)[:, position, None], found)
        return found

    return Routed(chosen, gates, outputs, of, total, 1.0, lambda expert: told(expert)[2])


def _rows(value: Any, at: Tensor, layout: Layout) -> Any:
    """Of a tensor of all positions some rows by number, in as many dimensions."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    found = layout.rows(value, value.shape[-1])
    if found is None:
        return value
    chosen = found.flatten(0, 1)[at]
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


class _Remover(Protocol):
    """How to silence experts."""

    ways: int
    """In how many places what they yield may be multiplied."""

    def __call__(
        self, expert: int | None, factor: float = 0.0, way: int | None = None
    ) -> AbstractContextManager[list[Tensor]]:
        """Inside, what one yields, or all, is multiplied with a factor.

        Args:
            expert: its number; None for all.
            factor: with which.
            way: the place, by number; all by default.
        """


def _remover(module: nn.Module, count: int) -> _Remover:
    """How to silence one of as many experts, or all.

    Raises:
        NotTold: they cannot be; `NoExperts` where there are none.
    """
    for held in module.modules():
        if isinstance(held, nn.ModuleList | nn.ModuleDict) and len(held) == count:
            return _Modules(list(held.children()))
    return _Stacks(module, count)


class _Modules:
    """Of modules: the output."""

    ways = 1

    def __init__(self, experts: list[nn.Module]) -> None:
        self._experts = experts

    @contextmanager
    def __call__(
        self, expert: int | None, factor: float = 0.0, way: int | None = None
    ) -> Iterator[list[Tensor]]:
        ungated: list[Tensor] = []

        def less(module: nn.Module, args: Any, output: Any) -> Any:
            if module in self._experts and isinstance(output, Tensor):
                ungated.append(output.detach())
            return _times(output, factor)

        with ExitStack() as stack:
            for own in self._experts if expert is None else [self._experts[expert]]:
                whole = type(own).forward is not nn.Module.forward  # else what it holds is called
                for part in [own] if whole else own.children():
                    stack.callback(part.register_forward_hook(less).remove)
            yield ungated


def _times(output: Any, factor: float) -> Any:
    if isinstance(output, tuple | list):
        return type(output)(_times(value, factor) for value in output)
    if not isinstance(output, Tensor):
        return output
    return output * factor if factor else torch.zeros_like(output)


class _Stacks:
    """Of matrices, stacked or one below the other: their rows."""

    def __init__(self, module: nn.Module, count: int) -> None:
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
            raise NoExperts(
                "they are neither a ModuleList of as many modules as the router has choices nor "
                "matrices, stacked or one below the other"
            )
        self._owners, self._count, self.ways = owners, count, len(owners)

    @contextmanager
    def __call__(
        self, expert: int | None, factor: float = 0.0, way: int | None = None
    ) -> Iterator[list[Tensor]]:
        owners = self._owners if way is None else [self._owners[way]]
        with _Scaled(owners, expert, self._count, factor):
            yield []


class _Scaled(TorchFunctionMode):
    """Functions are given copies of stacked matrices, one expert's multiplied with a factor."""

    def __init__(
        self, stacks: list[nn.Parameter], expert: int | None, count: int, factor: float
    ) -> None:
        super().__init__()
        self._copies = {id(stack): stack.detach().clone() for stack in stacks}
        for copy in self._copies.values():
            rows = copy.unflatten(0, (count, -1))[slice(None) if expert is None else expert]
            rows.copy_(rows * factor if factor else torch.zeros_like(rows))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {name: self._instead(value) for name, value in (kwargs or {}).items()}
        return func(*(self._instead(value) for value in args), **given)

    def _instead(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._instead(item) for item in value)
        return self._copies.get(id(value), value)
