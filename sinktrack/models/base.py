"""Which backend knows a model: the one place where that is asked.

A backend is asked only where its framework is imported already, as a model of it must have been
made by it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from sinktrack.errors import MeasurementError
from sinktrack.models.any_decoder.decoder import Decoder
from sinktrack.models.editable import Editable
from sinktrack.models.parallel import is_apart, takes_every_process
from sinktrack.probe import Probe

_Result = TypeVar("_Result")
_APART = (
    "causal tests do not run on a model that no process holds whole (FSDP1, ZeRO-3, tensor "
    "parallelism); run them on the checkpoints"
)


@dataclass(frozen=True)
class Model:
    """A model in training, and what its framework asks of who measures it."""

    backend: Literal["megatron", "transformers", "torch", "streamed"]
    model: Any
    """A module; chunks of Megatron-Core's; of ``torch`` a `Decoder` that holds its model; or a
    checkpoint that is `Streamed`."""
    every_process: bool
    """Must every process measure, since none holds the whole model?"""
    packages: tuple[str, ...] = ()
    """Packages whose versions belong in a record, beside those of every record."""
    no_causal_tests: str | None = None
    """Why the causal tests do not run on it, where they do not."""

    def tried(self, probe: Probe) -> str | None:
        """Say what was found in the model, or nothing, as far as that costs next to nothing.

        Raises:
            ProbeError, MeasurementError: as of `sinktrack.measure`.
        """
        if self.backend == "torch":
            from sinktrack.models.any_decoder.passes import check

            return check(self.model, probe)
        if self.backend == "transformers" and not self.every_process:
            from sinktrack.models.live import readable

            readable(self.model, probe)
        return None

    def editable(
        self, probe: Probe, batch_size: int | None = None
    ) -> AbstractContextManager[Editable]:
        """The model, to be run under an editor, and left as it was found.

        Args:
            probe: the fixed batch, which must fit.
            batch_size: sequences of it per pass at most.

        Raises:
            ProbeError, MeasurementError: on entering, as of `sinktrack.measure`; or the model
                cannot be edited, and why.
        """
        if self.no_causal_tests is not None:
            raise MeasurementError(self.no_causal_tests)
        if self.backend == "torch":
            from sinktrack.models.any_decoder import passes as torch_passes

            return torch_passes.editable(self.model, probe, batch_size)
        if self.backend == "megatron":
            from sinktrack.models.megatron import passes

            return passes.editable(self.model, probe, batch_size)
        if self.backend == "streamed":
            from sinktrack.models import streamed_passes

            return streamed_passes.editable(self.model, probe, batch_size)
        from sinktrack.models.live import editable

        return editable(self.model, probe, batch_size)

    def all_or_none(self, step: Callable[[], _Result]) -> _Result:
        """Take a step; where every process measures by agreement, all of them or none."""
        if self.backend != "megatron":
            return step()
        from sinktrack.models.megatron.processes import processes

        return processes().all_or_none(step)

    @property
    def agrees(self) -> bool:
        """Do its processes compare their probes themselves?"""
        return self.backend == "megatron"


def adapt(model: Any, decoder: Decoder | None = None) -> Model:
    """Find who knows a model.

    Args:
        model: as `sinktrack.measure` takes it.
        decoder: how to see a model that is no known framework's; it decides where it is given.

    Raises:
        MeasurementError: nobody does, and there is no evident list of blocks in it.
    """
    if decoder is None and isinstance(model, Decoder):
        decoder = model
    if decoder is not None:
        return _torch(decoder.of(model))
    if "megatron" in sys.modules and _is_megatron(model):
        from sinktrack.models.megatron.passes import why_not

        return Model("megatron", model, True, ("megatron-core",), why_not(model))
    if "sinktrack.models.streaming" in sys.modules and _is_streamed(model):
        return Model("streamed", model, False)
    if not isinstance(model, nn.Module):
        raise MeasurementError(f"a {type(model).__name__} is no model; give a torch.nn.Module")
    if "transformers" in sys.modules and _holds_transformers(model):
        reason = _APART if is_apart(model) else None
        return Model("transformers", model, takes_every_process(model), (), reason)
    return _torch(Decoder(model))


def _torch(decoder: Decoder) -> Model:
    assert decoder.model is not None
    reason = _APART if is_apart(decoder.model) else None
    return Model("torch", decoder, takes_every_process(decoder.model), (), reason)


def _is_megatron(model: Any) -> bool:
    from sinktrack.models.megatron.hooks import is_megatron

    return is_megatron(model)


def _is_streamed(model: Any) -> bool:
    from sinktrack.models.streaming import Streamed

    return isinstance(model, Streamed)


def _holds_transformers(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return any(isinstance(module, PreTrainedModel) for module in model.modules())
