"""Causal tests of the P0 sink circuit on a live model.

Shares are exact terms of a sum, but a large term may be one that nobody reads. Here the circuit is
changed and the sink is looked at:

* *necessity* (ablation): a component's write at P0 gives way to the one of another position, to
  the mean over the other positions, or to nothing;
* *sufficiency* (patching): P0's write, or its whole state, is put on another position;
* *position* (attention knockout): another position attends to itself alone in the blocks before the
  sink, as P0 does; and P0 is made to attend to all others.

All are read in every sink phase. Each is compared with matched controls; see
`sinktrack.interventions.effects` for what makes a verdict.
"""

from sinktrack.interventions.trials import (
    examine,
    necessity,
    position,
    run_causal_tests,
    sufficiency,
)

__all__ = ["examine", "necessity", "position", "run_causal_tests", "sufficiency"]
