"""The Hugging Face Trainer with the callback, then what was recorded.

python examples/trainer.py [DIRECTORY]
"""

import sys
from pathlib import Path

from transformers import Trainer, TrainingArguments

import sinktrack as st
from sinktrack.callbacks.huggingface import SinkTrackCallback
from sinktrack.demo import PairBackcopy, Sequences, tiny_moe

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-trainer")
language = PairBackcopy()
probe = st.Probe.from_tokens(language.sample(32))

trainer = Trainer(
    model=tiny_moe(seed=0),
    args=TrainingArguments(
        output_dir=str(out / "checkpoints"), max_steps=60, per_device_train_batch_size=32,
        learning_rate=5e-3, use_cpu=True, report_to=[], logging_steps=20,
    ),
    train_dataset=Sequences(language.sample(1024)),
)  # fmt: skip
trainer.add_callback(SinkTrackCallback(probe, out / "run", every=20, early=True))
trainer.train()

for record in st.Run.read(out / "run").records:
    print(f"step {record['step']:3}: sink rate {record['sink_rate']:.2f}")
