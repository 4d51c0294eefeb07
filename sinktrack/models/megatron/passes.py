"""Passes of a live Megatron-Core model that are edited: of one that every process holds whole.

Hooks return what takes the place of an input, an attention or a write. Nothing is communicated on
the way, so each data-parallel process runs by itself, and all compute the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sinktrack.archive.layouts.megatron_arguments import vocabulary
from sinktrack.attention import attend, edit_mask
from sinktrack.events import Editor, Observer, Projection, Routed, Write
from sinktrack.models.editable import InMemory, at_once
from sinktrack.models.guard import probe_context
from sinktrack.models.megatron.context import ready, synced
from sinktrack.models.megatron.fresh import fresh
from sinktrack.models.megatron.hooks import Chunks, Tap, chunks, sublayers, weight_of
from sinktrack.models.megatron.processes import Processes, processes
from sinktrack.probe import Probe

_SIZES = {
    "tensor": "get_tensor_model_parallel_world_size",
    "context": "get_context_parallel_world_size",
    "pipeline": "get_pipeline_model_parallel_world_size",
    "expert": "get_expert_model_parallel_world_size",
}


def why_not(model: Any) -> str | None:
    """Why the causal tests do not run on a model, the same on every process; None where they do."""
    from megatron.core import parallel_state as state

    if not state.model_parallel_is_initialized():
        return None  # nor is it measured, which says why
    spread = [f"{name} parallelism" for name, size in _SIZES.items() if getattr(state, size)() > 1]
    if getattr(_config(model), "moe_expert_capacity_factor", None) is not None:
        return (
            "causal tests put edited copies into one batch, and with moe_expert_capacity_factor "
            "what else is in a batch decides what is dropped"
        )
    models = model if isinstance(model, list | tuple) else [model]
    if any(isinstance(value, DTensor) for chunk in models for value in chunk.parameters()):
        spread.append("FSDP2")
    if not spread:
        return None
    return (
        "causal tests run on live Megatron-Core models that every process holds whole; here "
        f"{' and '.join(spread)} spreads it: run them on the checkpoints"
    )


def _config(model: Any) -> Any:
    module = model[0] if isinstance(model, list | tuple) else model
    while not hasattr(module, "decoder") and hasattr(module, "module"):
        module = module.module
    return getattr(module, "config", None)


@contextmanager
def editable(model: Any, probe: Probe, batch_size: int | None) -> Iterator[Passes]:
    """A model that is run and edited, and left as it was found; every process enters.

    Raises:
        ProbeError, MeasurementError: as of `sinktrack.measure`.
    """
    all_of: Processes = processes()

    def prepare() -> Passes:
        parts = chunks(model)
        passes = Passes(parts)
        probe.check(passes.vocabulary, getattr(parts.bare[0], "max_sequence_length", None))
        return passes

    passes = all_of.all_or_none(prepare)
    parts, size = passes.found, at_once(passes.vocabulary, probe, batch_size)
    with synced(parts), probe_context(nn.ModuleList(parts.bare), size, probe), ready(parts):
        fresh(parts, all_of)
        yield passes


class Passes(InMemory):
    """`Editable` of a Megatron-Core model."""

    def __init__(self, found: Chunks) -> None:
        self.found = found
        (self._chunk,) = found.bare
        self.blocks = found.count
        self.routes = False
        self.width = int(found.config.hidden_size)
        self.vocabulary = _vocabulary(found)
        self.device = next(self._chunk.parameters()).device

    def restarts(self, block: int) -> bool:
        """Blocks hand on the stream alone."""
        return True

    def run(
        self,
        tokens: Tensor,
        observer: Observer | None = None,
        editor: Editor | None = None,
        *,
        start: int = 0,
        stream: Tensor | None = None,
        logits: bool = False,
    ) -> Tensor | None:
        """As of `Editable`."""
        tokens = self.found.layout.padded(tokens).to(self.device)
        tap = _Tap(self.found, observer or Observer(), editor or Editor(), tokens.shape[1])
        ids = torch.arange(tokens.shape[1], device=self.device).expand(len(tokens), -1)
        if getattr(self.found.config, "mtp_num_layers", None) is not None:
            logits = False  # the head reads them behind blocks that see further tokens
        before = self._chunk.post_process
        with ExitStack() as stack:
            for number, layer in self.found.blocks.items():
                if number < start:
                    assert stream is not None
                    stack.enter_context(_standing_in(layer, stream.transpose(0, 1)))
                    continue
                for handle in tap.hooks(number, layer):
                    stack.callback(handle.remove)
            self._chunk.post_process = logits
            stack.callback(setattr, self._chunk, "post_process", before)
            output: Tensor = self._chunk(tokens, ids, None)
        return output[..., : self.vocabulary] if logits else None


def _vocabulary(found: Chunks) -> int:
    """Token ids without those that pad the embedding, by what a checkpoint of the model holds:
    Megatron Bridge's configuration, or Megatron-LM's arguments."""
    saved = {"vocab_size": getattr(found.config, "vocab_size", None)}
    loop = sys.modules.get("megatron.training.global_vars")
    if saved["vocab_size"] is None and loop is not None and loop._GLOBAL_ARGS is not None:
        saved = vars(loop._GLOBAL_ARGS)
    return vocabulary(saved, int(found.bare[0].vocab_size))


@contextmanager
def _standing_in(layer: Any, stream: Tensor) -> Iterator[None]:
    """The block does not run: it returns this."""
    layer.forward = lambda *args, **kwargs: (stream, None)
    try:
        yield
    finally:
        del layer.forward


class _Tap(Tap):
    """What a block goes through in a pass that may be edited."""

    def __init__(self, found: Chunks, observer: Observer, editor: Editor, length: int) -> None:
        super().__init__(found, observer)
        self.editor, self.length = editor, length
        self.routed: tuple[Tensor, Tensor] | None = None

    def hooks(self, number: int, layer: Any) -> Iterator[Any]:
        """Register everything in one block."""
        mixer, mlp = sublayers(layer)

        def of(hook: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *given: hook(number, *given)

        yield layer.register_forward_pre_hook(of(self.entered), with_kwargs=True)
        if self.attends(number):
            core = mixer.core_attention
            yield core.register_forward_hook(of(self.core), with_kwargs=True)
            yield mixer.linear_proj.register_forward_pre_hook(of(self.projected))
        if mixer is not None:
            yield mixer.register_forward_hook(of(self.attention_write))
        if hasattr(mlp, "router"):
            yield mlp.register_forward_pre_hook(of(self.experts_enter), with_kwargs=True)
            yield mlp.router.register_forward_hook(of(self.chosen))
        if mlp is not None:
            yield mlp.register_forward_hook(of(self.mlp_write))
        yield layer.register_forward_hook(of(self.leave))

    def entered(self, number: int, module: Any, args: Any, kwargs: Any) -> Any:
        """Before a block."""
        stream = (args[0] if args else kwargs["hidden_states"]).transpose(0, 1)
        changed = self.editor.state(number, stream)
        if changed is not None:
            stream = changed
            turned = changed.transpose(0, 1).contiguous()
            if args:
                args = (turned, *args[1:])
            else:
                kwargs = kwargs | {"hidden_states": turned}
        self.observer.state(number, stream)
        self.begin(stream.transpose(0, 1))
        self.mixed = self.inputs = self.routed = None
        return None if changed is None else (args, kwargs)

    def core(self, number: int, core: Any, args: Any, kwargs: Any, output: Tensor) -> Any:
        """After an attention."""
        names = ("query", "key", "value", "attention_mask")
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = [given[name] for name in names[:3]]
        query, key, value = self.heads_of(number, tensors, given, self.length)
        mask = self.mask(number, self.length, query.device)
        wide: dict[str, Any] = {
            "scale": self.scale(number, core),
            "sinks": self.sinks(core, query.device),
            "second_key": self.observer.second_key,
            "with_mixing": self.observer.with_mixing,
        }
        ours, attended = attend(query, key, value, mask=mask, **wide)
        self.same(number, ours, output)
        edited = edit_mask(mask, lambda seen: self.editor.mask(number, seen), query)
        if edited is not mask:
            ours, attended = attend(query, key, value, mask=edited, allow_future_keys=True, **wide)
        self.observer.attention(number, attended)
        if edited is mask:
            return None
        return ours.permute(2, 0, 1, 3).reshape(output.shape).to(output.dtype)

    def projected(self, number: int, module: Any, args: Any) -> None:
        """Before the heads are projected."""
        self.mixed = args[0].transpose(0, 1).clone()

    def attention_write(self, number: int, module: Any, args: Any, output: Any) -> Any:
        """After a block's attention."""
        added = _added(output)
        if not self.attends(number):
            return self._written(number, Write("mixer", added))
        linear = module.linear_proj
        weight, bias = weight_of(linear), getattr(linear, "bias", None)
        projection = None
        if weight is not None and self.mixed is not None:
            bias = bias if isinstance(bias, Tensor) and bias.numel() else None
            projection = Projection(self.mixed, self.heads, weight, bias, 1.0)
        return self._written(number, Write("attention", added, projection=projection))

    def experts_enter(self, number: int, module: Any, args: Any, kwargs: Any) -> None:
        """Before a block's experts."""
        self.inputs = (args[0] if args else kwargs["hidden_states"]).transpose(0, 1).clone()

    def chosen(self, number: int, module: Any, args: Any, output: Any) -> None:
        """After a router."""
        gates, chosen = output
        shape = (self.length, -1, gates.shape[-1])
        gates, chosen = (value.reshape(shape).transpose(0, 1) for value in (gates, chosen))
        self.routed = gates.where(chosen.bool(), 0), chosen.bool()

    def mlp_write(self, number: int, module: Any, args: Any, output: Any) -> Any:
        """After a block's MLP."""
        routed = None
        if self.routed is not None:
            assert self.inputs is not None
            routed = _routed(module, self.inputs, *self.routed)
        return self._written(number, Write("mlp", _added(output), routed=routed))

    def _written(self, number: int, write: Write) -> Any:
        self.observer.write(number, write)
        wanted = self.editor.write(number, write)
        row = (write.added if wanted is None else wanted)[:, 0]
        self.add(row)
        if wanted is None:
            return None
        return wanted.transpose(0, 1).contiguous(), None


