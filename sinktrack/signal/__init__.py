"""From the records of a run to its signal: onset, stage, plateau, regression; a candidate."""

from sinktrack.signal.analysis import Analysis, Migration, Plateau, alarm, analyze
from sinktrack.signal.robust import Interval
from sinktrack.signal.stages import Regression, Stages

__all__ = [
    "Analysis",
    "Interval",
    "Migration",
    "Plateau",
    "Regression",
    "Stages",
    "alarm",
    "analyze",
]
