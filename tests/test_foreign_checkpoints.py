"""Checkpoints that torchtitan and OLMo-core wrote, against the logits of their own models.

``scripts/foreign_checkpoints.py`` made them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sinktrack import Probe, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.follow import is_complete
from sinktrack.archive.huggingface import load

CHECKPOINTS = Path(__file__).parent / "data" / "checkpoints"


@pytest.mark.parametrize("name", sorted(place.name for place in CHECKPOINTS.iterdir()))
def test_logits_are_those_of_the_framework(name: str, tmp_path: Path) -> None:
    place, (kind, _, family) = CHECKPOINTS / name, name.partition("-")
    hf_config = place / "hf" if kind == "torchtitan" else None
    (checkpoint,) = discover(place, hf_config=hf_config)
    assert (checkpoint.format, checkpoint.step) == (kind, 10) and is_complete(checkpoint)
    model, theirs = load(checkpoint), load_file(place / "logits.safetensors")
    assert model.config.model_type == family
    with torch.no_grad():
        ours = model(theirs["tokens"]).logits
    assert theirs["logits"].std() > 0.5
    torch.testing.assert_close(ours, theirs["logits"], atol=1e-5, rtol=0)
    probe = Probe.from_tokens(theirs["tokens"])
    (record,) = scan(place, probe=probe, run=tmp_path, hf_config=hf_config)
    assert record["step"] == 10 and record["model"]["type"] == family