def _added(output: Any) -> Tensor:
    """``[B, T, D]``: a sublayer's output with the bias that comes apart from it; a copy."""
    added, bias = output if isinstance(output, tuple) else (output, None)
    whole: Tensor = added.clone() if bias is None else added + bias
    return whole.transpose(0, 1)


def _routed(mlp: Any, inputs: Tensor, gates: Tensor, chosen: Tensor) -> Routed:
    """The routed experts of a block.

    Args:
        mlp: that holds them, all.
        inputs: ``[B, T, D]``.
        gates: ``[B, T, E]``, 0 where an expert is not chosen.
        chosen: bool ``[B, T, E]``.
    """
    each = int(chosen.sum(-1).max())
    index = chosen.int().topk(max(each, 1), -1).indices
    gate = gates.gather(-1, index)
    dtype = next(mlp.experts.parameters()).dtype

    @cache
    def of(expert: int) -> Tensor:
        outputs = torch.zeros_like(inputs)
        at = chosen[..., expert]
        count = int(at.sum())
        if count:
            counts = torch.zeros(chosen.shape[-1], dtype=torch.int64)
            counts[expert] = count
            output, _ = mlp.experts(inputs[at].to(dtype), counts, gates[at][:, expert])
            outputs[at] = output.to(outputs.dtype)
        return outputs

    def outputs(position: int) -> Tensor:
        return torch.stack(
            [
                torch.stack([of(expert)[row, position] for expert in own])
                for row, own in enumerate(index[:, position].tolist())
            ]
        )

    def total() -> Tensor:
        return sum((of(expert) for expert in index.unique().tolist()), torch.zeros_like(inputs))

    return Routed(index, lambda: gate, outputs, of, total, 1.0)
