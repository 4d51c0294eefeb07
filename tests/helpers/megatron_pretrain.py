"""Runs `megatron.training.pretrain` itself, as Megatron-LM's scripts do.

A script to run under torchrun: ``megatron_pretrain.py OUT RUN ARGUMENT...`` trains a tiny model
with Megatron-LM's command line, with the callback writing to the directory RUN, or without where
that is "-". Only the data are stand-ins, and CUDA where there is none: then it runs over gloo.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from types import SimpleNamespace
from typing import Any

import megatron_cpu
import torch

from sinktrack import Probe
from sinktrack.callbacks.megatron import SinkTrackMegatron
from tests.helpers import megatron_hybrid, megatron_models, megatron_writers

VOCABULARY, LENGTH = 63, 16
PROBE = Probe.random(VOCABULARY, sequences=4, length=12, seed=3)
ARGUMENTS = f"""
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4
    --seq-length {LENGTH} --max-position-embeddings {LENGTH} --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
    --vocab-size {VOCABULARY} --tokenizer-type NullTokenizer --make-vocab-size-divisible-by 8
    --micro-batch-size 2
    --lr 0.01 --lr-decay-style cosine --min-lr 0.001 --attention-dropout 0.1 --hidden-dropout 0.1
    --eval-iters 1 --eval-interval 2 --save-interval 4 --log-interval 1 --num-workers 0
    --transformer-impl local --ckpt-format torch_dist
    --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
"""


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "nccl" if DEVICE == "cuda" else "gloo"


def stand_in() -> None:
    """What `megatron.training` asks of CUDA beside what Megatron-Core does."""
    megatron_cpu.stand_in()

    def available() -> bool:
        return sys._getframe(1).f_code.co_name == "initialize_megatron"

    def count() -> int:
        return int(
            sys._getframe(1).f_code.co_name in ("_initialize_distributed", "_set_random_seed")
        )

    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.get_states = lambda: {"none": torch.empty(0)}  # without any, loading gives up
    tensor_parallel.model_parallel_cuda_manual_seed = lambda *_, **__: None
    torch.cuda.is_available, torch.cuda.device_count = available, count
    torch.cuda.set_device = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.get_rng_state = lambda *_: torch.empty(0, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_: None
    torch.cuda.memory_stats = lambda *_: {}
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved",
                 "max_memory_reserved", "device_memory_used"):  # fmt: skip
        setattr(torch.cuda, name, lambda *_: 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(  # type: ignore[assignment]
        major=9, minor=0, multi_processor_count=1, total_memory=2**30
    )


class Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random tokens, the same in each run."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"tokens": torch.randint(VOCABULARY, (LENGTH + 1,), generator=generator)}


def datasets(*_: Any, vp_stage: int | None = None) -> Any:
    return Samples(), Samples(), Samples()


datasets.is_distributed = True  # type: ignore[attr-defined]


def model(*_: Any, pre_process: bool = True, post_process: bool = True, **given: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.training import arguments, get_args

    args = get_args()
    name = "core_transformer_config_from_args"
    home = arguments
    if not hasattr(arguments, name):
        home = importlib.import_module("megatron.training.argument_utils")
    config = getattr(home, name)(args)
    stage = given.get("vp_stage")
    if getattr(args, "hybrid_layer_pattern", None):
        hybrid = megatron_hybrid.classes()[0]
        return hybrid(
            config,
            megatron_hybrid.specification(config),
            args.padded_vocab_size,
            args.max_position_embeddings,
            args.hybrid_layer_pattern,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type=args.position_embedding_type,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            rotary_base=args.rotary_base,
            vp_stage=stage,
        )
    fused = args.transformer_impl == "transformer_engine"
    blocks = get_gpt_decoder_block_spec(
        config, fused, normalization=args.normalization, vp_stage=stage
    )
    if config.sequence_parallel or config.context_parallel_size > 1:
        megatron_models.on_cpu(blocks, config)
    return GPTModel(
        config,
        blocks,
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        rotary_base=args.rotary_base,
        mtp_block_spec=get_gpt_mtp_block_spec(config, blocks, fused, vp_stage=stage)
        if args.mtp_num_layers
        else None,
        vp_stage=stage,
    )


def loss(mask: Any, output: Any, **_: Any) -> Any:
    total = output.float().sum()
    count = torch.tensor(output.numel(), dtype=torch.int, device=DEVICE)
    return total, count, {"lm loss": torch.stack((total.detach(), count.float()))}


def step(iterator: Any, chunk: Any, *_: Any) -> Any:
    from megatron.core import parallel_state as state

    rank = state.get_context_parallel_rank()
    chunks = torch.arange(LENGTH, device=DEVICE).chunk(2 * state.get_context_parallel_world_size())
    held = torch.cat([chunks[rank], chunks[-1 - rank]])  # with one process, all
    tokens = next(iterator)["tokens"].to(DEVICE)
    output = chunk(tokens[:, held], held.expand(len(tokens), -1), None, labels=tokens[:, held + 1])
    return output, functools.partial(loss, None)


def main(out: str, run: str, *more: str) -> None:
    """Train; exits as Megatron does."""
    if DEVICE == "cpu":
        stand_in()
        torch.distributed.init_process_group(BACKEND)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # tensor parallelism insists on it
    from megatron.core.enums import ModelType
    from megatron.training import initialize, training

    initialize._compile_dependencies = lambda: None
    if DEVICE == "cpu":
        initialize._warmup_jit_function = lambda *_, **__: None
    arguments = [*ARGUMENTS.split(), "--distributed-backend", BACKEND]
    if "--train-samples" not in more:
        arguments += ["--train-iters", "8", "--lr-decay-iters", "8"]
    if "--step-batch-size-schedule" not in more:
        arguments += ["--global-batch-size", "8"]
    sys.argv = ["pretrain", *arguments, "--save", out, "--load", out, *more]
    if "--async-save" in more and DEVICE == "cpu":
        megatron_writers.train(training, out)
    given: dict[str, Any] = {}
    if run != "-":
        tracker = SinkTrackMegatron(PROBE, run, every=2, on_error="raise")
        given["non_loss_data_func"] = tracker.non_loss_data_func
    given |= {
        "train_valid_test_dataset_provider": datasets,
        "model_provider": model,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": step,
    }
    if "cfg_container" in inspect.signature(training.pretrain).parameters:
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        given["cfg_container"] = pretrain_cfg_container_from_args(parse_and_validate_args())
    training.pretrain(**given)


if __name__ == "__mp_main__" and DEVICE == "cpu":
    megatron_writers.write()
if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
