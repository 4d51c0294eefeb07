"""Modules that route to experts: what a router inside of them chose."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from sinktrack.models.any_decoder.experts import Expert, NoExperts, NotTold, apart, everywhere
from sinktrack.models.any_decoder.stream import Stream
from sinktrack.models.any_decoder.watched import Watched
from sinktrack.models.tracer import Mark, _tensors, mark, mark_of

SORTS = {"sort", "argsort"}
PAIRS = {"topk", "max", "kthvalue", "sort"}
CHOOSES = PAIRS | SORTS | {"argmax", "multinomial"}
"""Functions by which a router may choose; of the pairs they give the second is the index."""


class Routers(Watched):
    """The routed experts of a pass."""

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before a module that may route."""
        first = next(_tensors(args, kwargs), None)
        shape = () if first is None else first.shape
        for outer in self.experts if shape else ():
            rows = math.prod(shape[:-1])
            outer.rows[id(module)] = outer.rows.get(id(module), 0) + rows
        self.experts.append(Expert(module, args, kwargs, attended=self.attended))

    def returned(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook after it."""
        while self.experts and (call := self.experts.pop()).module is not module:
            pass
        values = [v for v in _tensors((output,), {}) if self.rows(v) is not None]
        if not values or self.flow.replaying or self.parts is None or call.told:
            return
        picked = call.chosen or call.ranked
        count = picked[0] if picked else call.unseen(self.batch * self.length)
        if count is None or self.attended > call.attended:
            return
        for outer in self.experts:
            outer.told = True
        kind = type(module).__name__
        with self.flow.paused():
            try:
                if not picked:
                    raise NotTold(
                        f"{kind} holds {count} modules alike, of which some run on some tokens "
                        "alone, and by what function of torch it chooses was not seen"
                    )
                if isinstance(mark_of(values[0]), Stream):
                    raise NotTold(f"{kind} adds what they write to the stream itself")
                routed = (apart if self.parts == "p0" else everywhere)(call, values[0], self)
            except NoExperts as error:
                self._one_mlp(error)
                return
            except NotTold as error:
                self._one_mlp(error)
                self.found.experts = max(self.found.experts or 0, count)
                return
        self.found.experts = max(self.found.experts or 0, count)
        self.routed, self.found.told = (values[0], routed), True
        mark(values[0], Mark("experts"))

    def _one_mlp(self, error: NotTold) -> None:
        self.notes.append(f"{self.name()}: its experts are one MLP here: {error}")

    def chose(self, name: str, scores: Tensor, result: Any) -> None:
        """A topk, the largest of each row, or all in order: it may be a router's."""
        index = result if isinstance(result, Tensor) else result[1]
        total = self.batch * self.length
        if scores.ndim > 3 or not index.ndim:
            return
        index = index if index.ndim == scores.ndim else index.unsqueeze(-1)
        count, each = scores.shape[-1], index.shape[-1]
        if scores.numel() != total * count or index.numel() != total * each or count < 2:
            return
        for call in self.experts:
            if name in SORTS:
                call.ranked = (count, index)
            else:
                call.chose(count, index)


def may_route(module: nn.Module) -> bool:
    """Has it modules, or stacks of matrices, among which a router may choose?"""
    stacked = any(value.ndim == 3 for value in module.parameters(recurse=False))
    return stacked or next(module.children(), None) is not None
