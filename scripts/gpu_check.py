"""Check everything that a GPU changes, in one command of under nine minutes.

Attention to P0 in every dtype and layout, and of a decoder of one's own that calls flex attention
or packed sequences, against float64; the device against the CPU; training with the callback against
training without, to the bit, plain, in bfloat16, compiled and with CUDA graphs; records of these
against scans of their checkpoints on the device; FSDP2; Megatron-Core with Transformer Engine where
that is installed; the cost of a probe against a plain forward pass. What fails does not stop the
rest. On a CPU the same runs in small, so that it works the day a GPU is at hand.

    python scripts/gpu_check.py [--device cuda] [--out gpu.json]

Prints a Markdown table; the exit code is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import sinktrack as st
from sinktrack.attention import attend
from sinktrack.callbacks.loop import SinkTracker

VOCABULARY = 512


@dataclass(frozen=True)
class Row:
    """One check."""

    name: str
    value: float | None
    """What was found: a largest difference, or a ratio of times."""
    most: float | None
    """What it may be; None where nothing is asked."""
    note: str = ""

    @property
    def failed(self) -> bool:
        """Is it more than it may be, or no number?"""
        return self.most is not None and not (self.value is not None and self.value <= self.most)


def model(device: str, dtype: torch.dtype, width: int, blocks: int, length: int) -> Any:
    """A mixture of experts with GQA and heads of 64."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        moe_intermediate_size=width // 2,
        num_hidden_layers=blocks,
        num_attention_heads=max(2, width // 64),
        num_key_value_heads=max(1, width // 128),
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=length,
        attn_implementation="sdpa",
    )
    return Qwen3MoeForCausalLM(config).to(device, dtype)


def attention(device: str, length: int) -> Iterator[Row]:
    """`attend` against softmax in float64 of the same queries and keys."""
    generator = torch.Generator().manual_seed(0)
    layouts: dict[str, dict[str, Any]] = {
        "plain": {}, "GQA": {"groups": 2}, "window": {"window": length // 4},
        "softcap": {"softcap": 20.0}, "sink logits": {"sinks": True}, "heads of 128": {"size": 128},
    }  # fmt: skip
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for (name, layout), dtype in itertools.product(layouts.items(), dtypes):
        size, groups = layout.get("size", 64), layout.get("groups", 8)
        query = torch.randn(2, 8, length, size, generator=generator).to(dtype)
        key, value = (
            torch.randn(2, groups, length, size, generator=generator).to(dtype) for _ in range(2)
        )
        mask = None
        if "window" in layout:
            places = torch.arange(length)
            apart = places[:, None] - places
            mask = ((apart >= 0) & (apart < layout["window"]))[None, None]
        sinks = torch.randn(8, generator=generator) if "sinks" in layout else None
        scale, softcap = 2 * size**-0.5, layout.get("softcap")
        _, found = attend(
            *(x.to(device) for x in (query, key, value)), scale=scale, softcap=softcap,
            mask=None if mask is None else mask.to(device),
            sinks=None if sinks is None else sinks.to(device),
        )  # fmt: skip
        wanted = _in_float64(query, key, scale, mask, softcap, sinks)
        most = 5e-6 if dtype == torch.float32 else 2**-13
        difference = float((found.p0.cpu().double() - wanted[..., 0]).abs().max())
        yield Row(f"attention to P0, {name}, {_short(dtype)}, T {length}", difference, most)
        squares = wanted.square().sum(-1)
        difference = float((found.mixing().cpu().double() - squares).abs().max())
        yield Row(f"squared attention, {name}, {_short(dtype)}, T {length}", difference, most)


def _in_float64(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    wide = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.double() @ wide.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        own = sinks.double()[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, own], -1)
    return scores.softmax(-1)[..., : key.shape[2]]


def backends(device: str, length: int) -> Iterator[Row]:
    """A probe gives the same whatever kernel the training has chosen."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    own = model(device, dtype, 256, 2, length)
    probe = st.Probe.random(VOCABULARY, 2, length)
    wanted = st.measure(own, probe).p0_attention
    kernels = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
    if device == "cuda":
        kernels |= {
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cuDNN": SDPBackend.CUDNN_ATTENTION,
        }
    for name, kernel in kernels.items():
        with sdpa_kernel(kernel):
            found = st.measure(own, probe).p0_attention
        yield Row(f"probe under the {name} kernel", float((found - wanted).abs().max()), 0.0)


class Decoder(nn.Module):
    """A decoder of one's own: GQA, and attention by the function named."""

    def __init__(self, attention: str, blocks: int = 2, heads: int = 4, size: int = 64) -> None:
        super().__init__()
        width = heads * size
        self.attention, self.heads, self.size = attention, heads, size
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width, self) for _ in range(blocks))
        self.probabilities: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden @ self.embedding.weight.mT

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of [B, H, T, D] over keys and values of half as many heads."""
        batch, heads, length, size = query.shape
        if self.attention == "flex":
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            mask = create_block_mask(
                lambda b, h, q, k: q >= k, None, None, length, length, device=query.device
            )
            run = torch.compile(flex_attention) if query.is_cuda else flex_attention
            return run(query, key, value, block_mask=mask, enable_gqa=True)
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        if self.attention == "varlen":
            from torch.nn.attention.varlen import varlen_attn

            ends = torch.arange(0, (batch + 1) * length, length, device=query.device).int()
            query, key, value = (
                x.transpose(1, 2).reshape(-1, heads, size) for x in (query, key, value)
            )
            out = varlen_attn(query, key, value, ends, ends, length, length, window_size=(-1, 0))
            assert isinstance(out, Tensor)
            return out.view(batch, length, heads, size).transpose(1, 2)
        if self.attention == "written":
            scores = query @ key.mT / math.sqrt(size)
            seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
            self.probabilities.append(scores.masked_fill(~seen, -math.inf).softmax(-1))
            return self.probabilities[-1] @ value
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Block(nn.Module):
    """Attention and an MLP, each over a normed stream."""

    def __init__(self, width: int, whole: Decoder) -> None:
        super().__init__()
        self.heads, self.size, self.attend = whole.heads, whole.size, whole.attend
        self.query, self.key_value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(3)
        )
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        normed = F.rms_norm(hidden, (width,))
        query, key_value = (
            project(normed).view(batch, length, self.heads, self.size).transpose(1, 2)
            for project in (self.query, self.key_value)
        )
        attended = self.attend(query, *(x.contiguous() for x in key_value.chunk(2, 1)))
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        written: Tensor = self.down(F.gelu(self.up(F.rms_norm(hidden, (width,)))))
        return hidden + written


def decoders(device: str, length: int) -> Iterator[Row]:
    """A decoder of one's own against the same in float64 with attention written out."""
    probe = st.Probe.random(VOCABULARY, 2, length)
    torch.manual_seed(0)
    plain = Decoder("written").double()
    for block in plain.layers:
        assert isinstance(block, Block)
        torch.nn.init.normal_(block.query.weight, std=0.3)  # far from uniform attention
    with torch.no_grad():
        plain(probe.tokens)
    wanted = torch.stack(plain.probabilities)[..., 1:, 0].mean((1, 3))
    half = [("SDPA", torch.bfloat16), ("varlen", torch.bfloat16)] if device == "cuda" else []
    for kind, dtype in [("SDPA", torch.float32), ("flex", torch.float32), *half]:
        own = Decoder(kind)
        own.load_state_dict(plain.state_dict())
        found = st.measure(st.Decoder(own.to(device, dtype)), probe).p0_attention
        difference = float((found.double().cpu() - wanted).abs().max())
        most = 5e-7 if dtype == torch.float32 else 2**-9
        yield Row(f"a decoder of one's own, {kind}, {_short(dtype)}", difference, most)


