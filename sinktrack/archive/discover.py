"""Find the checkpoints of an archive and their steps."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from sinktrack.errors import ArchiveError

_NUMBERED = re.compile(r"^checkpoint-(\d+)$")
_STEP_IN_NAME = re.compile(r"(?:checkpoint|step|iter)[-_]?(\d+)")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_LARGEST_JSON = 64 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights on disk."""

    path: Path
    step: int
    tokens: int | None

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name


def discover(archive: str | Path) -> list[Checkpoint]:
    """The checkpoints of an archive in step order.

    An archive is a directory of ``checkpoint-N`` directories as the Hugging Face Trainer writes
    them, or itself a model directory of sharded or single-file safetensors.

    Raises:
        ArchiveError: there is none, or two of the same step.
    """
    root = Path(archive).expanduser()
    if not root.is_dir():
        raise ArchiveError(f"{root} is not a directory")
    try:
        numbered = [path for path in root.iterdir() if path.is_dir() and _NUMBERED.match(path.name)]
    except OSError as error:
        raise ArchiveError(f"cannot read {root}: {error.strerror}") from error
    if not numbered and any((root / name).exists() for name in ("config.json", *_WEIGHTS)):
        numbered = [root]
    if not numbered:
        raise ArchiveError(
            f"no checkpoint in {root}: looked for directories checkpoint-N, and for a config.json "
            "with model.safetensors or model.safetensors.index.json"
        )
    return sorted((_checkpoint(path.absolute()) for path in numbered), key=lambda c: c.step)


def _checkpoint(path: Path) -> Checkpoint:
    state = {}
    if (path / "trainer_state.json").is_file():
        try:
            state = read_json(path / "trainer_state.json")
        except ArchiveError:  # the step is in the name as well; weights do not depend on it
            state = {}
    tokens = state.get("num_input_tokens_seen")
    found = _NUMBERED.match(path.name) or _STEP_IN_NAME.search(path.name)
    step = int(found[1]) if found else state.get("global_step")
    return Checkpoint(
        path,
        step if isinstance(step, int) and step >= 0 else 0,
        tokens if isinstance(tokens, int) and tokens > 0 else None,
    )


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file of bounded size.

    Raises:
        ArchiveError: missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ArchiveError(f"{path} is larger than {_LARGEST_JSON // 2**20} MiB")
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArchiveError(f"{path} is missing; is the checkpoint still being written?") from error
    except OSError as error:
        raise ArchiveError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{path} is not valid JSON; the checkpoint is damaged") from error
    if not isinstance(found, dict):
        raise ArchiveError(f"{path} does not hold a JSON object; the checkpoint is damaged")
    return found
