"""The fixed batch of tokens that is measured every time."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sinktrack import atomic
from sinktrack.errors import ProbeError

_log = logging.getLogger("sinktrack")
MOST_TEXTS = 256
"""Sequences that a probe takes from texts where nobody says how many."""
_PADDING = 4
"""As many padding tokens at the start of a row are no text, and no chance either."""


class Probe:
    """Token ids ``[B, T]``; two probes are equal when their digests are."""

    def __init__(self, tokens: Tensor, documents: Tensor | None = None) -> None:
        self.tokens = tokens
        """int64 ``[B, T]`` on the CPU."""
        self.documents = documents
        """int64 ``[B, T]``: where rows are packed, the number of each token's document."""

    @classmethod
    def from_tokens(cls, ids: Any, documents: Any = None) -> Probe:
        """From token ids: a tensor, an array or nested lists of integers ``[B, T]``.

        Args:
            ids: the tokens. Where not all can be measured with them, as where all sequences repeat
                one token or begin alike, a warning says so.
            documents: ``[B, T]`` integers for packed rows: a new document begins where the number
                changes along a row. P0 is then the first token of every document, and each is
                measured as a sequence of its own, which is what a model sees that is trained with
                a document mask and positions that begin anew.

        Raises:
            ProbeError: not two-dimensional, not integers, empty, one token per sequence or
                document, negative.
        """
        probe = cls._of(ids, documents)
        if probe.weakness is not None:
            _log.warning("%s", probe.weakness)
        return probe

    @classmethod
    def _of(cls, ids: Any, documents: Any = None) -> Probe:
        """As `from_tokens`, without a word on what the probe cannot show."""
        tokens = _integers(ids, "token ids")
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
        if documents is None:
            return cls(tokens)
        numbers = _integers(documents, "documents")
        if numbers.shape != tokens.shape:
            raise ProbeError(
                f"documents have shape {tuple(numbers.shape)}, the token ids {tuple(tokens.shape)}"
            )
        probe = cls(tokens, numbers.detach().to("cpu", torch.int64).contiguous().clone())
        for document in probe.rows:
            if len(document) < 2:
                raise ProbeError(
                    "a document has 1 token, so no query after its P0; leave it out of the probe"
                )
        return probe

    @classmethod
    def from_texts(
        cls,
        tokenizer: Any,
        texts: Sequence[str],
        length: int = 64,
        sequences: int | None = None,
    ) -> Probe:
        """From texts cut to ``length`` tokens; shorter ones are left out.

        Args:
            tokenizer: of transformers, a ``tokenizers.Tokenizer``, or an encoding of tiktoken;
                special tokens are added as it does by itself (tiktoken adds none).
            texts: one sequence each.
            length: T.
            sequences: B, at most: the first that are long enough are taken. By default 256, and
                the log says how many texts that leaves out.

        Raises:
            ProbeError: no text is long enough, or one is no text: not a string, half of a character
                (a lone surrogate), or begun by a byte order mark, which would be P0; or the
                tokenizer is none.
        """
        if isinstance(texts, str | bytes):
            raise ProbeError("texts is one string; give a list of strings")
        if sequences is not None and sequences < 1:
            raise ProbeError(f"sequences={sequences}: a probe has at least one")
        texts = list(texts)
        for number, text in enumerate(texts):
            _refuse_no_text(number, text)
        encode = _encoder(tokenizer)
        most = sequences or MOST_TEXTS
        kept: list[Any] = []
        longest = left = 0
        for number, text in enumerate(texts, 1):
            row = encode(text)
            longest = max(longest, len(row))
            if len(row) >= length:
                kept.append(row[:length])
            if len(kept) == most:
                left = len(texts) - number
                break
        if not kept:
            raise ProbeError(
                f"none of {len(texts)} texts has {length} tokens (the longest has {longest}); give "
                "longer texts or a smaller length"
            )
        if sequences is None and left:
            _log.warning(
                "the probe has the first %d texts of %d tokens or more; %s later ones are left "
                "out: give sequences= for another number", most, length, f"{left:,}",
            )  # fmt: skip
        return cls.from_tokens(kept)

    @classmethod
    def random(
        cls,
        vocab_size: int,
        sequences: int = 64,
        length: int = 64,
        seed: int = 0,
        first_token: int | None = None,
    ) -> Probe:
        """Uniform random tokens, the same for the same arguments.

        Args:
            vocab_size: ids are below it.
            sequences: B.
            length: T.
            seed: of the tokens.
            first_token: the id that every sequence begins with. Give that of [BOS] where the model
                was trained with one: its sink may not form on anything else.

        Raises:
            ProbeError: a vocabulary, first token, count or length that makes no probe.
        """
        if vocab_size < 1 or sequences < 1:
            raise ProbeError(f"a vocabulary of {vocab_size} and {sequences} sequences: no probe")
        if first_token is not None and not 0 <= first_token < vocab_size:
            raise ProbeError(f"first token {first_token} in a vocabulary of {vocab_size}: no probe")
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (sequences, max(length, 0)), generator=generator)
        if first_token is not None:
            ids[:, :1] = first_token
        return cls.from_tokens(ids)

    @cached_property
    def rows(self) -> list[Tensor]:
        """The sequences in reading order, int64 ``[T]`` each: rows, or the documents in them."""
        if self.documents is None:
            return list(self.tokens)
        cuts = [(row.diff() != 0).nonzero()[:, 0] + 1 for row in self.documents]
        return [
            document
            for row, cut in zip(self.tokens, cuts, strict=True)
            for document in row.tensor_split(cut)
        ]

    @cached_property
    def repeats(self) -> bool:
        """Does every sequence repeat one token?"""
        return all(bool((row == row[0]).all()) for row in self.rows)

    @cached_property
    def weakness(self) -> str | None:
        """What cannot be measured with these tokens, and why; None where all can."""
        rows = self.rows
        if self.repeats:
            return (
                "every sequence of the probe repeats one token, so no position differs from "
                "position zero: a model that tells it by its unmixed attention shows no sink here; "
                "give text, or random tokens"
            )
        if alike := begin_alike(torch.stack([row[0] for row in rows])):
            return (
                f"{alike}, so P0 states of distinct first tokens cannot be compared: "
                "direction_consistency and direction_to_mean will be null"
            )
        return None

    @property
    def sequences(self) -> int:
        """B: rows, or documents where rows are packed."""
        return len(self.rows)

    def batches(self, size: int) -> list[Tensor]:
        """int64 ``[b, T]`` each, ``b <= size``: the sequences, those of one length together."""
        by_length: dict[int, list[Tensor]] = {}
        for sequence in self.rows:
            by_length.setdefault(len(sequence), []).append(sequence)
        return [batch for group in by_length.values() for batch in torch.stack(group).split(size)]

    @property
    def length(self) -> int:
        """T, of a row."""
        return int(self.tokens.shape[1])

    @cached_property
    def digest(self) -> str:
        """Hex digest of shape and ids: 128 bits of BLAKE2b."""
        data = self.tokens.numpy().astype("<i8")
        content = f"sinktrack probe {data.shape}".encode() + data.tobytes()
        if self.documents is not None:
            content += b" documents" + self.documents.numpy().astype("<i8").tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

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

    def check(
        self, vocab_size: int | None, positions: int | None, padding: int | None = None
    ) -> None:
        """Refuse a model that this probe does not fit.

        Args:
            vocab_size: of the model.
            positions: the longest sequence that the model takes.
            padding: the model's padding token.

        Raises:
            ProbeError: an id beyond the vocabulary, more tokens than positions, or left padding.
        """
        for row, sequence in enumerate(self.rows):
            if padding is not None and bool((sequence[:_PADDING] == padding).all()):
                raise ProbeError(
                    f"sequence {row} begins with padding (token id {padding}), so its P0 is no "
                    "text; give sequences without padding"
                )
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
        tensors = {"tokens": self.tokens}
        if self.documents is not None:
            tensors["documents"] = self.documents
        data = save(tensors, metadata)
        try:
            atomic.write(path, data)
        except OSError as error:
            raise ProbeError(f"cannot write the probe {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read what `save` wrote.

        Raises:
            ProbeError: missing, damaged, or not a probe.
        """
        try:
            with _named(path) as name, safe_open(name, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise ProbeError(f"no probe file {path}") from error
        except (SafetensorError, OSError) as error:
            raise ProbeError(
                f"{path} is not a readable safetensors file ({error}); make the probe again"
            ) from error
        if metadata.get("sinktrack") != "probe" or "tokens" not in tensors:
            raise ProbeError(f"{path} is not a sinktrack probe; make one with Probe.save")
        probe = cls._of(tensors["tokens"], tensors.get("documents"))
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
        packed = "" if self.documents is None else f" in {self.sequences} documents"
        rows = len(self.tokens)
        return f"Probe({rows} x {self.length} tokens{packed}, {self.digest[:12]})"


def _encoder(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    """What gives a text's token ids, without padding.

    Raises:
        ProbeError: it is no tokenizer that is known.
    """
    if hasattr(tokenizer, "encode_ordinary"):  # tiktoken: names of special tokens are plain text
        ordinary: Callable[[str], Sequence[int]] = tokenizer.encode_ordinary
        return ordinary
    if callable(tokenizer):
        return lambda text: tokenizer(text)["input_ids"]
    if hasattr(tokenizer, "encode") and hasattr(tokenizer, "token_to_id"):

        def encode(text: str) -> list[int]:
            ids = tokenizer.encode(text)
            return [id for id, real in zip(ids.ids, ids.attention_mask, strict=True) if real]

        return encode
    raise ProbeError(
        f"{type(tokenizer).__name__} is no tokenizer that is known; give one of transformers or "
        "tokenizers, an encoding of tiktoken, or the ids to Probe.from_tokens"
    )


def begin_alike(first_tokens: Tensor) -> str | None:
    """What to say where all sequences begin with one token; None where two differ.

    Args:
        first_tokens: ``[B]``, token 0 of each sequence.
    """
    if len(first_tokens.unique()) > 1:
        return None
    count, token = len(first_tokens), int(first_tokens[0])
    if count == 1:
        return "the probe has one sequence"
    return f"all {count} sequences of the probe begin with token id {token}"


@contextmanager
def _named(path: str | Path) -> Iterator[str | Path]:
    """A name that safetensors takes: it knows none that is not UTF-8."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield path


def _refuse_no_text(number: int, text: Any) -> None:
    if not isinstance(text, str):
        raise ProbeError(f"text {number} is {type(text).__name__}, wanted a string")
    if text.startswith("\ufeff"):
        raise ProbeError(
            f"text {number} begins with a byte order mark, which would be its P0; read the file "
            "with encoding='utf-8-sig'"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ProbeError(
            f"text {number} holds half of a character (a lone surrogate, {text[error.start]!a}) at "
            f"position {error.start}; read its file with errors='strict'"
        ) from error


def _integers(values: Any, what: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ProbeError(f"{what} do not form a rectangle [B, T]: {error}") from error
    if tensor.ndim != 2:
        raise ProbeError(f"{what} have shape {tuple(tensor.shape)}, wanted [B, T]")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ProbeError(f"{what} are {tensor.dtype}, wanted integers")
    return tensor
