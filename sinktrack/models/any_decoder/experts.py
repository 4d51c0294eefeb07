"""Routed experts told apart: rows run again through their module, without each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
        self.length = layout.length
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
            with self.experts({expert: 0.0}):
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

    def left(self, at: Tensor) -> Tensor:
        """Those rows where no expert yields anything."""
        with self.experts(dict.fromkeys(range(self.count), 0.0)):
            return self(at)

    def is_linear(self, at: Tensor, factors: Factors, wanted: Tensor, scale: Tensor) -> bool:
        """Are these rows ``[n, D]`` what comes out where experts yield so many times as much?

        Args:
            at: rows, as of `__call__`.
            factors: what experts yield is multiplied with.
            wanted: ``[n, D]``.
            scale: ``[n]``, a norm that rounding goes with.
        """
        for place in reversed(range(self.experts.ways)):  # as a rule the last matrices write
            with self.experts(factors, place):
                off = (self(at) - wanted).norm(dim=-1)
            if bool((off <= 2 * _SUM_ROUNDING * self._eps * scale).all()):
                return True
        return False

    def gate(self, written: Tensor, ungated: list[Tensor], at: Tensor, among: int) -> Tensor:
        """``[n]``: what an expert's own output is multiplied with; nan where that is not shown.

        Args:
            written: ``[n, D]``: its part.
            ungated: what it yielded.
            at: the rows that chose it, among as many that ran.
        """
        unknown = torch.full((len(written),), torch.nan, device=written.device)
        if len(ungated) != 1 or ungated[0].numel() < written.numel():
            return unknown
        own = ungated[0].reshape(-1, written.shape[1]).float()
        own = own[at] if len(own) == among else own[: len(written)]
        gate = (own * written).sum(-1) / (own * own).sum(-1)
        error = (gate[:, None] * own - written).abs().amax()
        return gate if float(error) <= self._rounding * float(written.abs().max()) else unknown


def _apart(call: Expert, output: Tensor, layout: Layout) -> Routed:
    again = _Rerun(call, output, layout)
    chosen = again.chosen[:, 0]
    written = again.seen[:, 0].float()
    everyone = torch.arange(layout.batch, device=chosen.device) * layout.length
    whole = again(everyone)
    if not again.same(whole, written, written):
        raise NotTold("alone, P0 gets another output than in its sequence")
    one_by_one = [[expert] for expert in chosen.unique().tolist()]
    for groups in (_groups(chosen), one_by_one):
        parts, gates = _left_out(again, chosen, groups, whole, written)
        if _make(again, everyone, chosen, groups, whole, again.left(everyone), parts):
            break
        if len(groups) == len(one_by_one):
            raise NotTold(_NO_SUM)
    seen = again.seen  # and not what has copies of matrices

    def outputs(position: int) -> Tensor:
        return parts

    def of(expert: int) -> Tensor:
        raise MeasurementError("of a measurement, experts are told apart at P0 alone")

    return Routed(chosen[:, None], lambda: gates[:, None], outputs, of, lambda: seen, 1.0)


def _groups(chosen: Tensor) -> list[list[int]]:
    """Experts that may be left out together: no row of ``[B, K]`` chose two, and one chose none."""
    groups: list[tuple[list[int], set[int]]] = []
    for expert in chosen.unique().tolist():
        rows = set((chosen == expert).any(-1).nonzero()[:, 0].tolist())
        for experts, taken in groups:
            if not rows & taken and len(rows | taken) < len(chosen):
                experts.append(expert)
                taken |= rows
                break
        else:
            groups.append(([expert], rows))
    return [experts for experts, _ in groups]


def _left_out(
    again: _Rerun, chosen: Tensor, groups: list[list[int]], whole: Tensor, written: Tensor
) -> tuple[Tensor, Tensor]:
    """What each chosen expert writes ``[B, K, D]``, and its gates ``[B, K]``.

    Args:
        again: P0's rows.
        chosen: ``[B, K]``.
        groups: those that are left out together.
        whole: ``[B, D]``, with all.
        written: the same in the pass.

    Raises:
        NotTold: an expert acts on tokens that did not choose it, or none acts.
    """
    everyone = torch.arange(len(chosen), device=chosen.device) * again.length
    parts = torch.zeros(*chosen.shape, whole.shape[-1], device=chosen.device)
    gates = torch.full(chosen.shape, torch.nan, device=chosen.device)
    for experts in groups:
        out = torch.isin(chosen, torch.tensor(experts, device=chosen.device))
        others = (~out).all(-1)
        with again.experts(dict.fromkeys(experts, 0.0)) as ungated:
            less = whole - again(everyone)
        if not again.same(less[others], torch.zeros_like(less[others]), written):
            raise NotTold("what looks like an expert acts on tokens that did not choose it")
        for expert in experts:
            at, place = (chosen == expert).nonzero(as_tuple=True)
            parts[at, place] = less[at]
            gates[at, place] = again.gate(less[at], ungated.get(expert, []), at, len(chosen))
    if bool((whole != 0).any()) and not bool((parts != 0).any()):
        raise NotTold("none of what looks like its experts changes its output")
    return parts, gates


def _make(
    again: _Rerun,
    at: Tensor,
    chosen: Tensor,
    groups: list[list[int]],
    whole: Tensor,
    rest: Tensor,
    parts: Tensor,
) -> bool:
    """Do the parts ``[B, K, D]`` and the rest ``[B, D]`` make the whole, and no others would?"""
    if not again.sums(rest, whole, parts):
        return False
    alone = bool(((parts != 0).any(-1).sum(-1) < 2).any())  # of one part any sum would do
    if not alone and all(len(experts) == 1 for experts in groups):
        return True
    factors = {
        expert: (place + 0.5) / len(experts)  # those of a group might be mistaken for each other
        for experts in groups
        for place, expert in enumerate(experts)
    }
    by_place = torch.zeros_like(chosen, dtype=torch.float32)
    for expert, factor in factors.items():
        by_place[chosen == expert] = factor
    wanted = rest + (parts * by_place[..., None]).sum(1)
    scale = torch.cat([whole[:, None], rest[:, None], parts], 1).norm(dim=-1).amax(1)
    return again.is_linear(at, factors, wanted, scale)


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
            before, rest = again(at), again.left(at)
            parts = torch.zeros(*own.shape, layout.width, device=chosen.device)
            for expert in own.unique().tolist():
                with without({expert: 0.0}):
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
                with without({expert: 0.0}) as ungated:
                    left = again(rows)
                scale = torch.maximum(before.norm(dim=-1), left.norm(dim=-1))
                linear = again.is_linear(rows, {expert: 0.5}, (before + left) / 2, scale)
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
            yielded = ungated.get(expert, [])
            factor = again.gate(part[at], yielded, torch.arange(len(at)), len(rows))
            gate[at] = factor.where(factor != 0, torch.nan)  # lost in rounding
            if not bool(factor.isnan().any()):
                own[at] = yielded[0].reshape(-1, layout.width)[: len(at)].float()
        shape = chosen.shape[:2]
        return part.unflatten(0, shape), gate.unflatten(0, shape), own.unflatten(0, shape)

    def of(expert: int) -> Tensor:
        return told(expert)[0]

    def gates() -> Tensor:
        gates = torch.full(chosen.shape, torch.nan, device=chosen.device)
        for expert in chosen.unique().tolist():
            gates = torch.where(chosen == expert, told(expert)[1][..., None], gates)
        return gates

    def total() -> Tensor:
        return sum((of(expert) for expert in chosen.unique().tolist()), torch.zeros(()))

    def outputs(position: int) -> Tensor:
        own = chosen[:, position]
        outputs = torch.zeros(*own.shape, layout.width, device=chosen.device)
        for expert in own.unique().tolist():
            outputs = torch.where(
                (own == expert)[..., None], of(expert)[:, position, None], outputs
            )
        return outputs

    return Routed(chosen, gates, outputs, of, total, 1.0, lambda expert: told(expert)[2])


def _rows(value: Any, at: Tensor, layout: Layout) -> Any:
    """Of a tensor of all positions some rows by number, in as many dimensions."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    rows = layout.rows(value, value.shape[-1])
    if rows is None:
        return value
    chosen = rows.flatten(0, 1)[at]
    if value.ndim == 2:
        return chosen
    return chosen[None] if layout.time_first else chosen[:, None]


