"""A made-up pretraining: checkpoints between random weights and those of a trained model.

Checkpoint k holds (1 - a) random + a trained weights, a = 1 - exp(-k / 4), made in memory. Nothing
moves in this trace but that the trained circuit grows: whoever sees a migration in it made it up.
tests/data/runs/made-up-trace holds what this wrote from SmolLM2-135M-Instruct.

    python scripts/made_up_trace.py MODEL OUT [--checkpoints 20]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from real_runs import kept
from transformers import AutoModelForCausalLM

from sinktrack import Probe, measure
from sinktrack.records.run import to_json, versions

SEQUENCES, LENGTH = 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory that transformers loads")
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoints", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    ends = [
        (weight, first.detach(), weight.detach().clone())
        for weight, first in zip(model.parameters(), start.parameters(), strict=True)
    ]
    probe = Probe.random(model.config.vocab_size, SEQUENCES, LENGTH)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "records.jsonl").open("w") as file:
        for k in range(options.checkpoints):
            part = 1 - math.exp(-k / 4)
            with torch.no_grad():
                for weight, first, last in ends:
                    weight.copy_(torch.lerp(first, last, part))
            record = measure(model, probe).to_record(k, f"checkpoint-{k}", versions())
            line = kept(to_json(record), writers=3)
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            file.flush()
            print(k, line["depth"], line["first_two_share"], line["sinks"], flush=True)


if __name__ == "__main__":
    main()
