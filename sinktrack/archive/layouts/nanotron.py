"""nanotron's checkpoints: a safetensors file for each parameter and tensor-parallel process.

Directories of checkpoints are called by their steps alone (``500``). In one, ``model_config.json``
describes the model, ``checkpoint_metadata.json`` the training, and every file of a parameter that
is cut says which of its rows and columns are which of the whole's. Read are its Llama and its
Qwen2, also with blocks without RoPE (SmolLM3), dense.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from sinktrack.archive import huggingface, yaml_file
from sinktrack.archive.layouts.pieces import Finder, Piece, PieceSource, Stored
from sinktrack.archive.source import Checkpoint
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.joined import Patch, Patchwork, Rectangle
from sinktrack.archive.storage.safetensors_file import Place, read_described
from sinktrack.archive.storage.slices import DTYPES
from sinktrack.archive.storage.torch_file import Saved
from sinktrack.errors import ArchiveError

_METADATA, _CONFIG, _TRAINING = "checkpoint_metadata.json", "model_config.json", "config.yaml"
_FILE = re.compile(
    r"model_(?P<kind>weight|bias)"
    r"(?:_pp-rank-[0-9]+-of-[0-9]+_tp-rank-(?P<rank>[0-9]+)-of-(?P<count>[0-9]+)"
    r"(?P<experts>_exp-rank-[0-9]+-of-[0-9]+)?)?\.safetensors"
)
_STEP = re.compile(r"[0-9]{1,18}")
_DEEPEST = 12
_EMBEDDING, _HEAD = "token_position_embeddings.pp_block.token_embedding", "lm_head.pp_block"
_SAME = (
    "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "intermediate_size",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pad_token_id", "rms_norm_eps", "tie_word_embeddings", "vocab_size",
)  # fmt: skip
_ABSENT = (
    "rope_scaling", "rope_seq_len_interpolation_factor", "sliding_window_size", "moe_config",
)  # fmt: skip
"""What makes it another model than those that are read, where it is there."""


def find(files: Files) -> list[Checkpoint]:
    """The directory itself, or all that lie in it under their steps' numbers."""
    if _is_one(files):
        return [_checkpoint(files)]
    if not files.exists("latest.txt"):
        return []
    numbered = [entry.name for entry in files.entries() if _STEP.fullmatch(entry.name)]
    return [_checkpoint(files.at(name)) for name in numbered if _is_one(files.at(name))]


def _is_one(files: Files) -> bool:
    return files.exists(_METADATA) and files.exists("model")


def _checkpoint(files: Files) -> Checkpoint:
    step, tokens = files.once(_progress, _METADATA)
    if step is None and _STEP.fullmatch(files.name):
        step = int(files.name)
    reason = None if step is not None else f"{files.path(_METADATA)} tells no last_train_step"
    return Checkpoint(files, step or 0, tokens, "nanotron", files.name, reason=reason)


def _progress(files: Files) -> tuple[int | None, int | None]:
    """The step and the tokens seen, None where they are not told."""
    metadata: Any = None
    with suppress(ArchiveError):
        metadata = files.read_json(_METADATA).get("metas")
    told = metadata if isinstance(metadata, Mapping) else {}
    step, tokens = told.get("last_train_step"), told.get("consumed_tokens_total")
    return (
        step if type(step) is int and step >= 0 else None,
        tokens if type(tokens) is int and tokens > 0 else None,
    )


def open(checkpoint: Checkpoint) -> PieceSource:
    """A checkpoint's weights under the names of transformers' Llama, Qwen2 or SmolLM3.

    Raises:
        ArchiveError: a process's file is missing or damaged, or the model is none of these.
    """
    files = checkpoint.files
    sizes = files.read_json(_CONFIG)
    weights = files.at("model")
    try:
        config, pairs = _config(sizes, files)
        stored = _stored(weights, f"{files.location}/model")
        names = _Names(stored, config, pairs)
        pieces = dict(names.all())
        names.finder.nothing_left(config.model_type)
    except ArchiveError as error:
        raise ArchiveError(f"{files.location}: {error}") from error
    return PieceSource(files, config, weights, pieces)


