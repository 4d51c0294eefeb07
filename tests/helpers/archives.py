"""Archives on disk, and which tensors of a checkpoint were read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from sinktrack.archive.discover import discover
from sinktrack.archive.storage.files import Files


def place(root: Path, *names: str) -> Path:
    """An archive of directories that hold a config and a file of weights."""
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
        save_file({"a": torch.zeros(1)}, root / name / "model.safetensors")
    return root


def steps(archive: Path, pattern: str | None = None) -> list[tuple[str, int, int | None]]:
    return [(c.name, c.step, c.tokens) for c in discover(archive, pattern)]


def opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


class Recorded:
    """A checkpoint that remembers which tensors were read, and how many numbers of each."""

    def __init__(self, directory: Path) -> None:
        self.config = AutoConfig.from_pretrained(directory)
        self.files = Files(directory)
        self.tensors: dict[str, Any] = {
            name: file.get_slice(name)
            for path in directory.glob("*.safetensors")
            for file in [opened(path)]
            for name in file.keys()  # noqa: SIM118
        }
        self.read: dict[str, int] = {}

    def names(self) -> list[str]:
        return list(self.tensors)

    def slice(self, name: str) -> Any:
        return RecordedSlice(self, name)


class RecordedSlice:
    def __init__(self, source: Recorded, name: str) -> None:
        self.source, self.name = source, name
        self.slice = source.tensors[name]

    def get_shape(self) -> list[int]:
        return list(self.slice.get_shape())

    def get_dtype(self) -> str:
        return str(self.slice.get_dtype())

    def __getitem__(self, index: Any) -> torch.Tensor:
        value: torch.Tensor = self.slice[index]
        self.source.read[self.name] = self.source.read.get(self.name, 0) + value.numel()
        return value
