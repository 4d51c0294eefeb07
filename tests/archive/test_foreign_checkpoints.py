"""Checkpoints that torchtitan and OLMo-core wrote, against the logits of their own models.

``scripts/foreign_checkpoints.py`` made them. And what several processes wrote, a shard each.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sinktrack import Probe, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.follow import lack
from sinktrack.archive.huggingface import load
from tests.helpers.commands import two_processes
from tests.helpers.olmo_core_checkpoints import flex_olmo
from tests.helpers.paths import DATA
from tests.helpers.torchtitan_checkpoints import FAMILIES

CHECKPOINTS = DATA / "checkpoints"


@pytest.mark.parametrize("name", sorted(place.name for place in CHECKPOINTS.iterdir()))
def test_logits_are_those_of_the_framework(name: str, tmp_path: Path) -> None:
    place, (kind, _, family) = CHECKPOINTS / name, name.partition("-")
    hf_config = place / "hf" if kind == "torchtitan" else None
    (checkpoint,) = discover(place, hf_config=hf_config)
    assert (checkpoint.format, checkpoint.step) == (kind, 10) and not lack(checkpoint)
    model, theirs = load(checkpoint), load_file(place / "logits.safetensors")
    assert model.config.model_type == family
    with torch.no_grad():
        ours = model(theirs["tokens"]).logits
    assert theirs["logits"].std() > 0.5
    torch.testing.assert_close(ours, theirs["logits"], atol=1e-5, rtol=0)
    probe = Probe.from_tokens(theirs["tokens"])
    (record,) = scan(place, probe=probe, run=tmp_path, hf_config=hf_config)
    assert record["step"] == 10 and record["model"]["type"] == family


@pytest.mark.distributed
def test_shards_of_two_processes(tmp_path: Path) -> None:
    """Along any dimension: the rows of a head and the experts of a block lie in both files."""
    two_processes(
        tmp_path,
        """
        from tests.helpers import olmo_core_checkpoints, torchtitan_checkpoints
        from tests.archive.test_foreign_checkpoints import FAMILIES, flex_olmo
        from torch.distributed.checkpoint.state_dict_saver import save
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
        mesh = init_device_mesh("cpu", (2,))

        def write(state, place):
            sharded = {
                name: distribute_tensor(value, mesh, [Shard(number % value.ndim)])
                for number, (name, value) in enumerate(state.items())
            }
            save(sharded, checkpoint_id=place)

        for family in ("llama", "qwen3_moe"):
            state = torchtitan_checkpoints.weights(FAMILIES[family](), newer=True)
            write(state, out / family / "step-7")
        state = olmo_core_checkpoints.weights(flex_olmo())
        state = {f"model.{name}": value for name, value in state.items()}
        write(state, out / "flex_olmo" / "step7" / "model_and_optim")
        dist.destroy_process_group()
        """,
    )
    for family in ("llama", "qwen3_moe", "flex_olmo"):
        model = flex_olmo() if family == "flex_olmo" else FAMILIES[family]()
        model.config.save_pretrained(tmp_path / "hf")
        (checkpoint,) = discover(tmp_path / family, hf_config=tmp_path / "hf")
        assert len(list((tmp_path / family).rglob("*.distcp"))) == 2
        weights = load(checkpoint).state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(weights[name], value), name
