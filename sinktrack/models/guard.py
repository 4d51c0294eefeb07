"""Leave no trace: what a probe may change in a training process is put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sinktrack.errors import MeasurementError
from sinktrack.models import fp8
from sinktrack.models.hidden_state import Kept
from sinktrack.probe import Probe

_INTERNAL = {"_parameters", "_buffers", "_modules", "training"}
_OURS = ("sinktrack.", "transformers.")
_SPOILT: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()
"""Models with state that a probe changed for good, and its places."""


@contextmanager
def probe_context(model: nn.Module, size: int, probe: Probe) -> Iterator[None]:
    """Forward passes inside leave no trace; ``size`` sequences of the probe go through at once."""
    with out_of_memory(size, probe), preserve_state(model), _resharded(model):
        yield


def refuse_unreadable(model: nn.Module) -> None:
    """Refuse weights that are not there, or not numbers that we can multiply with.

    Raises:
        MeasurementError: names the first such parameter, why it is so and what to do.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            if any(getattr(module, "_hf_hook", None) for module in model.modules()):
                raise MeasurementError(
                    f"{name} is on the meta device: accelerate has offloaded it (device_map); "
                    "measure the checkpoint with `sinktrack scan`, which holds one block at a time"
                )
            raise MeasurementError(
                f"{name} is on the meta device and has no values; load the weights first"
            )
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise MeasurementError(
                f"{name} is stored as {parameter.dtype}: quantized weights are not supported; "
                "measure the model before quantization"
            )


def refuse_prompts(modules: Iterable[nn.Module]) -> None:
    """Refuse prompts and prefixes of PEFT, and LLaMA-Adapter's, which blocks attend to apart.

    Args:
        modules: a model, and all that stands around it.

    Raises:
        MeasurementError: one of them says that it has learned such a prompt.
    """
    names = ("is_prompt_learning", "is_adaption_prompt")
    for module in modules:
        adapters = getattr(module, "peft_config", None)
        learned = adapters.values() if isinstance(adapters, dict) else ()
        inside = type(module).__module__.startswith("peft.tuners.adaption_prompt")
        if inside or any(getattr(adapter, name, False) for adapter in learned for name in names):
            raise MeasurementError(
                "a prompt that PEFT learned stands before the probe's tokens, and what the model "
                "does behind it is not measured; not supported"
            )


