"""Any PyTorch decoder: its blocks are named, and everything else is found by its arithmetic.

The residual stream is followed as a linear form: from the input of block 0 on, a tensor that is the
stream carries the factor of each of its terms (that input, and every write). Sums add the factors,
numbers multiply them. At every block P0's rows of the terms are added up and compared with the
stream that is there, so a term that was missed is found out whatever the code. Attention is met
where functions of torch compute it, or known by value: an operator whose output is that of causal
softmax attention of its arguments is one. Routed experts are told apart by running P0's rows again
without each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule

from sinktrack.attention import Attended, attend, edit_mask, read_scores
from sinktrack.errors import MeasurementError, SinktrackError
from sinktrack.events import Editor, Observer, Projection, Routed, Uneditable, Write
from sinktrack.models.experts import Expert, NoExperts, NotTold, apart, everywhere
from sinktrack.models.guard import is_memory, refuse_prompts, refuse_unreadable
from sinktrack.models.parallel import is_apart
from sinktrack.models.tracer import (
    _ADD,
    _MULTIPLY,
    _SAME,
    Mark,
    ResidualTracer,
    _tensors,
    mark,
    mark_of,
)
from sinktrack.probe import Probe

Blocks = Iterable[nn.Module | Iterable[nn.Module]] | nn.ModuleDict
Term = tuple[int, int]
"""Of the stream: the n-th write of block k is ``(k, n)``, the input of block 0 ``(-1, 0)``."""
_EMBEDDING: Term = (-1, 0)
_WRITE = "decoder=sinktrack.Decoder(blocks=lambda model: model.{path})"
_SUBTRACT = {"sub", "sub_", "__sub__", "__isub__", "subtract"}
_DIVIDE = {"div", "div_", "__truediv__", "__itruediv__", "true_divide", "divide"}
_READS = {
    "__get__", "__len__", "__repr__", "data_ptr", "dim", "element_size", "is_contiguous",
    "is_floating_point", "ndimension", "numel", "register_hook", "requires_grad_", "size",
    "storage_offset", "stride", "untyped_storage", "get_device", "is_complex", "item", "tolist",
}  # fmt: skip
"""Functions of tensors that compute nothing."""
_ACROSS = {
    "conv1d",
    "conv2d",
    "cumsum",
    "cumprod",
    "roll",
    "lstm",
    "gru",
    "rnn_tanh",
    "logcumsumexp",
}
"""Functions that mix positions without a softmax."""
_MAPS = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum", "addmm", "baddbmm",
}  # fmt: skip
"""Functions that apply a linear map."""
_BLENDS = {
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "where", "lerp", "lerp_", "sub",
    "sub_", "__sub__", "__rsub__", "__isub__", "rsub", "subtract", "addcmul", "addcmul_", "addcdiv",
    "addmm", "baddbmm", "addbmm",
}  # fmt: skip
"""Functions that make one tensor of several, by more than a sum."""
_SORTS = {"sort", "argsort"}
_PAIRS = {"topk", "max", "kthvalue", "sort"}
_CHOOSES = _PAIRS | _SORTS | {"argmax", "multinomial"}
"""Functions by which a router may choose; of the pairs they give the second is the index."""
_PARTS = ("mixed", "attention", "experts", "sum")
_NORMS = {"rms_norm", "layer_norm", "linear", "float", "to", "norm", "pow", "square"}
"""Functions that take the stream in any block, and give what is computed from it."""
_DERIVED = "_sinktrack_derived"
_SCORED = "_sinktrack_scored"
"""The block in whose attention's scores a tensor was summed up over the keys, or computed from."""
_OVER_KEYS = {"logsumexp", "sum", "amax", "max", "mean", "norm", "vector_norm", "std", "var"}
_UNMASKED = "_sinktrack_unmasked"
"""Of scores, what they were before a mask was put on them."""
_HIDDEN = -9e3
"""Scores below, of keys with no measurable probability, hide them: masks write -1e4 or -1e9 too."""


class Decoder:
    """A PyTorch decoder of your own, for `sinktrack.measure` and the callbacks.

    Args:
        model: the model; without one, the model that is given in training.
        blocks: its blocks in order, a list or ``nn.ModuleDict``, or a function of the model that
            gives them. Where the model holds one evident list, they need not be said. A block that
            is no module of its own is a list of those that run in it, the first of which takes the
            stream, and the last of which gives it back.
        forward: how it is run on tokens ``[B, T]``: ``lambda model, tokens: model(tokens)`` if not
            given. Of what it returns only logits ``[B, T, V]`` are looked at, for the loss in
            causal tests.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        blocks: Blocks | Callable[[Any], Blocks] | None = None,
        forward: Callable[[Any, Tensor], Any] | None = None,
    ) -> None:
        self.model, self._blocks, self._forward = model, blocks, forward

    def of(self, model: Any) -> Decoder:
        """The same with a model, if it has none of its own.

        Raises:
            MeasurementError: there is no model.
        """
        if self.model is not None:
            return self
        if not isinstance(model, nn.Module):
            raise MeasurementError(f"a {type(model).__name__} is no model; give a torch.nn.Module")
        return Decoder(model, blocks=self._blocks, forward=self._forward)

    def run(self, tokens: Tensor) -> Any:
        """One forward pass of ``[B, T]`` tokens.

        Raises:
            MeasurementError: the model does not run on tokens alone.
        """
        assert self.model is not None
        bare = _unwrap(self.model)
        try:
            return bare(tokens) if self._forward is None else self._forward(bare, tokens)
        except (TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError) as e:
            if isinstance(e, SinktrackError):
                raise
            way = (
                "a forward= that runs it"
                if self._forward
                else ("forward=lambda model, tokens: model(tokens, ...) to sinktrack.Decoder")
            )
            raise MeasurementError(
                f"{class_of(bare)} does not run on tokens {tuple(tokens.shape)} "
                f"({type(e).__name__}: {e}); give {way}"
            ) from e
        except RuntimeError as e:
            if is_memory(e):
                raise
            if "bf16" in str(e) or "bfloat16" in str(e).lower():
                raise MeasurementError(
                    f"{class_of(bare)} does not run in the dtype of its weights ({e}); a probe "
                    "runs without the training's autocast: open torch.autocast within forward= of "
                    "sinktrack.Decoder"
                ) from e
            short = ", two as each first token is shown alone" if tokens.shape[1] == 2 else ""
            raise MeasurementError(
                f"{class_of(bare)} does not run on tokens {tuple(tokens.shape)}{short} ({e})"
            ) from e

    def blocks(self) -> dict[int, nn.Module]:
        """The blocks by number.

        Raises:
            MeasurementError: there are none, or they cannot be found.
        """
        assert self.model is not None
        bare = _unwrap(self.model)
        if self._blocks is None:
            found: Any = _evident(bare)
        elif callable(self._blocks) and not isinstance(self._blocks, nn.Module):
            try:
                found = self._blocks(bare)
            except AttributeError as error:
                raise MeasurementError(f"blocks= of sinktrack.Decoder: {error}") from error
        else:
            found = self._blocks
        values = list(found.values()) if isinstance(found, nn.ModuleDict) else list(found)
        values = [_joined(value) for value in values]
        if not values or not all(isinstance(value, nn.Module) for value in values):
            raise MeasurementError(
                "blocks= of sinktrack.Decoder gave no list of modules; give all blocks in order, "
                "such as model.layers"
            )
        blocks = {number: _unwrap(value) for number, value in enumerate(values)}
        if len({id(block) for block in blocks.values()}) < len(blocks):
            raise MeasurementError(
                "one module stands at several depths among the blocks: blocks that share all of "
                "their weights are not supported; give each depth a module of its own, whose "
                "parameters may be shared"
            )
        return blocks


class Several(nn.ModuleList):
    """A block that is no module of its own: those that run in it, in order."""


def _joined(value: Any) -> Any:
    """A block, of the modules that it is given as."""
    if not isinstance(value, list | tuple | nn.ModuleList):
        return value
    return Several(_leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple | nn.ModuleList):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def _unwrap(model: nn.Module) -> nn.Module:
    """Out of torch.compile, Fabric and DDP, in whose own forward all processes would be awaited."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model.get_submodule("_orig_mod")
        elif hasattr(model, "_original_module"):  # as Lightning's Fabric wraps it
            model = model.get_submodule("_original_module")
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def class_of(module: nn.Module) -> str:
    """The name of a module's class, as `_kind` tells it; of a list, those of its modules."""
    if isinstance(module, Several):
        return " and ".join(class_of(item) for item in module)
    return _kind(module).__name__