Factors = Mapping[int, float]
"""What experts yield is multiplied with, by number."""


class _Remover(Protocol):
    """How to silence experts."""

    ways: int
    """In how many places what they yield may be multiplied."""

    def __call__(
        self, factors: Factors, way: int | None = None
    ) -> AbstractContextManager[dict[int, list[Tensor]]]:
        """Inside, what some experts yield is multiplied with a factor.

        Args:
            factors: by expert.
            way: the place, by number; all by default.

        Returns:
            What they yield, by expert, where it is shown.
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
        self, factors: Factors, way: int | None = None
    ) -> Iterator[dict[int, list[Tensor]]]:
        ungated: dict[int, list[Tensor]] = {}

        def less(expert: int, is_whole: bool) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                if is_whole and isinstance(output, Tensor):
                    ungated.setdefault(expert, []).append(output.detach())
                return _times(output, factors[expert])

            return hook

        with ExitStack() as stack:
            for expert in factors:
                own = self._experts[expert]
                whole = type(own).forward is not nn.Module.forward  # else what it holds is called
                for part in [own] if whole else own.children():
                    stack.callback(part.register_forward_hook(less(expert, whole)).remove)
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
        self._count, self.ways = count, len(owners)
        self._scaled = [_Copy(owner, count) for owner in owners]

    @contextmanager
    def __call__(
        self, factors: Factors, way: int | None = None
    ) -> Iterator[dict[int, list[Tensor]]]:
        owners = self._scaled if way is None else [self._scaled[way]]
        with _Instead({id(own.owner): own.times(factors) for own in owners}):
            yield {}


class _Copy:
    """Stacked matrices, some of them multiplied with a factor: one copy for all factors."""

    def __init__(self, owner: nn.Parameter, count: int) -> None:
        self.owner, self._count = owner, count
        self._copy: Tensor | None = None
        self._now: dict[int, float] = {}

    def times(self, factors: Factors) -> Tensor:
        """The matrices; what was given before changes with it."""
        if self._copy is None:
            self._copy = self.owner.detach().clone()
        rows, before = (
            value.unflatten(0, (self._count, -1)) for value in (self._copy, self.owner.detach())
        )
        for expert in self._now.keys() | factors.keys():
            wanted = factors.get(expert, 1.0)
            if self._now.get(expert, 1.0) == wanted:
                continue
            if wanted:
                torch.mul(before[expert], wanted, out=rows[expert])
            else:
                rows[expert].zero_()  # also what is not finite
        self._now = dict(factors)
        return self._copy


class _Instead(TorchFunctionMode):
    """Functions are given other tensors than some, by id."""

    def __init__(self, others: dict[int, Tensor]) -> None:
        super().__init__()
        self._others = others

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {name: self._instead(value) for name, value in (kwargs or {}).items()}
        return func(*(self._instead(value) for value in args), **given)

    def _instead(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._instead(item) for item in value)
        return self._others.get(id(value), value)
