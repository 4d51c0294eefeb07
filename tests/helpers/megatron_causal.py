"""Trains tiny Megatron-Core models with causal tests of the live ones, and saves them.

A script: ``megatron_causal.py OUT FAMILY...`` writes the run ``OUT/FAMILY/run`` and the checkpoint
of the same weights beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import megatron_cpu
import torch
import torch.distributed as dist

from sinktrack import Probe, measure
from sinktrack.callbacks.megatron import SinkTrackMegatron
from sinktrack.metrics import phases
from tests.helpers.megatron_checkpoints import VOCABULARY, build, fill, save

PROBE = Probe.random(VOCABULARY, sequences=10, length=8, seed=4)


def main(out: str, *families: str) -> None:
    """Ten steps of each; the callback tests the last one's weights, which are saved."""
    megatron_cpu.start()
    for family in families:
        here = Path(out) / family
        model = build(family, {}).train()
        model.config.vocab_size = VOCABULARY  # as Megatron Bridge's says; the embedding is padded
        fill(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        tracker = SinkTrackMegatron(PROBE, here / "run", every=10, causal_every=1, on_error="raise")
        generator = torch.Generator().manual_seed(0)
        for step in range(1, 11):
            tokens = torch.randint(VOCABULARY, (2, 12), generator=generator)
            positions = torch.arange(12).expand(2, -1)
            mask = torch.ones(12, 12).triu(1).bool()[None, None]
            model(tokens, positions, mask, labels=tokens).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 10:  # the largest concentration behind block 1 is a sink's
                highest = float(measure([model], PROBE).concentration[2:].max()) - 1e-3
                phases.EPSILON = phases.GOES_ON = highest  # type: ignore[attr-defined]
                (here / "epsilon").write_text(str(highest))
            tracker.step(step, [model])
        save(model, family, here, "stacked")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
