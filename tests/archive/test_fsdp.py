"""Sharded checkpoints of FSDP2, written over two processes by torch itself."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from sinktrack import ArchiveError, Run, measure, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.layouts.fsdp import FOLDER
from sinktrack.archive.source import open as open_source
from sinktrack.records.run import to_json
from tests.helpers import models
from tests.helpers.commands import two_processes
from tests.helpers.trainings import PROBE


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fsdp")
    two_processes(
        root,
        f"""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_model_state_dict
        from torch.distributed.fsdp import fully_shard
        dist.init_process_group("gloo")
        model = models.mixtral()
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        place = out / "archive" / "checkpoint-7"
        dcp.save({{"model": get_model_state_dict(model)}}, checkpoint_id=place / {FOLDER!r})
        if dist.get_rank() == 0:
            model.config.save_pretrained(place)
        dist.destroy_process_group()
        """,
    )
    return root / "archive"


def test_measured_as_the_model_that_was_saved(archive: Path, tmp_path: Path) -> None:
    (record,) = scan(archive, probe=PROBE, run=tmp_path)
    live = to_json(measure(models.mixtral(), PROBE).to_record(7, "checkpoint-7", {}))
    assert record["step"] == 7 and Run.read(tmp_path).steps == [7]
    assert record["weights"] == live["weights"]
    assert record["p0_attention"] == live["p0_attention"]
    assert record["norm_ratio"] == live["norm_ratio"]


def test_slices(archive: Path) -> None:
    source = open_source(discover(archive)[0])
    weights = models.mixtral().state_dict()
    assert set(source.names()) == set(weights)
    for name, wanted in weights.items():
        part = source.slice(name)
        assert part.get_shape() == list(wanted.shape) and part.get_dtype() == "F32"
        assert torch.equal(part[...], wanted)
        assert torch.equal(part[1:3], wanted[1:3])
        assert torch.equal(part[2], wanted[2])


def test_one_number(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint-1"
    models.mixtral(num_hidden_layers=2).config.save_pretrained(place)
    weights = {"scale": torch.tensor(2.5), "scales": torch.tensor([1.0, 2.0])}
    save({"model": weights}, checkpoint_id=place / FOLDER, no_dist=True)
    source = open_source(discover(tmp_path)[0])
    scale = source.slice("scale")
    assert scale.get_shape() == [] and torch.equal(scale[...], weights["scale"])
    assert torch.equal(source.slice("scales")[...], weights["scales"])


def test_without_a_configuration_the_way_out_is_named(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / FOLDER).symlink_to(archive / "checkpoint-7" / FOLDER)
    with pytest.raises(ArchiveError, match="leads out of|--hf-config"):
        open_source(discover(tmp_path)[0])


def test_a_pickle_that_calls_something_is_refused(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "called",))

    place = tmp_path / "checkpoint-1" / FOLDER
    place.mkdir(parents=True)
    models.mixtral().config.save_pretrained(place.parent)
    (place / ".metadata").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ArchiveError, match="pathlib"):
        open_source(discover(tmp_path)[0])
    assert not (tmp_path / "called").exists()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_the_trainers_own(version: int, tmp_path: Path) -> None:
    """The Trainer shards by accelerate, which does so for GPUs alone: a process says it has one."""
    two_processes(
        tmp_path,
        f"""
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

        begin, wrap = PartialState.__init__, FSDP.__init__
        def of_gpus(self, *args, **kwargs):
            begin(self, *args, **kwargs)
            if self.distributed_type == DistributedType.MULTI_CPU:
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        PartialState.__init__ = of_gpus
        FSDP.__init__ = lambda *args, **kwargs: wrap(
            *args, **kwargs | {{"device_id": torch.device("cpu")}}
        )

        class Shards(TrainerCallback):
            def on_train_end(self, args, state, control, model, optimizer, **_):
                self.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
                self.random = (random.getstate(), numpy_state(), torch.get_rng_state())
                if {version} == 1:
                    with FSDP.summon_full_params(model):
                        weights = {{k: v.clone() for k, v in model.module.state_dict().items()}}
                else:
                    weights = {{k: v.full_tensor() for k, v in model.state_dict().items()}}
                self.weights = {{k.replace("_fsdp_wrapped_module.", ""): v
                                for k, v in weights.items()}}

        found = []
        for tracked in (False, True):
            set_seed(1)
            shards = Shards()
            callback = SinkTrackCallback(PROBE, out / "run", every=4, on_error="raise")
            arguments = TrainingArguments(
                output_dir=str(out), max_steps=6, learning_rate=3e-3, logging_steps=1,
                per_device_train_batch_size=4, report_to=[], use_cpu=True, ddp_backend="gloo",
                save_strategy="no", fsdp="full_shard auto_wrap" if {version} == 1 else True,
                fsdp_config={{
                    "version": {version}, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                    "sync_module_states": False, "cpu_ram_efficient_loading": False,
                }},
            )
            callbacks = [callback, shards] if tracked else [shards]
            trainer = Trainer(models.llama().train(), arguments, train_dataset=Data(),
                              callbacks=callbacks)
            trainer.train()
            assert "FSDP" in type(trainer.model).__name__ or {version} == 1
            assert {version} == 2 or isinstance(trainer.model, FSDP)
            found.append(vars(shards))
        assert_identical(*found)
        whole = models.llama()
        whole.load_state_dict(found[1]["weights"])
        if dist.get_rank() == 0:
            run = Run.read(out / "run")
            assert run.steps == [0, 4, 6]
            live = measure(whole, PROBE)
            assert run.records[-1]["weights"] == live.weights
            torch.testing.assert_close(
                torch.tensor(run.records[-1]["p0_attention"]), live.p0_attention,
                atol=1e-6, rtol=0,
            )
        dist.barrier()
        """,
    )
