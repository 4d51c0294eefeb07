"""What is measured, a module for each metric. `METRICS` lists them in the order of computation."""

from sinktrack.metrics.attention import Attention, Gates, SinkLogits
from sinktrack.metrics.base import Field, Metric
from sinktrack.metrics.first_token import FirstTokens
from sinktrack.metrics.localization import Localize
from sinktrack.metrics.mixing import Mixing, WriteRatios
from sinktrack.metrics.outliers import Outliers
from sinktrack.metrics.phases import Phases
from sinktrack.metrics.state import P0State
from sinktrack.metrics.total_effect import TotalEffects
from sinktrack.metrics.values import Values

METRICS: dict[str, Metric] = {
    "attention": Attention(),
    "sink_logits": SinkLogits(),
    "gates": Gates(),
    "state": P0State(),
    "phases": Phases(),
    "localization": Localize(),
    "total_effects": TotalEffects(),
    "first_token": FirstTokens(),
    "mixing": Mixing(),
    "write_ratios": WriteRatios(),
    "values": Values(),
    "outliers": Outliers(),
}
"""By the name under which their states are kept; each may use what those before it found."""

ALONE = {"state": METRICS["state"]}
"""Those that also look at the pass of single first tokens."""

FIELDS: dict[str, Field] = {
    field.name: field for metric in METRICS.values() for field in metric.fields
}
"""Every measured field of a record, by name."""
