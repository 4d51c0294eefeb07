"""The fixed batch of tokens that is measured every time."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sinktrack.errors import ProbeError


class Probe:
    """Token ids ``[B, T]``; two probes are equal when their digests are."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        """int64 ``[B, T]`` on the CPU."""

    @classmethod
    def from_tokens(cls, ids: Any) -> Probe:
        """From token ids: a tensor, an array or nested lists of integers ``[B, T]``.

        Raises:
            ProbeError: not two-dimensional, not integers, empty, one token per sequence, negative.
        """
        try:
            tokens = torch.as_tensor(ids)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ProbeError(f"token ids do not form a rectangle [B, T]: {error}") from error
        if tokens.ndim != 2:
            raise ProbeError(f"token ids have shape {tuple(tokens.shape)}, wanted [B, T]")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ProbeError(f"token ids are {tokens.dtype}, wanted integers")
        sequences, length = tokens.shape
        if sequences == 0:
            raise ProbeError("the probe has 0 sequences")
        if length < 2:
            raise ProbeError(
                f"the probe has {length} token per sequence; attention to position zero needs at "
                "least 2"
            )
        tokens = tokens.detach().to("cpu", torch.int64).contiguous().clone()
        if bool((tokens < 0).any()):
            row, column = (tokens < 0).nonzero()[0].tolist()
            raise ProbeError(
                f"token id {int(tokens[row, column])} at sequence {row}, position {column} is "
                "negative; padding cannot be measured"
            )
        return cls(tokens)

    @classmethod
    def from_texts(cls, tokenizer: Any, texts: Sequence[str], length: int = 64) -> Probe:
        """From texts cut to ``length`` tokens; shorter ones are left out.

        Args:
            tokenizer: of transformers; special tokens are added as it does by itself.
            texts: one sequence each.
            length: T.

        Raises:
            ProbeError: no text is long enough.
        """
        if isinstance(texts, str):
            raise ProbeError("texts is one string; give a list of strings")
        rows = [tokenizer(text)["input_ids"] for text in texts]
        kept = [row[:length] for row in rows if len(row) >= length]
        if not kept:
            longest = max(map(len, rows), default=0)
            raise ProbeError(
                f"none of {len(rows)} texts has {length} tokens (the longest has {longest}); give "
                "longer texts or a smaller length"
            )
        return cls.from_tokens(kept)

    @classmethod
    def random(cls, vocab_size: int, sequences: int = 64, length: int = 64, seed: int = 0) -> Probe:
        """Uniform random tokens, the same for the same arguments.

        Raises:
            ProbeError: a vocabulary, number of sequences or length that makes no probe.
        """
        if vocab_size < 1 or sequences < 1:
            raise ProbeError(f"a vocabulary of {vocab_size} and {sequences} sequences: no probe")
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (sequences, max(length, 0)), generator=generator)
        return cls.from_tokens(ids)

    @property
    def sequences(self) -> int:
        """B."""
        return int(self.tokens.shape[0])

    @property
    def length(self) -> int:
        """T."""
        return int(self.tokens.shape[1])

    @cached_property
    def digest(self) -> str:
        """Hex digest of shape and ids: 128 bits of BLAKE2b."""
        data = self.tokens.numpy().astype("<i8")
        head = f"sinktrack probe {data.shape}".encode()
        return hashlib.blake2b(head + data.tobytes(), digest_size=16).hexdigest()

    def first_tokens(self) -> Tensor:
        """int64 ``[N]``: the probe's distinct ids, ascending.

        Thinned evenly to a 64th of the probe's tokens, but at least 64 and at most 256, so that
        measuring them one by one stays cheap beside the probe itself.
        """
        distinct: Tensor = self.tokens.unique()
        limit = min(256, max(64, self.tokens.numel() // 64))
        if len(distinct) <= limit:
            return distinct
        return distinct[torch.from_numpy(np.linspace(0, len(distinct) - 1, limit).astype("int64"))]

    def check(self, vocab_size: int | None, positions: int | None) -> None:
        """Refuse a model that this probe does not fit.

        Raises:
            ProbeError: an id beyond the vocabulary, or more tokens than positions.
        """
        if positions is not None and self.length > positions:
            raise ProbeError(
                f"the probe's sequences have {self.length} tokens, the model {positions} positions"
            )
        if vocab_size is not None and int(self.tokens.max()) >= vocab_size:
            row, column = (self.tokens >= vocab_size).nonzero()[0].tolist()
            raise ProbeError(
                f"token id {int(self.tokens[row, column])} at sequence {row}, position {column} is "
                f"beyond the model's vocabulary of {vocab_size}; was the probe made for another "
                "tokenizer?"
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            ProbeError: it cannot be written.
        """
        path = Path(path)
        metadata = {"sinktrack": "probe", "schema": "1", "digest": self.digest}
        data = save({"tokens": self.tokens}, metadata)
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except OSError as error:
            raise ProbeError(f"cannot write the probe {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read what `save` wrote.

        Raises:
            ProbeError: missing, damaged, or not a probe.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tokens = file.get_tensor("tokens") if "tokens" in file.keys() else None  # noqa: SIM118
        except FileNotFoundError as error:
            raise ProbeError(f"no probe file {path}") from error
        except (SafetensorError, OSError) as error:
            raise ProbeError(
                f"{path} is not a readable safetensors file ({error}); make the probe again"
            ) from error
        if metadata.get("sinktrack") != "probe" or tokens is None:
            raise ProbeError(f"{path} is not a sinktrack probe; make one with Probe.save")
        probe = cls.from_tokens(tokens)
        if probe.digest != metadata.get("digest"):
            raise ProbeError(
                f"{path}: its tokens have digest {probe.digest}, its header says "
                f"{metadata.get('digest')}; the file is damaged, make the probe again"
            )
        return probe

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Probe) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Probe({self.sequences} x {self.length} tokens, {self.digest[:12]})"
