"""A checkpoint's model with the weights of one block at a time.

The model is built on the meta device, where it takes no memory, and transformers' own weight
conversion fills a block from the checkpoint's tensors. Of routed experts only those are read that a
token is routed to, of the embedding only the rows of the probe's tokens.
"""

from __future__ import annotations

import ctypes
import inspect
import math
import mmap
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from sinktrack.archive.foreign import some
from sinktrack.archive.huggingface import empty, prefix_of
from sinktrack.archive.source import Source, fitting
from sinktrack.archive.storage.slices import Slice
from sinktrack.errors import ArchiveError
from sinktrack.models.huggingface import Decoder, decoder, is_experts

_AT_ONCE = 32 * 2**20
"""Bytes of routed experts that are converted at a time: few enough for memory to be reused."""
_READERS = 8
"""Weights that are read ahead at the same time: a server answers each after a while."""
_BETWEEN = 64 * 2**10
"""Bytes between two rows that are read with them: less than another request to a server costs."""
_NO_PLAN: dict[str, Any] = (
    {"tp_plan": None}  # before transformers 5.9 or so, which takes it from the model
    if "tp_plan" in inspect.signature(convert_and_load_state_dict_in_model).parameters
    else {}
)
KEPT = 2**29
"""Bytes of weights up to which a model is read once and kept, where it will be run repeatedly."""


