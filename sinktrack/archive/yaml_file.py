"""Small YAML files, as data alone."""

from __future__ import annotations

from typing import Any

from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError, one_line, require

_LARGEST = 2**20


def read(files: Files, name: str) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        ArchiveError: it is missing, damaged, larger than a mebibyte, or no mapping.
        MissingExtra: PyYAML is not installed.
    """
    yaml = require("yaml", "scan")
    data = files.whole(name, _LARGEST)
    try:
        parsed = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ArchiveError(f"{files.path(name)} is damaged ({one_line(error)})") from error
    if not isinstance(parsed, dict):
        raise ArchiveError(f"{files.path(name)} holds no mapping; the checkpoint is damaged")
    return parsed
