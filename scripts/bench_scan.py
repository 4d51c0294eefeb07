"""Memory, bytes and time to measure one checkpoint: streamed, loaded whole, and as is usual.

Makes a checkpoint with the geometry of Qwen3-30B-A3B (hidden 2048, 128 experts of 768, top 8, 32
heads of 128, 4 KV heads, vocabulary 151,936, bfloat16) cut to a few blocks, and measures it in a
process each:

* streamed: what ``sinktrack scan`` does, one block at a time;
* whole: ``from_pretrained`` and ``sinktrack.measure``;
* published: ``from_pretrained`` with eager attention, then ``output_attentions=True`` and
  ``output_hidden_states=True``, from which the same curves are read.

Floors beside it: the bytes that the probe needs (all but experts that no token is routed to, and
embedding rows of no token), the time to read as many bytes in sequence, and the time of the
measurement when the weights are in memory already.

    python scripts/bench_scan.py --directory SCRATCH [--depth 4]

With ``--small N`` it scans N checkpoints of a model of four narrow blocks instead, by one process
and by workers, one after the other in each round, and prints the ratio of their times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_probe import Peak
from ratios import tell

WAYS = ("streamed", "whole", "published", "sequential")
GIB = 2**30


def config(depth: int, short: bool = False) -> Any:
    from transformers import Qwen3MoeConfig

    smaller = {} if not short else {
        "vocab_size": 4096, "hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 32,
        "num_attention_heads": 8,
    }  # fmt: skip
    shape = {
        "vocab_size": 151_936, "hidden_size": 2048, "moe_intermediate_size": 768,
        "num_experts": 128, "num_attention_heads": 32,
    }  # fmt: skip
    return Qwen3MoeConfig(
        intermediate_size=6144, num_hidden_layers=depth, num_key_value_heads=4, head_dim=128,
        num_experts_per_tok=8, norm_topk_prob=True, dtype="bfloat16", tie_word_embeddings=False,
        **(shape | smaller),
    )  # fmt: skip


def make(directory: Path, depth: int, short: bool = False) -> None:
    """Write the checkpoint, a shard for each block and one for the rest."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3MoeForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    shape = config(depth, short)
    shape.save_pretrained(directory)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(shape)
    names = revert_weight_conversion(model, model.state_dict())
    shards: dict[str, dict[str, Any]] = {}
    for name, value in names.items():
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else "rest"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = value.shape
    weight_map: dict[str, str] = {}
    for file, tensors in shards.items():
        filled = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if "norm" in name
            else torch.randn(size, dtype=torch.bfloat16) * 0.02
            for name, size in tensors.items()
        }
        save_file(filled, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(filled, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def forget(directory: Path) -> None:
    """Drop the files from the page cache, as far as this process may."""
    os.sync()
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def worker(arguments: argparse.Namespace) -> None:
    """Run one way once; print what it took as JSON."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import sinktrack
    from sinktrack.archive.discover import discover
    from sinktrack.archive.source import open as open_source
    from sinktrack.measure import measure_streamed
    from sinktrack.models.huggingface import is_experts
    from sinktrack.models.streaming import Streamed

    directory = arguments.directory
    shape = AutoConfig.from_pretrained(directory)
    sequences = arguments.tokens // arguments.length
    probe = sinktrack.Probe.random(shape.vocab_size, sequences, arguments.length)
    found: dict[str, Any] = {}
    routed: dict[Any, set[int]] = {}

    def streamed() -> Any:
        source = open_source(discover(directory)[0])
        model = Streamed(source, arguments.device)
        for module in model.model.modules():
            if is_experts(module):
                module.register_forward_pre_hook(
                    lambda module, given: routed.setdefault(module, set()).update(
                        given[1].unique().tolist()
                    )
                )
        measured = measure_streamed(model, probe, batch_size=arguments.batch_size)
        found["bytes"] = source.files.bytes_read
        found["needed"] = needed(source)
        return measured.concentration

    def needed(source: Any) -> int:
        chosen = {index: experts for index, experts in enumerate(routed.values())}
        total = 0
        for name in source.names():
            tensor = source.slice(name)
            size = 2 * torch.Size(tensor.get_shape()).numel()
            if "embed_tokens" in name:
                total += len(probe.tokens.unique()) * 2 * tensor.get_shape()[1]
            elif ".experts." in name:
                block, expert = (int(part) for part in name.split(".")[2:6:3])
                total += size if expert in chosen[block] else 0
            elif "lm_head" not in name:
                total += size
        expert = 3 * shape.hidden_size * shape.moe_intermediate_size
        found["block"] = 2 * shape.num_experts * expert
        found["experts"] = statistics.mean(len(experts) for experts in chosen.values())
        return total

    def whole() -> Any:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").to(arguments.device)
        start = time.perf_counter()
        measured = sinktrack.measure(model.eval(), probe, batch_size=arguments.batch_size)
        found["compute"] = time.perf_counter() - start
        return measured.concentration

    def published() -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", attn_implementation="eager"
        ).to(arguments.device)
        with torch.no_grad():
            seen = model.eval()(
                probe.tokens.to(arguments.device), output_attentions=True,
                output_hidden_states=True, use_cache=False,
            )  # fmt: skip
        return torch.stack([block[:, :, 1:, 0].float().mean() for block in seen.attentions])

    def sequential() -> None:
        left, part = arguments.bytes, bytearray(8 * 2**20)
        for path in sorted(directory.glob("*.safetensors")):
            with open(path, "rb", buffering=0) as file:
                while left > 0 and (count := file.readinto(part)):
                    left -= count

    way = {"streamed": streamed, "whole": whole, "published": published, "sequential": sequential}
    torch.zeros(1, device=arguments.device)
    start = time.perf_counter()
    with Peak() as peak:
        result = way[arguments.worker]()
    found["seconds"], found["peak"] = time.perf_counter() - start, peak.most - peak.start
    if result is not None:
        found["concentration"] = result.tolist()
    print(json.dumps(found), flush=True)


def run_all(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What every way took, by round."""
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            count = results["streamed"][-1].get("needed", 0) if way == "sequential" else 0
            results[way].append(run(arguments, way, count))
            print(way, results[way][-1], file=sys.stderr)
    return results


def run(arguments: argparse.Namespace, way: str, count: int = 0) -> dict[str, Any]:
    if not arguments.warm:
        forget(arguments.directory)
    command = [
        sys.executable, __file__, "--worker", way, "--directory", str(arguments.directory),
        "--device", arguments.device, "--tokens", str(arguments.tokens),
        "--length", str(arguments.length), "--bytes", str(count),
        "--batch-size", str(arguments.batch_size),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def small(arguments: argparse.Namespace) -> None:
    """Time scans of many small checkpoints, by one process and by workers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import sinktrack

    archive = arguments.directory / f"small-{arguments.small}"
    if not archive.exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2,
        ))  # fmt: skip
        for step in range(arguments.small):
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn_like(weight) * 1e-3)
            model.save_pretrained(archive / f"checkpoint-{step}")
        sinktrack.Probe.random(1000, sequences=16, length=64).save(arguments.directory / "probe")
    seconds: dict[int, list[float]] = {workers: [] for workers in (0, *arguments.workers)}
    for number in range(arguments.rounds):
        for workers, found in seconds.items():
            run = arguments.directory / f"run-{os.getpid()}-{number}-{workers}"
            command = [
                sys.executable, "-c", "import sinktrack.cli; sinktrack.cli.main()", "scan",
                str(archive), "--run", str(run), "--probe", str(arguments.directory / "probe"),
                *(["--workers", str(workers)] if workers else []),
            ]  # fmt: skip
            start = time.perf_counter()
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            found.append(time.perf_counter() - start)
            print(workers or "one process", f"{found[-1]:.1f} s", file=sys.stderr)
    alone = statistics.median(seconds[0])
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(
        f"{arguments.small} checkpoints, {os.cpu_count()} cores, threads of one process: {threads}"
    )
    print("| | seconds | of one process |\n|---|---|---|")
    for workers, found in seconds.items():
        name = f"{workers} workers" if workers else "one process"
        ratios = [a / b for a, b in zip(found, seconds[0], strict=True)]
        print(f"| {name} | {statistics.median(found):.1f} | {statistics.median(ratios):.2f} |")
    print(f"a checkpoint by one process: {alone / arguments.small:.2f} s")


def short(arguments: argparse.Namespace, directory: Path) -> None:
    """Of a smaller model, from the page cache."""
    make(directory, depth=2, short=True)
    arguments.directory, arguments.warm = directory, True
    arguments.rounds, arguments.tokens = 1, 512
    found = {way: rows[-1] for way, rows in run_all(arguments).items()}
    streamed, published = found["streamed"], found["published"]
    ratio = streamed["bytes"] / streamed["needed"]
    slower, larger = (streamed[what] / published[what] for what in ("seconds", "peak"))
    tell("count", {"scan of wide experts: bytes read / needed": ratio})
    tell("time", {"scan / output_attentions, seconds": slower})
    tell("memory", {"scan / output_attentions, peak": larger})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help="for the checkpoint; it stays there")
    parser.add_argument("--short", action="store_true", help="small, as JSON for bench.py")
    parser.add_argument("--depth", type=int, default=4, help="blocks; each takes 1.2 GiB of disk")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the probe")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time, of ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", type=int, help="scan so many small checkpoints instead")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="with --small")
    parser.add_argument("--warm", action="store_true", help="leave the page cache as it is")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    if arguments.short:
        with tempfile.TemporaryDirectory() as directory:
            short(arguments, Path(directory))
        return
    if arguments.directory is None:
        parser.error("--directory: where to put the checkpoint")
    if arguments.small:
        small(arguments)
        return
    if not (arguments.directory / "model.safetensors.index.json").exists():
        make(arguments.directory, arguments.depth)
    results = run_all(arguments)

    def median(way: str, what: str) -> float:
        return float(statistics.median(row.get(what, float("nan")) for row in results[way]))

    processor = platform.processor() or platform.machine()
    print(f"{processor}, {os.cpu_count()} cores, {'warm' if arguments.warm else 'cold'} page cache")
    print("| way | peak memory | seconds |\n|---|---|---|")
    for way in WAYS[:3]:
        print(f"| {way} | {median(way, 'peak') / GIB:.2f} GiB | {median(way, 'seconds'):.1f} |")
    streamed, block = median("streamed", "peak"), median("streamed", "block")
    floor = max(median("sequential", "seconds"), median("whole", "compute"))
    print(
        f"experts touched per block: {median('streamed', 'experts'):.0f} of 128, "
        f"{block / GIB:.2f} GiB routed weights a block\n"
        f"peak above one block's routed weights: {(streamed - block) / 2**20:.0f} MiB\n"
        f"bytes read / needed: "
        f"{median('streamed', 'bytes') / median('streamed', 'needed'):.4f}\n"
        f"sequential read of as many bytes {median('sequential', 'seconds'):.1f} s, compute with "
        f"weights in memory {median('whole', 'compute'):.1f} s; streamed / the larger: "
        f"{median('streamed', 'seconds') / floor:.2f}\n"
        f"published / streamed memory: {median('published', 'peak') / streamed:.1f}, "
        f"time: {median('published', 'seconds') / median('streamed', 'seconds'):.1f}"
    )


if __name__ == "__main__":
    main()
