"""Causal tests of the P0 sink circuit on a live model.

Shares are exact terms of a sum, but a large term may be one that nobody reads. Here the circuit is
changed and the sink is looked at:

* *necessity*: a term's write at P0 gives way to its mean over the other positions;
* *sufficiency*: P0's write, or its whole state, is put on another position;
* *position*: another position attends to itself alone in the blocks before the sink, as P0 does;
  and P0 is made to attend to all others.

Each is compared with matched controls; see `sinktrack.interventions.effects` for what makes a
verdict.
"""

from sinktrack.interventions.trials import examine, necessity, position, sufficiency

__all__ = ["examine", "necessity", "position", "sufficiency"]
