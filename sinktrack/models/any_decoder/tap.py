"""What one watched forward pass goes through: blocks, and the stream between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sinktrack.errors import MeasurementError
from sinktrack.models.any_decoder.by_value import distinct
from sinktrack.models.any_decoder.decoder import Several, class_of
from sinktrack.models.any_decoder.flow import Flow, swapped
from sinktrack.models.any_decoder.routers import Routers, may_route
from sinktrack.models.any_decoder.stream import (
    EMBEDDING,
    Decided,
    Reached,
    Stream,
    Undecided,
)
from sinktrack.models.any_decoder.unknown_operators import UnknownOperators
from sinktrack.models.any_decoder.writes import Writes
from sinktrack.models.parallel import has_units
from sinktrack.models.tracer import Mark, _tensors, mark, mark_of
from sinktrack.probe import Probe


class Tap(UnknownOperators, Writes, Routers):
    """Hooks on the blocks of a pass."""

    @cached_property
    def flow(self) -> Flow:  # type: ignore[override]
        """Of the functions that the pass calls."""
        flow = Flow(self)
        flow.copying = has_units(self.found.blocks.values())
        return flow

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
                    if module is not block and may_route(module):
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
            return swapped(args, stream, changed), {
                name: swapped(value, stream, changed) for name, value in kwargs.items()
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
        given = list(distinct(_tensors(args, kwargs)))
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
            raise Reached(stream.detach().clone())
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
            known = Stream("stream", form={EMBEDDING: 1.0})
            self.terms[EMBEDDING] = value[:, 0].double()
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
                    for value in distinct(_tensors(tuple(outputs), {}))
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

    def write(self, found: Mark | None, added: Tensor) -> None:
        """As of `Watcher`."""
        raise AssertionError  # sums with the stream are dealt with before


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