@contextmanager
def restore_on_exit(undo: Callable[[], object]) -> Iterator[None]:
    """Call ``undo`` on leaving; once more where a signal's handler raises in the middle of it."""
    try:
        try:
            yield
        finally:
            undo()
    except BaseException:
        undo()
        raise


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients, autocast, FP8, compilation or dropout; then restore everything.

    Restored, also when the body raises: the random states of Python, numpy, torch and every CUDA
    device, train or eval mode of each module, its buffers and plain attributes with all that hangs
    on them (see `sinktrack.models.hidden_state`), the default dtype, gradients, autocast,
    compilation and torch's stack of modes. Hooks of ours are removed, and those that transformers
    sets in a model's first forward pass.

    Raises:
        MeasurementError: after the body, something changed that cannot be put back, which is named;
            from then on before it, for that model. Before it, FP8 cannot be switched off.
    """
    from torch._dynamo import eval_frame  # slow to import

    _refuse_spoilt(model)
    kept = Kept(model)
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = {"cpu"} | {parameter.device.type for parameter in model.parameters()}
    python, numpy = random.getstate(), np.random.get_state()
    cpu = torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if cuda else []
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    autocast = {device: torch.is_autocast_enabled(device) for device in devices - {"meta"}}
    engine = fp8.Autocast()
    stance = eval_frame._stance
    depth = torch._C._len_torch_function_stack()
    modules = [
        (
            module,
            _attributes(module),
            {*module._forward_hooks, *module._forward_pre_hooks},
            module.training,
        )
        for module in model.modules()
    ]
    held = [
        (vars(module)[name], dict(vars(module)[name]))
        for module in model.modules()
        for name in ("_buffers", "_modules")
    ]
    buffers = [
        (buffer, buffer.clone())
        for module in model.modules()
        for buffer in module._buffers.values()
        if buffer is not None
    ]

    def undo() -> None:
        while torch._C._len_torch_function_stack() > depth:
            torch._C._pop_torch_function_stack()
        torch.set_grad_enabled(gradients)
        for device, enabled in autocast.items():
            torch.set_autocast_enabled(device, enabled)
        engine.undo()
        eval_frame._set_stance(stance)
        for module, attributes, hooks, training in modules:
            _restore(module, attributes)
            _unhook(module, hooks)
            module.training = training
        for now, before in held:
            _refill(now, before)
        with torch.no_grad():
            for buffer, saved in buffers:
                if not torch.equal(_bits(buffer), _bits(saved)):
                    buffer.copy_(saved)
            if failed := kept.undo():
                _SPOILT[model] = failed
        torch.set_default_dtype(dtype)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(gpus)

    with restore_on_exit(undo):
        torch.set_grad_enabled(False)  # not by torch's contexts, which a signal may leave half done
        for device in autocast:
            torch.set_autocast_enabled(device, False)
        engine.off()
        torch.compiler.set_stance("force_eager")
        for module, attributes, _, _ in modules:
            module.training = False
            if "_original_forward" in attributes:  # Accelerate wraps forward in autocast
                module.forward = attributes["_original_forward"]  # type: ignore[assignment]
            elif (full := fp8.in_full(module)) is not None:
                module.forward = full
        yield
    _refuse_spoilt(model)


def _refuse_spoilt(model: nn.Module) -> None:
    if failed := _SPOILT.get(model):
        raise MeasurementError(
            f"a forward pass of the probe changed {', '.join(failed[:5])}, which cannot be put "
            "back, so training has been disturbed; this model is not probed again. Keep the state "
            "in a buffer, or do not change it in eval mode"
        )


@contextmanager
def _resharded(model: nn.Module) -> Iterator[None]:
    """FSDP keeps what a forward gathered until a backward, which a probe does not have."""
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def out_of_memory(size: int, probe: Probe) -> Iterator[None]:
    """Say which number to lower; everything else is put back by then.

    Raises:
        MeasurementError: in place of what torch or Python raise where memory ends.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # the CPU's allocator has no error of its own
        if not is_memory(error):
            raise
        advice = (
            "lower the probe's batch size (--batch-size of a scan, probe_batch_size of a callback) "
            f"to {size // 2} or less"
            if size > 1
            else "give a probe of shorter sequences"
        )
        raise MeasurementError(
            f"out of memory with {size} sequences of {probe.length} tokens at once; {advice}"
        ) from error


def is_memory(error: Exception) -> bool:
    """Did memory end?"""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "DefaultCPUAllocator" in str(error)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes: nan equals itself."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _attributes(module: nn.Module) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if name not in _INTERNAL}


def _unhook(module: nn.Module, before: set[int]) -> None:
    """Remove new hooks of ours, and of transformers, which notes in an attribute that it set them.

    What others set is theirs: FSDP and Megatron do once, and would not again.
    """
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for number, hook in list(hooks.items()):
            if number not in before and str(hook.__module__).startswith(_OURS):
                for name, of in vars(module).items():
                    if name.startswith("_forward_") and isinstance(of, dict):
                        of.pop(number, None)


def _refill(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Hold the same again, also where something was None or not there yet."""
    if list(now) != list(before) or any(now[name] is not before[name] for name in before):
        now.clear()
        now.update(before)


def _restore(module: nn.Module, attributes: dict[str, object]) -> None:
    current = vars(module)
    for name in [name for name in current if name not in attributes and name not in _INTERNAL]:
        del current[name]
    for name, value in attributes.items():
        if current.get(name) is not value:
            current[name] = value
