"""The options that all callbacks share, checked where the callback is made."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from sinktrack.loggers.base import Logger
from sinktrack.models.any_decoder.decoder import Decoder
from sinktrack.probe import Probe


class OptionArguments(TypedDict, total=False):
    """`Options` but for ``every``, as the keyword arguments of a callback."""

    early: bool
    on_error: Literal["warn", "raise"]
    probe_batch_size: int | None
    causal_every: int | None
    loggers: Sequence[Logger] | None
    decoder: Decoder | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """When and how a callback probes.

    Raises:
        TypeError: an option is of another type; says which, and what was given.
        ValueError: an option has a value that it cannot have.
    """

    every: int = 100
    """Optimizer steps between probes; step 0 counts."""
    early: bool = False
    """Probe at steps 1, 2, 4, 8, ... below ``every`` too."""
    on_error: Literal["warn", "raise"] = "warn"
    """``warn`` reports a failing probe once and lets training go on; ``raise`` raises."""
    probe_batch_size: int | None = None
    """Sequences per forward pass of the probe; all at once by default."""
    causal_every: int | None = None
    """Also run the causal tests at every so many regular probes; never by default. They cost some
    tens of probes, see docs/causal.md."""
    loggers: Sequence[Logger] | None = None
    """Where each record is shown, such as ``TensorBoard("runs/tb")``; by default the active W&B
    run, if there is one."""
    decoder: Decoder | None = None
    """Which modules of a model of your own are its blocks, and how it is run, see
    docs/any-decoder.md; not needed for transformers and Megatron-Core, or where a model holds one
    evident list of blocks."""

    def __post_init__(self) -> None:
        self._count("every", "the interval is at least one step")
        self._count("probe_batch_size", "a forward pass takes at least one sequence", optional=True)
        self._count("causal_every", "the interval is at least one probe", optional=True)
        if not isinstance(self.early, bool):
            raise TypeError(f"early={self.early!r}: wanted True or False")
        if self.on_error not in ("warn", "raise"):
            raise ValueError(f"on_error={self.on_error!r}: wanted 'warn' or 'raise'")
        if self.decoder is not None and not isinstance(self.decoder, Decoder):
            raise TypeError(
                f"decoder is of type {type(self.decoder).__name__}: wanted a sinktrack.Decoder, "
                "such as sinktrack.Decoder(blocks=lambda model: model.layers)"
            )

    def _count(self, name: str, least: str, optional: bool = False) -> None:
        """Refuse what is no whole number of 1 or more; numpy's become plain ones."""
        given = getattr(self, name)
        if given is not None or not optional:
            object.__setattr__(self, name, _whole(name, given, least, optional))


def _whole(name: str, given: Any, least: str, optional: bool, also: str = "") -> int:
    try:
        if isinstance(given, bool):
            raise TypeError
        count = operator.index(given)
    except TypeError:
        wanted = "a whole number" + also + " or None" * optional
        raise TypeError(
            f"{name}={given!r} is of type {type(given).__name__}: wanted {wanted}"
        ) from None
    if count < 1:
        raise ValueError(f"{name}={count}: {least}")
    return count


def probe_of(given: Any) -> Probe:
    """The probe itself, or that of a file.

    Raises:
        TypeError: it is neither a probe nor a path.
        ProbeError: the file holds no probe.
    """
    if isinstance(given, Probe):
        return given
    if isinstance(given, str | os.PathLike):
        return Probe.load(Path(given))
    raise TypeError(
        f"probe is of type {type(given).__name__}: wanted a Probe, or the path of a probe file; "
        "Probe.from_tokens and Probe.from_texts make one"
    )


def tokens_of(given: Any) -> Any:
    """Tokens of a step, or a function that counts those seen.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if given is None or callable(given):
        return given
    return _whole("tokens", given, "a step takes at least one token", True, ", a function")


def directory_of(given: Any) -> Path:
    """The run directory's path.

    Raises:
        TypeError: it is no path.
    """
    if isinstance(given, str | os.PathLike):
        return Path(given)
    raise TypeError(f"run is of type {type(given).__name__}: wanted the path of a run directory")
