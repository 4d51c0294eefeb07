"""Taps on Hugging Face decoders: the attention interface, hooks, and the blocks' own additions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinktrack.attention import Attended, attend, edit_mask, read_scores
from sinktrack.errors import MeasurementError
from sinktrack.events import Editor, Observer, Projection, Routed, Uneditable, Write
from sinktrack.models.guard import refuse_prompts, restore_on_exit
from sinktrack.models.parallel import has_units
from sinktrack.models.tracer import Mark, ResidualTracer, makes, mark, mark_of

_STANDS_FOR = "sdpa"
"""The implementation whose place we take: models ask for its name and prepare masks for it."""
_INERT = {
    "attention_mask", "block_indices", "cache", "cache_position", "deterministic", "dropout",
    "layer_idx", "num_items_in_batch", "output_attentions", "output_hidden_states",
    "output_router_logits", "past_key_values", "position_ids", "return_dict", "sliding_window",
    "use_cache",
}  # fmt: skip
"""What else an attention may be handed without a change to its scores: windows and selected keys
are part of the mask."""


PLAIN: set[type] = {Tensor, nn.Parameter}
"""Classes of weights that multiply by their numbers; of any other class that is looked at."""
LIBRARIES = ("transformers.", "torch.", "peft.", "kernels.", "sinktrack.")
"""Whose functions and classes are what they are called."""


@dataclass(frozen=True)
class Decoder:
    """A Hugging Face decoder and what we need to know of it."""

    model: PreTrainedModel
    """The bare model, out of every wrapper."""
    config: Any
    """Its text configuration."""
    blocks: Mapping[int, nn.Module]
    """The blocks by number."""
    kinds: tuple[str, ...]
    """Per block ``full``, ``sliding``, ``linear``, or ``mlp`` where a block only has an MLP."""
    attentions: tuple[type, ...]
    """The classes of softmax attention that transformers names for this family."""
    interface: bool
    """Does its attention go through transformers' interface? If not, it is read where it is."""

    @property
    def type(self) -> str:
        """The family, as ``config.model_type``."""
        return str(self.config.model_type)

    @property
    def experts(self) -> int | None:
        """Routed experts per block, None for a dense model; where blocks differ, the most."""
        counts = [self.experts_of(index) for index in self.blocks]
        return max((count for count in counts if count is not None), default=None)

    def experts_of(self, block: int) -> int | None:
        """Routed experts that a block would have, None for a dense model."""
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        counts = [self.number(name, of, block) for of in ("", "ffn_config") for name in names]
        return next((count for count in counts if count is not None and count > 1), None)

    @property
    def most_heads(self) -> int | None:
        """Query heads per block; where blocks differ, the most."""
        counts = [self.heads(index) for index in self.blocks]
        return max((count for count in counts if count is not None), default=None)

    def heads(self, block: int) -> int | None:
        """Query heads of a block's attention."""
        names = ["num_attention_heads_per_layer", "num_attention_heads"]
        if self.kinds[block] == "sliding":
            names.insert(0, "swa_num_attention_heads")
        counts = [self.number(name, block=block) for name in names]
        return next((count for count in counts if count is not None), None)

    def number(self, name: str, within: str = "", block: int = 0) -> int | None:
        """What the configuration says for a block, in lists and overrides by block too.

        Args:
            name: of the attribute.
            within: of the attribute that holds it, if it is not the configuration itself.
            block: whose.
        """
        config = self.config
        if getattr(config, "is_heterogeneous", False):
            config = config.per_layer_config[block]
        value = getattr(getattr(config, within, None) if within else config, name, None)
        if isinstance(value, list | tuple):
            value = value[block] if len(value) == len(self.blocks) else None
        return value if isinstance(value, int) else None


