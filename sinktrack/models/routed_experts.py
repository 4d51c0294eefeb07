"""The routed experts of one block of a checkpoint, read as tokens come to them."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Mapping
from contextlib import suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sinktrack.archive.storage.safetensors_file import announce
from sinktrack.archive.storage.slices import DTYPES
from sinktrack.errors import ArchiveError

if TYPE_CHECKING:
    from sinktrack.models.streaming import Streamed

AT_ONCE = 32 * 2**20
"""Bytes of routed experts that are converted at a time: few enough for memory to be reused."""
_EXPECTED = 64 * 2**20
"""Bytes of routed experts that are on their way from a server at a time."""
_NEARLY = 0.9
"""Of the experts, from which share on a block counts as read whole: so will be the next."""


class Experts:
    """Routed experts whose weights are read when a token is routed to them.

    Args:
        streamed: the model.
        module: in one of its blocks.
        prefix: of the names of its weights in the model.
    """

    def __init__(self, streamed: Streamed, module: nn.Module, prefix: str) -> None:
        self._streamed = streamed
        self.count = int(getattr(module, "num_experts", 0))
        """Of experts."""
        self.targets = {
            name: streamed.targets[name]
            for own, _ in module.named_parameters()
            if self._divisible(name := f"{prefix}{own}")
        }
        """The weights that can be read expert by expert: their first dimension is the expert.

        In the checkpoint a group of names is one for each expert, or a single one for all."""
        self.values: dict[str, Tensor] = {}
        """Those weights on the device: of experts that no token came to, zeros."""
        self._read: set[int] = set()

    @property
    def nearly_all(self) -> bool:
        """Did tokens come to nearly all of the experts?"""
        return len(self._read) >= max(1, _NEARLY * self.count)

    def _divisible(self, target: str) -> bool:
        groups = self._streamed.names.get(target, [])
        return (
            self.count > 1
            and self._streamed.targets[target].shape[0] == self.count
            and bool(groups)
            and all(len(names) == self.count or self._is_table(names) for names in groups)
        )

    def _is_table(self, names: list[str]) -> bool:
        """Is one tensor on disk all experts, one after the other?"""
        shape = self._streamed.source.slice(names[0]).get_shape()
        return len(names) == 1 and shape[:1] == [self.count]

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the experts' forward: read those that the tokens are routed to."""
        if not self.targets:
            return
        index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        new = sorted(set(index.unique().tolist()) - self._read)
        new = [expert for expert in new if 0 <= expert < self.count]
        try:
            self._take(new)
        except BaseException:
            self.values, self._read = {}, set()  # part of it is another block's
            raise
        for name, value in self.values.items():
            self._streamed.put(name, value)
        if self.nearly_all:
            self._streamed.announce_following(experts=True)

    def _take(self, new: list[int]) -> None:
        """Read experts into their place."""
        bytes_each = sum(
            target[0].numel() * target.element_size() for target in self.targets.values()
        )
        size = max(1, AT_ONCE // bytes_each)
        many = len(new) > size
        if many:
            give_back()  # what attention left: the experts do not go there
        if not self.values:
            self.values = self._room(new)
        copied = self._stand_in_a_row()
        size = 1 if many and copied else size  # a conversion costs more for each call
        put = self._copy if copied else self._convert
        parts = [new[start : start + size] for start in range(0, len(new), size)]
        reader = self._streamed.reader
        expected = max(1, _EXPECTED // (bytes_each * size))
        self._expect(parts[:expected])
        coming = [reader.submit(self._fetch, part) for part in parts[:1]]
        for at, (part, next_part) in enumerate(zip_longest(parts, parts[1:])):
            tensors = coming.pop().result()  # one is read, one put in place
            self._expect(parts[at + expected : at + expected + 1])
            if next_part is not None:
                coming.append(reader.submit(self._fetch, next_part))
            put(part, tensors, self.values)
        if many:
            give_back()
        self._read |= set(new)

    def _room(self, wanted: list[int]) -> dict[str, Tensor]:
        """Memory for the weights, zero but for those of ``wanted``: of the last block's experts,
        if all of it was used, as a system takes as long to give fresh memory as to read the disk.
        """
        values = {}
        for name, target in self.targets.items():
            used = self._streamed.leftover(target)
            if used is None:
                values[name] = untouched(target, self._streamed.device)
                continue
            for expert in set(range(self.count)) - set(wanted):
                used[expert].zero_()
            values[name] = used
        return values

    def _expect(self, parts: list[list[int]]) -> None:
        """Have these experts on their way from a server."""
        if self._streamed.remote:
            announce(
                (self._streamed.source.slice(names[0]), expert, expert + 1)
                if len(names) == 1
                else (self._streamed.stored(names[expert]), 0, None)
                for experts in parts
                for expert in experts
                for target in self.targets
                for names in self._streamed.names[target]
            )

    def _fetch(self, experts: list[int]) -> dict[str, Tensor]:
        """From the checkpoint, what makes these experts."""
        weights: dict[str, Tensor] = {}
        for target in self.targets:
            for names in self._streamed.names[target]:
                if len(names) == 1:
                    whole = self._streamed.source.slice(names[0])
                    weights[names[0]] = torch.cat([whole[row : row + 1] for row in experts])
                else:
                    like = self._streamed.stored(names[0]).get_shape()
                    for expert in experts:
                        stored = self._streamed.stored(names[expert])
                        if stored.get_shape() != like:
                            raise ArchiveError(
                                f"{names[expert]} is {stored.get_shape()}, {names[0]} {like}; the "
                                "checkpoint does not fit its config.json"
                            )
                        weights[names[expert]] = stored[...]
        return weights

    def _stand_in_a_row(self) -> bool:
        """Does the conversion put an expert's tensors one behind the other, as they are stored?

        Then they can be copied, for less time than transformers' conversion takes.
        """
        known, weights = self._streamed.in_a_row, tuple(self.targets)
        if weights not in known:
            known[weights] = self._copies_as_converted()
        return known[weights]

    def _copies_as_converted(self) -> bool:
        """Whether random numbers say so."""
        random, tensors = torch.Generator().manual_seed(0), {}
        for target, like in self.targets.items():
            rows = 0
            for names in self._streamed.names[target]:
                stored = self._streamed.stored(names[0])
                fused = len(names) == 1
                shape = stored.get_shape()[fused:]
                if like.dim() < 2 or not shape or shape[1:] != list(like.shape[2:]):
                    return False
                rows += shape[0]
                numbers = torch.randn(shape, generator=random).to(DTYPES[stored.get_dtype()])
                tensors[names[0]] = numbers[None] if fused else numbers
            if rows != like.shape[1]:
                return False
        converted, copied = (
            {name: torch.empty_like(like[:1], device="cpu") for name, like in self.targets.items()}
            for _ in range(2)
        )
        self._convert([0], tensors, converted)
        self._copy([0], tensors, copied)
        return all(torch.equal(copied[name], value) for name, value in converted.items())

    def _copy(
        self, experts: list[int], tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> None:
        """Put the tensors of each expert one behind the other."""
        for target, value in values.items():
            for row, expert in enumerate(experts):
                parts = [
                    tensors[names[0]][row] if len(names) == 1 else tensors[names[expert]]
                    for names in self._streamed.names[target]
                ]
                places = value[expert].split([len(part) for part in parts])
                for place, part in zip(places, parts, strict=True):
                    place.copy_(part)

    def _convert(
        self, experts: list[int], tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> None:
        """Through transformers' conversion, as if the block had these experts alone."""
        for target, like in self.targets.items():
            shape = (len(experts), *like.shape[1:])
            self._streamed.put(target, torch.empty(shape, dtype=like.dtype, device="meta"))
        self._streamed.convert(tensors)
        for target, value in values.items():
            for expert, part in zip(experts, self._streamed.weight(target).detach(), strict=True):
                value[expert].copy_(part)


def untouched(like: Tensor, device: str, *, scattered: bool = False) -> Tensor:
    """Zeros that, on the CPU, take memory only where something is written.

    Args:
        like: of the same shape and dtype.
        device: where.
        scattered: small parts will be written here and there, each of which must not take a huge
            page.
    """
    if device != "cpu":
        return torch.zeros_like(like, device=device)
    pages = mmap.mmap(-1, math.prod(like.shape) * like.element_size())
    advice = "MADV_NOHUGEPAGE" if scattered else "MADV_HUGEPAGE"
    if hasattr(mmap, advice):  # Linux
        with suppress(OSError):
            pages.madvise(getattr(mmap, advice))
    return torch.frombuffer(pages, dtype=like.dtype).view(like.shape)


def give_back() -> None:
    """What freed weights leave goes back to the system, which glibc by itself does at the top of
    its heap alone."""
    with suppress(AttributeError, OSError, TypeError):  # elsewhere than on Linux
        ctypes.CDLL(None).malloc_trim(0)
