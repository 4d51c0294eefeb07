"""sinktrack: follows the attention sink at position zero through pretraining."""

from sinktrack import figures, signal
from sinktrack.errors import (
    ArchiveError,
    MeasurementError,
    MissingExtra,
    ProbeError,
    RecordError,
    SinktrackError,
)
from sinktrack.measure import measure
from sinktrack.measurement import Measurement
from sinktrack.probe import Probe
from sinktrack.records.run import Run
from sinktrack.scan import scan

__version__ = "0.1.0"

__all__ = [
    "ArchiveError",
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
    "scan",
    "signal",
]
