"""From the records of a run to its signal: onset, stage, plateau, regression; a candidate."""

from sinktrack.signal.analysis import Analysis, FirstBlock, Migration, Plateau, alarm, analyze
from sinktrack.signal.compare import Comparison, compare
from sinktrack.signal.phases import Event
from sinktrack.signal.robust import Interval
from sinktrack.signal.sensitivity import OnsetBy, Sensitivity, sensitivity
from sinktrack.signal.stages import Regression, Stages
from sinktrack.signal.timeline import Timeline, timeline

__all__ = [
    "Analysis",
    "Comparison",
    "Event",
    "FirstBlock",
    "Interval",
    "Migration",
    "OnsetBy",
    "Plateau",
    "Regression",
    "Sensitivity",
    "Stages",
    "Timeline",
    "alarm",
    "analyze",
    "compare",
    "sensitivity",
    "timeline",
]