class Streamed:
    """A model whose blocks have weights only inside of `block`.

    Args:
        source: the checkpoint.
        device: where to compute.
        dtype: such as ``bfloat16``; by default one in which no stored weight is rounded.
        head: will the language head be needed, and the blocks more than once?

    Raises:
        ArchiveError: transformers does not know the architecture, or a weight is missing, damaged,
            quantized, of another shape, or has no place in the model.
        MeasurementError: not a decoder whose blocks can be found.
    """

    def __init__(
        self,
        source: Source,
        device: str = "cpu",
        dtype: str | None = None,
        *,
        head: bool = False,
    ) -> None:
        self._source, self._device = source, device
        self.read_ahead = torch.device(device).type != "cpu" or not source.files.local
        """Read the following block's weights, but for routed experts, while this one computes. From
        a disk to the CPU they would wait in the very memory that is to be saved."""
        self._ahead: Future[dict[str, Tensor]] | None = None
        self.reader = ThreadPoolExecutor(1)
        """Reads while others convert or compute."""
        skeleton = empty(source, dtype, head=head)
        self.model, self._names, self._text = skeleton.model, skeleton.names, skeleton.prefix
        self.decoder: Decoder = replace(decoder(skeleton.text), model=self.model)
        self._targets = dict(self.model.state_dict())
        if head:
            lacking = [name for name in self._behind() if not self._names.get(name)]
            if lacking:
                raise ArchiveError(
                    f"{source.files.location}: {len(lacking)} weights missing ({some(lacking)}); "
                    "the checkpoint does not fit its config.json"
                )
        self._keeps = head and sum(value.nbytes for value in self._targets.values()) <= KEPT
        self._kept: dict[int, dict[nn.Module, _Experts]] = {}
        """By block with its weights, what reads its experts."""
        self._largest = max(weight.numel() for weight in self._targets.values())
        self._load_config = LoadStateDictConfig(
            dtype=self.model.dtype,
            dtype_plan=self.model._get_dtype_plan(self.model.dtype),
            device_map={"": device},
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        self._prefixes = {
            index: prefix_of(self.model, block) for index, block in self.decoder.blocks.items()
        }

    @property
    def bytes_read(self) -> int:
        """Of the checkpoint, so far."""
        count: int = self._source.files.bytes_read
        return count

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def base(self) -> PreTrainedModel:
        """The model without its language head, which a probe does not need."""
        base: PreTrainedModel = self.model.base_model
        return base

    @property
    def largest_block(self) -> int:
        """Bytes of the weights of the largest block."""
        sizes = [
            sum(int(self._targets[name].nbytes) for name in self._own(index))
            for index in self._prefixes
        ]
        return max(sizes)

    def load_surroundings(self, tokens: Tensor) -> None:
        """Read what the text decoder has outside of its blocks.

        Args:
            tokens: int64, the token ids whose embedding is wanted.

        Raises:
            ArchiveError: a weight is missing, damaged or of another shape.
        """
        for name, buffer in list(self.model.named_buffers()):
            if name in self._targets:
                continue
            if buffer.is_meta:  # is not saved, and made anew from the configuration
                unset = torch.nan if buffer.is_floating_point() else 0  # what is not is refused
                buffer = torch.full_like(buffer, unset, device=self._device)
            self._put(name, buffer.to(self._device))
        self.model.initialize_weights()  # for the first time: a second call does nothing
        text, blocks = self._text, tuple(self._prefixes.values())
        own = {
            name for name in self._targets if name.startswith(text) and not name.startswith(blocks)
        }
        table = f"{prefix_of(self.model, self.base.get_input_embeddings())}weight"
        self._load(own - self._load_rows(table, tokens))

    @contextmanager
    def head(self) -> Iterator[None]:
        """What stands behind the `base`, with its weights, which are freed on leaving.

        Raises:
            ArchiveError: a weight is missing, damaged or of another shape.
        """
        own = self._behind()
        tied = {
            name: other
            for name, other in self.model.all_tied_weights_keys.items()
            if name in own and self._names.get(name) is self._names.get(other)
        }
        before = {name: self._get(name).detach() for name in {*own, *tied.values()}}
        try:
            for name in before:
                self._put(name, self._targets[name])
            self._load(own - tied.keys())
            for name, other in tied.items():  # stored for both, under either name
                self.convert({source: self._slice(source) for source in self._sources([name])})
                if self._get(name).is_meta:
                    self._put(name, self._get(other).detach())
            yield
        finally:
            for name, value in before.items():
                self._put(name, value)
            _give_back()

    def _behind(self) -> set[str]:
        """The weights that the `base` does not hold."""
        base = prefix_of(self.model, self.base)
        return {name for name in self._targets if not name.startswith(base)}

    @contextmanager
    def block(self, index: int, following: int | None = None) -> Iterator[nn.Module]:
        """The block with its weights, which are freed on leaving, unless the model is small.

        Routed experts are read when tokens come to them.

        Args:
            index: its number.
            following: the block that comes next, to read ahead.

        Raises:
            ArchiveError: a weight is missing, damaged or of another shape.
        """
        block, own, hooks = self.decoder.blocks[index], self._own(index), []
        try:
            if index not in self._kept:
                experts = self._experts(index)
                self._load(own - _later(experts))
                self._kept[index] = experts
            for module, weights in self._kept[index].items():
                hook = module.register_forward_pre_hook(weights.read, with_kwargs=True)
                hooks.append(hook)
            if self.read_ahead and following is not None and following not in self._kept:
                self._ahead = self.reader.submit(self._read, following)
            yield block
        finally:
            for hook in hooks:
                hook.remove()
            if not (self._keeps and index in self._kept):
                self._kept.pop(index, None)
                for name in own:
                    self._put(name, self._targets[name])
                _give_back()

    def _own(self, index: int) -> set[str]:
        prefix = self._prefixes[index]
        return {name for name in self._targets if name.startswith(prefix)}

    def _experts(self, index: int) -> dict[nn.Module, _Experts]:
        return {
            module: _Experts(self, module, f"{self._prefixes[index]}{path}.")
            for path, module in self.decoder.blocks[index].named_modules()
            if is_experts(module)
        }

    def _read(self, index: int) -> dict[str, Tensor]:
        names = self._sources(self._own(index) - _later(self._experts(index)))
        with ThreadPoolExecutor(_READERS) as readers:
            read = readers.map(lambda name: self._slice(name)[...], names)
            return dict(zip(names, read, strict=True))

    def _slice(self, name: str) -> Slice:
        return fitting(self._source, name, self._largest)

    def _sources(self, targets: Collection[str]) -> list[str]:
        return [name for t in targets for group in self._names.get(t, []) for name in group]

    def _load_rows(self, table: str, tokens: Tensor) -> set[str]:
        """Of an embedding table the rows of these tokens, if it can be read by rows."""
        names = self._names.get(table, [])
        target = self._targets[table]
        if len(names) != 1 or len(names[0]) != 1:
            return set()
        rows = self._source.slice(names[0][0])
        if list(rows.get_shape()) != list(target.shape):
            return set()
        value = _untouched(target, self._device, scattered=True)
        width = math.prod(target.shape[1:]) * target.element_size()
        for first, last, wanted in _neighbours(tokens.unique().tolist(), width):
            read = rows[first:last].to(value)
            value[wanted] = read[[token - first for token in wanted]]
        self._put(table, value)
        return {table}

    def _load(self, targets: Collection[str]) -> None:
        names = self._sources(targets)
        ahead, self._ahead = self._ahead, None
        read: Mapping[str, Any] = {} if ahead is None else ahead.result()
        self.convert({name: read.get(name, self._slice(name)) for name in names})
        ignored = self.model._keys_to_ignore_on_load_missing
        missing = [
            name for name in targets if self._get(name).is_meta and not _matches(ignored, name)
        ]
        if missing:
            raise ArchiveError(
                f"{len(missing)} weights missing ({some(missing)}); the checkpoint does not fit "
                "its config.json"
            )

    def convert(self, tensors: Mapping[str, Slice | Tensor]) -> None:
        """Put these tensors of the checkpoint where they belong, by transformers' conversion.

        Raises:
            ArchiveError: one is damaged, cannot be converted or is of another shape.
        """
        if not tensors:
            return
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            info, _ = convert_and_load_state_dict_in_model(
                self.model, dict(tensors), self._load_config, **_NO_PLAN
            )
        finally:
            if shown:
                logging.enable_progress_bar()
        if info.conversion_errors or info.error_msgs:
            errors = [*map(str, info.conversion_errors.values()), *info.error_msgs]
            raise ArchiveError(f"{some(list(tensors))} cannot be converted: {errors[0]}")
        if info.mismatched_keys:
            name, given, wanted = min(info.mismatched_keys)
            raise ArchiveError(
                f"{len(info.mismatched_keys)} weights mismatched ({name} is {tuple(given)}, wanted "
                f"{tuple(wanted)}); the checkpoint does not fit its config.json"
            )

    def _get(self, name: str) -> Tensor:
        value: Tensor = self.model.get_parameter_or_buffer(name)
        return value

    def _put(self, name: str, value: Tensor) -> None:
        path, _, own = name.rpartition(".")
        module = self.model.get_submodule(path)
        if own in module._buffers:
            module._buffers[own] = value
        else:
            module._parameters[own] = nn.Parameter(value, requires_grad=False)


class _Experts:
    """The routed experts of one block, read as tokens come to them."""

    def __init__(self, streamed: Streamed, module: nn.Module, prefix: str) -> None:
        self._streamed = streamed
        self._count = int(getattr(module, "num_experts", 0))
        self.targets = {
            name: streamed._targets[name]
            for own, _ in module.named_parameters()
            if self._divisible(name := f"{prefix}{own}")
        }
        """The weights that can be read expert by expert: their first dimension is the expert."""
        self._values: dict[str, Tensor] = {}
        self._read: set[int] = set()

    def _divisible(self, target: str) -> bool:
        groups = self._streamed._names.get(target, [])
        return (
            self._count > 1
            and self._streamed._targets[target].shape[0] == self._count
            and bool(groups)
            and all(len(names) == self._count or self._fused(names) for names in groups)
        )

    def _fused(self, names: list[str]) -> bool:
        """Is one tensor on disk all experts, one after the other?"""
        shape = self._streamed._source.slice(names[0]).get_shape()
        return len(names) == 1 and shape[0] == self._count

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the experts' forward: read those that the tokens are routed to."""
        if not self.targets:
            return
        index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        new = sorted(set(index.unique().tolist()) - self._read)
        new = [expert for expert in new if 0 <= expert < self._count]
        if not self._values:
            self._values = {
                name: _untouched(target, self._streamed._device)
                for name, target in self.targets.items()
            }
        bytes_each = sum(
            target[0].numel() * target.element_size() for target in self.targets.values()
        )
        size = max(1, _AT_ONCE // bytes_each)
        parts = [new[start : start + size] for start in range(0, len(new), size)]
        reader = self._streamed.reader
        coming = [reader.submit(self._fetch, part) for part in parts[:1]]
        for part, next_part in zip_longest(parts, parts[1:]):  # one is read, one converted
            tensors = coming.pop().result()
            if next_part is not None:
                coming.append(reader.submit(self._fetch, next_part))
            self._convert(part, tensors)
        self._read |= set(new)
        for name, value in self._values.items():
            self._streamed._put(name, value)

    def _fetch(self, experts: list[int]) -> dict[str, Tensor]:
        """From the checkpoint, what makes these experts."""
        weights: dict[str, Tensor] = {}
        for target in self.targets:
            for names in self._streamed._names[target]:
                if self._fused(names):
                    whole = self._streamed._source.slice(names[0])
                    weights[names[0]] = torch.cat([whole[row : row + 1] for row in experts])
                else:
                    for expert in experts:
                        weights[names[expert]] = self._streamed._slice(names[expert])[...]
        return weights

    def _convert(self, experts: list[int], tensors: Mapping[str, Tensor]) -> None:
        """Through transformers' conversion, as if the block had these experts alone."""
        for target, like in self.targets.items():
            shape = (len(experts), *like.shape[1:])
            self._streamed._put(target, torch.empty(shape, dtype=like.dtype, device="meta"))
        self._streamed.convert(tensors)
        for target, value in self._values.items():
            for expert, part in zip(experts, self._streamed._get(target).detach(), strict=True):
                value[expert].copy_(part)


def _untouched(like: Tensor, device: str, *, scattered: bool = False) -> Tensor:
    """A tensor that, on the CPU, takes memory only where it is written to.

    Args:
        like: of the same shape and dtype.
        device: where.
        scattered: small parts will be written here and there, each of which must not take a huge
            page.
    """
    if device != "cpu":
        return torch.empty_like(like, device=device)
    pages = mmap.mmap(-1, math.prod(like.shape) * like.element_size())
    advice = "MADV_NOHUGEPAGE" if scattered else "MADV_HUGEPAGE"
    if hasattr(mmap, advice):  # Linux
        with suppress(OSError):
            pages.madvise(getattr(mmap, advice))
    return torch.frombuffer(pages, dtype=like.dtype).view(like.shape)


def _neighbours(rows: Sequence[int], width: int) -> Iterator[tuple[int, int, list[int]]]:
    """Rows that are read together, though some between them are not wanted.

    Args:
        rows: which are wanted, ascending.
        width: bytes of a row.

    Yields:
        The first that is read, the one behind the last, and those of them that are wanted.
    """
    together: list[int] = []
    for row in rows:
        if together and (
            (row - together[-1] - 1) * width > _BETWEEN or (row - together[0]) * width > _AT_ONCE
        ):
            yield together[0], together[-1] + 1, together
            together = []
        together.append(row)
    if together:
        yield together[0], together[-1] + 1, together


def _later(experts: Mapping[nn.Module, _Experts]) -> set[str]:
    """The weights that are read as tokens come to them."""
    return {name for weights in experts.values() for name in weights.targets}


def _matches(patterns: Collection[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _give_back() -> None:
    """What freed weights leave goes back to the system, which glibc by itself does at the top of
    its heap alone."""
    with suppress(AttributeError, OSError, TypeError):  # elsewhere than on Linux
        ctypes.CDLL(None).malloc_trim(0)
