"""What stands in a directory without weights that are read, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

_MOST = 10_000
_NAMED = 3
_DEEPSPEED = re.compile(
    r"(?:mp_rank|(?:bf16_|fp16_)?zero_pp_rank|layer)_.*(?:model|optim)[^/]*_states\.pt"
)
_STATE = r"optimizer|scheduler|rng_state|random_states|scaler|sampler|training_args"
_KINDS = (
    (
        r"adapter_(?:model.*|config\.json)",
        "adapters alone ({found}); merge them into their base model with PEFT's merge_and_unload, "
        "and save that",
    ),
    (
        rf"global_step[0-9]+/|{_DEEPSPEED.pattern}|zero_to_fp32\.py",
        "DeepSpeed's state ({found}), a part for each process; write the weights with DeepSpeed's "
        "own zero_to_fp32.py --safe_serialization",
    ),
    (
        r"(?:model|pytorch_model)-[0-9]+-of-[0-9]+\.(?:safetensors|bin)",
        "shards ({found}) without their index; copy model.safetensors.index.json, or "
        "pytorch_model.bin.index.json, from where they come from",
    ),
    (
        r"pytorch_model_fsdp(?:_[0-9]+)?\.bin",
        "FSDP's full state ({found}), a pickle under a name that is not read; rename it to "
        "pytorch_model.bin, with the model's config.json beside it or in --hf-config",
    ),
    (
        r"(?:pytorch_)?model_fsdp(?:_[0-9]+)?_rank[0-9]+\.bin",
        "FSDP's local state ({found}), a file for each process; save with SHARDED_STATE_DICT",
    ),
    (
        r"(?:pytorch_model_fsdp_[0-9]+|model_and_optim)/|.*\.distcp",
        "shards ({found}) without .metadata, which is written last; unless that is still to come, "
        "they cannot be put together",
    ),
    (
        rf"(?!{_STATE}).*\.(?:safetensors|bin|pth?|ckpt|gguf|h5|msgpack|npz|tar)",
        "weights under a name that is not read ({found}); save the model with save_pretrained",
    ),
    (
        rf"(?:{_STATE}).*|trainer_state\.json",
        "the state of training ({found}) and no weights; save the model, too",
    ),
)
"""Names, and what they are; the first that some name matches counts."""


def of(files: Files) -> str:
    """What stands in a directory that should be a checkpoint, and what to do about it.

    Raises:
        ArchiveError: it is not a directory, or cannot be read.
    """
    if (found := known(files)) is not None:
        return found
    there = _names(files)
    if not there:
        return f"{files.location} is empty; is the checkpoint still being written?"
    cure = "is the checkpoint still being written?"
    if any(name.endswith("/") for name in there):
        cure += " --pattern finds what lies further below"
    return f"{files.location} holds no weights that are read (there is {few(there)}); {cure}"


def known(files: Files) -> str | None:
    """The same where it is a kind that is known, else None.

    Raises:
        ArchiveError: it is not a directory, or cannot be read.
    """
    gone = sorted(entry.name for entry in islice(files.entries(), _MOST) if entry.dangling)
    if gone:
        return (
            f"{files.location} holds links to what is not there ({few(gone)}); copy or download "
            "the checkpoint again, with what its links lead to"
        )
    there = _names(files)
    for pattern, said in _KINDS:
        if found := [name for name in there if re.fullmatch(pattern, name)]:
            return f"{files.location} holds {said.format(found=few(found))}"
    return None


def of_deepspeed(files: Files) -> bool:
    """Whether a directory is DeepSpeed's state of a model, as it lies in a checkpoint."""
    try:
        return any(_DEEPSPEED.fullmatch(name) for name in _names(files))
    except ArchiveError:
        return False


def few(found: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(found[:_NAMED]) + (
        f" and {len(found) - _NAMED} more" if found[_NAMED:] else ""
    )


def _names(files: Files) -> list[str]:
    """What a directory holds; directories with a slash behind their names."""
    found = islice(files.entries(), _MOST)
    return sorted(entry.name + ("/" if entry.directory else "") for entry in found)
