"""What transformers makes of a checkpoint: its configuration, its tokenizer, the whole model."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sinktrack.archive import foreign
from sinktrack.archive.source import Checkpoint, Source, as_stored, fitting, open
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.slices import DTYPES
from sinktrack.errors import ArchiveError, one_line

_LARGEST = 64 * 2**20
_FLOATS = ("F64", "F32", "F16", "BF16")
_EIGHT = torch.float8_e4m3fn
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_OTHER_TOKENIZERS = (
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
"""What tokenizers without a ``tokenizer.json`` are made of."""
_LAST: dict[Any, tuple[tuple[tuple[str, bytes], ...], Any]] = {}
"""What was made last by a class of transformers', and the digests of the files it is of."""
_EMPTY: tuple[Any, Empty] | None = None
"""What was made last, and of what."""


@dataclass(frozen=True)
class Empty:
    """A model on the meta device, and where in a checkpoint its weights are."""

    model: Any
    """In evaluation mode, in the dtype to be measured."""
    names: dict[str, list[list[str]]]
    """Per weight of the model the checkpoint's tensors that make it, like ones together."""
    renamed: dict[str, str]
    """By tensor of the checkpoint the weight that it is as it stands, under whatever name."""
    text: Any
    """The decoder without its language head; in a model of text and images the text's."""
    in_a_row: dict[tuple[str, ...], bool] = field(default_factory=dict)
    """By weights of routed experts: are they what is stored, one after the other? As was found."""

    def copied(self) -> Empty:
        """Another model like it."""
        values = chain(self.model.parameters(), self.model.buffers())
        held = {id(value): value for value in values if value.is_meta}  # nothing is written there
        model = copy.deepcopy(self.model, held)
        return replace(self, model=model, text=_text(model))

    @property
    def prefix(self) -> str:
        """What the names of the text decoder's weights begin with."""
        return prefix_of(self.model, self.text)


