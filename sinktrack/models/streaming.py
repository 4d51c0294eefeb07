"""A checkpoint's model with the weights of one block at a time.

The model is built on the meta device, where it takes no memory, and a block is filled from the
checkpoint's tensors under transformers' names and by its weight conversion. Of routed experts only
those are read that a token is routed to, of the embedding only the rows of the probe's tokens.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from sinktrack.archive.foreign import some
from sinktrack.archive.huggingface import empty, kept_in, prefix_of
from sinktrack.archive.source import Source, fitting
from sinktrack.archive.storage.safetensors_file import announce
from sinktrack.archive.storage.slices import Slice
from sinktrack.errors import ArchiveError
from sinktrack.models.huggingface import Decoder, decoder, is_experts
from sinktrack.models.routed_experts import AT_ONCE, Experts, give_back, untouched

_READERS = 8
"""Weights that are read ahead at the same time: a server answers each after a while."""
_AT_ONCE = 4 * 2**20
"""Bytes from which on several threads read a disk in less time than one."""
_BETWEEN = 64 * 2**10
"""Bytes between two rows that are read with them: less than another request to a server costs."""
_NO_PLAN: dict[str, Any] = (
    {"tp_plan": None}  # before transformers 5.9 or so, which takes it from the model
    if "tp_plan" in inspect.signature(convert_and_load_state_dict_in_model).parameters
    else {}
)
_BUSY = 64 * 2**20
"""Bytes of blocks on their way from a server, which answers each request after a while."""
_LIKELY = 32
"""Tokens for each expert from which on each is likely to get one."""
KEPT = 2**29
"""Bytes of weights up to which a model is read once and kept, where it will be run repeatedly."""


_BEGINNING: list[tuple[str, int, int | None]] = []
"""What the last model of a server read first: tensors, and which rows of them."""


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
        self.source, self.device = source, device
        self.read_ahead = torch.device(device).type != "cpu"
        """Read the following block's weights, but for routed experts, while this one computes. On
        the CPU they would wait in the very memory that is to be saved."""
        self.remote = not source.files.local
        self._ahead: Future[dict[str, Tensor]] | None = None
        self._following: int | None = None
        self._left: list[Tensor] = []
        """Memory of the last block's experts, for the next one's."""
        self.reader = ThreadPoolExecutor(1)
        """Reads while others convert or compute."""
        self._readers = ThreadPoolExecutor(_READERS)
        self._announcer = ThreadPoolExecutor(1)
        skeleton = empty(source, dtype, head=head)
        self.model, self._text = skeleton.model, skeleton.prefix
        self.names = skeleton.names
        """By weight of the model the names in the checkpoint of what makes it, in groups."""
        self._renamed = skeleton.renamed
        self.in_a_row = skeleton.in_a_row
        self.decoder: Decoder = replace(decoder(skeleton.text), model=self.model)
        self.targets = dict(self.model.state_dict())
        """What stands for each weight while it takes no memory."""
        if head:
            lacking = [name for name in self._behind() if not self.names.get(name)]
            if lacking:
                raise ArchiveError(
                    f"{source.files.location}: {len(lacking)} weights missing ({some(lacking)}); "
                    "the checkpoint does not fit its config.json"
                )
        self._keeps = head and sum(value.nbytes for value in self.targets.values()) <= KEPT
        self._kept: dict[int, dict[nn.Module, Experts]] = {}
        """By block with its weights, what reads its experts."""
        self._largest = max(weight.numel() for weight in self.targets.values())
        self._load_config = LoadStateDictConfig(
            dtype=self.model.dtype,
            dtype_plan=self.model._get_dtype_plan(self.model.dtype),
            device_map={"": device},
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        self._kept_in = kept_in(self.model, self.model.dtype)
        self._prefixes = {
            index: prefix_of(self.model, block) for index, block in self.decoder.blocks.items()
        }

    @property
    def bytes_read(self) -> int:
        """Of the checkpoint, so far."""
        count: int = self.source.files.bytes_read
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
            sum(int(self.targets[name].nbytes) for name in self._own(index))
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
            if name in self.targets:
                continue
            if buffer.is_meta:  # is not saved, and made anew from the configuration
                unset = torch.nan if buffer.is_floating_point() else 0  # what is not is refused
                buffer = torch.full_like(buffer, unset, device=self.device)
            self.put(name, buffer.to(self.device))
        self.model.initialize_weights()  # for the first time: a second call does nothing
        text, blocks = self._text, tuple(self._prefixes.values())
        own = {
            name for name in self.targets if name.startswith(text) and not name.startswith(blocks)
        }
        table = f"{prefix_of(self.model, self.base.get_input_embeddings())}weight"
        groups = self._groups_of_rows(table, tokens)
        first = min(self._prefixes)
        if groups:
            own.remove(table)
        if self.remote:
            rows = [(self.names[table][0][0], start, stop) for start, stop, _ in groups]
            others = self._sources([*own, *self._besides_experts(first)])
            _BEGINNING[:] = [*rows, *((name, 0, None) for name in others)]
            begin(self.source)
        elif not self.read_ahead and self._comes_to_all(first, tokens.numel()):
            self._announce(first, experts=True)
        if groups:
            self._load_rows(table, groups)
        self._load(own)

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
            if name in own and self.names.get(name) is self.names.get(other)
        }
        before = {name: self.weight(name).detach() for name in {*own, *tied.values()}}
        try:
            for name in before:
                self.put(name, self.targets[name])
            self._load(own - tied.keys())
            for name, other in tied.items():  # stored for both, under either name
                self.convert({source: self.stored(source) for source in self._sources([name])})
                if self.weight(name).is_meta:
                    self.put(name, self.weight(other).detach())
            yield
        finally:
            for name, value in before.items():
                self.put(name, value)
            give_back()

    def _behind(self) -> set[str]:
        """The weights that the `base` does not hold."""
        base = prefix_of(self.model, self.base)
        return {name for name in self.targets if not name.startswith(base)}

    @contextmanager
    def block(self, index: int, last: int | None = None) -> Iterator[nn.Module]:
        """The block with its weights, which are freed on leaving, unless the model is small.

        Routed experts are read when tokens come to them.

        Args:
            index: its number.
            last: the block up to which all that follow will be gone through, to read ahead.

        Raises:
            ArchiveError: a weight is missing, damaged or of another shape.
        """
        block, own, hooks = self.decoder.blocks[index], self._own(index), []
        following = index + 1 if last is not None and index < last else None
        self._following = following
        left: list[Tensor] = []
        try:
            if index not in self._kept:
                experts = self._experts(index)
                self._load(own - _later(experts))
                self._kept[index] = experts
            for module, weights in self._kept[index].items():
                hook = module.register_forward_pre_hook(weights.read, with_kwargs=True)
                hooks.append(hook)
            if self.remote and last is not None:
                self._announce_many(index + 1, last)
            if self.read_ahead and following is not None and following not in self._kept:
                self._ahead = self.reader.submit(self._read, following)
            if not hooks:
                self.announce_following(experts=False)
            yield block
            if following is not None:
                left = self._useful(self._kept[index], following)
        finally:
            for hook in hooks:
                hook.remove()
            self._left = []
            if not (self._keeps and index in self._kept):
                self._kept.pop(index, None)
                self._left = left
                for name in own:
                    self.put(name, self.targets[name])
                if sum(self.targets[name].nbytes for name in own) >= _AT_ONCE:  # it takes a while
                    give_back()

    def _useful(self, done: Mapping[nn.Module, Experts], following: int) -> list[Tensor]:
        """Memory of a block's experts, all in use, that those of the following one fit into."""
        own = self._own(following)
        fits = {(like.shape, like.dtype) for like in map(self.targets.__getitem__, own)}
        return [
            value
            for weights in done.values()
            if weights.nearly_all
            for value in weights.values.values()
            if (value.shape, value.dtype) in fits
        ]

    def leftover(self, like: Tensor) -> Tensor | None:
        """Memory of the last block's experts, given away; the taker writes or zeroes all of it."""
        for place, value in enumerate(self._left):
            if value.shape == like.shape and value.dtype == like.dtype:
                return self._left.pop(place)
        return None

    def announce_following(self, *, experts: bool) -> None:
        """Have the system read the following block from a disk while this one computes.

        Args:
            experts: with all routed experts?
        """
        following, self._following = self._following, None
        if following is not None and not self.read_ahead and not self.remote:
            self._announce(following, experts)

    def _announce(self, index: int, experts: bool) -> int:
        """Have a block on its way: from a disk into the system's cache, which gives way to any
        process's memory; from a server into ours. Of weights in safetensors files alone.

        Returns:
            Its bytes.
        """
        if index in self._kept:
            return 0
        own = self._own(index)
        first = self._besides_experts(index)
        wanted = [*first, *(own - first)] if experts else list(first)
        names = self._sources(wanted)
        size = sum(int(self.targets[name].nbytes) for name in wanted)
        if self.remote:
            self.announce(names)
        elif size >= AT_ONCE:  # takes a while
            self._announcer.submit(self.announce, names)
        return size

    def _announce_many(self, first: int, last: int) -> None:
        """As many of these blocks as keep a server busy."""
        size = 0
        for index in range(first, last + 1):
            if size >= _BUSY:
                break
            size += self._announce(index, experts=False)

    def announce(self, names: Iterable[str]) -> None:
        """Say that these tensors of the checkpoint will be read soon."""
        announce((self.source.slice(name), 0, None) for name in names)

    def _comes_to_all(self, index: int, tokens: int) -> bool:
        """Are so many tokens likely to come to all experts of a block?"""
        chosen = self.decoder.number("num_experts_per_tok", block=index) or 1
        counts = [experts.count for experts in self._experts(index).values()]
        return tokens * chosen >= _LIKELY * max(counts, default=0)

    def _own(self, index: int) -> set[str]:
        prefix = self._prefixes[index]
        return {name for name in self.targets if name.startswith(prefix)}

    def _experts(self, index: int) -> dict[nn.Module, Experts]:
        return {
            module: Experts(self, module, f"{self._prefixes[index]}{path}.")
            for path, module in self.decoder.blocks[index].named_modules()
            if is_experts(module)
        }

    def _besides_experts(self, index: int) -> set[str]:
        """A block's weights, but for those that are read as tokens come to them."""
        return self._own(index) - _later(self._experts(index))

    def _read(self, index: int) -> dict[str, Tensor]:
        names = self._sources(self._besides_experts(index))
        read = self._readers.map(lambda name: self.stored(name)[...], names)
        return dict(zip(names, read, strict=True))

    def stored(self, name: str) -> Slice:
        """A tensor of the checkpoint.

        Raises:
            ArchiveError: there is none, or one that is far too large.
        """
        return fitting(self.source, name, self._largest)

    def _sources(self, targets: Collection[str]) -> list[str]:
        return [name for t in targets for group in self.names.get(t, []) for name in group]

    def _groups_of_rows(self, table: str, tokens: Tensor) -> list[tuple[int, int, list[int]]]:
        """Of an embedding table those of these tokens, see `_neighbours`; none if it cannot be
        read by rows."""
        names = self.names.get(table, [])
        target = self.targets[table]
        if len(names) != 1 or len(names[0]) != 1:
            return []
        if self.source.slice(names[0][0]).get_shape() != list(target.shape):
            return []
        width = math.prod(target.shape[1:]) * target.element_size()
        return list(_neighbours(tokens.unique().tolist(), width))

    def _load_rows(self, table: str, groups: Iterable[tuple[int, int, list[int]]]) -> None:
        rows = self.source.slice(self.names[table][0][0])
        value = untouched(self.targets[table], self.device, scattered=True)
        for first, last, wanted in groups:
            read = rows[first:last].to(value)
            value[wanted] = read[[token - first for token in wanted]]
        self.put(table, value)

    def _load(self, targets: Collection[str]) -> None:
        names = self._sources(targets)
        ahead, self._ahead = self._ahead, None
        read: Mapping[str, Any] = {} if ahead is None else ahead.result()
        if self.remote:
            self.announce(name for name in names if name not in read)
        self.convert({name: read.get(name, self.stored(name)) for name in names})
        ignored = self.model._keys_to_ignore_on_load_missing
        missing = [
            name for name in targets if self.weight(name).is_meta and not _matches(ignored, name)
        ]
        if missing:
            raise ArchiveError(
                f"{len(missing)} weights missing ({some(missing)}); the checkpoint does not fit "
                "its config.json"
            )

    def convert(self, tensors: Mapping[str, Slice | Tensor]) -> None:
        """Put these tensors of the checkpoint where they belong.

        Raises:
            ArchiveError: one is damaged, cannot be converted or is of another shape.
        """
        alone = {name: self._renamed[name] for name in tensors if name in self._renamed}
        size = sum(self.targets[target].nbytes for target in alone.values())
        at_once = size < _AT_ONCE and self.source.files.local
        by = map if at_once else self._readers.map
        read = by(lambda name: self._as_it_is(name, tensors[name]), alone)
        mismatched = []
        for target, value in zip(alone.values(), read, strict=True):
            if (wanted := self.weight(target).shape) != value.shape:
                mismatched.append((target, value.shape, wanted))
            self.put(target, value)
        self._refuse_mismatched(mismatched)
        if others := {name: value for name, value in tensors.items() if name not in alone}:
            self._convert(others)

    def _as_it_is(self, name: str, tensor: Slice | Tensor) -> Tensor:
        """A weight that transformers would only rename, a call of whose conversion takes 4 ms."""
        target = self._renamed[name]
        dtype = self._kept_in(target) or self.targets[target].dtype
        return tensor[...].to(self.device, dtype)

    def _convert(self, tensors: Mapping[str, Slice | Tensor]) -> None:
        """By transformers' conversion."""
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
        self._refuse_mismatched(info.mismatched_keys)

    def _refuse_mismatched(self, weights: Collection[tuple[str, torch.Size, torch.Size]]) -> None:
        if weights:
            name, given, wanted = min(weights)
            raise ArchiveError(
                f"{len(weights)} weights mismatched ({name} is {tuple(given)}, wanted "
                f"{tuple(wanted)}); the checkpoint does not fit its config.json"
            )

    def weight(self, name: str) -> Tensor:
        """A parameter or buffer of the model."""
        value: Tensor = self.model.get_parameter_or_buffer(name)
        return value

    def put(self, name: str, value: Tensor) -> None:
        """Make this a parameter or buffer of the model."""
        path, _, own = name.rpartition(".")
        module = self.model.get_submodule(path)
        if own in module._buffers:
            module._buffers[own] = value
        else:
            module._parameters[own] = nn.Parameter(value, requires_grad=False)


def begin(source: Source) -> None:
    """Have on its way what the last model read first, as the next of an archive is like it."""
    names = set(source.names())
    announce((source.slice(name), first, last) for name, first, last in _BEGINNING if name in names)


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
            (row - together[-1] - 1) * width > _BETWEEN or (row - together[0]) * width > AT_ONCE
        ):
            yield together[0], together[-1] + 1, together
            together = []
        together.append(row)
    if together:
        yield together[0], together[-1] + 1, together


def _later(experts: Mapping[nn.Module, Experts]) -> set[str]:
    """The weights that are read as tokens come to them."""
    return {name for weights in experts.values() for name in weights.targets}


def _matches(patterns: Collection[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