def decoder(model: nn.Module) -> Decoder:
    """Find the blocks of a Hugging Face decoder, whatever wraps it.

    Raises:
        MeasurementError: not a decoder of transformers, or none whose blocks can be found.
    """
    bare = _unwrap(model)
    config = bare.config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise MeasurementError(
            f"{type(bare).__name__} is an encoder-decoder; only decoders have P0"
        )
    blocks = dict(enumerate(_blocks(bare, config)))
    _refuse_shared(blocks)
    if hasattr(bare.base_model, "_rescale_layers"):  # and our putting back would undo its note
        raise MeasurementError(
            f"block 0 ({type(blocks[0]).__name__}): no softmax attention, and in eval mode "
            f"{type(bare).__name__} divides its weights; not supported"
        )
    attentions = _recorded(bare, "attentions")
    kinds = _kinds(config, blocks, attentions)
    interface = bare._can_set_attn_implementation()
    return Decoder(bare, config, blocks, kinds, attentions, interface)


def _unwrap(model: nn.Module) -> PreTrainedModel:
    """The one transformers model in a module, whatever the names on the way to it.

    Raises:
        MeasurementError: there is none, or several; or PEFT has put a learned prompt before it.
    """
    outer = model
    while not isinstance(model, PreTrainedModel):
        for name in ("module", "_orig_mod", "base_model", "model"):
            inner = getattr(model, name, None)
            if isinstance(inner, nn.Module):
                model = inner
                break
        else:
            model = _only(model)
    around = [
        module for module in outer.modules() if any(inner is model for inner in module.modules())
    ]
    refuse_prompts([*around, *model.modules()])
    return model


def _only(outer: nn.Module) -> PreTrainedModel:
    models: list[PreTrainedModel] = []
    for module in outer.modules():  # the outer one of two comes first
        within = any(module in other.modules() for other in models)
        if isinstance(module, PreTrainedModel) and not within:
            models.append(module)
    name = type(outer).__name__
    if not models:
        raise MeasurementError(
            f"{name} is not a transformers model; sinktrack measures "
            "transformers decoders (AutoModelForCausalLM and the like)"
        )
    if len(models) > 1:
        raise MeasurementError(
            f"{name} holds {len(models)} transformers models; give the one that is to be measured"
        )
    return models[0]


