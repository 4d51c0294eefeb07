"""A hand-written loop with the tracker; any wandb run that is active gets the curves.

python examples/loop.py [DIRECTORY]
"""

import sys
from pathlib import Path

import torch

import sinktrack as st
from sinktrack.callbacks.loop import SinkTracker
from sinktrack.demo import PairBackcopy, tiny_moe

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-loop")
language = PairBackcopy()
probe = st.Probe.from_tokens(language.sample(32))
model = tiny_moe(seed=0).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
tracker = SinkTracker(probe, out / "run", every=20)

for step in range(1, 61):
    tokens = language.sample(32)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    measured = tracker.step(step, model, tokens=step * tokens.numel())
    if measured is not None:
        concentration = " ".join(f"{value:.2f}" for value in measured.concentration.tolist())
        print(f"step {step:3}: loss {loss:.2f}, attention to P0 by block {concentration}")
