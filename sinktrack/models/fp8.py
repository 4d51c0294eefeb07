"""FP8 of Transformer Engine: off while a probe runs, and weights that are kept in it as numbers.

A forward pass in FP8 notes the largest values that it meets, in eval mode too, and the next step of
training scales by them: a probe would change those. Without FP8 it measures what a scan does.
"""

from __future__ import annotations

import sys

from torch import Tensor

from sinktrack.errors import MeasurementError

_MODULES = ("transformer_engine.pytorch.quantization", "transformer_engine.pytorch.fp8")
"""Where the state of its autocast is; the second in versions before 2.9."""
_QUESTIONS = ("is_fp8_enabled", "is_fp8_calibration")
"""What its layers ask that state in each forward pass."""


class Autocast:
    """Transformer Engine's autocast, where it is imported: it can be told to be off.

    Raises:
        MeasurementError: this version's cannot.
    """

    def __init__(self) -> None:
        modules = [sys.modules[name] for name in _MODULES if name in sys.modules]
        states = {getattr(module, "FP8GlobalStateManager", None) for module in modules}
        self._own = [
            (state, name, getattr(state, "__dict__", {}).get(name))
            for state in states
            for name in _QUESTIONS
        ]
        if missing := [name for _, name, own in self._own if own is None]:
            raise MeasurementError(
                f"this version of Transformer Engine has no {' and '.join(missing)}, so FP8 cannot "
                "be switched off while a probe runs; take another version, or scan the checkpoints"
            )

    def off(self) -> None:
        """Layers multiply in the dtype of their weights, whatever the model enters."""
        for state, name, _ in self._own:
            setattr(state, name, staticmethod(lambda: False))

    def undo(self) -> None:
        """As it was."""
        for state, name, own in self._own:
            setattr(state, name, own)


def plain(weight: Tensor) -> Tensor:
    """A weight that Transformer Engine keeps in FP8, in the dtype that it stands for; or itself."""
    if any(kind.__module__.startswith("transformer_engine.") for kind in type(weight).__mro__):
        return weight.detach().dequantize()
    return weight