def load(
    checkpoint: Checkpoint, device: str = "cpu", dtype: str | None = None, *, head: bool = True
) -> Any:
    """The whole model in evaluation mode. Nothing is ever unpickled.

    Args:
        checkpoint: what to load.
        device: where to.
        dtype: such as ``bfloat16``; by default the one that the weights are stored in.
        head: whether the language head is needed, which a reward model has none of.

    Raises:
        ArchiveError: a file is missing or damaged, a weight is missing or has another shape, there
            are some that the model has no place for, or transformers does not know the
            architecture; names the file.
    """
    source = open(checkpoint)
    where = checkpoint.files.location
    try:
        made = empty(source, dtype, head=head)
        largest = max(weight.numel() for weight in made.model.state_dict().values())
        weights = {name: fitting(source, name, largest) for name in source.names()}
        model, info = type(made.model).from_pretrained(
            None,
            config=made.model.config,
            state_dict=weights,
            dtype=made.model.dtype,
            output_loading_info=True,
        )
    except ArchiveError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ArchiveError(f"{where} cannot be loaded: {one_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(map(str, info[kind]))
        if kind == "missing_keys" and not head:
            names = [name for name in names if name.startswith(made.prefix)]
        if names:
            raise ArchiveError(
                f"{where}: {len(names)} weights {kind.removesuffix('_keys')} "
                f"({foreign.some(names)}); the checkpoint does not fit its config.json"
            )
    return model.to(device).eval()


def empty(source: Source, dtype: str | None = None, *, head: bool = False) -> Empty:
    """The model without its weights, once all of them are seen to have a place in it.

    Of checkpoints that differ in their numbers alone it is made once and copied.

    Args:
        source: the checkpoint.
        dtype: such as ``bfloat16``; by default the narrowest in which no stored weight is rounded,
            whatever the configuration says.
        head: whether that counts for the weights of the language head, too.

    Raises:
        ArchiveError: transformers cannot build it, the weights are quantized, or the checkpoint
            holds tensors that it has no place for.
    """
    global _EMPTY
    tensors = {name: source.slice(name) for name in source.names()}
    stored = {name: tensor.get_dtype() for name, tensor in tensors.items()}
    shapes = {name: tensor.get_shape() for name, tensor in tensors.items()}
    config = source.config.to_dict()  # two configurations are equal if their fields alone are
    asked = type(source.config), config, stored, shapes, dtype, head
    last = _EMPTY  # other threads have theirs
    if last is None or last[0] != asked:
        _EMPTY = last = asked, _made_empty(source, stored, dtype, head)
    return last[1].copied()


def _made_empty(source: Source, stored: dict[str, str], dtype: str | None, head: bool) -> Empty:
    config = source.config
    if getattr(config, "quantization_config", None):
        raise ArchiveError(
            "quantized weights are not supported; scan the model before quantization"
        )
    blocks = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(blocks, int) and blocks > len(stored):
        raise ArchiveError(
            f"{source.files.location}: config.json has {blocks} blocks, of which {len(stored)} "
            "tensors cannot be the weights"
        )
    wide = getattr(torch, dtype) if dtype else _promoted(stored.values())
    model = built(config, wide)
    names, renamed, left = _places(model, stored)
    made = Empty(model, names, renamed, _text(model))
    try:
        _refuse_quantized(made, stored)
        _refuse_foreign(source, model, left)
    except ArchiveError as error:
        raise ArchiveError(f"{source.files.location}: {error}") from error
    if dtype is None and (narrow := _narrowest(made, stored, head)) != wide:
        model = built(config, narrow)
        made = replace(made, model=model, text=_text(model))
    return made


def prefix_of(model: nn.Module, module: nn.Module) -> str:
    """What the names of the module's weights begin with in the model."""
    path = next(path for path, submodule in model.named_modules() if submodule is module)
    return f"{path}." if path else ""


def built(config: Any, dtype: torch.dtype) -> Any:
    """On the meta device; of text and images where the configuration is of both."""
    auto: Any = AutoModelForCausalLM
    if config.get_text_config(decoder=True) is not config and _sees(config):
        auto = AutoModelForImageTextToText
    kind, known = config.model_type, auto._model_mapping
    if getattr(config, "is_encoder_decoder", False):
        raise ArchiveError(
            f"a {kind} cannot be built: it is an encoder and a decoder, and read are decoders that "
            "stand alone"
        )
    if type(config) not in known:
        saved = ", ".join(map(str, getattr(config, "architectures", None) or ["no class"]))
        raise ArchiveError(
            f"a {kind} cannot be built: transformers has no language model of this kind (saved as "
            f"{saved[:200]}), whose blocks could be measured"
        )
    try:
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        reason = one_line(error)
        raise ArchiveError(f"a {config.model_type} cannot be built: {reason}") from error
    _refuse_unread_rotations(model)
    for value in model.parameters():  # come from the checkpoint: drawing them costs time alone
        value._is_hf_initialized = True
    return model.eval()


def _refuse_unread_rotations(model: Any) -> None:
    """Refuse rotary embeddings by kind of block where the class knows but one for all blocks.

    Raises:
        ArchiveError: so it is, as where a newer transformers has saved the checkpoint.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None)
    kinds = [k for k, value in rope.items() if isinstance(value, dict)] if rope else []
    tables = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    if kinds and "inv_freq" in tables and not any(f"{kind}_inv_freq" in tables for kind in kinds):
        raise ArchiveError(
            f"a {config.model_type} cannot be built: its configuration gives rope_parameters by "
            f"kind of block ({', '.join(kinds)}), and {type(model).__name__} of transformers "
            f"{transformers.__version__} reads one for all blocks; install a newer transformers"
        )


def _sees(config: Any) -> bool:
    """Whether the model is one that takes images, not the decoder of one alone."""
    alone = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    saved = getattr(config, "architectures", None) or []
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and alone not in saved


def _text(model: Any) -> Any:
    """The decoder that reads text, without its language head."""
    if model.config.get_text_config(decoder=True) is model.config:
        return model.base_model
    decoder = model.get_decoder()
    while (inner := decoder.base_model) is not decoder:
        decoder = inner
    return decoder


def _places(
    model: Any, stored: Iterable[str]
) -> tuple[dict[str, list[list[str]]], dict[str, str], dict[str, list[str]]]:
    """Per weight of the model the tensors that make it; of them those that are it as they stand;
    and per name without a place its tensors.

    By transformers' own renaming. Of tied weights one may be stored for both.
    """
    targets = model.state_dict()
    mapping = get_model_conversion_mapping(model) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    sources: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    left: dict[str, list[str]] = defaultdict(list)
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, targets)
        if target not in targets and name in targets:
            target, pattern = rename_source_key(name, [], [], prefix, targets)
        if target in targets:
            sources[target][pattern].append(name)
        else:
            left[target].append(name)
    names = {target: list(by_pattern.values()) for target, by_pattern in sources.items()}
    renamed = {
        found[0]: target
        for target, by_pattern in sources.items()
        for pattern, found in by_pattern.items()
        if pattern is None and len(by_pattern) == len(found) == 1
    }
    for target, source in model.all_tied_weights_keys.items():
        for one, other in ((target, source), (source, target)):
            if one not in names and other in names:
                names[one] = names[other]
    return names, renamed, left


def _refuse_foreign(source: Source, model: Any, left: Mapping[str, list[str]]) -> None:
    config = model.config.get_text_config(decoder=True)
    blocks = config.num_hidden_layers
    names = foreign.left_over(
        left,
        lambda name: source.slice(left[name][0]).get_shape(),
        blocks=blocks,
        ignored=model._keys_to_ignore_on_load_unexpected or (),
        senses=config is not source.config,
    )
    foreign.refuse([own for name in names for own in left[name]], config.model_type, blocks)


def _refuse_quantized(found: Empty, stored: Mapping[str, str]) -> None:
    """By their dtypes, whatever the configuration says."""
    targets = found.model.state_dict()
    weights = {
        name
        for target, groups in found.names.items()
        if targets[target].is_floating_point()
        for group in groups
        for name in group
    }
    packed = {
        name: dtype
        for name, dtype in stored.items()
        if dtype not in _FLOATS and (name in weights or DTYPES.get(dtype, _EIGHT).is_floating_point)
    }
    if packed:
        name = min(packed)
        raise ArchiveError(
            f"quantized weights are not supported: {foreign.count(len(packed), 'tensor')} such as "
            f"{name}, which is stored as {packed[name]}; scan the model before quantization, or "
            "save it dequantized"
        )


def _promoted(dtypes: Iterable[str]) -> torch.dtype:
    """The narrowest dtype that holds all numbers of these."""
    floats = [DTYPES[name] for name in set(dtypes) if name in _FLOATS]
    return reduce(torch.promote_types, floats) if floats else torch.float32


def _narrowest(found: Empty, stored: Mapping[str, str], head: bool) -> torch.dtype:
    """In which to build the model so that none of its measured weights is rounded."""
    model = found.model
    measured = [found.prefix]
    if head and (output := model.get_output_embeddings()) is not None:
        measured.append(prefix_of(model, output))
    weights = {
        target: _promoted(stored[name] for group in groups for name in group)
        for target, groups in found.names.items()
        if target.startswith(tuple(measured))
    }
    wide = reduce(torch.promote_types, weights.values()) if weights else model.dtype
    for dtype in sorted({*weights.values()} - {wide}, key=lambda dtype: dtype.itemsize):
        kept = kept_in(model, dtype)
        if all(
            torch.promote_types(held, own) == own
            for target, held in weights.items()
            for own in [kept(target) or dtype]
        ):
            return dtype
    return wide


def kept_in(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """By name of a weight the dtype that it is kept in where the model is of this one, or None.

    By transformers' plan, as of routers that are always in float32.
    """
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda _: None
    kept, groups, _ = build_glob_alternation(list(plan))

    def find(name: str) -> torch.dtype | None:
        match = kept.search(name)
        return plan[groups[match.lastgroup]] if match else None

    return find


def config(files: Files) -> Any:
    """The configuration that ``config.json`` describes.

    Raises:
        ArchiveError: it is missing, damaged, or not known to transformers.
    """
    said = files.read_json("config.json")
    kind, where = said.get("model_type"), files.path("config.json")
    if kind not in CONFIG_MAPPING:
        _refuse_unknown(where, kind, said.get("auto_map"))
    failure = f"{where}: transformers makes no configuration of model_type {kind!r} of it"
    return copy.deepcopy(_made(AutoConfig, files, ["config.json"], failure))  # some change theirs


def _refuse_unknown(where: str, kind: Any, own_code: Any) -> NoReturn:
    """Say why transformers has no such family, and what goes on."""
    own = f"transformers {transformers.__version__} does not know how to build model_type"
    if isinstance(own_code, dict) and own_code:
        names = foreign.some([str(name) for name in own_code.values()])
        raise ArchiveError(
            f"{where}: {own} {str(kind)[:80]!r}, which is code of the checkpoint's own ({names}); "
            "that is never run: give the config.json of a family of transformers that holds the "
            "same tensors with --hf-config (hf_config), or load the model where you trust its code "
            "and measure it with st.measure(st.Decoder(model, blocks=...), probe)"
        )
    failure = "it names no model_type" if kind is None else f"{own} {str(kind)[:80]!r}"
    raise ArchiveError(
        f"{where}: {failure}; give the config.json of a family that it knows with --hf-config "
        "(hf_config), or, where a newer one knows it, pip install --upgrade transformers"
    )


def config_of(checkpoint: Checkpoint) -> Any:
    """The configuration beside a checkpoint's weights, or the one given in its place.

    Raises:
        ArchiveError: there is none, or it is damaged or not known to transformers.
    """
    if checkpoint.config is None and not checkpoint.files.exists("config.json"):
        raise ArchiveError(
            f"{checkpoint.files.location} holds no config.json, as sharded checkpoints do not; "
            "give the configuration of the model with --hf-config"
        )
    return config(checkpoint.config or checkpoint.files)


def is_text(config: Any) -> bool:
    """Whether transformers has a language model of this configuration."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def base_prefix(config: Any) -> str:
    """What the family's models with a language head call their decoder: ``model``, ...

    Raises:
        ArchiveError: transformers has no such model.
    """
    if not is_text(config):
        raise ArchiveError(f"transformers has no language model of model_type {config.model_type}")
    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].base_model_prefix)


