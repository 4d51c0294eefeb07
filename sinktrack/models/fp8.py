"""FP8 of Transformer Engine and torchao: off while a probe runs, so it measures what a scan does.

With Transformer Engine a forward pass in FP8 notes the largest values that it meets, in eval mode
too, and the next step of training scales by them: a probe would change those. With torchao nothing
is noted, but what a position gets hangs on how others round, and rounding to 8 bits turns a last
bit into a hundredth.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sinktrack.errors import MeasurementError

_MODULES = ("transformer_engine.pytorch.quantization", "transformer_engine.pytorch.fp8")
"""Where the state of its autocast is; the second in versions before 2.9."""
_QUESTIONS = ("is_fp8_enabled", "is_fp8_calibration")
"""What its layers ask that state in each forward pass."""
_LOW = {
    "torchao.float8.float8_linear.Float8Linear",
    "torchao.prototype.blockwise_fp8_training.linear.Float8BlockwiseLinear",
    "torchao.prototype.float8nocompile.float8nocompile_linear.Float8LinearNoCompile",
    "torchao.prototype.moe_training.mxfp8_linear.MXFP8Linear",
    "torchao.prototype.moe_training.nvfp4_training.nvfp4_training.NVFP4Linear",
    "torchao.prototype.moe_training.tensor.TrainingWeightWrapperBaseTensor",
    "torchao.prototype.quantized_training.int8_mixed_precision.Int8MixedPrecisionTrainingLinear",
    "torchao.prototype.quantized_training.int8_mixed_precision."
    "Int8MixedPrecisionTrainingLinearWeight",
}
"""torchao's linear layers, and weights of such, that round to 8 or 4 bits as they multiply."""


class Autocast:
    """Transformer Engine's autocast, where it is imported: it can be told to be off.

    Raises:
        MeasurementError: this version's cannot.
    """

    def __init__(self) -> None:
        modules = [module for name in _MODULES if (module := sys.modules.get(name)) is not None]
        states = {getattr(module, "FP8GlobalStateManager", None) for module in modules}
        if len(states) > 1:
            states.discard(None)  # only one of the two modules has it
        missing = [name for state in states for name in _QUESTIONS if not hasattr(state, name)]
        if missing:
            raise MeasurementError(
                f"this version of Transformer Engine has no {' and '.join(missing)}, so FP8 cannot "
                "be switched off while a probe runs; take another version, or scan the checkpoints"
            )
        self._own = [
            (state, name, vars(state).get(name)) for state in states for name in _QUESTIONS
        ]

    def off(self) -> None:
        """Layers multiply in the dtype of their weights, whatever the model enters."""
        for state, name, _ in self._own:
            setattr(state, name, staticmethod(lambda: False))

    def undo(self) -> None:
        """As it was."""
        for state, name, own in self._own:
            if own is not None:
                setattr(state, name, own)
            elif name in vars(state):  # it inherits it
                delattr(state, name)


def plain(weight: Tensor) -> Tensor:
    """The numbers that a weight of a class of its own stands for, where it can tell; or itself."""
    for name in ("get_original_weight", "dequantize"):  # NF4's dequantize takes another argument
        own = getattr(type(weight), name, None)
        if own not in (None, Tensor.dequantize):
            try:
                numbers: Tensor = getattr(weight.detach(), name)()
            except TypeError:  # it wants an argument that we do not know
                continue
            return numbers
    return weight


def in_full(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The forward pass of a layer of torchao that multiplies in few bits, in full; else None.

    A forward pass that is another's, of a subclass or put on the layer, is left alone.
    """
    if not isinstance(module, nn.Linear) or "forward" in vars(module):
        return None
    forward: Any = type(module).forward
    if forward is nn.Linear.forward:
        weight = module._parameters.get("weight")
        low = _is_low(getattr(weight, "_local_tensor", weight))
    else:
        low = f"{forward.__module__}.{forward.__qualname__.removesuffix('.forward')}" in _LOW
    return partial(_linear, module) if low else None


def _is_low(value: object) -> bool:
    return any(f"{kind.__module__}.{kind.__name__}" in _LOW for kind in type(value).__mro__)


def _linear(module: nn.Linear, input: Tensor) -> Tensor:
    weight: Any = module.weight
    if hasattr(weight, "to_original_precision"):  # FSDP2 gathered it in FP8
        weight = weight.to_original_precision()
    elif _is_low(weight):
        weight = weight._data
    return F.linear(input, weight, module.bias)
