"""A tiny Megatron-Core MoE trained over two processes, its checkpoints scanned, the report drawn.

    python scripts/megatron_tiny_moe.py OUT [STEPS]

Expert-parallel over gloo on the CPU, on the task of `sinktrack demo`. The callback measures it in
training, Megatron saves it, and the scanner, which knows nothing of Megatron, measures what was
saved; both must agree.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from sinktrack import Run, demo, scan
from sinktrack.callbacks.megatron import SinkTrackMegatron

PROCESSES, SEQUENCES, STEPS, SAVES = 2, 32, 1000, 4
VOCABULARY = demo.SYMBOLS + 1
SETTINGS: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 24, "num_attention_heads": 1, "kv_channels": 24,
    "ffn_hidden_size": 16, "num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 16,
    "moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "allgather",
    "gated_linear_unit": True, "activation_func": F.silu, "normalization": "RMSNorm",
    "add_bias_linear": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "expert_model_parallel_size": PROCESSES,
}  # fmt: skip
ON_CPU = {
    "use_cpu_initialization": True, "bias_dropout_fusion": False, "bias_activation_fusion": False,
    "masked_softmax_fusion": False, "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
}  # fmt: skip


def build() -> Any:
    """The model in Megatron's wrapper."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = TransformerConfig(**SETTINGS, **ON_CPU)
    config.finalize_model_grads_func = finalize_model_grads
    spec = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
    spec.layer_norm = WrappedTorchNorm
    torch.manual_seed(1 + dist.get_rank())  # the experts of each process are its own
    model = GPTModel(
        config, spec, VOCABULARY, demo.LENGTH,
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
    )  # fmt: skip
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    wrapped.broadcast_params()
    return wrapped


def train(out: Path, steps: int) -> None:
    """What every process does."""
    import megatron_cpu
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    torch.set_num_threads(1)
    megatron_cpu.start(expert_model_parallel_size=PROCESSES)
    model = [build()]
    settings = OptimizerConfig(
        optimizer="adam", lr=5e-3, weight_decay=0.0, adam_beta2=0.95, clip_grad=0.0
    )
    optimizer = get_megatron_optimizer(settings, model)
    language = demo.PairBackcopy()
    language.sample(64)  # the probe's share of the stream
    tracker = SinkTrackMegatron(
        demo.probe(), out / "run", every=max(steps // 24, 1), early=True, on_error="raise"
    )

    def forward(batches: Any, chunk: Any) -> Any:
        tokens = next(batches)
        positions = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
        losses = chunk(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        return losses, lambda values: (values.mean(), {"loss": values.detach().mean()})

    model[0].train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, step / 100)
        model[0].zero_grad_buffer()
        optimizer.zero_grad()
        mine = language.sample(SEQUENCES).chunk(PROCESSES)[dist.get_rank()]
        (found,) = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter([mine]), model=model,
            num_microbatches=1, seq_length=demo.LENGTH - 1, micro_batch_size=len(mine),
            forward_only=False,
        )  # fmt: skip
        optimizer.step()
        tokens = step * SEQUENCES * demo.LENGTH
        tracker.step(step, model, tokens)
        if step % (steps // SAVES) == 0:
            if tracker.tracker.measured != step:  # each checkpoint has its match
                tracker.tracker.probe_now(step, model, tokens)
            save(model[0].module, out / "checkpoints", step)
            if dist.get_rank() == 0:
                print(f"step {step}: loss {float(found['loss']):.2f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def save(model: Any, out: Path, step: int) -> None:
    """As Megatron-LM does, with the arguments of its command line that make this model."""
    from megatron.core import dist_checkpointing

    directory = out / f"iter_{step:07d}"
    directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    arguments = {name: value for name, value in SETTINGS.items() if not callable(value)} | {
        "num_experts": SETTINGS["num_moe_experts"], "norm_epsilon": model.config.layernorm_epsilon,
        "swiglu": True, "rotary_base": 10000, "position_embedding_type": "rope",
        "group_query_attention": False, "untie_embeddings_and_output_weights": True,
        "padded_vocab_size": VOCABULARY, "max_position_embeddings": demo.LENGTH,
        "seq_length": demo.LENGTH, "consumed_train_samples": step * SEQUENCES,
    }  # fmt: skip
    common = {"args": argparse.Namespace(**arguments), "iteration": step}
    dist_checkpointing.save(model.sharded_state_dict() | common, str(directory))
    if dist.get_rank() == 0:
        (out / "latest_checkpointed_iteration.txt").write_text(str(step))


def main(out: Path, steps: int) -> None:
    """Train, scan, compare, draw."""
    from rich.console import Console

    from sinktrack.signal import analyze
    from sinktrack.views.report import write_report
    from sinktrack.views.terminal import show

    demo.clear(out)
    print(f"training a tiny MoE for {steps} steps over {PROCESSES} processes ...", flush=True)
    subprocess.run(
        [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={PROCESSES}", __file__, str(out), str(steps),
        ],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    records = Run.read(out / "run").records
    online = {record["step"]: record for record in records}
    scanned = list(scan(out / "checkpoints", probe=demo.probe(), run=out / "scanned"))
    worst = 0.0
    for record in scanned:
        live = online[record["step"]]
        assert live["tokens"] == record["tokens"]
        ours = [
            {k: v for k, v in r.items() if k not in ("model", "weights")} for r in (live, record)
        ]
        worst = max(worst, demo.largest_difference(*ours))
    if not worst <= demo.AGREEMENT:
        raise SystemExit(f"online and offline records differ by {worst:.2g}")
    write_report({"live": records, "checkpoints": scanned}, out / "report.html")
    show(records, analyze(records), "Megatron-Core", Console())
    print(demo.summary(records))
    print(f"{len(scanned)} checkpoints scanned; online and offline agree to {worst:.1e}.")
    print(f"Report: {out / 'report.html'}")


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-megatron")
    number = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    (train if "RANK" in os.environ else main)(place, number)
