"""What the names of checkpoints say: steps and tokens, written as people write counts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from sinktrack.errors import ArchiveError

_LARGEST = 2**63 - 1
"""Of a count; more does not fit into what others read records with."""
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_COUNT = r"(?:[0-9]{1,3}(?:_[0-9]{3})+|[0-9]{1,32})(?:\.[0-9]{1,18})?[kKmMbBtT]?"
_TOKENS = r"[-_]tokens?[-_]?|(?<=[kKmMbBtT])-(?=[0-9._]+[kKmMbBtT])"
"""What stands before tokens: their name, or nothing where both counts have units (``480k-1T``); the
7B of ``checkpoint-1000-7B`` is most likely a model's size."""
_STEP = (
    rf"(?:checkpoint-|global_step_?|iter_|(?:epoch(?:=[0-9]+-|_[0-9]+_))?step[-_=]?|ep[0-9]+-ba)"
    rf"(?P<step>{_COUNT})(?:(?:{_TOKENS})(?P<tokens>{_COUNT}))?"
    r"(?:-hf|-unsharded|-rank0|-v[0-9]+)?(?:\.ckpt)?"
)
_NAME = re.compile(rf"(?P<stage>(?:stage[0-9]+-)?(?:ingredient[0-9]+-)?){_STEP}")
_END = re.compile(rf"(?:.*[^A-Za-z0-9])?{_STEP}", re.DOTALL)
_ALIKE = re.compile(r"(?i)(?:checkpoint|ckpt|step|iter|epoch|tokens).*[0-9]")


@dataclass(frozen=True)
class Named:
    """What a name says of a checkpoint."""

    step: int
    tokens: int | None = None
    stage: str = ""
    """What stands before the step, such as ``stage1-``; steps begin anew with each."""


def count(text: str) -> int | None:
    """The number that a text is, such as ``5000``, ``1_000``, ``480k``, ``2.1B`` or ``1T``; exact.

    k, M, B and T, of either case, are powers of a thousand. None where the text is anything else,
    also in part: no whole number (``1.5``), or more than 2**63 - 1.
    """
    if not re.fullmatch(_COUNT, text):
        return None
    unit = _UNITS.get(text[-1].lower(), 1)
    number = Fraction(text.rstrip("kKmMbBtT").replace("_", "")) * unit
    return int(number) if number.denominator == 1 and number <= _LARGEST else None


def known(name: str) -> Named | None:
    """What a name says that is known from beginning to end, such as ``step1000-tokens4B``."""
    return _read(_NAME.fullmatch(name))


def at_end(name: str) -> Named | None:
    """What the end of a name says, such as that of ``TinyLlama-1.1B-step-50K-105b``."""
    return _read(_END.fullmatch(name))


def alike(name: str) -> bool:
    """Whether a name speaks of steps, though it may not be known what it says."""
    return _ALIKE.search(name) is not None


class Pattern:
    """A regular expression of names, with a group ``step`` and, if you like, ``tokens``.

    Raises:
        ArchiveError: it is no regular expression, or has no such group.
    """

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        try:
            self._compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ArchiveError(f"--pattern {pattern} is no regular expression: {error}") from error
        if "step" not in self._compiled.groupindex:
            raise ArchiveError(
                f"--pattern {pattern} has no group named step; write the number as (?P<step>[0-9]+)"
            )

    def __str__(self) -> str:
        return self._text

    def read(self, name: str) -> Named | None:
        """What a name says; None where the pattern does not match all of it.

        Raises:
            ArchiveError: it matches, but a group is no count.
        """
        match = self._compiled.fullmatch(name)
        if match is None:
            return None
        groups = match.groupdict()
        step = self._count(name, "step", groups["step"] or "")
        tokens = groups.get("tokens")
        return Named(step, self._count(name, "tokens", tokens) if tokens else None)

    def _count(self, name: str, group: str, text: str) -> int:
        number = count(text)
        if number is None:
            raise ArchiveError(
                f"--pattern {self._text}: in {name} the group {group} is {text[:200]!r}, which is "
                "no whole number up to 2**63 - 1; wanted one like 5000, 1_000, 480k or 2.1B, as "
                f"(?P<{group}>[0-9._]+[kMBT]?) finds them"
            )
        return number


def _read(found: re.Match[str] | None) -> Named | None:
    if found is None:
        return None
    step, tokens = count(found["step"]), found["tokens"]
    number = count(tokens) if tokens else None
    if step is None or (tokens and number is None):
        return None
    return Named(step, number, found.groupdict().get("stage") or "")
