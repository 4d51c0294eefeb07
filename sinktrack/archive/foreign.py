"""Tensors of a checkpoint that its model has no place for.

transformers leaves them out with a warning. Most of them mean that the checkpoint is of another
model than ``config.json`` says, that an adapter was not merged, or that the weights are quantized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence

from sinktrack.errors import ArchiveError

_SHOWN = 4
_QUANTIZED = re.compile(
    r"(?:^|[._])(?:SCB|weight_format|g_idx|absmax|quant_map|W_q|codebooks?|codes|lut|amax|qdata|"
    r"qweight|qzeros|qscales?|scales|scale_inv|(?:weight|input|output|proj|[qkv])(?:_global)?_scale(?:_2)?|"
    r"smooth_factor|weight\._(?:data|scale|shift|zero_?point)|zeros|zero_?points?|packed|weight_shape|blocks|quant_state(?:[._].*)?|quant_type)$"
)
"""What formats of quantized weights keep beside a weight, or in its place."""
_ADAPTER = re.compile(
    r"(?:^|\.)(?:lora_|hada_|lokr_|oft_|boft_|vera_|base_layer\.|modules_to_save\.|prompt_encoder|"
    r"ia3_|adapters?[._])"
)
_BUFFERS = re.compile(
    r"(?:^|\.)(?:(?:original_)?inv_freq|cos_cached|sin_cached|position_ids|masked_bias)$"
)
"""What old versions of transformers saved, though the configuration says it all."""
_MASK = re.compile(r"(?:^|\.)(?:attn|attention|crossattention|self_attention)\.bias$")
"""So did they with the causal mask, ``[1, 1, T, T]``."""
_HEAD = re.compile(
    r"(?:score|scores|classifier|regression_head|v_head|value_head|values_head|rm_head|reward_head|"
    r"reward_model_head|cost_head|critic_head|summary|qa_outputs)(?:\.|$)"
)
"""Heads of reward and value models; no block reads them."""
WRAPPERS = ("module.", "base_model.model.", "pretrained_model.", "_forward_module.")
"""What DDP, PEFT, TRL and Lightning put before the names of all weights."""
_SENSES = re.compile(
    r"(?:^|\.)[a-z0-9_]*(?:vision|visual|image|audio|video|multi_modal|multimodal|projector|"
    r"connector)[a-z0-9_]*(?:\.|$)"
)
"""What a model of text and images has beside its text decoder."""
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")


def is_head(name: str) -> bool:
    """Whether a tensor is of a head that scores what a decoder says."""
    return _HEAD.match(name) is not None


def left_over(
    names: Iterable[str],
    shape: Callable[[str], Sequence[int]],
    *,
    blocks: int,
    ignored: Collection[str],
    senses: bool,
) -> list[str]:
    """Those of the tensors without a place that are not known to be harmless.

    Args:
        names: as the model would call them.
        shape: of a tensor.
        blocks: how many the model has.
        ignored: transformers' patterns of what its class leaves out without a word.
        senses: whether the model has towers for images or sound, which are not measured.
    """
    names = list(names)
    ahead = {match[1] for name in names if (match := _BLOCK.search(name)) and ".eh_proj." in name}
    within = [pattern for pattern in ignored if not re.search(r"\d", pattern)]

    def harmless(name: str) -> bool:
        match = _BLOCK.search(name)
        if _BUFFERS.search(name):
            return True
        if match is None and (is_head(name) or (senses and _SENSES.search(name))):
            return True
        measured = match is not None and int(match[1]) < blocks
        if match is not None and not measured and match[1] in ahead:
            return True  # a head that predicts further tokens
        if senses and _SENSES.search(name[: match.start()] if match else name):
            return True
        if _MASK.search(name):
            return len(shape(name)) == 4
        patterns = within if measured else ignored
        return any(re.search(pattern, name) for pattern in patterns)

    return [name for name in names if not harmless(name)]


def refuse(left: Collection[str], family: str, blocks: int | None = None) -> None:
    """Raise an error that names some of them and what they most likely are, if there are any.

    Args:
        left: tensors without a place.
        family: the model's, as ``config.model_type``.
        blocks: how many the model has, where its blocks are numbered in these names.

    Raises:
        ArchiveError: there are such tensors.
    """
    if not left:
        return
    if quantized := [name for name in left if _QUANTIZED.search(name)]:
        raise ArchiveError(
            f"quantized weights are not supported: the checkpoint holds {some(quantized)}; scan "
            "the model before quantization, or save it dequantized"
        )
    first, *others = sorted(left)
    held = f"the checkpoint holds {first}"
    if others:
        held += f", and {count(len(others), 'more tensor')} ({some(others)})"
    held += f" that {family} has no place for"
    if any(_ADAPTER.search(name) for name in left):
        raise ArchiveError(
            f"{held}; some are of an adapter: merge it into the weights and save the model again"
        )
    if wrapped := next((prefix for prefix in WRAPPERS if first.startswith(prefix)), None):
        raise ArchiveError(
            f"{held}; {wrapped} is a wrapper's, and not all names begin with it: save the model "
            "that it wraps"
        )
    numbers = [int(match[1]) for name in left if (match := _BLOCK.search(name))]
    if blocks is not None and (more := [number for number in numbers if number >= blocks]):
        raise ArchiveError(
            f"{held}; the configuration has {blocks} blocks, the checkpoint block "
            f"{max(more)}, too: give the right configuration with --hf-config"
        )
    raise ArchiveError(
        f"{held}; it is of another model than its configuration says: give the right configuration "
        "with --hf-config"
    )


def some(names: Collection[str]) -> str:
    """A few of them, and how many more there are."""
    shown = ", ".join(sorted(names)[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def count(number: int, what: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{number} {what}" + ("s" if number != 1 else "")
