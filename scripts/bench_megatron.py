"""What a probe of a Megatron-Core model costs beside a plain forward pass of the same tokens.

    python scripts/bench_megatron.py [LENGTH...]

One process on the CPU, a MoE of 4 blocks of width 256 with the local core attention, a probe of
4,096 tokens; medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import megatron_cpu
import torch
import torch.nn.functional as F
from ratios import tell

from sinktrack import Probe, measure

VOCABULARY, TOKENS, ROUNDS = 1024, 4096, 5


def build(length: int) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=4, hidden_size=256, num_attention_heads=8, num_query_groups=4,
        num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=256,
        moe_token_dispatcher_type="allgather", gated_linear_unit=True, activation_func=F.silu,
        normalization="RMSNorm", add_bias_linear=False, use_cpu_initialization=True,
        bias_dropout_fusion=False, bias_activation_fusion=False, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=False, normalization="RMSNorm")
    return GPTModel(config, spec, VOCABULARY, length, position_embedding_type="rope").eval()


def seconds(function: Any) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare(length: int, tokens: int, count: int) -> tuple[float, float]:
    """Seconds of a plain forward pass, and the cost of a probe over it."""
    torch.manual_seed(0)
    model = build(length)
    probe = Probe.random(VOCABULARY, sequences=tokens // length, length=length)
    positions = torch.arange(length).expand(tokens // length, -1)

    def plain() -> None:
        with torch.no_grad():
            model(probe.tokens, positions, None)

    rounds = []
    for _ in range(count + 1):  # the first is for warming up
        rounds.append((seconds(plain), seconds(lambda: measure(model, probe))))
    forward = statistics.median(one for one, _ in rounds[1:])
    return forward, statistics.median(other / one for one, other in rounds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lengths", type=int, nargs="*", default=[64, 512, 2048])
    parser.add_argument("--short", action="store_true", help="small, as JSON for bench.py")
    arguments = parser.parse_args()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", "29500")):  # fmt: skip
        os.environ.setdefault(name, value)
    megatron_cpu.start()
    if arguments.short:
        tell("time", {"Megatron: measure / plain forward": compare(64, 512, 3)[1]})
        return
    print("| T | plain forward | measure / plain |\n|---|---|---|")
    for length in arguments.lengths:
        forward, ratio = compare(length, TOKENS, ROUNDS)
        print(f"| {length} | {forward:.2f} s | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