def devices(device: str, length: int) -> Iterator[Row]:
    """The device gives in float32 what the CPU gives."""
    probe = st.Probe.random(VOCABULARY, 2, length)
    one, other = (
        st.measure(model(where, torch.float32, 256, 3, length), probe) for where in ("cpu", device)
    )
    for name in ("p0_attention", "p0_norm", "mixing", "p0_write"):
        wanted, found = (getattr(each, name, None) for each in (one, other))
        if wanted is not None:
            apart = float(((found - wanted).abs() / wanted.abs().max()).nan_to_num().max())
            yield Row(f"the device against the CPU, {name}", apart, 1e-5)


TRAININGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 autocast": {"autocast": True},
    "compiled": {"mode": "default"},
    "CUDA graphs": {"mode": "reduce-overhead", "autocast": True},
}


def _train(
    device: str, steps: int, tracker: SinkTracker | None, out: Path | None = None, *,
    autocast: bool = False, mode: str = "",
) -> Any:  # fmt: skip
    own = model(device, torch.float32, 128, 3, 64)
    run = torch.compile(own, mode=mode, dynamic=False) if mode else own
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(1, steps + 1):
        tokens = torch.randint(VOCABULARY, (4, 32), generator=generator).to(device)
        with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
            loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if tracker is not None:
            tracker.step(step, run)  # type: ignore[arg-type]
        if out is not None and step % 4 == 0:
            own.save_pretrained(out / f"checkpoint-{step}")
    random = torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device == "cuda" else [])
    state = {name: value.cpu() for name, value in own.state_dict().items()}
    return losses, state, random