def _text(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads text; the model itself where it reads nothing else."""
    decoder: Any = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model


def _refuse_shared(blocks: Mapping[int, nn.Module]) -> None:
    """Refuse one module at several depths: hooks cannot tell which of them runs."""
    depths: dict[int, list[int]] = {}
    for index, block in blocks.items():
        depths.setdefault(id(block), []).append(index)
    for at in depths.values():
        if len(at) > 1:
            raise MeasurementError(
                f"blocks {', '.join(map(str, at))} are one module "
                f"({type(blocks[at[0]]).__name__}): blocks that share all of their weights are "
                "not supported; give each depth a module of its own, whose parameters may be shared"
            )


def _blocks(model: PreTrainedModel, config: Any) -> nn.ModuleList:
    """The list of the blocks that transformers names; else the one as long as the config says."""
    named = _recorded(model, "hidden_states")
    count = getattr(config, "num_hidden_layers", None)
    lists = [module for module in _text(model).modules() if isinstance(module, nn.ModuleList)]
    for blocks in lists:
        if len(blocks) and named and all(isinstance(block, named) for block in blocks):
            return blocks
    for blocks in lists:
        if len(blocks) and len(blocks) == count:
            return blocks
    raise MeasurementError(
        f"unknown architecture {type(model).__name__}: no list of {count} blocks found in it"
    )


def _recorded(model: nn.Module, what: str) -> tuple[type, ...]:
    """The classes of modules that transformers names as the source of an output."""
    classes: set[type] = set()
    for module in model.modules():
        recorded = getattr(type(module), "_can_record_outputs", None) or {}
        named = recorded.get(what, ()) if isinstance(recorded, dict) else ()
        for entry in named if isinstance(named, list | tuple) else (named,):
            target = getattr(entry, "target_class", entry)
            if isinstance(target, type):
                classes.add(target)
    return tuple(classes)


def _kinds(
    config: Any, blocks: Mapping[int, nn.Module], attentions: tuple[type, ...]
) -> tuple[str, ...]:
    declared = _declared(config, len(blocks))
    kinds = []
    for index, (block, name) in enumerate(zip(blocks.values(), declared, strict=False)):
        softmax = any(isinstance(module, attentions) for module in block.modules())
        if name in ("mlp", "moe"):
            kinds.append("mlp")
        elif attentions and not softmax:
            if name in ("full_attention", "sliding_attention", "chunked_attention", "attention"):
                _refuse_foreign(index, block)
            kinds.append("linear")
        elif "sliding" in name or "chunked" in name:
            kinds.append("sliding")
        elif "full" in name or name == "attention" or softmax:
            kinds.append("full")
        else:
            kinds.append("linear")
        mixers = {type(module).__name__ for module in block.modules() if _is_recurrent(module)}
        if softmax and mixers:
            raise MeasurementError(
                f"block {index} ({type(block).__name__}): {', '.join(sorted(mixers))} beside its "
                "attention, so what its MLP writes cannot be told apart; not supported"
            )
    return tuple(kinds)


def _refuse_foreign(index: int, block: nn.Module) -> None:
    """Refuse a block that should attend, but whose attention gave way to another class."""
    for module in block.modules():
        if not type(module).__module__.startswith(LIBRARIES):
            raise MeasurementError(
                f"block {index} ({type(block).__name__}): {type(module).__name__} is in the place "
                "of its attention, and what it computes is not known here; derive it from the "
                "class that it replaces"
            )


def _declared(config: Any, blocks: int) -> list[str]:
    """The blocks' kinds in the configuration's words."""
    if declared := getattr(config, "layer_types", None):
        return list(declared)
    if declared := getattr(config, "attention_layers", None):  # GPT-Neo's
        return ["sliding" if name == "local" else "full" for name in declared]
    used = getattr(config, "use_sliding_window", True)
    window = used and getattr(config, "sliding_window", None)
    return ["sliding_attention" if window else "full_attention"] * blocks


def _is_recurrent(module: nn.Module) -> bool:
    return re.search("Mixer$|Mamba|DeltaNet|RecurrentBlock", type(module).__name__) is not None


@contextmanager
def watch(
    found: Decoder,
    observer: Observer,
    editor: Editor | None = None,
    start: int = 0,
    until: int | None = None,
) -> Iterator[None]:
    """Show the forward passes of ``found`` to ``observer``; undone on leaving, whatever happens.

    Args:
        found: the decoder.
        observer: who is told.
        editor: who may change what is computed.
        start: the first block that is shown.
        until: the first that no longer is; all are by default.

    Raises:
        MeasurementError: by the forward pass, where a block cannot be shown exactly.
    """
    tap, before = _Tap(found, observer, editor or Editor()), _ACTIVE.get()
    stack = ExitStack()

    def undo() -> None:
        stack.close()
        _ACTIVE.set(before)

    with prepared(found), restore_on_exit(undo):
        last = max(found.blocks)
        stack.callback(found.model.register_forward_pre_hook(tap.begin).remove)
        for index, block in found.blocks.items():
            if not start <= index < (last + 1 if until is None else until):
                continue
            hook = block.register_forward_pre_hook(tap.enter(index), with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(block.register_forward_hook(tap.leave(index, index == last)).remove)
            for module in block.modules():
                if is_experts(module):
                    hook = module.register_forward_hook(tap.experts, with_kwargs=True)
                    stack.callback(hook.remove)
        _ACTIVE.set(tap)
        with _standing_in(), tap.lineage:
            yield


@contextmanager
def prepared(found: Decoder) -> Iterator[None]:
    """Let the model prepare masks for the attention that `watch` puts in the place of its own.

    Raises:
        MeasurementError: its own is none of transformers'.
    """
    own = configs(found.model) if found.interface else []
    for config in own:
        _known(config._attn_implementation)
    before = [(config, config._attn_implementation) for config in own]

    def undo() -> None:
        for config, implementation in before:
            config._attn_implementation_internal = implementation

    with restore_on_exit(undo):
        for config in own:
            config._attn_implementation_internal = _STANDS_FOR
        yield


@contextmanager
def resume(found: Decoder, start: int, stream: Tensor, forms: Mapping[int, int]) -> Iterator[None]:
    """Skip the blocks before ``start``: the forward passes meet ``stream`` at its input.

    Everything else of the model runs as it always does.

    Args:
        found: the decoder.
        start: the first block that runs.
        stream: ``[B, T, D]`` at its input.
        forms: what the blocks return, see `returned`.
    """
    with ExitStack() as stack:
        for index, block in found.blocks.items():
            if index < start:
                own = vars(block).get("forward")
                undo = (setattr, block, "forward", own) if own else (delattr, block, "forward")
                stack.callback(*undo)
                size = forms[index]
                output = (stream, *[None] * (size - 1)) if size else stream
                block.forward = _constant(output)
        yield


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


@contextmanager
def returned(found: Decoder, forms: dict[int, int]) -> Iterator[None]:
    """Note in ``forms`` how each block returns its stream: 0 bare, n in a tuple of n.

    A block that returns more than the stream is left out: blocks after it may depend on that.
    """

    def note(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, tuple | list):
                forms[index] = 0
            elif all(value is None for value in output[1:]):
                forms[index] = len(output)

        return hook

    with ExitStack() as stack:
        for index, block in found.blocks.items():
            stack.callback(block.register_forward_hook(note(index)).remove)
        yield


def _known(name: str) -> None:
    """Refuse an attention of which nothing is known here."""
    function = ALL_ATTENTION_FUNCTIONS.get(name)  # none for a model's own, ``eager``
    if function is not None and (origin := foreign(function)):
        raise MeasurementError(
            f"attention {name!r} is a function of {origin}, and what it computes is not known "
            "here; if it is softmax attention, call model.set_attn_implementation('sdpa')"
        )


def foreign(function: Any) -> str | None:
    """The module that a function comes from, if none of transformers'; wrapped ones included."""
    names = [getattr(function, "__module__", "")]
    names.append(getattr(function, "__globals__", {}).get("__name__", names[0]))
    return next((name for name in names if not f"{name}.".startswith(LIBRARIES)), None)


def configs(model: nn.Module) -> list[Any]:
    """Every distinct configuration object that a module of the model reads."""
    distinct = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            distinct[id(config)] = config
    return list(distinct.values())


def experts_held(block: nn.Module) -> list[int]:
    """How many routed experts' weights a block holds, per module that holds some."""
    held = []
    for module in filter(is_experts, block.modules()):
        matrices = [weight for weight in module.parameters(recurse=False) if weight.ndim == 3]
        held += [matrices[0].shape[0]] if matrices else []
    return held


def is_experts(module: nn.Module) -> bool:
    """Does transformers' experts interface run this module?"""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


class _Tap:
    """What one watched forward pass goes through."""

    def __init__(self, found: Decoder, observer: Observer, editor: Editor) -> None:
        self.found, self.observer, self.editor = found, observer, editor
        self._edits_mask = type(editor).mask is not Editor.mask  # else none is built
        self.block = -1
        self.attended = 0
        self.attention_writes = 0
        self.written = False
        self.shape: tuple[int, ...] = ()
        self.routed: Routed | None = None
        self.entered: set[int] | None = None
        """The blocks that ran in this pass of the model; None where they run by themselves."""
        self.lineage = ResidualTracer(self)
        self.lineage.copying = has_units(found.blocks.values())

    def begin(self, module: nn.Module, args: Any) -> None:
        """A pass of the whole model begins."""
        self.entered = set()

    def name(self) -> str:
        return f"block {self.block} ({type(self.found.blocks[self.block]).__name__})"

    def enter(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            stream = args[0] if args else kwargs.get("hidden_states")
            self.block = index
            if self.entered is not None:
                if index in self.entered:
                    raise MeasurementError(
                        f"{self.name()}: runs more than once in a pass of the model; not supported"
                    )
                self.entered.add(index)
            if not isinstance(stream, Tensor) or stream.ndim != 3:
                raise MeasurementError(f"{self.name()}: no residual stream [B, T, D] at its input")
            self.lineage.following = False
            self.lineage.forget()
            changed = self.editor.state(index, stream)
            if changed is not None:
                stream = changed
                if args:
                    args = (stream, *args[1:])
                else:
                    kwargs = kwargs | {"hidden_states": stream}
            self.observer.state(index, stream)
            self.attended = self.attention_writes = 0
            self.written = False
            self.routed = None
            self.shape = tuple(stream.shape)
            mark(stream, Mark("stream"))
            self.lineage.following = True
            return None if changed is None else (args, kwargs)

        return hook

    def leave(self, index: int, last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.lineage.following = False
            self.lineage.forget()
            self.routed = None
            stream = output[0] if isinstance(output, tuple | list) else output
            mark = mark_of(stream)
            if mark is None or mark.origin != "stream":
                self._untold(
                    "its output is not its input plus writes, so what writes the P0 state cannot "
                    "be told"
                )
            if self.found.kinds[index] in ("full", "sliding") and not self.attended:
                raise MeasurementError(
                    f"{self.name()}: its attention was not seen: it goes through neither "
                    "transformers' attention interface nor torch's softmax over [B, H, T, T] or "
                    "scaled_dot_product_attention; load the model with "
                    "attn_implementation='eager' or 'sdpa'"
                )
            if self.attended and self.found.kinds[index] not in ("full", "sliding"):
                raise MeasurementError(
                    f"{self.name()}: it attends by softmax, in no class that transformers names "
                    "for its attention; derive that class from the one that it replaces"
                )
            if self.attended and not self.attention_writes:
                self._untold("the attention's output was not seen on its way into the stream")
            if last:
                self.observer.state(index + 1, stream)

        return hook

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        following, self.lineage.following = self.lineage.following, False
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and not causal:
            raise MeasurementError(f"{self.name()}: attention that is not causal has no P0 sink")
        if position_bias is not None:
            raise MeasurementError(f"{self.name()}: learned position biases are not supported")
        if unknown := [name for name in kwargs.keys() - _INERT if kwargs[name] is not None]:
            raise MeasurementError(
                f"{self.name()}: it hands {', '.join(sorted(unknown))} to its attention, whose "
                "meaning is not known here; not supported"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = attention_mask
        if self._edits_mask:
            mask = edit_mask(attention_mask, self._edited, query)
        with self._named():
            output, attended = attend(
                query, key, value, scale=scale, mask=mask, softcap=softcap, sinks=s_aux,
                second_key=self.observer.second_key, allow_future_keys=mask is not attention_mask,
                with_mixing=self.observer.with_mixing,
            )  # fmt: skip
        self._attended(attended)
        output = output.transpose(1, 2).contiguous()
        mark(output, Mark("mixed", heads=query.shape[1]))
        self.lineage.following = following
        return output, None

    def experts(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        bound = dict(zip(names, args, strict=False)) | kwargs
        if any(name not in bound for name in names):
            return
        batch, length, width = self.shape
        stream = bound["hidden_states"].detach().view(batch, length, width)
        index = bound["top_k_index"].view(batch, length, -1)
        gate = bound["top_k_weights"].view(batch, length, -1)
        chosen = index.shape[-1]

        def outputs(position: int) -> Tensor:
            rows = stream[:, position].repeat_interleave(chosen, dim=0)
            one = (index[:, position].reshape(-1, 1), gate[:, position].reshape(-1, 1))
            result: Tensor = module.forward(rows, *one)
            return result.view(batch, chosen, width)

        def of(expert: int) -> Tensor:
            chosen = index == expert
            at = chosen.any(-1)
            weight = (gate * chosen).sum(-1)[at].unsqueeze(-1)
            result = torch.zeros_like(stream)
            if len(weight):
                one = torch.full_like(weight, expert, dtype=index.dtype)
                result[at] = module.forward(stream[at], one, weight).to(result.dtype)
            return result

        total = output.detach().view(batch, length, width)
        self.routed = Routed(index, lambda: gate, outputs, of, lambda: total, 1.0)
        mark(output, Mark("experts"))

    def _edited(self, seen: Tensor) -> Tensor | None:
        return self.editor.mask(self.block, seen)

    def _only_hidden(self, seen: Tensor) -> Tensor | None:
        wanted = self._edited(seen)
        if wanted is not None and bool((wanted & ~seen).any()):
            raise Uneditable(
                f"{self.name()}: it masks its scores itself, so no query can be shown a later key"
            )
        return wanted

    def softmax(self, scores: Tensor) -> tuple[Tensor, Mark] | None:
        batch, length, _ = self.shape
        if scores.ndim != 4 or (scores.shape[0], *scores.shape[2:]) != (batch, length, length):
            return None
        changed = edit_mask(scores, self._only_hidden, scores) if self._edits_mask else scores
        assert changed is not None
        with self._named():
            attended = read_scores(changed, self.observer.second_key, changed is not scores)
        self._attended(attended)
        return changed, Mark("weights", heads=scores.shape[1])

    def reweighted(self) -> None:
        raise MeasurementError(
            f"{self.name()}: its attention's probabilities are changed after the softmax, so what "
            "meets the values is not softmax attention; not supported"
        )

    def joined(self) -> None:
        raise MeasurementError(
            f"{self.name()}: something is added to what its heads attend to, beside the softmax; "
            "not supported"
        )

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
        output, _ = self.attend(
            nn.Identity(), query, key, value, attn_mask, scale, is_causal or query.shape[2] == 1
        )
        output = output.transpose(1, 2)
        mark(output, Mark("mixed", heads=query.shape[1]))
        return output

    def gate(self, mixed: Tensor, gate: Tensor, heads: int) -> None:
        batch, length, _ = self.shape
        if mixed.shape[:2] != (batch, length):
            raise MeasurementError(
                f"{self.name()}: a gate on heads of shape {tuple(mixed.shape)}; not supported"
            )
        gate = gate.expand_as(mixed).reshape(batch, length, heads, -1)
        self.observer.gate(self.block, gate.mean(-1, dtype=torch.float32))

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except MeasurementError as error:
            raise MeasurementError(f"{self.name()}: {error}") from error

    def _untold(self, reason: str) -> None:
        self.observer.untold(self.block, f"{self.name()}: {reason}")

    def _attended(self, attended: Attended) -> None:
        self.attended += 1
        self.observer.attention(self.block, attended)

    def _has_own_tensors(self) -> bool:
        """Has the block weights of other classes than torch's?"""
        kinds = {type(weight) for weight in self.found.blocks[self.block].parameters()}
        return not kinds <= PLAIN

    def write(self, found: Mark | None, added: Tensor) -> Tensor | None:
        if added.numel() != math.prod(self.shape):
            self._untold(
                f"a {tuple(added.shape)} is added to its residual stream {self.shape}, which is no "
                "sublayer's write"
            )
            return None
        added = added.view(self.shape)
        raw = None if found is None else found.raw
        if raw is not None:  # of another shape, it went through more than a norm
            raw = raw.view(self.shape) if raw.numel() == added.numel() else None
        if found is not None and found.origin == "attention":
            self.attention_writes += 1
            assert found.operands is not None
            mixed, heads, weight, bias = found.operands
            if mixed.numel() != self.shape[0] * self.shape[1] * weight.shape[1]:
                self._untold(
                    "its attention heads are routed like experts, so what each writes at P0 cannot "
                    "be told"
                )
                return None
            mixed = mixed.view(*self.shape[:2], -1)
            whole = added if raw is None else raw
            if self._has_own_tensors() and not makes(found, mixed[:, 0], whole[:, 0]):
                self._untold(
                    "its output projection's weight is of a class that multiplies otherwise than "
                    "by its numbers, so what each head writes at P0 cannot be told"
                )
                return None
            projection = Projection(mixed, heads, weight, bias, found.factor)
            write = Write("attention", added, raw, projection)
        elif found is not None and found.origin == "experts" and self.routed is not None:
            routed = replace(self.routed, factor=found.factor)
            write = Write("mlp", added, raw, routed=routed)
        else:
            mixer = self.found.kinds[self.block] == "linear" and not self.written
            write = Write("mixer" if mixer else "mlp", added)
        self.written = True
        self.observer.write(self.block, write)
        return self.editor.write(self.block, write)


_ACTIVE: ContextVar[_Tap | None] = ContextVar("sinktrack_tap", default=None)


@contextmanager
def _standing_in() -> Iterator[None]:
    """Be transformers' `_STANDS_FOR` attention, for the watched forward pass alone."""
    own = ALL_ATTENTION_FUNCTIONS[_STANDS_FOR]
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = local.get(_STANDS_FOR)

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tap = _ACTIVE.get()  # another thread may run a model of its own meanwhile
        return own(module, *args, **kwargs) if tap is None else tap.attend(module, *args, **kwargs)

    def undo() -> None:
        if before is None:
            local.pop(_STANDS_FOR, None)
        else:
            local[_STANDS_FOR] = before

    with restore_on_exit(undo):
        local[_STANDS_FOR] = attention
        yield