def _config(sizes: Mapping[str, Any], files: Files) -> tuple[Any, bool]:
    """The configuration, and whether rotary pairs are neighbours in the matrices."""
    llama, qwen = sizes.get("is_llama_config"), sizes.get("is_qwen2_config")
    if not (llama or qwen):
        kinds = [name for name in sizes if name.startswith("is_") and sizes[name]]
        kind = kinds[0] if kinds else "no is_llama_config"
        raise ArchiveError(
            f"{_CONFIG} has {kind}; of nanotron's models its Llama and its dense Qwen2 are read"
        )
    for name in _ABSENT:
        if sizes.get(name):
            raise ArchiveError(
                f"{_CONFIG} has {name} {sizes[name]}, which the models that are read from nanotron "
                "do not have"
            )
    if files.exists(_TRAINING) and "use_mup" in str(_initial(yaml_file.read(files, _TRAINING))):
        raise ArchiveError(
            f"{_TRAINING} says use_mup: that scales attention and logits as no model that is read"
        )
    shared = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    shared |= {name: sizes[name] for name in _SAME if name in sizes}
    base = sizes.get("rope_theta", 1e4)
    shared["rope_parameters"] = {"rope_type": "default", "rope_theta": base}
    every, biased = sizes.get("no_rope_layer"), bool(sizes.get("attention_bias"))
    if biased and (llama or every):
        raise ArchiveError(f"{_CONFIG} has attention_bias, which is read of its Qwen2 alone")
    # before the value was there (March 2025), pairs were neighbours
    pairs = bool(sizes.get("rope_interleaved", bool(llama)))
    if every:
        own = {"no_rope_layer_interval": every, "use_sliding_window": False}
        return huggingface.made_config("smollm3", shared | own), pairs
    family = "qwen2" if biased else "llama"
    return huggingface.made_config(family, shared), pairs


def _initial(training: Mapping[str, Any]) -> Any:
    model = training.get("model")
    return model.get("init_method") if isinstance(model, Mapping) else None


def _stored(weights: Files, where: str) -> dict[str, Stored]:
    """Each parameter by its name, put together of all processes' files."""
    parts: dict[str, list[tuple[str, re.Match[str]]]] = {}
    for path, files_of in _walk(weights, "", 0):
        name = f"{path.rpartition('/')[0].replace('/', '.')}.{files_of['kind']}"
        parts.setdefault(name.removeprefix("model."), []).append((path, files_of))
    if not parts:
        raise ArchiveError(f"{where} holds no parameter as nanotron writes them")
    return {name: _whole(weights, name, files_of) for name, files_of in parts.items()}


def _walk(files: Files, at: str, depth: int) -> Iterator[tuple[str, re.Match[str]]]:
    for entry in files.entries() if depth < _DEEPEST else ():
        path = f"{at}{entry.name}"
        if entry.directory:
            yield from _walk(files.at(entry.name), f"{path}/", depth + 1)
        elif match := _FILE.fullmatch(entry.name):
            yield path, match


def _whole(weights: Files, name: str, found: list[tuple[str, re.Match[str]]]) -> Stored:
    count = max(int(match["count"] or 1) for _, match in found)
    ranks = sorted(int(match["rank"] or 0) for _, match in found)
    if any(match["experts"] for _, match in found):
        raise ArchiveError(f"{name} is cut by expert; its mixtures of experts are not read")
    if ranks != list(range(count)):
        raise ArchiveError(
            f"of {name} there are {len(found)} files of {count} processes ({found[0][0]}); copy "
            "all of them, and none of another training"
        )
    patches: list[Patch] = []
    for path, match in found:
        places, notes = read_described(weights, path)
        if "data" not in places:
            raise ArchiveError(f"{path} holds no tensor 'data'; the checkpoint is damaged")
        saved = _saved(path, places["data"])
        pairs = notes.get("local_global_slices_pairs")
        if pairs is None:
            if match["rank"] is not None:
                raise ArchiveError(f"{path} does not say which part of {name} it holds")
            return saved
        patches.extend(Patch(saved, *_pair(pair, path)) for pair in pairs.split(";"))
    return Patchwork.of(patches, name)


