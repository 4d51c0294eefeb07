"""Text files of others, read as UTF-8 or refused at the byte that is not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sinktrack.errors import RecordError

_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
}


def read(path: Path) -> str:
    """A text file's content, without the byte order mark of UTF-8; its newlines are kept.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not text in UTF-8; names the file, and the line and byte where that shows.
    """
    data = path.read_bytes()
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            raise ValueError(
                f"{path} is {name} text, by its byte order mark in line 1 at byte 0; convert it: "
                f"iconv -f {name[:6]} -t UTF-8"
            )
    if (nul := data.find(b"\0")) >= 0:
        raise ValueError(
            f"{path}, line {_line(data, nul)}: byte {nul} of the file is NUL, so it is no text in "
            "UTF-8; convert or mend it"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # counted from behind the mark, which the decoder takes off first
        at = error.start + (len(data) - len(error.object))
        raise ValueError(
            f"{path}, line {_line(data, at)}: byte {at} of the file, 0x{data[at]:02x}, is not "
            "UTF-8; convert it (iconv -f ENCODING -t UTF-8), or remove the line"
        ) from error


def lines(path: Path) -> list[str]:
    r"""A text file's lines: they end at ``\n`` or ``\r\n`` alone, and no mark begins one.

    A mark may also begin a later line, where files were joined.

    Raises:
        OSError, ValueError: as of `read`.
    """
    split = read(path).split("\n")
    if not split[-1]:
        del split[-1]
    return [line.removesuffix("\r").lstrip("\ufeff") for line in split]


def printable(name: str) -> str:
    r"""A name with ``\udcXX`` for each byte that is not UTF-8, so that all can write it."""
    return name.encode("utf-8", "backslashreplace").decode()


def interval(
    bounds: Sequence[float], form: str, same: str = "every sequence gives the same"
) -> str:
    """The ends of a 95 % interval in words, also where it has no width, or none that shows.

    Args:
        bounds: low and high.
        form: of the numbers, in Python's format language.
        same: what to say where both are one number.
    """
    low, high = (format(bound, form) for bound in bounds)
    if low != high:
        return f"95 %: {low} to {high}"
    return same if bounds[0] == bounds[1] else "95 %: narrower than the last digit"


def natural(name: str) -> list[tuple[int, float, str]]:
    """A key that sorts by numbers: ``seed2`` before ``seed10``, ``5e-4`` before ``0.01``."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name, flags=re.ASCII)
    return [
        (0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(parts) if part
    ]


def refuse_unencodable(path: Path, who: str) -> None:
    """Refuse a path that others than Python cannot take.

    Raises:
        RecordError: its name is not UTF-8.
    """
    if printable(str(path)) != str(path):
        raise RecordError(
            f"{who} takes no path whose name is not UTF-8, as {printable(str(path))}; rename the "
            "directory, or give another"
        )


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1
