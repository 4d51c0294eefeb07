"""What is said of archives that are not read: every kind built, and the table for the docs.

    python scripts/archive_kinds.py

The table of docs/archives.md is what this prints; a test compares them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from sinktrack.archive import remains
from sinktrack.archive.storage.files import Files

KINDS: dict[str, tuple[str, ...]] = {
    "PEFT adapters": ("adapter_config.json", "adapter_model.safetensors"),
    "PEFT adapters, unexplained": ("adapter_model.safetensors",),
    "DeepSpeed, pipeline parts alone": ("global_step5/a", "zero_to_fp32.py"),
    "shards without an index": ("model-00001-of-00002.safetensors",),
    "FSDP, local state": ("pytorch_model_fsdp_rank0.bin", "pytorch_model_fsdp_rank1.bin"),
    "Meta, Mistral": ("consolidated.00.pth", "params.json", "tokenizer.model"),
    "torchtune": ("hf_model_0001_0.pt", "recipe_state/recipe_state.pt"),
    "nanotron, parts": ("checkpoint_metadata.json", "config.yaml", "model_config.json"),
    "NeMo 2": ("context/model.yaml", "weights/.metadata"),
    "NeMo 1": ("model.nemo",),
    "several of GGUF": ("model-Q4_K_M.gguf", "model-f16.gguf"),
    "TensorFlow, Flax": ("flax_model.msgpack", "tf_model.h5"),
    "JAX, Orbax": ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"),
    "NumPy": ("params.npz",),
    "ONNX": ("model.onnx",),
    "packed": ("step1000.tar.gz",),
    "distributed, unfinished": ("__0_0.distcp", "__1_0.distcp"),
    "another name": ("model.fp16.safetensors",),
    "an adapter in another file": ("adapter_config.json", "adapter_model.pt"),
    "OLMo, parts": ("config.yaml", "rank0.pt", "rank1.pt"),
    "metaseq, parts": (
        "checkpoint_1000-model_part-0-shard0.pt",
        "checkpoint_1000-model_part-0-shard1.pt",
    ),
    "verl, not of FSDP": ("actor/dist_ckpt/.metadata", "data.pt"),
    "vLLM, TensorRT-LLM": ("model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"),
    "llm.c": ("model_00001000.bin", "state_00001000_00000.bin"),
    "Diffusers": ("model_index.json", "unet/diffusion_pytorch_model.safetensors"),
    "parts of GGUF": ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf"),
    "Keras": ("model.keras",),
    "Paddle, MindSpore, EasyLM": ("model_state.pdparams",),
    "cut short": ("model.safetensors.incomplete",),
    "a data set": ("train.bin", "val.bin"),
    "a pickle": ("model.pkl",),
    "state of training alone": ("optimizer.pt", "rng_state.pth", "trainer_state.json"),
    "a tokenizer alone": ("tokenizer.json", "tokenizer_config.json", "vocab.json"),
    "a run of sinktrack": ("probe.safetensors", "records.jsonl"),
    "something else": ("notes.txt", "plots/a.png"),
    "nothing": (),
}


def build(kind: str, directory: Path) -> Path:
    """A directory of such files, without contents."""
    for name in KINDS[kind]:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return directory


def said() -> dict[str, str]:
    """Of each kind the message, with the directory's own name left out."""
    found = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            files = Files(build(kind, Path(name)))
            found[kind] = remains.of(files).removeprefix(f"{files.location} ")
    return found


def table() -> str:
    """For the docs."""
    rows = (f"| {kind} | {text} |" for kind, text in said().items())
    return "\n".join(["| What stands there | What is said of it |", "|---|---|", *rows])


if __name__ == "__main__":
    print(table())