def training(device: str, steps: int) -> Iterator[Row]:
    """Training with the callback is training without it; the scan gives what the callback gave."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    probe = st.Probe.random(VOCABULARY, 4, 32)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for name, given in TRAININGS.items():
            if "mode" in given and device != "cuda":
                continue  # inductor's C++ takes a minute
            plain = _bits(_train(device, steps, None, **given))
            again = _bits(_train(device, steps, None, **given))
            tracker = SinkTracker(probe, here / name, every=2, on_error="raise")
            tracked = _bits(_train(device, steps, tracker, here / f"{name} saved", **given))
            tracker.close()
            note = "" if plain == again else "training does not repeat itself without it"
            apart = None if note else float(plain != tracked)
            most = None if note else 0.0
            yield Row(f"training, {name}, with the callback: bits that differ", apart, most, note)
            scanned = here / f"{name} scanned"
            list(st.scan(here / f"{name} saved", probe=probe, run=scanned, device=device))
            live = {record["step"]: record for record in st.Run.read(here / name).records}
            difference = 0.0
            for record in st.Run.read(scanned).records:
                for field in ("p0_attention", "p0_norm"):
                    one, other = (torch.tensor(r[field]) for r in (record, live[record["step"]]))
                    apart = float(((one - other) / other.abs().max()).abs().max())
                    difference = max(difference, apart)
            yield Row(f"scan on the device against the callback, {name}", difference, 1e-5)
    torch.use_deterministic_algorithms(False)


def _bits(result: Any) -> list[Any]:
    losses, state, random = result
    tensors = [*(state[name] for name in sorted(state)), *random]
    return [losses, *(x.contiguous().view(torch.uint8).numpy().tobytes() for x in tensors)]


def sharded(device: str) -> Iterator[Row]:
    """FSDP2 over one process: its hooks and DTensors, without a second device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    probe = st.Probe.random(VOCABULARY, 2, 32)
    own = model(device, torch.float32, 128, 3, 64)
    wanted = st.measure(own, probe).p0_attention
    with tempfile.NamedTemporaryFile() as store:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store.name}", rank=0, world_size=1)
        try:
            mesh = init_device_mesh(device, (1,))
            for block in own.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(own, mesh=mesh)
            found = st.measure(own, probe).p0_attention
        finally:
            dist.destroy_process_group()
    yield Row("FSDP2, one process", float((found - wanted).abs().max()), 1e-6)


_GROUPED: dict[str, Any] = {
    "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 128,
    "moe_grouped_gemm": True, "moe_token_dispatcher_type": "alltoall",
}  # fmt: skip
_ENGINE: dict[str, dict[str, Any]] = {
    "dense": {},
    "grouped experts": _GROUPED,
    "window": {"window_size": (16, 0)},
    "sink logits": {"softmax_type": "learnable"},
    "FP8, delayed scaling": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "FP8, scaled by tensors, weights in FP8": {
        "fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": True,
    },
    "FP8, scaled by blocks, grouped experts": _GROUPED | {
        "fp8": "e4m3", "fp8_recipe": "blockwise",
    },
}  # fmt: skip
"""Megatron-Core models of Transformer Engine's layers."""


