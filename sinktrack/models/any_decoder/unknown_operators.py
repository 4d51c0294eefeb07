"""Attention by operators that nobody knows, recognized by their output."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sinktrack.attention import attend, edit_mask
from sinktrack.models.any_decoder.attention import Attentions
from sinktrack.models.any_decoder.by_value import alike
from sinktrack.models.tracer import Mark, _tensors, mark


class UnknownOperators(Attentions):
    """The operators of a pass that are no functions of torch for tensors."""

    def opaque(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Is an operator that nobody knows causal attention of its arguments?"""
        given = [v for value in _tensors(args, kwargs) if (v := self._apart(value)).ndim == 4]
        packed = [v for v in _tensors((result,), {}) if v.is_floating_point()]
        outputs = [v for v in packed if self._apart(v).ndim == 4]
        if len(given) < 3 or not outputs or not self.inside:
            return
        output = self._apart(outputs[0])
        scales = {given[0].shape[-1] ** -0.5}
        scales |= {float(v) for k, v in kwargs.items() if "scale" in k and isinstance(v, float)}
        scales |= {value for value in args if isinstance(value, float)}
        for turned in (True, False):
            query, key, value = (v.transpose(1, 2) if turned else v for v in given[:3])
            whole = output.transpose(1, 2) if turned else output
            if (query.shape[0], query.shape[2]) != (self.batch, self.length):
                continue
            if whole.shape[:3] != query.shape[:3] or key.shape[:3] != value.shape[:3]:
                continue
            if key.shape[2] != self.length or query.shape[1] % key.shape[1]:
                continue
            exact = [v.float() if v.element_size() < 4 else v for v in (query, key, value)]
            for scale, mask in product(scales, self._windows(args, kwargs, query.device)):
                own, attended = attend(
                    *exact, scale=scale, mask=mask, second_key=self.observer.second_key
                )
                if own.shape == whole.shape and alike(own, whole):
                    edited = edit_mask(mask, self.edit_mask, query) if self.editor else mask
                    if edited is not mask:
                        own, attended = attend(
                            *exact,
                            scale=scale,
                            mask=edited,
                            second_key=self.observer.second_key,
                            allow_future_keys=True,
                        )
                        whole.copy_(own)
                    self.show(name, attended, whole)
                    mark(outputs[0], Mark("mixed", heads=query.shape[1]))
                    others = _tensors((result,), {})
                    self.flow.score([value for value in others if value is not outputs[0]])
                    return
        self.went_as_attention = (
            f"{name} takes three tensors like queries, keys and values, and gives something else "
            "than causal softmax attention of them"
        )

    def _apart(self, value: Tensor) -> Tensor:
        """``[B, T, H, D]`` of sequences that are packed in ``[B * T, H, D]``."""
        if value.ndim != 3 or len(value) != self.batch * self.length:
            return value
        apart: Tensor = value.unflatten(0, (self.batch, self.length))
        return apart

    def _windows(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
    ) -> Iterator[Tensor | None]:
        """Masks of causal attention: all keys, or as many as a number among arguments says."""
        yield None
        given = [*args, *kwargs.values()]
        given += [item for value in given if isinstance(value, tuple | list) for item in value]
        sizes = {value for value in given if type(value) is int and 0 < value <= self.length}
        at = torch.arange(self.length, device=device)
        behind = at[:, None] - at
        for keys in sorted(sizes | {size + 1 for size in sizes}):  # its own counted, or not
            if keys < self.length:
                yield ((behind >= 0) & (behind < keys))[None, None]