def _kind(module: nn.Module) -> type[nn.Module]:
    """A module's class as written: without FSDP2's, compilation and activation checkpointing."""
    module = _unwrap(module)
    while isinstance(module, ActivationWrapper):
        module = _unwrap(module.get_submodule("_checkpoint_wrapped_module"))
    of = type(module)
    return of.__mro__[2] if isinstance(module, FSDPModule) else of


def _evident(model: nn.Module) -> list[nn.Module]:
    """The one list of blocks in a model.

    Raises:
        MeasurementError: there is none, or more than one.
    """
    found: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        inside = any(path == other or path.startswith(f"{other}.") for other in found)
        if inside or not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            continue
        items = [item for item in module._modules.values() if item is not None]
        if not items:
            continue
        alike = len({_kind(item) for item in items}) == 1  # every other one may be checkpointed
        alike = alike and _runs(items[0])
        if alike and all(next(_unwrap(item).children(), None) is not None for item in items):
            found[path] = items
    if len(found) == 1:
        return next(iter(found.values()))
    seen = " and ".join(f"model.{path} of {len(items)}" for path, items in found.items())
    path = max(found, key=lambda path: len(found[path]), default="layers")
    raise MeasurementError(
        f"{type(model).__name__} is not a transformers model, and which modules are its blocks "
        f"cannot be told ({'lists: ' + seen if found else 'no list of like modules found'}); name "
        f"them: {_WRITE.format(path=path)}, for measure sinktrack.Decoder(model, "
        f"blocks=model.{path})"
    )


def _runs(module: nn.Module) -> bool:
    """Has it a forward pass of its own?"""
    own = vars(_kind(module)).get("forward") or getattr(_unwrap(module), "forward", None)
    return getattr(own, "__func__", own) is not _kind(nn.Module()).forward


@dataclass
class Found:
    """What a measurement says of a decoder."""

    model: nn.Module
    blocks: Mapping[int, nn.Module]
    kinds: tuple[str, ...] = ()
    most_heads: int | None = None
    experts: int | None = None
    embedding: str | None = None
    """The parameter in which the tokens were looked up, by name."""
    how: list[str] = field(default_factory=list)
    """What computes attention in it."""
    told: bool = False
    """Were experts told apart?"""
    notes: list[str] = field(default_factory=list)
    """What could not be told of the parts of its writes, and why."""
    carries: bool | None = None
    """Does a block return its last write beside the stream? None before that is known."""
    start: int | None = None
    """Which of the tensors of its shape at block 0 is the stream, where there are several."""
    forms: dict[int, int] = field(default_factory=dict)
    """What blocks return: 0 the stream bare, n a tuple of n of which the others are None."""

    @property
    def type(self) -> str:
        """The class's name."""
        return class_of(self.model)


def found_in(decoder: Decoder) -> Found:
    """What is known of a decoder before it runs; errors as of `sinktrack.measure`."""
    model = decoder.model
    assert model is not None
    model = _unwrap(model)
    blocks = decoder.blocks()
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise MeasurementError(
                f"{name} is DistributedDataParallel inside of the model, whose forward waits for "
                "all processes; give the model that it wraps"
            )
    if is_apart(model):
        raise MeasurementError(
            f"no process holds the whole of {class_of(model)} (FSDP1, tensor, expert "
            "or pipeline parallelism); of models that are not transformers only whole ones, DDP "
            "and FSDP2 are supported: measure the saved checkpoints with `sinktrack scan`"
        )
    refuse_unreadable(model)
    refuse_prompts(model.modules())
    devices = {str(value.device): name for name, value in model.named_parameters() if value.ndim}
    if len(devices) > 1:
        where = " and ".join(f"{name} on {device}" for device, name in devices.items())
        raise MeasurementError(
            f"{class_of(model)} is split over devices ({where}); of models that are not "
            "transformers only those on one device are supported: measure a copy on one, or the "
            "saved checkpoints with `sinktrack scan`"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise MeasurementError(
            f"{class_of(model)} holds modules compiled by TorchScript, whose operations cannot be "
            "seen; measure the model that they were made of"
        )
    return Found(model, blocks)


@dataclass(frozen=True)
class Stream(Mark):
    """A tensor that is the residual stream."""

    form: Mapping[Term, float] = field(default_factory=dict)
    """The factor of each of its terms."""

    def plus(self, other: Stream, factor: float = 1.0) -> Stream:
        """A sum of two, the other one multiplied with a number."""
        form = dict(self.form)
        for term, value in other.form.items():
            form[term] = form.get(term, 0.0) + value * factor
        return Stream("stream", form={term: value for term, value in form.items() if value})

    def times(self, factor: float) -> Stream:
        """Multiplied with a number."""
        return Stream("stream", form={term: value * factor for term, value in self.form.items()})


@dataclass(frozen=True)
class Restart:
    """A pass begins with a later block than the first."""

    block: int
    stream: Tensor
    """``[B, T, D]`` at its input."""
    dims: int
    """Of the model's own tensor of it: 3, or 2 where positions and sequences are one."""
    time_first: bool


class _Reached(Exception):
    """The input of block 0, where no more is wanted of a pass."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__("block 0")
        self.stream = stream


class Undecided(Exception):
    """Several tensors at the input of block 0 may be the stream."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} tensors")
        self.count = count


class Decided(Exception):
    """Block 0 is over, and by now it is known which of its outputs is the stream.

    Args:
        places: of those among its outputs in which a write of the block is.
    """

    def __init__(self, places: tuple[int, ...]) -> None:
        super().__init__("block 0 is over")
        self.places = places