def transformer_engine(device: str) -> Iterator[Row]:
    """Megatron-Core with Transformer Engine: attention of what its core gets, in float64; norms;
    the random states, of which its fused attention takes; and the scales of FP8, which its forward
    passes set."""
    try:
        import transformer_engine  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        yield Row("Megatron-Core with Transformer Engine", None, None, "not installed")
        return
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import random as states
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    alone = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=alone, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    states.model_parallel_cuda_manual_seed(1)
    probe = st.Probe.random(VOCABULARY, 4, 64)
    for name, changes in _ENGINE.items():
        torch.manual_seed(0)
        config = TransformerConfig(
            num_layers=3, hidden_size=256, num_attention_heads=4, num_query_groups=2,
            ffn_hidden_size=512, normalization="RMSNorm", attention_dropout=0.1,
            bf16=True, params_dtype=torch.bfloat16, add_bias_linear=False, **changes,
        )  # fmt: skip
        layers = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
        own = GPTModel(config, layers, VOCABULARY, 64, position_embedding_type="rope").to(device)
        whole = Float16Module(config, own)
        seen: list[tuple[Any, ...]] = []
        hidden: list[Tensor] = []
        handles = []
        for layer in own.decoder.layers:
            core = layer.self_attention.core_attention
            torch.nn.init.normal_(layer.self_attention.linear_qkv.weight, std=0.3)
            handles += [
                core.register_forward_pre_hook(
                    lambda core, given, more, seen=seen: seen.append((core, *given[:2], more)),
                    with_kwargs=True,
                ),
                layer.register_forward_pre_hook(
                    lambda _, given, more, hidden=hidden: hidden.append(
                        given[0] if given else more["hidden_states"]
                    ),
                    with_kwargs=True,
                ),
            ]
        given = probe.tokens.to(device), torch.arange(64, device=device).expand(4, -1), None
        with _without_fp8(own), torch.no_grad():
            wide = whole.eval()(*given)
        whole.train()
        for handle in handles:
            handle.remove()
        if config.fp8:  # a step of training sets the scales
            logits = whole(*given)
            assert not torch.equal(whole.eval()(*given), wide), "FP8 is not on in training"
            whole.train()
            logits.float().square().mean().backward()
        before = _states(own, states.get_cuda_rng_tracker())
        found = st.measure([whole], probe)
        moved = float(before != _states(own, states.get_cuda_rng_tracker()))
        wanted = torch.stack([_engine(config, *each) for each in seen])
        norms = torch.stack([stream[0].float().norm(dim=-1).mean() for stream in hidden]).cpu()
        yield Row(
            f"Transformer Engine, {name}: attention to P0",
            float((found.p0_attention.double() - wanted).abs().max()), 2**-13,
        )  # fmt: skip
        apart = (found.p0_norm[: len(norms)] - norms).abs() / norms
        yield Row(f"Transformer Engine, {name}: norms of P0", float(apart.max()), 1e-6)
        yield Row(f"Transformer Engine, {name}: random states and scales that moved", moved, 0.0)
    dist.destroy_process_group()


@contextmanager
def _without_fp8(own: nn.Module) -> Iterator[None]:
    """As Megatron-Core's own configuration says it."""
    configs: dict[int, Any] = {
        id(each.config): each.config for each in own.modules() if hasattr(each, "config")
    }
    before = [(config, config.fp8) for config in configs.values()]
    for config, _ in before:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in before:
            config.fp8 = fp8


def _states(own: nn.Module, tracker: Any) -> dict[str, bytes]:
    """Random states, and what FP8 scales by: of layers, and what it will reduce over processes."""
    from transformer_engine.pytorch.fp8 import (  # type: ignore[import-not-found]
        FP8GlobalStateManager as Scales,
    )

    tensors = {
        name: state.get_state() if isinstance(state, torch.Generator) else state
        for name, state in tracker.get_states().items()
    }
    for name, module in own.named_modules():
        for of, scaling in getattr(module, "fp8_meta", {}).items():
            for key in ("scale", "amax_history"):
                if isinstance(value := getattr(scaling, key, None), Tensor):
                    tensors[f"{name} {of} {key}"] = value
    for buffer in (Scales.global_amax_buffer, Scales.global_amax_history_buffer):
        for name, values in buffer.items():
            tensors |= {f"{id(buffer)} {name} {at}": each for at, each in enumerate(values)}
    return {name: value.cpu().numpy().tobytes() for name, value in tensors.items()}


