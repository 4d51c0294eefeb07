"""Taps on Megatron-Core decoders: hooks on blocks, attention, router and experts.

The hooks only look: the model's own forward and communication run as they are. A hook that fails
says so after the pass, not in it, lest the other processes wait for this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sinktrack.attention import attend
from sinktrack.errors import MeasurementError
from sinktrack.events import Observer, Projection, Write
from sinktrack.models.fp8 import plain
from sinktrack.models.megatron.layout import Layout, Routing

if TYPE_CHECKING:
    from sinktrack.models.megatron.shards import Shard

_KERNELS = ("unfused_attention", "flash_attention", "fused_attention")
"""Where Transformer Engine keeps the factor on the scores."""
_LINEAR = ("gated_delta_net", "gdn", "gdn2")
"""Variants of attention that no block is measured in, but all around them."""
_SCANNED = "scan the checkpoints, which are measured in the dtype of their weights"
_TOLERANCE = 1e-3
_HALF_TOLERANCE = 0.1
"""How far an attention may be from ours in relative norm, before it is said to be another."""


@dataclass(frozen=True)
class Chunks:
    """The part of a Megatron-Core decoder that a process holds, and what we need to know of it."""

    models: Sequence[nn.Module]
    """As they are wrapped, one per virtual pipeline stage."""
    bare: Sequence[Any]
    """Out of every wrapper."""
    config: Any
    blocks: Mapping[int, nn.Module]
    """Its blocks by their number over the whole model."""
    kinds: Mapping[int, str]
    layout: Layout

    @property
    def count(self) -> int:
        """Blocks of the whole model; of a hybrid one as many as its pattern has sublayers."""
        pattern = getattr(self.bare[0], "hybrid_layer_pattern", None)
        if pattern:
            return len(pattern.split("/")[0].replace("|", ""))
        return int(self.config.num_layers)


def is_megatron(model: Any) -> bool:
    """Is this a Megatron-Core model, or a list of chunks of one?"""
    first = model[0] if isinstance(model, list | tuple) and model else model
    return any(cls.__module__.startswith("megatron.") for cls in type(first).__mro__)


def chunks(model: Any) -> Chunks:
    """Find the blocks of a Megatron-Core decoder, whatever wraps it.

    Args:
        model: a model, or the list of chunks that Megatron's ``get_model`` returns.

    Raises:
        MeasurementError: what cannot be measured exactly, by name.
    """
    models = list(model) if isinstance(model, list | tuple) else [model]
    bare = [_unwrap(chunk) for chunk in models]
    config = bare[0].config
    _refuse(config, bare)
    layers: list[Any] = [layer for chunk in bare for layer in chunk.decoder.layers]
    blocks = {layer.layer_number - 1: layer for layer in layers}
    kinds = {number: _kind(number, layer, config) for number, layer in blocks.items()}
    layout = _layout(config)
    if layout.length(1) > 1 and getattr(config, "moe_expert_capacity_factor", None) is not None:
        raise MeasurementError(
            "moe_expert_capacity_factor where sequences are spread: what is dropped depends on "
            "what each process holds; not supported"
        )
    return Chunks(models, bare, config, blocks, kinds, layout)


def _unwrap(model: Any) -> Any:
    while not hasattr(model, "decoder"):
        name = type(model).__name__
        if "FullyShardedDataParallel" in name and not name.startswith("Torch"):
            raise MeasurementError(
                f"{name}: Megatron's own FSDP is not supported; train with PyTorch's FSDP2 or with "
                "the distributed optimizer"
            )
        inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise MeasurementError(f"{type(model).__name__} has no decoder; not supported")
        model = inner
    if not hasattr(model.decoder, "layers"):
        raise MeasurementError(f"{type(model).__name__}: no list of blocks in its decoder")
    return model


def _refuse(config: Any, bare: Sequence[nn.Module]) -> None:
    """Refuse by name what would be measured wrongly."""
    reasons = {
        "fp4": f"probes without it were not tried; {_SCANNED}",
        "moe_latent_size": "experts that work in a latent space",
        "moe_router_force_load_balancing": "routing by chance",
        "moe_router_force_biased": "routing by chance",
        "moe_expert_rank_capacity_factor": "what is dropped depends on what each process holds",
        "enable_mhc_connections": "several residual streams, connected by mixing",
        "inference_fuse_tp_communication": "additions fused into communication",
        "hybrid_context_parallel": "sequences that differ in how they are spread",
        "fine_grained_activation_offloading": "activations that leave the device",
    }
    for name, reason in reasons.items():
        if getattr(config, name, None):
            raise MeasurementError(
                f"{name}={getattr(config, name)} is not supported in training: {reason}"
            )
    recipe = getattr(config, "fp8_recipe", None)
    if getattr(config, "fp8", None) and getattr(recipe, "value", recipe) == "mxfp8":
        raise MeasurementError(
            f"fp8_recipe=mxfp8 is not supported in training: probes without it were not tried; "
            f"{_SCANNED}"
        )
    variant = getattr(config, "experimental_attention_variant", None)
    if variant is not None and variant not in _LINEAR:
        raise MeasurementError(
            f"experimental_attention_variant={variant}: attention that is not causal softmax over "
            "every key; not supported"
        )
    if getattr(config, "cuda_graph_impl", "none") == "local":
        raise MeasurementError(
            "cuda_graph_impl='local': a replayed graph shows nothing to hooks; not supported"
        )
    for chunk in bare:
        if getattr(chunk, "position_embedding_type", "") == "mrope":
            raise MeasurementError("multimodal rotary embeddings are not supported")


def sublayers(layer: nn.Module) -> tuple[Any, Any]:
    """What mixes positions in a block, and its MLP; None for the one that it does without.

    A block of HybridModel is one sublayer: an attention, an MLP, experts, or a Mamba mixer.
    """
    mixer = getattr(layer, "self_attention", None) or getattr(layer, "mixer", None)
    both = mixer, getattr(layer, "mlp", None)
    mixer, mlp = (None if type(of).__name__ == "IdentityOp" else of for of in both)
    return mixer, mlp


def _kind(number: int, layer: nn.Module, config: Any) -> str:
    named = f"block {number} ({type(layer).__name__})"
    mixer, mlp = sublayers(layer)
    if mixer is None and mlp is None:
        raise MeasurementError(f"{named} has neither attention nor an MLP; not supported")
    if type(getattr(layer, "cross_attention", None)).__name__ not in ("IdentityOp", "NoneType"):
        raise MeasurementError(f"{named} attends to another sequence; not supported")
    if mixer is None:
        return "mlp"
    core = getattr(mixer, "core_attention", None)
    if core is None:
        if re.search("DeltaNet|MambaMixer", type(mixer).__name__):
            return "linear"
        raise MeasurementError(
            f"{named}: {type(mixer).__name__} has no core_attention; not supported"
        )
    if type(core).__name__ == "DSAttention":
        raise MeasurementError(
            f"{named}: DSAttention attends to the keys that it chooses; not supported"
        )
    return "full" if _window(number, config) is None else "sliding"


def weight_of(linear: nn.Module) -> Tensor | None:
    """The one matrix of a linear layer, where it has one of its own, out of FP8."""
    weight = getattr(linear, "weight", None)
    return plain(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _window(number: int, config: Any) -> tuple[int, int] | None:
    from megatron.core.transformer.utils import is_layer_window_attention

    frequency = getattr(config, "window_attn_skip_freq", None)
    if is_layer_window_attention(config.window_size, frequency, number + 1):
        left, right = config.window_size
        return None if left < 0 else (int(left), int(right))
    return None


def _layout(config: Any) -> Layout:
    from megatron.core import parallel_state as state

    return Layout(
        tp=state.get_tensor_model_parallel_rank(),
        tp_size=state.get_tensor_model_parallel_world_size(),
        cp=state.get_context_parallel_rank(),
        cp_size=state.get_context_parallel_world_size(),
        sequence_parallel=bool(config.sequence_parallel),
        dense=state.get_data_parallel_rank() == 0,
        experts=state.get_expert_data_parallel_rank() == 0,
        # cuDNN, below Transformer Engine, has no sink logits for a single token
        shortest=1 if getattr(config, "softmax_type", "vanilla") == "vanilla" else 2,
    )


@contextmanager
def watch(found: Chunks, shard: Shard) -> Iterator[_Watcher]:
    """Show the forward passes to ``shard``; undone on leaving, whatever happens.

    Ask the tap afterwards whether it failed.
    """
    tap = _Watcher(found, shard)
    with ExitStack() as stack:
        for number, layer in found.blocks.items():
            for handle in tap.hooks(number, layer):
                stack.callback(handle.remove)
            if getattr(found.config, "attention_output_gate", False) and tap.attends(number):
                stack.enter_context(tap.gated(number, sublayers(layer)[0]))
        yield tap


class Tap:
    """What a block goes through in a forward pass that is shown."""

    def __init__(self, found: Chunks, observer: Observer) -> None:
        self.found, self.observer, self.layout = found, observer, found.layout
        self.sum = torch.zeros(0)
        self.bound = 0.0
        self.heads = 0
        self.mixed: Tensor | None = None
        self.inputs: Tensor | None = None

    def name(self, number: int) -> str:
        """Of a block."""
        return f"block {number} ({type(self.found.blocks[number]).__name__})"

    def attends(self, number: int) -> bool:
        """Has a block softmax attention?"""
        return self.found.kinds[number] in ("full", "sliding")

    def untold(self, number: int, reason: str) -> None:
        """What writes to the stream in a block cannot be told."""
        self.observer.untold(number, f"{self.name(number)}: {reason}")

    def begin(self, stream: Tensor) -> None:
        """A stream ``[T, B, D]`` enters a block."""
        self.sum, self.bound = stream[0].float(), float(stream[0].norm())

    def add(self, row: Tensor) -> None:
        """What a sublayer writes at P0, ``[B, D]``."""
        self.sum = self.sum + row.float()
        self.bound += float(row.norm())

    def heads_of(
        self, number: int, tensors: Sequence[Tensor], given: Mapping[str, Any], length: int
    ) -> list[Tensor]:
        """Queries, keys and values ``[B, H, T, D]`` of a block's attention, without what pads them.

        Raises:
            MeasurementError: its mask is another than a causal one.
        """
        kind = getattr(given.get("attn_mask_type"), "name", None)
        if kind not in (None, "causal") or given.get("packed_seq_params") is not None:
            raise MeasurementError(
                f"{self.name(number)}: an attention mask of type {kind} is not supported"
            )
        by_head = [tensor[:length].permute(1, 2, 0, 3) for tensor in tensors]
        self.heads = by_head[0].shape[1]
        return by_head

    def leave(self, number: int, module: Any, args: Any, output: Any) -> None:
        """After a block, whose terms are checked."""
        stream = output[0] if isinstance(output, tuple) else output
        slack = 8 * torch.finfo(stream.dtype).eps * self.bound
        if self.layout.holds_p0 and float((stream[0].float() - self.sum).norm()) > slack:
            self.untold(
                number,
                "its output is not its input plus what its attention and MLP write, so what writes "
                "the P0 state cannot be told",
            )
        if number == self.found.count - 1:
            self.observer.state(number + 1, stream.transpose(0, 1))

    def same(self, number: int, ours: Tensor, output: Tensor) -> None:
        """Is it the attention we take it for? Scale, mask and sinks could all be others."""
        sequences, heads, length, _ = ours.shape
        theirs = output.reshape(len(output), sequences, heads, -1)
        positions = self.layout.queries(self.layout.length(length))
        held = positions < length
        if not bool(held.any()):
            return
        ours = ours.permute(2, 0, 1, 3)[positions[held].to(ours.device)]
        difference = (theirs[held.to(theirs.device)] - ours).float().norm() / ours.float().norm()
        limit = _TOLERANCE if ours.dtype == torch.float32 else _HALF_TOLERANCE
        if float(difference) > limit:  # what is not finite is found in the states
            raise MeasurementError(
                f"{self.name(number)}: its core attention differs from causal softmax attention of "
                f"the same queries, keys and values by {float(difference):.1e} of its norm; not "
                "supported"
            )

    def scale(self, number: int, core: Any) -> float:
        """What the scores of an attention are multiplied with."""
        for module in (core, *(getattr(core, name, None) for name in _KERNELS)):
            scale = getattr(module, "softmax_scale", None)
            if isinstance(scale, int | float):
                factor = getattr(getattr(core, "scale_mask_softmax", None), "scale", None)
                return float(scale) * (1.0 if factor is None else float(factor))
        raise MeasurementError(
            f"{self.name(number)}: {type(core).__name__} does not say its softmax_scale; not "
            "supported"
        )

    def mask(self, number: int, length: int, device: torch.device) -> Tensor | None:
        """Bool ``[1, 1, T, T]`` of a block with a window; None where all keys are seen."""
        window = _window(number, self.found.config)
        if window is None:
            return None
        seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
        return seen.tril().triu(-window[0])

    def sinks(self, core: Any, device: torch.device) -> Tensor | None:
        """``[H]`` logits that join the denominator, where there are any."""
        kind = getattr(self.found.config, "softmax_type", "vanilla")
        if kind == "vanilla":
            return None
        offset = getattr(core, "softmax_offset", None)
        if kind == "learnable" and offset is None:
            raise MeasurementError(f"{type(core).__name__} has no softmax_offset; not supported")
        return torch.zeros(self.heads, device=device) if offset is None else offset.reshape(-1)


class _Watcher(Tap):
    """Shows forward passes to a shard."""

    def __init__(self, found: Chunks, shard: Shard) -> None:
        super().__init__(found, shard)
        self.shard = shard
        self.failure: Exception | None = None
        """The first, after which nothing more is looked at; a MeasurementError by intention."""

    def hooks(self, number: int, layer: Any) -> Iterator[Any]:
        """Register everything in one block."""
        mixer, mlp = sublayers(layer)

        def guard(hook: Callable[..., None]) -> Callable[..., None]:
            return self._guarded(number, hook)

        yield layer.register_forward_pre_hook(guard(self.enter), with_kwargs=True)
        if self.attends(number):
            core = mixer.core_attention
            yield core.register_forward_hook(self.attended(number), with_kwargs=True)
            yield mixer.linear_proj.register_forward_pre_hook(guard(self.project))
        if mixer is not None:
            yield mixer.register_forward_hook(guard(self.attention))
        if hasattr(mlp, "router"):
            yield mlp.register_forward_pre_hook(guard(self.enter_experts), with_kwargs=True)
            yield mlp.router.register_forward_hook(guard(self.route))
        if mlp is not None:
            yield mlp.register_forward_hook(guard(self.mlp))
        yield layer.register_forward_hook(guard(self.leave))

    def _guarded(self, number: int, hook: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            if self.failure is None:
                try:
                    hook(number, *args)
                except Exception as error:
                    self.failure = error

        return guarded

    def enter(self, number: int, module: Any, args: Any, kwargs: Any) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        if stream.shape[-1] != self.found.config.hidden_size:
            raise MeasurementError(
                f"{self.name(number)} gets a stream of width {stream.shape[-1]}, hidden_size is "
                f"{self.found.config.hidden_size}, as with several streams; not supported"
            )
        self.shard.state(number, stream.transpose(0, 1))
        self.begin(stream)
        self.mixed = self.inputs = None

    def attended(self, number: int) -> Callable[..., None]:
        look = self._guarded(number, self._attended)

        def hook(core: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            names = ("query", "key", "value", "attention_mask")
            given = dict(zip(names, args, strict=False)) | kwargs
            if self.shard.batch(number) is not None:
                tensors = [given[name] for name in names[:3]]
                # All must gather, whoever failed before.
                look(core, [self._gathered(tensor) for tensor in tensors], given, output)

        return hook

    def _attended(
        self, number: int, core: Any, tensors: Sequence[Tensor], given: Any, output: Tensor
    ) -> None:
        batch = self.shard.batch(number)
        assert batch is not None
        length = self.shard.lengths[batch]
        query, key, value = self.heads_of(number, tensors, given, length)
        ours, attended = attend(
            query,
            key,
            value,
            scale=self.scale(number, core),
            mask=self.mask(number, length, query.device),
            sinks=self.sinks(core, query.device),
            with_mixing=self.shard.with_mixing,
        )
        self.same(number, ours, output)
        self.shard.attention(number, attended)

    def _gathered(self, tensor: Tensor) -> Tensor:
        """``[t, B, H, D]`` of every position, in order, from those of this process."""
        if self.layout.cp_size == 1:
            return tensor
        from megatron.core import parallel_state as state

        parts = [torch.empty_like(tensor) for _ in range(self.layout.cp_size)]
        dist.all_gather(parts, tensor.contiguous(), group=state.get_context_parallel_group())
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves[::-1]])

    @contextmanager
    def gated(self, number: int, attention: Any) -> Iterator[None]:
        """See the gate on the heads' outputs, which no module of its own applies."""
        own = attention._apply_output_gate

        def apply(mixed: Tensor, gate: Tensor) -> Tensor:
            def look(number: int) -> None:
                heads = gate.reshape(*mixed.shape[:2], self.heads, -1).float().sigmoid()
                self.shard.gate(number, heads.mean(-1).transpose(0, 1))

            self._guarded(number, look)()
            result: Tensor = own(mixed, gate)
            return result

        attention._apply_output_gate = apply
        try:
            yield
        finally:
            del attention._apply_output_gate

    def project(self, number: int, module: Any, args: Any) -> None:
        self.mixed = args[0][:1].transpose(0, 1).clone()

    def attention(self, number: int, module: Any, args: Any, output: Any) -> None:
        added = self._added(output)
        if not self.attends(number):
            self.shard.write(number, Write("mixer", added))
            return
        linear = module.linear_proj
        weight, bias = weight_of(linear), getattr(linear, "bias", None)
        projection = None
        if self.mixed is None:
            self.untold(number, "its attention's heads were not seen on their way into the stream")
        elif weight is None:
            self.untold(
                number,
                f"linear_proj is a {type(linear).__name__} without a weight of its own, as with "
                "adapters, so what each head writes cannot be told; merge them first",
            )
        else:
            bias = bias if isinstance(bias, Tensor) and bias.numel() else None
            projection = Projection(self.mixed, self.heads, weight, bias, 1.0)
        self.shard.write(number, Write("attention", added, projection=projection))

    def mlp(self, number: int, module: Any, args: Any, output: Any) -> None:
        self.shard.write(number, Write("mlp", self._added(output)))

    def _added(self, output: Any) -> Tensor:
        """``[B, t, D]``: a sublayer's output with the bias that comes apart from it."""
        added, bias = output if isinstance(output, tuple) else (output, None)
        if bias is not None:
            added = added + bias
        self.add(added[0])
        result: Tensor = added.transpose(0, 1)
        return result

    def enter_experts(self, number: int, module: Any, args: Any, kwargs: Any) -> None:
        self.inputs = (args[0] if args else kwargs["hidden_states"])[:1].transpose(0, 1).clone()

    def route(self, number: int, module: Any, args: Any, output: Any) -> None:
        assert self.inputs is not None
        gates, chosen = output
        sequences = len(self.inputs)
        gates = gates[:sequences].where(chosen[:sequences].bool(), 0)
        self.shard.experts(number, self.inputs, gates[:, None])


def expert_writes(mlp: Any, routing: Routing) -> dict[int, Tensor]:
    """What the routed experts of this process write at P0, gates included.

    Args:
        mlp: the block's MLP.
        routing: P0 on its way into the experts.

    Returns:
        By expert that any sequence's P0 is routed to, ``[D]`` float32 summed over the sequences.
    """
    rows = {e: routing.gates[:, e].nonzero()[:, 0] for e in mlp.local_expert_indices}
    counts = torch.tensor([len(chosen) for chosen in rows.values()])
    if not int(counts.sum()):
        return {}
    dtype = next(mlp.experts.parameters()).dtype
    inputs = routing.inputs[torch.cat(list(rows.values()))].to(dtype)
    gates = torch.cat([routing.gates[chosen, expert] for expert, chosen in rows.items()])
    output, _ = mlp.experts(inputs, counts, gates)
    sums = [part.float().sum(0) for part in output.split(counts.tolist())]
    return {e: part for (e, chosen), part in zip(rows.items(), sums, strict=True) if len(chosen)}
