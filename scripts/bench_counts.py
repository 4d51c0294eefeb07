"""Counts of what a scan, a probe and the causal tests do: bytes, reads, forwards, copies.

They are of tiny models and the same on every machine, so that a test compares them with those kept
in ``tests/golden/counts.json``: none may grow. A change that lowers one keeps the new number.

    python scripts/bench_counts.py [--keep]
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ratios import tell
from torch import Tensor
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import sinktrack as st
from sinktrack.archive.discover import discover
from sinktrack.archive.source import open as open_source
from sinktrack.archive.storage.files import Files
from sinktrack.interventions import run_causal_tests
from sinktrack.measure import measure_streamed
from sinktrack.models import streaming
from tests.helpers import planted
from tests.helpers.elsewhere import Elsewhere, elsewhere

KEPT = Path(__file__).parents[1] / "tests/golden/counts.json"
CHECKPOINTS = 3
_TO_THE_HOST = {Tensor.cpu, Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__,
                Tensor.__float__, Tensor.__index__}  # fmt: skip


def counts() -> dict[str, float]:
    """Every count as a ratio, by what is divided by what."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as directory:
            return of_scans(Path(directory)) | of_passes(Path(directory)) | of_copies()
    finally:
        logging.disable(disabled)


def of_scans(directory: Path) -> dict[str, float]:
    """A scan of an MoE: what it reads, how often, and how often it opens a file."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, moe_intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=32,
        num_experts_per_tok=2, max_position_embeddings=64, tie_word_embeddings=False,
        pad_token_id=None, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    archive = directory / "archive"
    for step in range(1, CHECKPOINTS + 1):
        model.save_pretrained(archive / f"checkpoint-{step}")
    probe = st.Probe.random(512, sequences=2, length=8)
    with counted(Files, "_opened") as opened, counted(Files, "read") as read:
        list(st.scan(archive, probe=probe, run=directory / "run"))
    routed: dict[Any, set[int]] = {}

    def chosen(module: Any, hidden: Tensor, index: Tensor, *_: Any) -> None:
        routed.setdefault(module, set()).update(index.unique().tolist())

    source = open_source(discover(archive)[0])
    source.names()
    before = source.files.bytes_read
    streamed = streaming.Streamed(source)
    with before_forward(type(model.model.layers[0].mlp.experts), chosen):
        measure_streamed(streamed, probe)
    experts = [len(found) for found in routed.values()]  # in the order of the blocks
    needed = 0
    for name, value in model.state_dict().items():
        if "embed_tokens" in name:
            needed += value[probe.tokens.unique()].nbytes
        elif ".experts." in name:
            needed += experts[int(name.split(".")[2])] * value[0].nbytes
        elif "lm_head" not in name:
            needed += value.nbytes
    return {
        "scan: bytes of weights read / needed": (source.files.bytes_read - before) / needed,
        "scan: files opened / checkpoints": opened() / CHECKPOINTS,
        "scan: reads / checkpoints": read() / CHECKPOINTS,
    }


def of_passes(directory: Path) -> dict[str, float]:
    """A model with a sink: how often blocks run, on how many tokens; and streamed bytes."""
    model = planted.dense()
    planted.neuron_writer(model, 1)
    for block in range(2, planted.BLOCKS):
        planted.reader(model, block)
    probe = planted.probe(8)
    with through(model) as plain:
        measured = st.measure(model, probe, in_training=True)
    with through(model) as affected:
        st.measure(model, probe)
    with through(model) as tested:
        found = run_causal_tests(model, probe, measured)
    whole = planted.BLOCKS * probe.tokens.numel()
    model.save_pretrained(directory / "planted")
    size = sum(path.stat().st_size for path in (directory / "planted").glob("*.safetensors"))
    with mock.patch.object(streaming, "KEPT", 0):  # as if it were too large to be kept
        source = open_source(discover(directory / "planted")[0])
        model = streaming.Streamed(source, head=True)
        measured = measure_streamed(model, probe)
        before = source.files.bytes_read
        run_causal_tests(model, probe, measured)
    return {
        "probe in training: block forwards / blocks": plain[0] / planted.BLOCKS,
        "probe in training: tokens through blocks / of one pass": plain[1] / whole,
        "total effects: block forwards / blocks": (affected[0] - plain[0]) / planted.BLOCKS,
        "total effects: tokens through blocks / of one pass": (affected[1] - plain[1]) / whole,
        "causal tests: block forwards / blocks": tested[0] / planted.BLOCKS,
        "causal tests: tokens through blocks / of one pass": tested[1] / whole,
        "causal tests: forwards told / one": found["forwards"],
        "causal tests, streamed: bytes read / of the checkpoint": (
            (source.files.bytes_read - before) / size
        ),
    }


def of_copies() -> dict[str, float]:
    """A model on another device: copies to the host, each of which waits for the device."""
    model, probe = planted.dense(), planted.probe(8)
    with elsewhere() as move:
        move(model)
        with _Copies() as copies:
            st.measure(model, probe, in_training=True)
        in_training = copies.count
        with _Copies() as copies:
            st.measure(model, probe)
    return {
        "probe in training: copies to the host / blocks": in_training / planted.BLOCKS,
        "probe: copies to the host / blocks": copies.count / planted.BLOCKS,
    }


class _Copies(TorchFunctionMode):
    """Counts what brings values from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], Elsewhere):
            self.count += func in _TO_THE_HOST
            self.count += func is Tensor.to and not isinstance(out, Elsewhere)
        return out


@contextmanager
def through(model: Any) -> Iterator[list[int]]:
    """How many times a block runs, and on how many tokens; a rehearsal runs none."""
    seen = [0, 0]

    def add(module: Any, *args: Any, **kwargs: Any) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        seen[0] += 1
        seen[1] += stream.shape[:2].numel()

    with before_forward(type(model.model.layers[0].self_attn), add):
        yield seen


@contextmanager
def before_forward(kind: Any, call: Callable[..., None]) -> Iterator[None]:
    """Call something before the forward of a class of modules: a probe takes hooks away."""
    forward = kind.forward

    @functools.wraps(forward)
    def watched(module: Any, *args: Any, **kwargs: Any) -> Any:
        call(module, *args, **kwargs)
        return forward(module, *args, **kwargs)

    with mock.patch.object(kind, "forward", watched):
        yield


@contextmanager
def counted(owner: type, name: str) -> Iterator[Callable[[], int]]:
    """Calls of a method."""
    method = getattr(owner, name)
    with mock.patch.object(owner, name, autospec=True, side_effect=method) as calls:
        yield lambda: calls.call_count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="the same, as JSON for bench.py")
    parser.add_argument("--keep", action="store_true", help="keep these numbers")
    arguments = parser.parse_args()
    found = counts()
    if arguments.short:
        tell("count", found)
        return
    for name, ratio in found.items():
        print(f"{ratio:10.4f}  {name}")
    if arguments.keep:
        kept = {name: round(ratio, 5) for name, ratio in found.items()}
        KEPT.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
