"""Modules whose output torch does not see being computed, such as those of a C++ extension.

What they compute is not known, but a module can be asked: it runs once more, in a pass whose
numbers are thrown away, on rows of which some are others. Where the rest comes out as before, and
those do not, what it gives at a position is a function of what it gets there. If it is added to the
stream, it is a write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sinktrack.models.any_decoder.by_value import distinct
from sinktrack.models.any_decoder.stream import Stream
from sinktrack.models.any_decoder.watched import Watched
from sinktrack.models.tracer import by_weight, mark, mark_of

_TIMES = 2.0**20
"""A stream is multiplied with it, which shows in what a module gives that adds the stream itself;
what it makes of a norm's output does not grow."""
_GROWS = 4
"""By how much it may, where a norm's eps held a small stream down."""
_ROUNDING = 64
"""Of a dtype's eps, in parts of a row's norm: what other rows may change in it."""


class OutOfSight(Watched):
    """The modules of a pass whose outputs come from nowhere."""

    asking = False
    """Are they asked in this pass?"""

    def gave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A hook after a module."""
        known = self.found.out_of_sight
        if known is None or self.flow.replaying or not self.inside:
            return
        given = distinct(_within((args, kwargs)))
        with self.flow.paused():
            if not any(map(self.flow.derived, given)):
                return
            leaves = list(_within(output))
            wide = [place for place, value in enumerate(leaves) if self._has_rows(value)]
            unknown = [place for place in wide if not self.flow.derived(leaves[place])]
            count = len(unknown)
            if self.asking and known.get(module, count) != count:
                known[module] = 0  # it gave a tensor again that it had given before
            elif not self.asking and any(self._is_old(leaves[place], given) for place in wide):
                self.lose(f"{type(module).__name__} gives a tensor once more that it gave before")
                return
            sums = self.flow._sums(given) if unknown else []
            self.changes = []
            for place in unknown:
                form = self.flow._by_value(leaves[place], sums)
                if form is not None:
                    mark(leaves[place], form)
            if self.changes:
                raise self.uneditable(f"{type(module).__name__} adds a write out of torch's sight")
            unknown = [n for n in unknown if mark_of(leaves[n]) is None]
            if self.asking and count and known.get(module, count):
                known[module] = count if self._follows(module, args, kwargs, unknown, leaves) else 0
            if known.get(module):
                for place in unknown:
                    self._mark(module, given, leaves[place])

    def _is_old(self, value: Tensor, given: list[Tensor]) -> bool:
        """Was it known before its module gave it, which is no router that was told apart?"""
        known = mark_of(value)
        passed = any(value is one for one in given)
        told = known is not None and known.origin == "experts"
        return self.flow.derived(value) and not passed and not told

    def _has_rows(self, value: Tensor) -> bool:
        return value.ndim > 0 and self.rows(value, value.shape[-1]) is not None

    def _follows(
        self, module: nn.Module, args: Any, kwargs: Any, unknown: list[int], leaves: list[Tensor]
    ) -> bool:
        """Is what a module gives at a position a function of what it gets there, and no sum with
        the stream?"""
        if not unknown:
            return True
        given = [value for value in _within((args, kwargs)) if self.flow.derived(value)]
        if self.length < 4 or not all(map(self._has_rows, given)):
            return False
        before = [leaves[place].detach().clone() for place in unknown]
        times = _TIMES if any(isinstance(mark_of(value), Stream) for value in given) else 2.0
        odd = torch.tensor([row.bit_count() % 2 for row in range(self.batch * self.length)])
        for parity in (1, 0):  # in no period, so that no distance between positions goes unseen
            at = (odd == parity).nonzero()[:, 0].to(before[0].device)
            again = self._again_with(module, args, kwargs, at, times)
            if again is None or len(again) != len(leaves):
                return False
            for own, place in zip(before, unknown, strict=True):
                old, new = leaves[place], again[place]
                memory = any(_shares(old, value) for value in (*given, new))
                if memory or old.shape != new.shape or not torch.equal(old, own):
                    return False
                if not self._by_position(own, new, at, times):
                    return False
        return True

    def _again_with(
        self, module: nn.Module, args: Any, kwargs: Any, at: Tensor, times: float
    ) -> list[Tensor] | None:
        """What a module gives where some rows are others; None where it does not run on them."""

        def other(value: Tensor) -> Tensor:
            if not value.is_floating_point() or not self.flow.derived(value):
                return value
            rows = self.rows(value, value.shape[-1])
            assert rows is not None
            flat = rows.flatten(0, 1).clone()
            flat[at] = flat[_in_place_of(at)] * times
            return self.like(flat.view(rows.shape), value)

        self.flow.replaying = True
        try:
            return list(_within(module(*_replaced(args, other), **_replaced(kwargs, other))))
        except Exception:  # whatever the code of others raises
            return None
        finally:
            self.flow.replaying = False

    def _by_position(self, old: Tensor, new: Tensor, at: Tensor, times: float) -> bool:
        """Are rows as they were but for some, which do not grow with a stream?"""
        left, right = self.rows(old, old.shape[-1]), self.rows(new, new.shape[-1])
        if left is None or right is None:
            return False
        one, two = left.flatten(0, 1).float(), right.flatten(0, 1).float()
        kept = torch.ones(len(one), dtype=torch.bool, device=at.device)
        kept[at] = False
        off = (one - two)[kept].norm(dim=-1)
        if not bool((off <= _ROUNDING * torch.finfo(old.dtype).eps * one[kept].norm(dim=-1)).all()):
            return False
        if torch.equal(one[at], two[at]):
            return False
        grown = two[at].norm(dim=-1) <= _GROWS * one[_in_place_of(at)].norm(dim=-1)
        return times == 2 or bool(grown.all())

    def _mark(self, module: nn.Module, given: list[Tensor], value: Tensor) -> None:
        """What a module gives stems from the stream, or from its attention or experts alone."""
        self.flow.derive(value)
        derived = [one for one in given if self.flow.derived(one)]
        known = mark_of(derived[0])
        if len(derived) > 1 or known is None or isinstance(known, Stream):
            return
        if known.origin == "mixed":
            mark(value, by_weight(module, derived[0], value) or known)
        elif known.origin in ("attention", "experts"):
            mark(value, known if known.raw is not None else replace(known, raw=derived[0]))


def _in_place_of(at: Tensor) -> Tensor:
    """Rows that take the place of some, half of these twice: a mean over all is another then."""
    return at[len(at) - 1 - torch.arange(len(at), device=at.device) // 2]


def _within(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _within(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _within(item)


def _replaced(value: Any, other: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(value, Tensor):
        return other(value)
    if isinstance(value, tuple | list):
        items = [_replaced(item, other) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {name: _replaced(item, other) for name, item in value.items()}
    return value


def _shares(one: Tensor, two: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