def _engine(config: Any, core: Any, query: Tensor, key: Tensor, more: Any) -> Tensor:
    """float64 ``[H]``: mean attention to P0 of ``[T, B, H, D]``."""
    length, heads = len(query), query.shape[2]
    queries, keys = (x.permute(1, 2, 0, 3).cpu() for x in (query, key))
    places = torch.arange(length)
    apart = places[:, None] - places
    window = config.window_size[0] if config.window_size else length
    seen = ((apart >= 0) & (apart <= window))[None, None]
    sinks = getattr(core, "softmax_offset", None)
    probabilities = _in_float64(
        queries, keys, queries.shape[-1] ** -0.5, seen, None,
        None if sinks is None else sinks.detach().cpu().reshape(heads),
    )  # fmt: skip
    return probabilities[..., 1 : window + 1, 0].mean((0, 2))


def cost(device: str, lengths: tuple[int, ...], width: int, blocks: int) -> Iterator[Row]:
    """`measure` over a plain forward pass of the same tokens, interleaved; medians."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for length in lengths:
        own = model(device, dtype, width, blocks, length).eval()
        probe = st.Probe.random(VOCABULARY, max(1, lengths[-1] // length), length)
        tokens = probe.tokens.to(device)

        def plain(own: Any = own, tokens: Tensor = tokens) -> None:
            with torch.no_grad():
                own(tokens, use_cache=False, logits_to_keep=1)

        def probed(own: Any = own, probe: st.Probe = probe) -> None:
            st.measure(own, probe, in_training=True)

        seconds: dict[str, list[float]] = {"plain": [], "probed": []}
        for _ in range(6):
            for name, run in (("plain", plain), ("probed", probed)):
                _synchronize(device)
                start = time.perf_counter()
                run()
                _synchronize(device)
                seconds[name].append(time.perf_counter() - start)
        ratio = statistics.median(seconds["probed"][1:]) / statistics.median(seconds["plain"][1:])
        milliseconds = 1000 * statistics.median(seconds["plain"][1:])
        yield Row(f"probe over forward, T {length}", ratio, None, f"forward {milliseconds:.1f} ms")
        del own


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(name: str, check: Callable[[], Iterator[Row]]) -> list[Row]:
    """A check's rows; one more where it broke off."""
    found: list[Row] = []
    try:
        found.extend(check())
    except Exception as error:
        traceback.print_exc()
        found.append(Row(name, None, 0.0, f"{type(error).__name__}: {error}"[:200]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    device, large = arguments.device, arguments.device == "cuda"
    machine = torch.cuda.get_device_name() if large else platform.processor() or platform.machine()
    start = time.perf_counter()
    checks: dict[str, Callable[[], Iterator[Row]]] = {
        # first: it loads the system's cuDNN, which does not get on with parts of torch's
        "Transformer Engine": lambda: transformer_engine(device),
        "attention": lambda: attention(device, 1024 if large else 64),
        "backends": lambda: backends(device, 1024 if large else 64),
        "decoders": lambda: decoders(device, 256 if large else 64),
        "devices": lambda: devices(device, 256 if large else 64),
        "training": lambda: training(device, 20 if large else 8),
        "FSDP2": lambda: sharded(device),
        "cost": lambda: cost(
            device,
            (512, 2048, 8192, 32768) if large else (64, 128),
            *((2048, 8) if large else (64, 2)),
        ),
    }  # fmt: skip
    rows = []
    print(
        f"{machine}, torch {torch.__version__}\n\n| check | found | at most | |\n|---|---|---|---|"
    )
    for name, check in checks.items():
        for row in run(name, check):
            rows.append(row)
            value = "-" if row.value is None else f"{row.value:.3g}"
            most = "-" if row.most is None else f"{row.most:.3g}"
            told = f"**failed** {row.note}" if row.failed else row.note
            print(f"| {row.name} | {value} | {most} | {told} |", flush=True)
    seconds = time.perf_counter() - start
    failed = [row.name for row in rows if row.failed]
    print(f"\n{len(rows)} checks in {seconds:.0f} s, {len(failed)} failed")
    if arguments.out:
        arguments.out.write_text(json.dumps(
            {"machine": machine, "torch": torch.__version__, "sinktrack": st.__version__,
             "seconds": seconds, "rows": [asdict(row) | {"failed": row.failed} for row in rows]},
            indent=1,
        ))  # fmt: skip
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
