"""Checkpoints of a run that is over: scan them, then look at curves and signal.

python examples/archive.py [DIRECTORY]
"""

import sys
from pathlib import Path

import sinktrack as st
from sinktrack.demo import PairBackcopy, tiny_moe
from sinktrack.views.report import write_report

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-archive")
for step in (0, 1, 2):  # stands for a training
    tiny_moe(seed=step).save_pretrained(out / "archive" / f"checkpoint-{step}")

probe = st.Probe.from_tokens(PairBackcopy().sample(32))
for record in st.scan(out / "archive", probe=probe, run=out / "run"):
    print(f"{record['source']}: sink rate {record['sink_rate']:.2f}")

run = st.Run.read(out / "run")
print(st.signal.analyze(run))
write_report({"example": run.records}, out / "report.html")
