"""Runs `megatron.bridge.training.pretrain.pretrain` itself over gloo on CPUs.

A script to run under torchrun: ``megatron_bridge_pretrain.py OUT RUN EXIT [PROJECT [STRATEGY]]``
trains a tiny model by Megatron Bridge's configuration for eight iterations, or until it exits at a
multiple of EXIT. The callback writes to the directory RUN; there is none where that is "-". With a
PROJECT it logs to W&B. With a STRATEGY, ``mcore`` or ``nvrx``, it saves asynchronously, and trains
for fourteen; there a negative EXIT is the iteration in which a signal comes. Only CUDA, packages
that want it, and the data are stand-ins.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch

from sinktrack.callbacks.megatron import SinkTrackMegatron
from tests.helpers import megatron_writers
from tests.helpers.megatron_pretrain import LENGTH, PROBE, VOCABULARY, Samples, loss, stand_in

ABSENT: tuple[str, ...] = (
    "transformer_engine",
    "modelopt",
    "nvidia_resiliency_ext",
    "megatron.energon",
)
"""Packages that Bridge imports whatever it trains."""
if importlib.util.find_spec("nvidia_resiliency_ext"):
    ABSENT = tuple(name for name in ABSENT if name != "nvidia_resiliency_ext")


class Anything(type):
    """A class that has every attribute, and of which nothing is made."""

    def __call__(cls, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Absent(types.ModuleType):
    """A package that is not here, with whatever is asked of it."""

    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Finder:
    """Finds those packages."""

    def find_spec(self, name: str, *_: Any) -> Any:
        if any(f"{name}.".startswith(f"{absent}.") for absent in ABSENT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> Any:
        made = Absent(spec.name)
        made.__path__ = []
        return made

    def exec_module(self, module: Any) -> None: ...


def import_bridge() -> None:
    """Core first, which does without them where they are not there."""
    from megatron.core import dist_checkpointing, optimizer, tensor_parallel  # noqa: F401
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs  # noqa: F401
    from megatron.core.models.mamba import mamba_model  # noqa: F401

    sys.meta_path.insert(0, Finder())
    import megatron.bridge.training.pretrain  # noqa: F401


def step(iterator: Any, chunk: Any) -> Any:
    tokens = next(iterator)["tokens"]
    positions = torch.arange(LENGTH).expand(len(tokens), -1)
    output = chunk(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
    return output, functools.partial(loss, None)


def main(out: str, run: str, until: str, project: str = "", strategy: str = "") -> None:
    """Train."""
    stand_in()
    import_bridge()
    steps = 14 if strategy else 8
    if strategy:
        from megatron.bridge.training import checkpointing

        megatron_writers.train(checkpointing, out, signal_at=-int(until))
    from megatron.bridge.data.base import DatasetProvider
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training import initialize
    from megatron.bridge.training import pretrain as bridge
    from megatron.bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        DistributedDataParallelConfig,
        DistributedInitConfig,
        LoggerConfig,
        OptimizerConfig,
        RNGConfig,
        SchedulerConfig,
        TokenizerConfig,
        TrainingConfig,
        ValidationConfig,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    class Data(DatasetProvider):  # type: ignore[misc]
        seq_length: int = LENGTH

        def build_datasets(self, context: Any) -> Any:
            return Samples(), Samples(), Samples()

    initialize.compile_helpers = lambda: None
    initialize._warmup_jit_function = lambda *_, **__: None
    model = GPTModelProvider(
        num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4,
        seq_length=LENGTH, vocab_size=VOCABULARY + 1, normalization="RMSNorm",
        add_bias_linear=False, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, position_embedding_type="rope",
        share_embeddings_and_output_weights=False, attention_dropout=0.1, hidden_dropout=0.1,
        transformer_layer_spec=lambda _: get_gpt_layer_local_spec(normalization="RMSNorm"),
        masked_softmax_fusion=False, cross_entropy_loss_fusion=False,
        gradient_accumulation_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, apply_rope_fusion=False, persist_layer_norm=False,
        pipeline_dtype=torch.float32, deallocate_pipeline_outputs=False,
    )  # fmt: skip
    config = ConfigContainer(
        train=TrainingConfig(
            train_iters=steps, exit_interval=max(int(until), 0) or None,
            exit_signal_handler=int(until) < 0, global_batch_size=8, micro_batch_size=2,
        ),
        validation=ValidationConfig(eval_iters=1, eval_interval=2),
        model=model,
        optimizer=OptimizerConfig(
            optimizer="adam", lr=0.01, min_lr=0.001, bf16=False, use_distributed_optimizer=False
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine", lr_warmup_iters=0, lr_decay_iters=steps,
            start_weight_decay=0.01, end_weight_decay=0.01, weight_decay_incr_style="constant",
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=False),
        dataset=Data(dataloader_type="single", num_workers=0),
        logger=LoggerConfig(
            log_interval=1, tensorboard_dir=f"{out}/board", wandb_project=project or None,
            wandb_exp_name="one" if project else None, wandb_save_dir=out if project else None,
        ),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY),
        checkpoint=CheckpointConfig(
            save=out, load=out, save_interval=4, ckpt_format="torch_dist",
            async_save=bool(strategy), fully_parallel_save=bool(strategy),
            **({"async_strategy": strategy} if strategy else {}),
        ),
        rng=RNGConfig(seed=7),
        dist=DistributedInitConfig(distributed_backend="gloo"),
    )  # fmt: skip
    callbacks: list[Any] = []
    if run != "-":
        callbacks = [SinkTrackMegatron(PROBE, run, every=3, on_error="raise")]
    bridge.pretrain(config, step, callbacks=callbacks)


if __name__ == "__mp_main__":
    megatron_writers.write()
if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
