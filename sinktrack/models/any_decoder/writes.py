"""What is added to the stream: attention, its heads, an MLP, experts, or the first input."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sinktrack.events import Projection, Write
from sinktrack.models.any_decoder.by_value import close
from sinktrack.models.any_decoder.stream import EMBEDDING, Stream
from sinktrack.models.any_decoder.watched import Watched
from sinktrack.models.tracer import Mark, makes


class Writes(Watched):
    """The writes of a pass."""

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
            return Stream("stream", form={EMBEDDING: factor})
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
            own = rows[:, 0]
            if close(own.float(), self.heads, rows.dtype) and makes(found, own, whole[:, 0]):
                return Projection(rows, heads, weight, bias, found.factor)
        return None
