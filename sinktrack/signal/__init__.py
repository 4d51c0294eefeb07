"""From the records of a run to its signal: onset, stage, plateau, regression; a candidate."""

from sinktrack.signal.analysis import Analysis, FirstBlock, Migration, Plateau, alarm, analyze
from sinktrack.signal.compare import Comparison, compare
from sinktrack.signal.phases import Event
from sinktrack.signal.robust import Interval
from sinktrack.signal.stages import Regression, Stages
from sinktrack.signal.timeline import Timeline, timeline

__all__ = [
    "Analysis",
    "Comparison",
    "Event",
    "FirstBlock",
    "Interval",
    "Migration",
    "Plateau",
    "Regression",
    "Stages",
    "Timeline",
    "alarm",
    "analyze",
    "compare",
    "timeline",
]