def _saved(path: str, place: Place) -> Saved:
    strides = [1]
    for size in reversed(place.shape[1:]):
        strides.insert(0, strides[0] * size)
    return Saved(path, DTYPES[place.dtype], place.shape, tuple(strides)[: len(place.shape)],
                 place.start)  # fmt: skip


def _pair(text: str, path: str) -> tuple[Rectangle, Rectangle]:
    """``0,8,None|None,None,None#...``: what of the part, and what it is of the whole."""
    sides = [
        tuple(
            re.fullmatch(r"([0-9]{1,18}|None),([0-9]{1,18}|None),(?:None|1)", one)
            for one in side.split("|")
        )
        for side in text.split("#")
    ]
    if len(sides) != 2 or not all(one for side in sides for one in side):
        raise ArchiveError(f"{path} notes {text[:80]!r}, which is no part of a tensor")
    local, whole = (
        tuple(
            (int(one[1]) if one[1] != "None" else 0, int(one[2]) if one[2] != "None" else None)
            for one in side
            if one
        )
        for side in sides
    )
    return local, whole


class _Names:
    """Where nanotron keeps what Hugging Face's modules want."""

    def __init__(self, stored: dict[str, Stored], config: Any, pairs: bool) -> None:
        self.finder, self.config, self.pairs = Finder(stored), config, pairs
        self.stored = stored
        self.width = config.hidden_size // config.num_attention_heads

    def all(self) -> Iterator[tuple[str, Piece]]:
        rows, hidden = self.config.vocab_size, self.config.hidden_size
        middle = self.config.intermediate_size
        renamed = self.finder.renamed
        yield renamed("model.embed_tokens", _EMBEDDING, rows, hidden)
        yield renamed("model.norm", "final_layer_norm.pp_block", hidden)
        if not self.config.tie_word_embeddings:
            yield renamed("lm_head", _HEAD, rows, hidden)
        for block in range(self.config.num_hidden_layers):
            own, at = f"decoder.{block}.pp_block", f"model.layers.{block}"
            yield renamed(f"{at}.input_layernorm", f"{own}.input_layernorm", hidden)
            yield renamed(
                f"{at}.post_attention_layernorm", f"{own}.post_attention_layernorm", hidden
            )
            yield from self._qkv(f"{at}.self_attn", f"{own}.attn.qkv_proj")
            yield renamed(f"{at}.self_attn.o_proj", f"{own}.attn.o_proj", hidden, hidden)
            both = self.finder.take(f"{own}.mlp.gate_up_proj.weight", shape=(2 * middle, hidden))
            yield f"{at}.mlp.gate_proj.weight", Piece(both, rows=((0, middle),))
            yield f"{at}.mlp.up_proj.weight", Piece(both, rows=((middle, 2 * middle),))
            yield renamed(f"{at}.mlp.down_proj", f"{own}.mlp.down_proj", hidden, middle)

    def _qkv(self, at: str, own: str) -> Iterator[tuple[str, Piece]]:
        heads = self.config.num_attention_heads
        groups = self.config.num_key_value_heads
        ends = [0, heads, heads + groups, heads + 2 * groups]
        kinds: dict[str, tuple[int, ...]] = {"weight": (self.config.hidden_size,)}
        if self.config.model_type == "qwen2":
            kinds["bias"] = ()
        for kind, rest in kinds.items():
            fused = self.finder.take(f"{own}.{kind}", shape=(ends[-1] * self.width, *rest))
            for letter, first, last in zip("qkv", ends, ends[1:], strict=False):
                yield (
                    f"{at}.{letter}_proj.{kind}",
                    Piece(
                        fused,
                        rows=((first * self.width, last * self.width),),
                        turned=self._apart if self.pairs and letter != "v" else None,
                    ),
                )

    def _apart(self, rows: Tensor) -> Tensor:
        """Hugging Face has the first of all rotary pairs of a head, then the second of each."""
        heads = rows.reshape(-1, self.width // 2, 2, *rows.shape[1:])
        return heads.transpose(1, 2).reshape(rows.shape)