def made_config(kind: str, values: dict[str, Any]) -> Any:
    """A configuration of transformers out of another framework's.

    Raises:
        ArchiveError: transformers does not take these values.
    """
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:
        raise ArchiveError(f"no {kind} of these sizes: {one_line(error)}") from error


def tokenizer(files: Files) -> Any | None:
    """The tokenizer beside a checkpoint or in its ``tokenizer`` directory, or None.

    The same object for files that hold the same: it is not to be changed.

    Raises:
        ArchiveError: it cannot be read.
    """
    if not files.exists("tokenizer.json"):
        files = files.at("tokenizer")
    if not files.exists("tokenizer.json"):
        return None
    names = [name for name in _TOKENIZER if files.exists(name)]
    return _made(AutoTokenizer, files, names, f"the tokenizer of {files.location} cannot be read")


def other_tokenizer(files: Files) -> str | None:
    """What stands in the place of a tokenizer that is read, and what makes one of it."""
    for place in (files, files.at("tokenizer")):
        if tokenizers := [name for name in _OTHER_TOKENIZERS if place.exists(name)]:
            return (
                f"{', '.join(tokenizers)} without the tokenizer.json that is read: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes it"
            )
    return None


def vocabulary(checkpoint: Checkpoint) -> int:
    """The size of the vocabulary, from the model's configuration.

    Raises:
        ArchiveError: it cannot be read.
    """
    return int(as_stored(checkpoint).config.get_text_config(decoder=True).vocab_size)


def _made(auto: Any, files: Files, names: list[str], failure: str) -> Any:
    """From small files, copied to a place of ours: remote ones, and none that a link could swap.

    What checkpoint after checkpoint holds alike is made once.
    """
    contents = {name: files.whole(name, _LARGEST) for name in names}
    digest = tuple((name, hashlib.sha256(data).digest()) for name, data in contents.items())
    held, made = _LAST.get(auto, (None, None))
    if held == digest:
        return made
    with tempfile.TemporaryDirectory() as directory:
        for name, data in contents.items():
            (Path(directory) / name).write_bytes(data)
        try:
            made = auto.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            said = one_line(error).replace(directory, files.location)
            raise ArchiveError(f"{failure}: {said}") from error
    _LAST[auto] = digest, made
    return made
