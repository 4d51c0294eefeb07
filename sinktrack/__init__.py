"""sinktrack: follows the attention sink at position zero through pretraining."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sinktrack.errors import (
    ArchiveError,
    MeasurementError,
    MissingExtra,
    ProbeError,
    RecordError,
    SinktrackError,
)

if TYPE_CHECKING:
    from sinktrack import figures, signal
    from sinktrack.interventions.card import position_card
    from sinktrack.measure import measure
    from sinktrack.measurement import Measurement
    from sinktrack.models.any_decoder.decoder import Decoder
    from sinktrack.probe import Probe
    from sinktrack.records.run import Run
    from sinktrack.scan import scan

__version__ = "0.1.0"

__all__ = [
    "ArchiveError",
    "Decoder",
    "Measurement",
    "MeasurementError",
    "MissingExtra",
    "Probe",
    "ProbeError",
    "RecordError",
    "Run",
    "SinktrackError",
    "figures",
    "measure",
    "position_card",
    "scan",
    "signal",
]

_LAZY = {
    "Decoder": "sinktrack.models.any_decoder.decoder",
    "Measurement": "sinktrack.measurement",
    "Probe": "sinktrack.probe",
    "Run": "sinktrack.records.run",
    "figures": "sinktrack.figures",
    "measure": "sinktrack.measure",
    "position_card": "sinktrack.interventions.card",
    "scan": "sinktrack.scan",
    "signal": "sinktrack.signal",
}
"""What is imported when it is first asked for, as torch takes seconds: where each name lies."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return getattr(module, name, module)


def __dir__() -> list[str]:
    return sorted((*__all__, "__version__"))


class _Package(ModuleType):
    """Keeps ``sinktrack.scan`` and ``sinktrack.measure`` the functions.

    Importing a submodule sets it as the package's attribute; these two have the functions' names.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in ("measure", "scan") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