class Tap:
    """What one watched forward pass goes through."""

    def __init__(
        self,
        decoder: Decoder,
        found: Found,
        observer: Observer,
        tokens: Tensor,
        parts: Literal["p0", "all"] | None,
        editor: Editor | None = None,
        start: Restart | None = None,
    ) -> None:
        self.decoder, self.found, self.observer, self.tokens = decoder, found, observer, tokens
        self.parts, self.editor, self.restart = parts, editor, start
        self.started = 0 if start is None else start.block
        self.batch, self.length = tokens.shape
        self.width = 0 if start is None else start.stream.shape[-1]
        self.time_first = start is not None and start.time_first
        """Do positions stand before sequences where both are one dimension, or equally many?"""
        self.block = self.started - 1
        self.inside = False
        self.masked = False
        """Has the editor changed who sees what in this block?"""
        self.changes: list[tuple[Tensor, Tensor, float]] = []
        """Of the sum that is under way: an operand, ``[B, T, D]`` that enters the stream in its
        place, and the factor with which the operand does."""
        self.lost: str | None = None
        self.notes: list[str] = []
        self.flow = _Flow(self)
        self.dims = 0
        """Of the model's own tensor of the stream."""
        self.terms: dict[Term, Tensor] = {}
        """float64 ``[B, D]``, P0's rows."""
        self.size = torch.zeros(0)
        self.went: list[str] = []
        """Functions that took the stream and gave no stream, the last ones."""
        self.first: Tensor | None = None
        self.attended = self.written = self.places = 0
        self.unmixed = False
        """Do the probabilities of a softmax still wait for their values?"""
        self.heads: Tensor | None = None
        """float32 ``[B, H * Dv]``: what P0's heads yield, gates included."""
        self.beside: list[Tensor] = []
        """What stood beside the stream at the block's input, and was no write of the last block."""
        self.settling: tuple[Tensor, list[Tensor]] | None = None
        """A stream at a block's input whose last write may stand beside it, and what may be it."""
        self.handed: list[Tensor] = []
        """What the last block returned of the stream's size."""
        self.direct = True
        """Was every block handed just what the one before returned?"""
        self.carries = False
        self.deciding = False
        """Does the pass end with block 0?"""
        self.yielded: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        """By block P0's rows ``[B, D]`` at its input, what its heads yield there ``[B, H * Dv]``,
        and how large that is at any position."""
        self.experts: list[Expert] = []
        self.routed: tuple[Tensor, Routed] | None = None

    # Names and layouts

    def name(self) -> str:
        """Of the present block."""
        if self.block < 0:
            return "before block 0"
        return f"block {self.block} ({class_of(self.found.blocks[self.block])})"

    def refuse(self, reason: str) -> MeasurementError:
        """The error that says where."""
        return MeasurementError(f"{self.name()}: {reason}")

    def uneditable(self, reason: str) -> Uneditable:
        """The same where only an editor fails."""
        return Uneditable(f"{self.name()}: {reason}, so it cannot be changed there")

    def lose(self, reason: str) -> None:
        """Who writes the P0 state cannot be told; the rest stands."""
        self._untold(f"{self.name()}: {reason}")

    def _untold(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
            self.observer.untold(max(self.block, 0), reason)

    def rows(self, value: Any, width: int | None = None, turned: bool = False) -> Tensor | None:
        """``[B, T, width]`` of a tensor of that size in a known order, or None.

        Args:
            value: anything.
            width: of the stream by default.
            turned: read it in the other order where its shape leaves that open.
        """
        width = self.width if width is None else width
        time_first = self._is_time_first(value, width, turned)
        if time_first is None:
            return None
        rows: Tensor = value.reshape(*self._shape(time_first), width)
        return rows.transpose(0, 1) if time_first else rows

    def _shape(self, time_first: bool) -> tuple[int, int]:
        return (self.length, self.batch) if time_first else (self.batch, self.length)

    def _is_time_first(self, value: Any, width: int, turned: bool = False) -> bool | None:
        """The order of a tensor's positions and sequences; None where it has not both."""
        total = self.batch * self.length
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
            return None
        if value.shape[-1] != width or value.numel() != total * width:
            return None
        lead = tuple(size for size in value.shape[:-1] if size != 1)
        both, other = self._shape(False), self._shape(True)
        if both != other and lead in (both, other):
            return lead == other
        if lead in (both, (total,)) or (1 in both and lead == (max(both),)):
            return self.time_first != turned
        return None

    def like(self, rows: Tensor, value: Tensor) -> Tensor:
        """``[B, T, D]`` in the shape and order of a tensor of the stream's size."""
        turned = self._is_time_first(value, rows.shape[-1])
        return (rows.transpose(0, 1) if turned else rows).reshape(value.shape)

    def wrote_last(self, value: Tensor) -> bool:
        """Is a write of the present block in a stream?"""
        found = mark_of(value)
        return isinstance(found, Stream) and any(term[0] == self.block for term in found.form)

    def p0(self, value: Tensor, width: int | None = None) -> Tensor:
        """P0's rows of a tensor of that size."""
        found = self.rows(value, width)
        assert found is not None
        return found[:, 0].detach()

    # The pass

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the blocks, and the arithmetic followed."""
        with ExitStack() as stack:
            for index, block in self.found.blocks.items():
                if index < self.started:
                    stack.enter_context(_standing_in(block, self._handed_on(index)))
                    continue
                first, last = (block[0], block[-1]) if isinstance(block, Several) else (block,) * 2
                hook = first.register_forward_pre_hook(self.enter(index), with_kwargs=True)
                stack.callback(hook.remove)
                stack.callback(last.register_forward_hook(self.leave(index)).remove)
                for module in block.modules():
                    if module is not block and _may_route(module):
                        hook = module.register_forward_pre_hook(self.called, with_kwargs=True)
                        stack.callback(hook.remove)
                        stack.callback(module.register_forward_hook(self.returned).remove)
            with self.flow:
                yield

    def _handed_on(self, index: int) -> Any:
        """What a block returns that does not run, of the stream behind it."""
        assert self.restart is not None
        own = self.restart
        rows = own.stream.transpose(0, 1) if own.time_first else own.stream
        stream = rows.flatten(0, 1) if own.dims == 2 else rows
        self.handed = [stream]
        size = self.found.forms[index]
        return (stream, *[None] * (size - 1)) if size else stream

    def embedded(self, index: Any, weight: Any) -> None:
        """Before tokens are looked up: an index too large would be an error of the device."""
        if not isinstance(index, Tensor) or not isinstance(weight, Tensor):
            return
        if index.is_floating_point() or index.dtype == torch.bool:
            return
        if index.numel() != self.tokens.numel() or not torch.equal(
            index.reshape(-1).sort().values, self.tokens.reshape(-1).sort().values
        ):
            return
        if int(index.max()) >= weight.shape[0]:
            Probe.from_tokens(self.tokens.cpu()).check(weight.shape[0], None, None)
        if self.found.embedding is None:
            named = self.found.model.named_parameters()
            self.found.embedding = next((name for name, own in named if own is weight), None)

    def enter(self, index: int) -> Callable[..., None]:
        """A hook before a block."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self.flow.paused():
                stream, changed = self._enter(index, args, kwargs)
            if changed is None:
                return None
            return _swapped(args, stream, changed), {
                name: _swapped(value, stream, changed) for name, value in kwargs.items()
            }

        return hook

    def _enter(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The stream at a block's input, and what the editor puts in its place."""
        if index != self.block + 1 or self.inside:
            before = "no block" if self.block < 0 else f"block {self.block}"
            raise MeasurementError(
                f"block {index} ({class_of(self.found.blocks[index])}) runs after {before}: "
                "each block must run once in a pass, in the order in which they are given; not "
                "supported"
            )
        given = list(_distinct(_tensors(args, kwargs)))
        if index == 0:
            stream = self._start(given)
            return stream, self._settle(stream)
        like = [value for value in given if self.rows(value) is not None]
        if not like:
            self._refuse_input(index, given)
        marked = [value for value in like if isinstance(mark_of(value), Stream)]
        newest = [value for value in marked if self.wrote_last(value)]
        own = [value for value in like if any(value is one for one in self.handed)]
        for chosen in (marked, newest, own if len(self.handed) == 1 else [], like):
            if len(chosen) == 1:
                stream = chosen[0]
                break
        else:
            raise MeasurementError(
                f"block {index} ({class_of(self.found.blocks[index])}): {len(like)} tensors "
                "of the stream's shape come in, and which is the residual stream cannot be told; "
                "not supported"
            )
        self.direct = self.direct and any(stream is one for one in self.handed)
        beside = [v for v in like if v is not stream and any(v is one for one in self.handed)]
        beside = [value for value in beside if not isinstance(mark_of(value), Stream)]
        self.beside = []
        known = isinstance(mark_of(stream), Stream)
        if known and beside and self.found.carries is not False:
            self.settling = (stream, beside)
            return stream, None
        return stream, self._settle(stream)

    def _refuse_input(self, index: int, given: list[Tensor]) -> None:
        shapes = ", ".join(str(tuple(value.shape)) for value in given) or "no tensor"
        raise MeasurementError(
            f"block {index} ({class_of(self.found.blocks[index])}): no residual stream [B, T, "
            f"D] at its input for tokens {tuple(self.tokens.shape)}: it got {shapes}; several "
            "streams side by side (hyper-connections) are not supported, nor tokens that the model "
            "itself puts before the text; let a block take and return the stream as a tensor, and "
            "where the model only wants its tokens in another form, give forward= to "
            "sinktrack.Decoder"
        )

    def _start(self, given: list[Tensor]) -> Tensor:
        """The stream at the input of block 0, and its layout."""
        fits = [value for value in given if self._may_start(value)]
        if not fits:
            self._refuse_input(0, given)
        if len(fits) > 1 and self.found.start is None:
            raise Undecided(len(fits))
        value = fits[min(self.found.start or 0, len(fits) - 1)]
        lead = tuple(size for size in value.shape[:-1] if size != 1)
        both, turned = self._shape(False), self._shape(True)
        self.width, self.dims = value.shape[-1], value.ndim
        if 1 not in both and (both == turned or lead == (self.batch * self.length,)):
            self.time_first = self._order(value)
        else:
            self.time_first = lead == turned != both
        return value

    def _may_start(self, value: Tensor) -> bool:
        """Has it a row for each position of each sequence?"""
        if not value.is_floating_point() or value.ndim < 2 or not value.shape[-1]:
            return False
        lead = tuple(size for size in value.shape[:-1] if size != 1)
        both = self._shape(False)
        total = (self.batch * self.length,)
        return lead in (both, self._shape(True), total) or (1 in both and lead == (max(both),))

    def _order(self, stream: Tensor) -> bool:
        """By value: another token at position 1 of sequence 0 changes its row at block 0."""
        if self.flow.probing:
            raise _Reached(stream.detach().clone())
        others = self.tokens[self.tokens != self.tokens[0, 1]]
        if not len(others):
            raise MeasurementError(
                "all tokens of a batch are equal, so whether positions or sequences come first in "
                "the model's tensors cannot be told; give a probe of more tokens"
            )
        changed = self.tokens.clone()
        changed[0, 1] = others[0]
        other = self.flow.probe(changed)
        width = self.width
        differs = (stream.reshape(-1, width) != other.reshape(-1, width)).any(-1)
        rows = {time_first: self.batch if time_first else 1 for time_first in (False, True)}
        hit = [time_first for time_first, row in rows.items() if bool(differs[row])]
        if len(hit) != 1:
            raise MeasurementError(
                "whether positions or sequences come first in the model's tensors cannot be told "
                f"from {tuple(stream.shape)}; probe with another batch size"
            )
        return hit[0]

    def _settle(self, stream: Tensor) -> Tensor | None:
        """The stream at the next block's input is known; what the editor puts in its place."""
        self.settling = None
        self.close()
        self.block += 1
        self.inside = self.block < len(self.found.blocks)
        value = self.rows(stream)
        assert value is not None
        known = mark_of(stream)
        changed = None
        if self.restart is not None and self.block == self.started:
            value = self.restart.stream
            changed = self.like(value, stream)
        if self.block == self.started:
            self.first = value.detach().clone()
            known = Stream("stream", form={_EMBEDDING: 1.0})
            self.terms[_EMBEDDING] = value[:, 0].double()
            self.size = torch.zeros(self.batch, dtype=torch.float64, device=stream.device)
        elif not isinstance(known, Stream):
            last = f" (it went into {', '.join(self.went[-3:])})" if self.went else ""
            self._untold(
                f"the stream at block {self.block} is not its first input plus writes, by sums and "
                f"numbers that were seen{last}, so what writes the P0 state cannot be told"
            )
            known = Stream("stream", form={})
        row = self.p0(stream).double()
        if self.editor is None:
            self.yielded[self.block] = (row.float(), None, None)
        self.size = self.size + 4 * torch.linalg.vector_norm(row, dim=-1)
        if self.lost is None and self.editor is None:
            self._check(known, row, stream.dtype)
        wanted = self.editor.state(self.block, value) if self.editor and self.inside else None
        if wanted is not None:
            value, changed = wanted, self.like(wanted, stream)
        self.observer.state(self.block, value)
        if self.lost is None:
            self.observer.factors(self.block, dict(known.form))
        for own in (stream, changed):
            if own is not None:
                mark(own, known)
        self.masked = False
        self.attended = self.written = self.places = 0
        self.unmixed = False
        self.heads, self.routed, self.went = None, None, []
        self.flow.forget()
        self.flow.following = self.inside  # what comes behind the last block is no write
        return changed

    def _check(self, known: Stream, row: Tensor, dtype: torch.dtype) -> None:
        """Do the terms make the stream that is there?"""
        total = torch.zeros_like(row)
        size = self.size
        for term, factor in known.form.items():
            value = self.terms[term] * factor
            total = total + value
            size = size + torch.linalg.vector_norm(value, dim=-1)
        error = torch.linalg.vector_norm(total - row, dim=-1)
        bad = error > torch.finfo(dtype).eps * size * 2
        if bool(bad.any()):
            worst = float((error / torch.linalg.vector_norm(row, dim=-1)).max())
            self._untold(
                f"the terms that were seen make another stream at block {self.block} than is there "
                f"(off by {worst:.2g} of it): something writes to it out of sight, such as an "
                "operation in place on its memory or by an operator of its own"
            )

    def leave(self, index: int) -> Callable[..., None]:
        """A hook after a block."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            with self.flow.paused():
                self.settle()
                self.inside = False
                outputs = output if isinstance(output, tuple | list) else (output,)
                if all(value is None for value in outputs[1:]):
                    self.found.forms[index] = len(outputs) if outputs is output else 0
                if isinstance(output, dict):
                    outputs = tuple(output.values())
                self.handed = [
                    value
                    for value in _distinct(_tensors(tuple(outputs), {}))
                    if self.rows(value) is not None
                ]
                if self.deciding:
                    written = enumerate(_tensors(tuple(outputs), {}))
                    raise Decided(tuple(place for place, v in written if self.wrote_last(v)))
                if index == len(self.found.blocks) - 1:
                    self._finish()

        return hook

    def _finish(self) -> None:
        """The last block's output is the stream at the end, or its write still comes to it."""
        marked = [value for value in self.handed if isinstance(mark_of(value), Stream)]
        newest = [value for value in marked if self.wrote_last(value)]
        chosen = marked if len(marked) == 1 else newest
        if len(chosen) == 1:
            beside = [value for value in self.handed if not isinstance(mark_of(value), Stream)]
            if beside and (self.carries or len(self.found.blocks) == 1):
                self.settling = (chosen[0], beside)
            else:
                self._settle(chosen[0])
        elif len(self.handed) == 1 and self.direct and len(self.found.blocks) > 1:
            self._settle(self.handed[0])
        else:
            raise self.refuse(
                f"{len(self.handed)} tensors of the stream's shape come out, and none can be told "
                "to be the stream that goes on; let a block return its input plus its writes"
            )

    def settle(self) -> None:
        """Anything else than a sum happens to an input beside which its last write may stand."""
        if self.settling is None:
            return
        stream, self.beside = self.settling
        if self.carries:
            raise self.refuse(
                "it returns its last write beside the stream, and that is not added to it before "
                "anything else; not supported"
            )
        with self.flow.paused():
            if self._settle(stream) is not None:
                raise self.uneditable("its input has a second tensor of its size beside it")

    def end(self) -> None:
        """The pass is over."""
        with self.flow.paused():
            self.settle()
            if self.block < len(self.found.blocks):
                raise MeasurementError(
                    f"{max(self.block, 0)} of {len(self.found.blocks)} blocks ran in a pass of the "
                    "model; give blocks= to sinktrack.Decoder that all run"
                )

    def close(self) -> None:
        """A block is over."""
        if self.block < self.started:
            return
        if not self.attended:
            how = f" ({self.went_as_attention})" if self.went_as_attention else ""
            raise self.refuse(
                "no softmax attention was seen: neither scaled_dot_product_attention, nor "
                "flex_attention, nor softmax over scores [B, H, T, T], nor an operator whose "
                f"output is causal softmax attention of its arguments{how}; not supported"
            )
        if self.unmixed:
            raise self.refuse(
                "its attention's probabilities were not seen to meet its values, so they may be "
                "others by then; not supported"
            )
        if not self.written and self.lost is None:
            self.lose("the attention's output was not seen on its way into the residual stream")

    went_as_attention = ""

    # Writes

    def write_of(self, found: Mark | None, added: Tensor) -> tuple[Stream, Tensor | None] | None:
        """A term of its own: something is added to the stream. None if it is no write.

        With it ``[B, T, D]`` that the editor wants in its place, if any.
        """
        value = self.rows(added)
        if value is None:
            return None
        for other in self.beside:
            rows = self.rows(other)
            if rows is not None and torch.equal(rows, value):
                raise self.refuse(
                    "the block before it returned a write beside the stream, which is added only "
                    "now; not supported"
                )
        if not self.flow.derived(added):
            again = self._again(value)
            return None if again is None else (again, None)
        if not self.inside and self.settling is None:
            self.lose("after it, something that no block wrote is added to the stream")
            return None
        term = (self.block, self.places)
        self.places += 1
        self.terms[term] = value[:, 0].detach().double()
        with self.flow.paused():
            write = self._write(found, value, added)
            self.observer.write(self.block, write)
            wanted = self.editor.write(self.block, write) if self.editor else None
        return Stream("stream", form={term: 1.0}), wanted

    def _again(self, value: Tensor) -> Stream | None:
        """The first input once more, at its side all along and times a number."""
        assert self.first is not None
        own, one = value.double(), self.first.double()
        square = float((one * one).sum())
        factor = float((own * one).sum()) / square if square else 0.0
        error = float((own - factor * one).abs().max())
        if error <= 4 * torch.finfo(value.dtype).eps * float(own.abs().max()):
            return Stream("stream", form={_EMBEDDING: factor})
        self.lose(
            "something that is computed from no residual stream is added to it, such as another "
            "embedding, or an operator's output out of torch's sight"
        )
        return None

    def _write(self, found: Mark | None, value: Tensor, added: Tensor) -> Write:
        if found is not None and found.origin in ("attention", "mixed"):
            self.written += 1
            wholes: list[Tensor | None] = [value]
            if found.raw is not None:
                wholes += [self.rows(found.raw), self.rows(found.raw, turned=True)]
            for whole in wholes if found.origin == "attention" else ():
                projection = None if whole is None else self._projection(found, whole)
                if projection is not None:
                    raw = None if whole is value else whole
                    return Write("attention", value, raw, projection)
            self.notes.append(
                f"{self.name()}: which head writes what cannot be told: the attention's output is "
                "no linear map of its heads side by side"
            )
            return Write("attention", value)
        if found is not None and found.origin == "experts" and self.routed is not None:
            raw = None if found.raw is None else self.rows(found.raw)
            routed = replace(self.routed[1], factor=found.factor)
            return Write("mlp", value, raw, routed=routed)
        return Write("mlp", value)

    def _projection(self, found: Mark, whole: Tensor) -> Projection | None:
        """The output projection, if by value it makes the write of the heads as they were."""
        assert found.operands is not None
        mixed, heads, weight, bias = found.operands
        for turned in (False, True):
            rows = self.rows(mixed, weight.shape[1], turned)
            if rows is None or self.heads is None or rows.shape[-1] != self.heads.shape[1]:
                return None
            own = rows[:, 0].float()
            made = own @ weight.float().T
            if bias is not None:
                made = made + bias.float()
            coarse = max((rows.dtype, whole.dtype), key=lambda dtype: torch.finfo(dtype).eps)
            if _close(own, self.heads, rows.dtype) and _close(
                made * found.factor, whole[:, 0].float(), coarse, 32
            ):
                return Projection(rows, heads, weight, bias, found.factor)
        return None

    # Attention

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors say where."""
        try:
            yield
        except Uneditable:
            raise
        except MeasurementError as error:
            raise self.refuse(str(error)) from error

    def show(self, how: str, attended: Attended, output: Tensor | None) -> None:
        """An attention of the block, what computed it, and its output ``[B, H, T, Dv]``."""
        if not self.inside:
            raise self.refuse("attention is computed outside of the blocks; not supported")
        self.attended += 1
        if how not in self.found.how:
            self.found.how.append(how)
        heads = attended.p0.shape[1]
        self.found.most_heads = max(self.found.most_heads or 0, heads)
        with self.named():
            self.observer.attention(self.block, attended)
        if output is not None:
            self.yields(output[:, :, 0].detach().float().flatten(1), output)

    def yields(self, heads: Tensor | None, output: Tensor) -> None:
        """P0's rows ``[B, H * Dv]`` of what its heads yield, and that of all positions."""
        self.heads = heads
        if self.editor is None and heads is not None and self.block in self.yielded:
            size = output.detach().float().square().sum() / (self.batch * self.length)
            self.yielded[self.block] = (self.yielded[self.block][0], heads, size.sqrt())

    def softmax(self, scores: Tensor) -> tuple[Tensor, Mark] | None:
        """Scores ``[B, ..., T, T]`` enter a softmax."""
        length = self.length
        if scores.ndim not in (4, 5) or tuple(scores.shape[-2:]) != (length, length):
            if scores.ndim == 3 and tuple(scores.shape[-2:]) == (length, length):
                self.went_as_attention = (
                    f"a softmax over {tuple(scores.shape)}, of which sequence and head cannot be "
                    "told: view the scores as [B, H, T, T]"
                )
            return None
        if scores.shape[0] != self.batch:
            return None
        with self.flow.paused(), self.named():
            wide = scores.flatten(1, -3).float()
            least = wide.logsumexp(-1, keepdim=True) - 80
            wide = wide.masked_fill((wide <= _HIDDEN) & (wide < least), -torch.inf)
            changed = self._unmasked(scores, wide)
            if changed is not None:
                wide = changed
                scores = changed.view(scores.shape).to(scores.dtype)
            attended = read_scores(wide, self.observer.second_key, changed is not None)
        with self.flow.paused():
            self.show("softmax", attended, None)
        self.unmixed = True
        return scores, Mark("weights", heads=wide.shape[1])

    def edit_mask(self, seen: Tensor) -> Tensor | None:
        """Other keys that the editor lets the queries see."""
        wanted = self.editor.mask(self.block, seen) if self.editor else None
        self.masked = self.masked or wanted is not None
        return wanted

    def _unmasked(self, scores: Tensor, wide: Tensor) -> Tensor | None:
        """Scores ``[B, H, T, T]`` with another mask, if the editor wants one."""
        seen = wide > -torch.inf
        wanted = self.edit_mask(seen)
        if wanted is None:
            return None
        if bool((wanted & ~seen).any()):
            before = getattr(scores, _UNMASKED, None)
            before = None if before is None else before.expand(scores.shape).flatten(1, -3).float()
            if before is None or not torch.equal(before[seen], wide[seen]):
                raise self.uneditable(
                    "its scores are masked before they can be seen, and no query can be shown a "
                    "later key"
                )
            wide = torch.where(seen, wide, before)
        return wide.masked_fill(~wanted, -torch.inf)

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """In place of torch's."""
        with self.flow.paused():
            if query.ndim != 4 or (query.shape[0], query.shape[2]) != (self.batch, self.length):
                raise self.refuse(
                    f"scaled_dot_product_attention over queries {tuple(query.shape)} for tokens "
                    f"{tuple(self.tokens.shape)}, wanted [B, H, T, D]: chunks of a sequence, "
                    "sequences in a row and heads among the sequences are not supported"
                )
            if key.shape[2] != self.length:
                raise self.refuse(
                    f"scaled_dot_product_attention over {key.shape[2]} keys for {self.length} "
                    "positions: memory keys, a key of zeros (softmax1) and caches are not supported"
                )
            if attn_mask is None and not is_causal:
                raise self.refuse("attention that is not causal has no P0 sink")
            if key.shape[1] != query.shape[1] and not enable_gqa and key.shape[1] != 1:
                raise self.refuse(
                    f"{query.shape[1]} query heads over {key.shape[1]} key heads without enable_gqa"
                )
            mask = None if attn_mask is None else self._mask(attn_mask)
            wanted = query.shape[-1] ** -0.5 if scale is None else scale
            with self.named():
                edited = edit_mask(mask, self.edit_mask, query) if self.editor else mask
                output, attended = attend(
                    query, key, value, scale=wanted, mask=edited,
                    second_key=self.observer.second_key,
                    allow_future_keys=edited is not mask,
                )  # fmt: skip
            self.show("SDPA", attended, output)
        mark(output, Mark("mixed", heads=query.shape[1]))
        return output

    def _mask(self, mask: Tensor) -> Tensor:
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        mask = mask.expand(*mask.shape[:2], self.length, self.length)
        if mask.dtype != torch.bool:
            mask = mask.masked_fill(mask <= _HIDDEN, -torch.inf)
        seen = mask[..., 0] if mask.dtype == torch.bool else mask[..., 0] > -torch.inf
        if not bool((seen == seen[:, :1]).all()):
            raise self.refuse("its heads differ in which queries see P0; not supported")
        return mask

    def flex(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Flex attention in eager mode, which computes all scores too."""
        result = function(*args, **kwargs)
        query, key, value, score_mod, block_mask, scale = args[:6]
        buffers, mask_buffers = (
            (args[7] if len(args) > 7 else ()),
            (args[8] if len(args) > 8 else ()),
        )
        batch, heads, length, _ = query.shape
        if (batch, length) != (self.batch, self.length) or key.shape[2] != length:
            raise self.refuse(
                f"flex_attention over queries {tuple(query.shape)} and keys {tuple(key.shape)} for "
                f"tokens {tuple(self.tokens.shape)}; not supported"
            )
        with self.flow.paused(), self.named():
            group = heads // key.shape[1]
            keys = key.float().repeat_interleave(group, 1)
            scores = query.float() @ keys.mT * scale
            at = [torch.arange(n, device=query.device) for n in (batch, heads, length, length)]
            scores = _over_all(lambda s, *i: score_mod(s, *i, *buffers), scores, at)
            seen = _over_all(lambda s, *i: block_mask[-1](*i, *mask_buffers), scores, at)
            wanted = self.edit_mask(seen)
            scores = scores.masked_fill(~(seen if wanted is None else wanted), -torch.inf)
            attended = read_scores(scores, self.observer.second_key, wanted is not None)
            values = value.float().repeat_interleave(group, 1)
            own = scores.softmax(-1).nan_to_num() @ values
            if wanted is not None:
                result[0].copy_(own)
            elif not _alike(own, result[0]):
                raise MeasurementError(
                    "flex_attention gives something else than softmax attention of its arguments"
                )
            self.show("flex attention", replace(attended, value=value), result[0])
        mark(result[0], Mark("mixed", heads=heads))
        self.flow.score(tuple(result[1:]))
        return result

    def multi_head(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``nn.MultiheadAttention``'s function, step by step."""
        names = (
            "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight",
            "in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight",
            "out_proj_bias", "training", "key_padding_mask", "need_weights", "attn_mask",
            "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight",
            "static_k", "static_v", "average_attn_weights", "is_causal",
        )  # fmt: skip
        given = dict(zip(names, args, strict=False)) | kwargs
        for name in ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask"):
            if given.get(name) is not None:
                raise self.refuse(
                    f"multi_head_attention_forward with {name}: memory keys and padding are not "
                    "supported"
                )
        if given.get("add_zero_attn"):
            raise self.refuse("multi_head_attention_forward with add_zero_attn is not supported")
        query, heads = given["query"], given["num_heads"]
        if query.ndim != 3 or query.shape[:2] != (self.length, self.batch):
            raise self.refuse(
                f"multi_head_attention_forward over {tuple(query.shape)}, wanted [T, B, D]"
            )
        with self.flow.paused():
            expected = function(*args, **kwargs)[0]
        weights = given["in_proj_weight"]
        parts = (
            [given[f"{name}_proj_weight"] for name in "qkv"]
            if given.get("use_separate_proj_weight")
            else list(weights.chunk(3))
        )
        bias = given.get("in_proj_bias")
        biases = [None] * 3 if bias is None else list(bias.chunk(3))

        def split(name: str, place: int) -> Tensor:
            value = F.linear(given[name], parts[place], biases[place])
            by_head: Tensor = value.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
            return by_head

        with self.flow.paused():
            q, k, v = (split(name, place) for place, name in enumerate(("query", "key", "value")))
            mask, causal = given.get("attn_mask"), given.get("is_causal") or False
            if mask is not None and mask.ndim == 3:
                mask = mask.unflatten(0, (self.batch, heads))
            if mask is not None and mask.dtype == torch.bool:
                mask = ~mask  # true hides in this function
        with self.flow:
            mixed = self.scaled_dot_product_attention(q, k, v, mask, 0.0, causal and mask is None)
            mixed = mixed.permute(2, 0, 1, 3).flatten(2)
            output = F.linear(mixed, given["out_proj_weight"], given["out_proj_bias"])
        self.flow.derive(output)
        if not self.masked and not _alike(output, expected):
            raise self.refuse("multi_head_attention_forward gives another output than is known")
        return output, None

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
                if own.shape == whole.shape and _alike(own, whole):
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

    def gate(self, mixed: Tensor, gate: Tensor, heads: int) -> None:
        """The heads are multiplied with something."""
        if self.heads is None:
            return
        width = self.heads.shape[1]
        for view in self._head_views(mixed, heads):
            if view.shape[-1] * heads != width:
                continue
            if _close(view[:, 0].flatten(1).float(), self.heads, view.dtype):
                gates = next(g for g in self._head_views(gate.expand_as(mixed), heads, mixed, view))
                self.heads = (view[:, 0] * gates[:, 0]).flatten(1).float()
                self.observer.gate(self.block, gates.mean(-1, dtype=torch.float32))
                return

    def _head_views(
        self, value: Tensor, heads: int, like: Tensor | None = None, view: Tensor | None = None
    ) -> Iterator[Tensor]:
        """``[B, T, H, Dv]`` of heads in the orders in which they may stand."""
        shape = (self.batch, self.length)
        if value.numel() % (shape[0] * shape[1] * heads):
            return
        each = value.numel() // (shape[0] * shape[1] * heads)
        turned = [
            value.reshape(*shape, heads, each),
            value.reshape(shape[0], heads, shape[1], each).transpose(1, 2),
            value.reshape(shape[1], shape[0], heads, each).transpose(0, 1),
        ]
        if like is None or view is None:
            yield from turned
            return
        for own, other in zip(turned, self._head_views(like, heads), strict=True):
            if torch.equal(other, view):
                yield own

    def reweighted(self) -> None:
        """As of `Watcher`."""
        raise self.refuse(
            "its attention's probabilities are changed after the softmax (talking heads, or a "
            "factor), so what meets the values is not softmax attention; not supported"
        )

    def joined(self) -> None:
        """As of `Watcher`."""
        raise self.refuse(
            "something is added to what its heads attend to, beside the softmax; not supported"
        )

    def write(self, found: Mark | None, added: Tensor) -> None:
        """As of `Watcher`."""
        raise AssertionError  # sums with the stream are dealt with before

    # Routed experts

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
        found = call.chosen or call.ranked
        count = found[0] if found else call.unseen(self.batch * self.length)
        if count is None or self.attended > call.attended:
            return
        for outer in self.experts:
            outer.told = True
        kind = type(module).__name__
        with self.flow.paused():
            try:
                if not found:
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
            if name in _SORTS:
                call.ranked = (count, index)
            else:
                call.chose(count, index)


class _Flow(ResidualTracer):
    """Follows streams as linear forms, and knows what is derived from them."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(tap)
        self.tap = tap
        self.probing = self.replaying = False
        self._pauses = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is computed inside is our own."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def probe(self, tokens: Tensor) -> Tensor:
        """The input of block 0 for other tokens."""
        self.probing, pauses, self._pauses = True, self._pauses, 0
        try:
            with self:
                self.tap.decoder.run(tokens)
        except _Reached as reached:
            return reached.stream
        finally:
            self.probing, self._pauses = False, pauses
        raise MeasurementError("a second pass of the model does not reach block 0")

    @staticmethod
    def derived(value: Tensor) -> bool:
        """Does it depend on the stream?"""
        return bool(getattr(value, _DERIVED, False)) or mark_of(value) is not None

    @staticmethod
    def derive(result: Any) -> None:
        """It depends on the stream."""
        for value in _tensors((result,), {}):
            setattr(value, _DERIVED, True)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._pauses:
            return func(*args, **kwargs)
        name = _name(func)
        if name in ("embedding", "__getitem__") and len(args) > 1:
            weight, index = args[:2]
            if isinstance(weight, Tensor) and not weight.is_floating_point():
                weight, index = index, weight
            self.tap.embedded(index, weight)
        if not self.following or self.probing:
            return func(*args, **kwargs)
        values = list(_tensors(args, kwargs))
        scored = any(map(self._scored, values)) or (
            name in _OVER_KEYS and bool(values) and self._is_scores(values[0])
        )
        result = self._followed(name, func, types, args, kwargs)
        if any(self.derived(value) for value in values):
            changed = args[0] if name == "__setitem__" else result
            self.derive(changed)
            if scored:
                self.score((changed,))
        return result

    def _scored(self, value: Tensor) -> bool:
        """Is it computed from what the present block's scores sum up to?"""
        return getattr(value, _SCORED, None) == self.tap.block and mark_of(value) is None

    def score(self, results: Any) -> None:
        """These are."""
        for value in _tensors(results, {}):
            if value.is_floating_point():
                setattr(value, _SCORED, self.tap.block)

    def _is_scores(self, value: Tensor) -> bool:
        """Are they attention's, ``[B, H, T, T]``, by the shape?"""
        length = self.tap.length
        wide = value.ndim > 3 or (value.ndim == 3 and self.tap.width != length)
        return wide and tuple(value.shape[-2:]) == (length, length) and self.derived(value)

    def _followed(
        self, name: str, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tap = self.tap
        if type(func).__name__ == "FlexAttentionHOP":
            return tap.flex(func, args, kwargs)
        if name == "scaled_dot_product_attention":
            tap.settle()
            return tap.scaled_dot_product_attention(*args, **kwargs)
        if name == "multi_head_attention_forward":
            tap.settle()
            return tap.multi_head(func, args, kwargs)
        values = list(_tensors(args, kwargs))
        if name in _ACROSS and tap.inside and any(map(self._of_positions, values)):
            tap.lose(f"{name} mixes positions beside its attention")
        if any(isinstance(mark_of(value), Stream) for value in values):
            return self._on_stream(name, func, args, kwargs)
        if name in _READS:
            return func(*args, **kwargs)
        marks = [found for value in values if (found := mark_of(value))]
        if any(found.origin == "mixed" for found in marks) and any(map(self._scored, values)):
            raise tap.refuse(
                "what its heads attend to is changed by what their scores add up to (a sink's "
                "logit, softmax1), so it is not softmax attention over its keys alone; not "
                "supported"
            )
        with self.paused():
            combined = self._combined(name, args, kwargs) if marks and tap.inside else None
        if combined is not None:
            result = func(*args, **kwargs)
            mark(result, combined)
            return result
        if name in _BLENDS and tap.inside and any(found.origin in _PARTS for found in marks):
            beside = [value for value in values if mark_of(value) is None]
            if any(self.derived(value) and value.is_floating_point() for value in beside):
                tap.lose(f"{name} joins its attention or experts with something else it computes")
        if name in _MAPS and any(m.origin == "attention" and m.raw is not None for m in marks):
            return func(*args, **kwargs)  # a layer of its own on the attention's output
        before = self._unmasked(name, func, args, kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        if before is not None and isinstance(result, Tensor):
            setattr(result, _UNMASKED, before)
        if name in _CHOOSES and args and (isinstance(result, tuple) or name not in _PAIRS):
            with self.paused():
                tap.chose(name, args[0], result)
        if any(found.origin == "weights" for found in marks) and name in _MAPS:
            tap.yields(self._mixed(result), result)
            tap.unmixed = False
        if _is_opaque(func, name):
            with self.paused():
                tap.opaque(name, args, kwargs, result)
        return result

    def _combined(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mark | None:
        """The mark of sublayers' outputs side by side, added up with factors or multiplied.

        None where they are not, or are added up plainly.
        """
        left, right = (*args, None, None)[:2] if args else (None, None)
        a, b = mark_of(left), mark_of(right)
        marks = [found for found in (a, b) if found is not None]
        if not any(found.origin in ("sum", "attention", "experts") for found in marks):
            return None
        if name in _MULTIPLY or name in _DIVIDE:
            value, factor = (left, right) if a is not None else (right, left)
            found = mark_of(value)
            fits = found is not None and found.origin == "sum" and isinstance(value, Tensor)
            if not fits or (name in _DIVIDE and value is not left) or kwargs:
                return None
            if isinstance(factor, Tensor):
                if self.derived(factor) or torch.broadcast_shapes(
                    factor.shape, value.shape
                ) != tuple(value.shape):
                    return None
                factor = float(factor) if factor.numel() == 1 else factor
            elif not isinstance(factor, int | float):
                return None
            return self._scaled(found, value, 1 / factor if name in _DIVIDE else factor)
        if name in ("neg", "__neg__") and a is not None and a.origin == "sum":
            return self._scaled(a, left, -1.0)
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return None
        if left.shape != right.shape or self.tap.rows(left) is None:
            return None
        alpha = kwargs.get("alpha", 1)
        if name in _SUBTRACT:
            one, two = 1.0, -float(alpha)
        elif name in _ADD and alpha != 1:
            one, two = 1.0, float(alpha)
        elif name in ("lerp", "lerp_"):
            weight = self._number(args[2] if len(args) > 2 else kwargs.get("weight"))
            if weight is None:
                return None
            one, two = 1 - weight, weight
        else:
            return None
        if not self.derived(left) or not self.derived(right):
            return None
        terms = [*self._scaled(a, left, one).parts, *self._scaled(b, right, two).parts]
        return Mark("sum", parts=tuple(terms))

    def _scaled(self, found: Mark | None, value: Tensor, factor: Any) -> Mark:
        """A sum's mark, each term of it multiplied with a number or a constant tensor."""
        terms: list[tuple[Mark | None, Tensor]] = []
        for known, part in found.parts if found and found.parts else ((found, value),):
            scaled = part.view(value.shape) * factor
            self.derive(scaled)
            if known is not None and known.raw is None:
                number = isinstance(factor, int | float)
                known = (
                    replace(known, factor=known.factor * factor)
                    if number
                    else replace(known, raw=part)
                )
            terms.append((known, scaled))
        return Mark("sum", parts=tuple(terms))

    def _of_positions(self, value: Tensor) -> bool:
        """Is it computed for each position, and no count such as of an expert's tokens?"""
        large = value.numel() >= self.tap.batch * self.tap.length
        return large and value.is_floating_point() and self.derived(value)

    def _mixed(self, result: Any) -> Tensor | None:
        """float32 ``[B, H * Dv]``: P0's rows of what probabilities and values make."""
        found = mark_of(result)
        if found is None or found.origin != "mixed" or result.ndim not in (4, 5):
            return None
        with self.paused():
            batch, length = self.tap.batch, self.tap.length
            by_head = result.flatten(1, -3)
            by_position = result.flatten(2, -2)
            first = tuple(by_head.shape[:3]) == (batch, found.heads, length)
            second = tuple(by_position.shape[:3]) == (batch, length, found.heads)
            if first == second:
                return None
            rows: Tensor = by_head[:, :, 0] if first else by_position[:, 0]
            return rows.detach().float().flatten(1)

    def _on_stream(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tap = self.tap
        if tap.settling is not None and name not in _READS:
            handled, result = self._carried(name, func, args, kwargs)
            if handled:
                return result
            tap.settle()
        values = list(_tensors(args, kwargs))
        streams = [value for value in values if isinstance(mark_of(value), Stream)]
        before = {id(value): mark_of(value) for value in streams}
        versions = self._versions(values)
        tap.changes = []
        with self.paused():
            new = None if name in _READS else self._form(name, args, kwargs)
            sums = self._sums(values) if new is None and _is_opaque(func, name) else []
            if tap.changes and name in ("addcmul", "addcmul_"):  # of a product there is no operand
                ((stream, whole, _),) = tap.changes
                func = torch.Tensor.add_ if _is_in_place(name) else torch.add
                args, kwargs = (stream, tap.like(whole.to(stream.dtype), stream)), {}
            else:
                args, kwargs = self._edited(name, args, kwargs)
        result = func(*args, **kwargs)
        outputs = [v for v in _tensors((result,), {}) if v.is_floating_point()]
        with self.paused():
            if name == "__setitem__" or (new is None and name.endswith("_") and name[:2] != "__"):
                _unmark(args[0])
                return result
            for value in outputs:
                if any(value is one for one in streams) and new is None:
                    continue
                form = new if new is not None and tap.rows(value) is not None else None
                if form is None and len(streams) == 1 and _is_view(value, streams[0]):
                    form = before[id(streams[0])]  # type: ignore[assignment]
                if form is None and sums:
                    form = self._by_value(value, sums)
                if form is not None:
                    mark(value, form)
                elif tap.rows(value) is not None and name not in _NORMS:
                    tap.went.append(name)
            if sums and tap.changes:
                result = self._again(name, func, args, kwargs, result, sums, versions)
            if _is_opaque(func, name):
                tap.opaque(name, args, kwargs, result)
        return result

    def _carried(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bool, Any]:
        """Is the last block's write added to the stream first of all? Then that is the stream."""
        tap = self.tap
        assert tap.settling is not None
        stream, beside = tap.settling
        values = list(_tensors(args, kwargs))
        other = next((v for v in values if any(v is one for one in beside)), None)
        if other is None or not any(value is stream for value in values):
            return False, None
        if (name not in _ADD or kwargs) and not _is_opaque(func, name):
            return False, None
        versions = self._versions(values)
        tap.changes = []
        with self.paused():
            sums = self._sums(values)
        result = func(*args, **kwargs)
        with self.paused():
            for value in _tensors((result,), {}):
                form = self._by_value(value, sums)
                if form is not None:
                    mark(value, form)
                    if tap.changes:
                        result = self._again(name, func, args, kwargs, result, sums, versions)
                        made = [v for v in _tensors((result,), {}) if mark_of(v) is form]
                        (value,) = made
                    self.derive(result)
                    tap.carries = True
                    changed = tap._settle(value)
                    if changed is not None and result is not value:
                        raise tap.uneditable(f"its input is made by {name}, with more than the sum")
                    return True, result if changed is None else changed
        raise tap.refuse(
            f"{name} takes the stream and the last block's output, and gives no sum of them; not "
            "supported"
        )

    def _edited(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a sum, with the writes that the editor wants in the place of their own."""
        tap = self.tap
        for value, whole, factor in tap.changes:
            rows = tap.rows(value)
            assert rows is not None
            if factor != 1:
                whole = torch.where(whole == rows * factor, rows, whole / factor)
            new = tap.like(whole.to(value.dtype), value)
            if args and args[0] is value and _is_in_place(name):
                value.copy_(new)  # the sum is written there
                continue
            args = _swapped(args, value, new)
            kwargs = {key: _swapped(own, value, new) for key, own in kwargs.items()}
        return args, kwargs

    def _versions(self, values: list[Tensor]) -> list[int]:
        """How often tensors were changed in place, where a pass may be edited."""
        return [value._version for value in values] if self.tap.editor else []

    def _unmasked(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Of scores that are about to be masked, or were, what they are without a mask."""
        tap = self.tap
        if tap.editor is None or not tap.inside:
            return None
        square = [
            value
            for value in _tensors(args[:3], {})
            if value.ndim > 3 and value.shape[-2:] == (tap.length, tap.length)
            if value.is_floating_point() and self.derived(value)
        ]
        if len(square) != 1:
            return None
        (scores,) = square
        before = getattr(scores, _UNMASKED, None)
        if name in ("masked_fill", "masked_fill_", "where") or name in _ADD:
            if before is not None:
                return before  # type: ignore[no-any-return]
            return scores.clone() if _is_in_place(name) else scores
        if before is not None and (name in _SAME or name in _MULTIPLY or name in _DIVIDE):
            with self.paused():
                own: Tensor = func(*_swapped(args, scores, before.clone()), **kwargs)
            return own
        return None

    def _again(
        self,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        sums: list[tuple[Tensor, Tensor, Tensor]],
        versions: list[int],
    ) -> Any:
        """An operator that was found to be a sum by its value, once more with edited writes.

        Raises:
            Uneditable: it works in place, or does not give their sum.
        """
        tap = self.tap
        if self._versions(list(_tensors(args, kwargs))) != versions:
            raise tap.uneditable(f"{name} adds its write to the stream in place")
        args, kwargs = self._edited(name, args, kwargs)
        again = func(*args, **kwargs)
        ((edited, whole, _),) = tap.changes
        for old, new in zip(_tensors((result,), {}), _tensors((again,), {}), strict=True):
            found = mark_of(old)
            if not isinstance(found, Stream):
                continue
            mark(new, found)
            stream = next(one for one, other, _ in sums if other is edited)
            left, right = tap.rows(stream), tap.rows(new)
            if left is None or right is None:
                continue
            if not _close(right.float(), (left + whole).float(), new.dtype):
                raise tap.uneditable(f"{name} gives no sum of the stream and another write")
        return again

    def _sums(self, values: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """A stream, another value, and their sum ``[B, T, D]``."""
        like = [value for value in _distinct(values) if self.tap.rows(value) is not None]
        streams = [value for value in like if isinstance(mark_of(value), Stream)]
        found = []
        for stream in streams:
            for other in like:
                if other is not stream:
                    left, right = self.tap.rows(stream), self.tap.rows(other)
                    assert left is not None
                    assert right is not None
                    found.append((stream, other, left + right))
        return found

    def _by_value(self, value: Tensor, sums: list[tuple[Tensor, Tensor, Tensor]]) -> Stream | None:
        """The form of an operator's output that is a sum of what went in."""
        rows = self.tap.rows(value)
        if rows is None:
            return None
        for stream, other, total in sums:
            if _close(rows.float(), total.float(), value.dtype):
                known, term = mark_of(stream), self._term(other)
                assert isinstance(known, Stream)
                return None if term is None else known.plus(term)
        return None

    def _form(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stream | None:
        """The linear form of a result; None where it is none."""
        left = args[0] if args else kwargs.get("input")
        right = args[1] if len(args) > 1 else kwargs.get("other")
        a, b = mark_of(left), mark_of(right)
        if name in _ADD or name in _SUBTRACT:
            sign = -1.0 if name in _SUBTRACT else 1.0
            return self._sum_of(left, right, sign * kwargs.get("alpha", 1))
        if name in _MULTIPLY:
            stream, other = (a, right) if isinstance(a, Stream) else (b, left)
            factor = self._number(other)
            return (
                stream.times(factor) if isinstance(stream, Stream) and factor is not None else None
            )
        if name in _DIVIDE and isinstance(a, Stream) and not kwargs.get("rounding_mode"):
            factor = self._number(right)
            return a.times(1 / factor) if factor else None
        if name in ("neg", "__neg__") and isinstance(a, Stream):
            return a.times(-1.0)
        if name in ("lerp", "lerp_"):
            factor = self._number(args[2] if len(args) > 2 else kwargs.get("weight"))
            if factor is None or not isinstance(left, Tensor) or not isinstance(right, Tensor):
                return None
            one, two = self._term(left, 1 - factor), self._term(right, factor)
            return one.plus(two) if one and two else None
        if name in ("addcmul", "addcmul_") and isinstance(a, Stream) and len(args) > 2:
            scaled = args[1] * args[2] * kwargs.get("value", 1)
            marked = next((v for v in args[1:3] if mark_of(v)), None)
            found = None if marked is None else replace(_known(marked), raw=marked)
            if isinstance(found, Stream) or self.tap.rows(scaled) is None:
                return None
            self.derive(scaled)
            term = self.tap.write_of(found, scaled)
            if term is None:
                return None
            if term[1] is not None:
                assert isinstance(left, Tensor)
                self.tap.changes.append((left, term[1], 1.0))
            return a.plus(term[0])
        if name in _SAME and isinstance(a, Stream):
            return a
        return None

    def _sum_of(self, left: Any, right: Any, factor: float) -> Stream | None:
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            number = right if isinstance(left, Tensor) else left
            found = mark_of(left) or mark_of(right)
            return found if number == 0 and factor == 1 else None  # type: ignore[return-value]
        if self.tap.rows(left) is None or self.tap.rows(right) is None:
            return None
        one, two = self._term(left), self._term(right, factor)
        return one.plus(two) if one is not None and two is not None else None

    def _term(self, value: Tensor, factor: float = 1.0) -> Stream | None:
        """An operand of a sum: a stream, or a write."""
        found = mark_of(value)
        if isinstance(found, Stream):
            return found.times(factor)
        parts = found.parts if found and found.parts else ((found, value),)
        total = Stream("stream")
        whole, edited = [], False
        for known, part in parts:
            scaled = part if factor == 1 else part * factor
            if self.derived(value):
                self.derive(scaled)
            if known is not None and factor != 1:
                known = replace(known, factor=known.factor * factor)
            term = self.tap.write_of(known, scaled)
            if term is None:
                return None
            total = total.plus(term[0])
            whole.append(self.tap.rows(scaled) if term[1] is None else term[1])
            edited = edited or term[1] is not None
        if edited:
            self.tap.changes.append((value, sum(whole), factor))  # type: ignore[arg-type]
        return total

    def _number(self, value: Any) -> float | None:
        """A factor that does not depend on the tokens."""
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, Tensor) and value.numel() == 1 and not self.derived(value):
            return float(value)
        return None


@contextmanager
def _standing_in(block: nn.Module, output: Any) -> Iterator[None]:
    """The block does not run: it returns this."""
    own = vars(block).get("forward")
    block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _swapped(value: Any, old: Tensor, new: Tensor) -> Any:
    """The same with another tensor in the place of one."""
    if isinstance(value, tuple | list):
        items = [_swapped(item, old, new) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return new if value is old else value


def _is_in_place(name: str) -> bool:
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _known(value: Tensor) -> Mark:
    found = mark_of(value)
    assert found is not None
    return found


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "") or str(func)
    return name if isinstance(name, str) else type(func).__name__


def _is_opaque(func: Any, name: str) -> bool:
    """A function that is none of torch's own for tensors."""
    if type(func).__name__ in ("OpOverload", "OpOverloadPacket", "CustomOpDef"):
        return True
    return not any(hasattr(place, name) for place in (Tensor, torch, F))


def _is_view(value: Tensor, of: Tensor) -> bool:
    """The same numbers in the same memory, perhaps in another shape."""
    return (
        value.dtype == of.dtype
        and value.numel() == of.numel()
        and value.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()
        and value.storage_offset() == of.storage_offset()
    )


def _unmark(value: Any) -> None:
    if mark_of(value) is not None:
        delattr(value, "_sinktrack_mark")


def _distinct(values: Iterable[Tensor]) -> list[Tensor]:
    return list({id(value): value for value in values}.values())


def _close(one: Tensor, two: Tensor, dtype: torch.dtype, factor: float = 4) -> bool:
    """Equal to rounding of the dtype, in parts of the largest."""
    if one.shape != two.shape:
        return False
    if not two.numel():
        return True
    slack = factor * torch.finfo(dtype).eps * float(two.abs().max())
    return bool(((one - two).abs() <= slack).all())


def _alike(own: Tensor, other: Tensor) -> bool:
    """Are two computations of attention one but for rounding, at random in low precision?"""
    eps = torch.finfo(other.dtype).eps
    if eps < 1e-4:
        return _close(own.float(), other.float(), other.dtype, 64)
    error = torch.linalg.vector_norm(own.float() - other.float())
    return bool(error <= eps / 2 * torch.linalg.vector_norm(own.float()))


def _may_route(module: nn.Module) -> bool:
    """Has it modules, or stacks of matrices, among which a router may choose?"""
    stacked = any(value.ndim == 3 for value in module.parameters(recurse=False))
    return stacked or next(module.children(), None) is not None


def _over_all(function: Callable[..., Tensor], scores: Tensor, at: list[Tensor]) -> Tensor:
    """A function of a score and its four indices, over all of ``[B, H, T, T]``."""
    for place in range(3, -1, -1):
        dims: list[int | None] = [None] * 4
        dims[place] = 0
        function = torch.vmap(function, in_dims=(0, *dims))
    return function(scores, *at).expand(scores.shape)
