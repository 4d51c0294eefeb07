"""LoRA adapters of PEFT (``adapter_config.json``, ``adapter_model``), merged into their base model.

The base is given with ``--base``. A merged weight is what PEFT's ``merge_and_unload`` computes:
``W + scaling B A``, and for DoRA that by rows of the trained magnitude. It is handed out in float32
and rounded to the base's dtype once, as PEFT does, or not at all with ``--dtype float32``.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import regex
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sinktrack.archive import foreign, remains, source
from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.huggingface import empty, prefix_of
from sinktrack.archive.layouts.pieces import Piece, PieceSlice
from sinktrack.archive.source import Checkpoint, Source
from sinktrack.archive.storage import torch_file
from sinktrack.archive.storage.files import Files
from sinktrack.archive.storage.safetensors_file import SafetensorsSlice, read_header
from sinktrack.archive.storage.slices import Index, Slice
from sinktrack.errors import ArchiveError

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_INERT = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "alpha_pattern", "lora_bias",
    "lora_dropout", "lora_ga_config", "loftq_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
"""Settings that are heeded here, or that do not bear on the merged weights."""
_PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"}
_CHANGES_BASE = re.compile(r"(?i)pissa|corda|olora|loftq|lora_ga")
"""Ways to initialize that take from the base what they put into the adapter."""
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(?:\.default)?(?:\.(?P<kind>weight|bias))?"
)
_WHOLE = re.compile(
    r"(?P<module>.+?)(?:\.modules_to_save(?:\.default)?|\.base_layer)?\.(?P<kind>weight|bias)"
)
_FLOATS = ("F64", "F32", "F16", "BF16")
_HEADLESS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""Tasks whose models have no language head."""
_SECONDS, _LONGEST = 0.2, 10_000
"""For one match of a pattern of the configuration, and its length."""
_SIMPLE = re.compile(r"[\w.^$|\\()?:*+\[\]-]{1,300}")
_NESTED = re.compile(r"[)\]*+?][*+{]|\)\?")


def find(files: Files) -> list[Checkpoint]:
    """The directory itself, if it holds an adapter; to be measured, it needs its base."""
    if files.exists(CONFIG) and any(map(files.exists, _FILES)):
        return [checkpoint_at(files, "adapters", remains.known(files))]
    return []


def open(checkpoint: Checkpoint) -> MergedSource:
    """The base's weights with the adapter merged into them.

    Raises:
        ArchiveError: there is no base, the adapter is none of LoRA's or uses what is not merged
            here, or it does not fit the base.
    """
    files, base = checkpoint.files, checkpoint.base
    if base is None:
        raise ArchiveError(str(remains.known(files)))
    settings = files.read_json(CONFIG)
    _refuse(settings, files.path(CONFIG))
    if checkpoint.config is not None:
        base = replace(base, config=checkpoint.config)
    return MergedSource(files, settings, _stored(files), source.open(base))


class MergedSource:
    """The weights of a base with an adapter merged.

    Args:
        files: the adapter's.
        settings: what its ``adapter_config.json`` says.
        stored: its tensors.
        base: the model that it was trained on.

    Raises:
        ArchiveError: it does not fit the base.
    """

    def __init__(
        self, files: Files, settings: Mapping[str, Any], stored: Mapping[str, Slice], base: Source
    ) -> None:
        self.files, self.config, self._base = files, base.config, base
        self.quantized = getattr(base, "quantized", None)
        """What the base is stored as, where that is of few bits."""
        base_model = empty(base)
        places = _Places(base, base_model.model, base_model.names)
        self._changes = _Adapter(files, settings, stored).on(places)
        self._untied = {}
        """A head that is the embedding's tensor in the base, but not once one of both changes."""
        if not settings.get("ensure_weight_tying") and self._changes.keys() & places.tied:
            self._untied = {places.head: places.stored(places.head)}

    def names(self) -> list[str]:
        """Of all tensors."""
        return [*self._base.names(), *self._untied]

    def slice(self, name: str) -> Slice:
        """One tensor, merged where the adapter changes it."""
        stored = self._base.slice(self._untied.get(name, name))
        change = self._changes.get(name)
        return stored if change is None else _Merged(stored, change)


@dataclass
class _Change:
    """What an adapter does to one weight."""

    turned: bool = False
    """Whether the weight is stored ``[in, out]``, as Conv1D's and an embedding's are."""
    instead: Slice | None = None
    """Values in place of the base's."""
    parts: dict[str, Slice] = field(default_factory=dict)
    """A ``[r, in]``, B ``[out, r]`` and perhaps a magnitude ``[out]``, by PEFT's names."""
    scaling: float = 1.0
    bias: Slice | None = None
    """Of B, which is added to the bias that the weight is."""


@dataclass(frozen=True)
class _Merged:
    """One weight of the base with the adapter's change."""

    base: Slice
    change: _Change

    def get_shape(self) -> list[int]:
        """Its size in each dimension."""
        return self.base.get_shape()

    def get_dtype(self) -> str:
        """The base's."""
        return self.base.get_dtype()

    def __getitem__(self, index: Index) -> Tensor:
        """A part of it, or with ``...`` all, in float32 or wider.

        Only the rows of a leading slice of step 1 are read, where they can be merged by themselves.
        """
        change = self.change
        first: Any = index
        rest: tuple[Any, ...] = ()
        if isinstance(index, tuple):
            first, *others = index or (...,)
            rest = (slice(None), *others)
        alone = isinstance(first, slice) and first.step in (None, 1)
        rows: Index = first if alone and "magnitude" not in change.parts else ...
        merged = _wide((change.instead or self.base)[rows])
        if change.bias is not None:
            merged = merged + _wide(change.bias[rows]) * change.scaling
        if "A" in change.parts:
            a, b = self._parts
            if rows is not ...:
                a, b = (a[:, rows], b) if change.turned else (a, b[rows])
            delta = (b @ a).T if change.turned else b @ a
            merged = merged + delta * change.scaling
            if "magnitude" in change.parts:
                length = torch.linalg.norm(merged, dim=0 if change.turned else 1)
                factor = _wide(change.parts["magnitude"][...]) / length
                merged = merged * (factor if change.turned else factor[:, None])
        return merged[index] if rows is ... else merged[rest or ...]

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        """A and B, read once however many rows are asked for."""
        return _wide(self.change.parts["A"][...]), _wide(self.change.parts["B"][...])


class _Adapter:
    """An adapter's tensors by the modules that they belong to."""

    def __init__(
        self, files: Files, settings: Mapping[str, Any], stored: Mapping[str, Slice]
    ) -> None:
        self._files, self._settings = files, settings
        self._low: dict[str, dict[str, Slice]] = defaultdict(dict)
        """Of each module ``A``, ``B``, ``magnitude``, ``bias``, and ``embedding`` of one."""
        self._whole: dict[str, Slice] = {}
        """Weights that replace the base's, by name."""
        if not stored or (settings.get("target_modules") and not any("lora_" in n for n in stored)):
            raise self._error(
                "holds no weights of LoRA: most likely its parts were not gathered when it was "
                "saved (DeepSpeed ZeRO-3, FSDP)"
            )
        for name in sorted(stored):
            if (dtype := stored[name].get_dtype()) not in _FLOATS:
                raise self._error(
                    f"holds {name} as {dtype}, which is not merged here: save it in float32"
                )
            own = name.removeprefix("base_model.model.")
            if match := _PART.fullmatch(own):
                part, bias = match["part"], match["kind"] == "bias"
                key = "bias" if bias else "magnitude" if "magnitude" in part else part[-1]
                if bias and part != "lora_B":
                    raise self._error(f"holds {name}, which is not known here")
                if key in self._low[match["module"]]:
                    raise self._error(f"holds {name} under another name, too: which one counts?")
                self._low[match["module"]][key] = stored[name]
                if "embedding" in part:
                    self._low[match["module"]]["embedding"] = stored[name]
            elif (match := _WHOLE.fullmatch(own)) and not re.search(
                r"lora_|token_adapter|trainable_tokens", own
            ):
                own = f"{match['module']}.{match['kind']}"
                if own in self._whole:
                    raise self._error(f"holds {name} under another name, too: which one counts?")
                self._whole[own] = stored[name]
            else:
                raise self._error(f"holds {name}, which is not merged here: merge it with PEFT's "
                                  "merge_and_unload and save that")  # fmt: skip

    def on(self, places: _Places) -> dict[str, _Change]:
        """What changes of a base's tensors, by their names there.

        Raises:
            ArchiveError: a module is not of the base, or of another shape.
        """
        changes: dict[str, _Change] = defaultdict(_Change)
        for name, value in self._whole.items():
            if not foreign.is_head(name):
                place = self._at(places, name)
                self._same(name, value.get_shape(), places.shape(place.name))
                self._once(name, changes[place.name].instead)
                changes[place.name].instead = value
        for module, parts in self._low.items():
            place = self._at(places, f"{module}.weight")
            change = changes[place.name]
            self._once(module, change.parts)
            change.scaling = self._scaling(module, parts)
            change.turned = place.kind in ("Conv1D", "Embedding")
            embedded = place.kind == "Embedding"
            if place.kind not in ("Linear", "Conv1D", "Embedding") or (
                ("embedding" in parts) != embedded or (embedded and "magnitude" in parts)
            ):
                raise self._error(
                    f"changes {module}, of class {place.kind}, in a way that is not merged here; "
                    "merge it with PEFT's merge_and_unload and save that"
                )
            shape = places.shape(place.name)
            out, into = reversed(shape) if change.turned else shape
            rank = parts["A"].get_shape()[0]
            wanted = {"A": [rank, into], "B": [out, rank], "magnitude": [out]}
            change.parts = {part: parts[part] for part in wanted if part in parts}
            for part, stored in change.parts.items():
                self._same(f"{module}.lora_{part}", stored.get_shape(), wanted[part])
            if "bias" in parts:
                own = self._at(places, f"{module}.bias").name
                self._same(f"{module}.lora_B.bias", parts["bias"].get_shape(), [out])
                self._once(f"{module}.bias", changes[own].bias)
                changes[own].bias, changes[own].scaling = parts["bias"], change.scaling
        self._complete(places)
        return dict(changes)

    def _complete(self, places: _Places) -> None:
        """Refuse an adapter without tensors of a module that its configuration picks."""
        settings = self._settings
        stored = set(self._low) | {name.rpartition(".")[0] for name in self._whole}
        modules = places.modules(stored)
        if settings.get("task_type") in _HEADLESS or settings.get("ensure_weight_tying"):
            modules = {name: own for name, own in modules.items() if own is not places.output}
        missing = [
            name
            for name, module in modules.items()
            if (module is None or isinstance(module, (nn.Linear, nn.Embedding, Conv1D)))
            and name not in self._low
            and self._picks(name, module is places.output)
        ]
        saved = self._listed("modules_to_save")
        for name, module in modules.items():
            whole = _ends(name, saved)
            for weight, _ in module.named_parameters() if module is not None else ():
                own = f"{name}.{weight}"
                biased = settings.get("bias") == "all" and own.endswith(".bias")
                if (whole or biased) and own not in self._whole:
                    missing.append(own)
        if missing:
            raise self._error(
                f"has no tensors of {foreign.some(sorted(set(missing)))}, which {CONFIG} names: it "
                "was not saved whole"
            )

    def _picks(self, name: str, output: bool) -> bool:
        """Whether PEFT puts LoRA on a module of this name."""
        settings = self._settings
        excluded, wanted = settings.get("exclude_modules"), settings.get("target_modules")
        if excluded and (
            self._matches(excluded, name) if isinstance(excluded, str)
            else _ends(name, self._listed("exclude_modules"))
        ):  # fmt: skip
            return False
        if any(f".{one}." in f".{name}." for one in self._listed("modules_to_save")):
            return False
        if isinstance(wanted, str):
            return not output if wanted.lower() == "all-linear" else self._matches(wanted, name)
        if not _ends(name, self._listed("target_modules")):
            return False
        layers = settings.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = settings.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            start = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
            if match := self._matches(rf"{start}{pattern}\.(?P<index>\d+)\..*", name):
                return int(match["index"]) in (layers if isinstance(layers, list) else [layers])
        return False

    def _matches(self, pattern: str, name: str) -> Any:
        """The match of a whole name, in bounded time."""
        try:
            if len(pattern) > _LONGEST:
                raise TimeoutError
            return regex.fullmatch(pattern, name, timeout=_SECONDS)
        except (regex.error, TimeoutError) as error:
            raise self._error(
                f"has a pattern of modules that is not matched here: {pattern[:80]!r}; merge it "
                "with PEFT's merge_and_unload and save that"
            ) from error

    def _listed(self, name: str) -> list[str]:
        """A setting that is a list of names, or none."""
        listed = self._settings.get(name) or []
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise self._error(f"has {name} {str(listed)[:80]}, which is no list of names")
        return listed

    def _once(self, name: str, before: object) -> None:
        if before:
            raise self._error(f"changes {name} under two names: which one counts?")

    def _at(self, places: _Places, name: str) -> _Place:
        place = places.of(name)
        if place is None:
            raise self._error(
                f"changes {name}, of which the base {places.where} has no tensor of its own; give "
                "the model that it was trained on with --base"
            )
        return place

    def _scaling(self, module: str, parts: Mapping[str, Slice]) -> float:
        """What B A is multiplied with."""
        if missing := {"A", "B"} - set(parts):
            raise self._error(f"lacks lora_{min(missing)} of {module}: it was not saved whole")
        settings = self._settings
        for setting, key in (("use_dora", "magnitude"), ("lora_bias", "bias")):
            if settings.get(setting) and key not in parts:
                raise self._error(
                    f"lacks the {key} of {module} ({setting}): it was not saved whole"
                )
        for name in ("A", "B"):
            if len(shape := parts[name].get_shape()) != 2 or 0 in shape:
                raise self._error(
                    f"has lora_{name} of {module} of shape {shape}: most likely its parts were not "
                    "gathered when it was saved (DeepSpeed ZeRO-3, FSDP)"
                )
        rank, said = parts["A"].get_shape()[0], self._of(module, "rank_pattern", "r")
        if rank != said:
            raise self._error(f"has rank {rank} in {module}, {CONFIG} says {said:g}")
        alpha = self._of(module, "alpha_pattern", "lora_alpha")
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def _of(self, module: str, patterns: str, name: str) -> float:
        """A setting of a module: of the first pattern that its name ends with, else of all."""
        given = self._settings.get(patterns) or {}
        if not isinstance(given, Mapping):
            raise self._error(f"has no names and numbers for {patterns}")
        setting = self._settings.get(name, 8)
        for pattern, value in given.items():
            if not _SIMPLE.fullmatch(pattern) or _NESTED.search(pattern) or (
                pattern.count("*") + pattern.count("+") > 3
            ):  # fmt: skip
                raise self._error(
                    f"has a {patterns} that is not matched here: {pattern[:80]!r}; merge it with "
                    "PEFT's merge_and_unload and save that"
                )
            try:
                matched = re.match(rf"(?:.*\.)?(?:{pattern})$", module)
            except re.error as error:
                raise self._error(f"{patterns} {pattern[:80]!r}: {error}") from error
            if matched:
                setting = value
                break
        if type(setting) not in (int, float) or not 0 <= setting < math.inf:
            raise self._error(f"has {name} {str(setting)[:80]} of {module}")
        return float(setting)

    def _same(self, name: str, shape: list[int], wanted: list[int]) -> None:
        if shape != wanted:
            cure = "give the model that it was trained on with --base"
            if re.search(r"emb|wte|lm_head", name):
                cure += ", with its embedding resized as in that training"
            raise self._error(f"has {name} of shape {shape}, the base takes {wanted}; {cure}")

    def _error(self, said: str) -> ArchiveError:
        return ArchiveError(f"{self._files.location}: the adapter {said}")


@dataclass(frozen=True)
class _Place:
    """A tensor of a base."""

    name: str
    """On disk; or in the model, of a head that is tied there."""
    kind: str
    """The class of its module."""


class _Places:
    """Where a base keeps what a transformers model of it calls by a name."""

    def __init__(self, base: Source, model: Any, names: Mapping[str, list[list[str]]]) -> None:
        self.where = base.files.location
        self._base, self._model, self._names = base, model, names
        self._own = set(base.names())
        self.output: nn.Module | None = None
        self.head, self.tied = "", set[str]()
        """The weight of the language head, and what it and the embedding are both made of."""
        if (output := model.get_output_embeddings()) is not None:
            self.output = output
            self.head = f"{prefix_of(model, output)}weight"
            table = f"{prefix_of(model, model.get_input_embeddings())}weight"
            if names.get(self.head) and names[self.head] == names.get(table):
                self.tied = {self.head, names[table][0][0]} if self.head not in self._own else set()

    def of(self, name: str) -> _Place | None:
        """A tensor by the name of its weight; None where it has none of its own.

        An adapter may have been trained on the model with its language head or without.
        """
        prefix = f"{self._model.base_model_prefix}."
        for own in (name, prefix + name, name.removeprefix(prefix)):
            groups = self._names.get(own, [])
            if len(groups) == 1 and len(groups[0]) == 1:
                module = self._model.get_submodule(own.rpartition(".")[0])
                kinds = (nn.Linear, nn.Embedding, Conv1D)
                kind = next((kind for kind in kinds if isinstance(module, kind)), type(module))
                stored = own if own == self.head and self.tied else groups[0][0]
                return _Place(stored, kind.__name__)
        if name in self._own:  # a part of what the model fuses, such as an expert's matrix
            return _Place(name, "Linear")
        return None

    def modules(self, stored: Set[str]) -> dict[str, nn.Module | None]:
        """All modules, under the names that an adapter's have: with the decoder's prefix or not.

        None for a part of what the model fuses, where the adapter changes such parts.
        """
        own: dict[str, nn.Module | None] = {
            name: module for name, module in self._model.named_modules() if name
        }  # fmt: skip
        prefix = f"{self._model.base_model_prefix}."
        bare = {
            name.removeprefix(prefix): module for name, module in own.items()
            if name.startswith(prefix)
        }  # fmt: skip
        longer = {prefix + name: module for name, module in own.items()}
        best = max((own, bare, longer), key=lambda names: len(stored & names.keys()))
        parts = {
            name.removesuffix(".weight") for name in self._own
            if name.endswith(".weight") and len(self.shape(name)) == 2
        } - {*own, *bare, *longer}  # fmt: skip
        return best | (dict.fromkeys(parts) if stored & parts else {})

    def stored(self, name: str) -> str:
        """Under which name on disk."""
        return self._names[name][0][0] if name in self.tied and name == self.head else name

    def shape(self, name: str) -> list[int]:
        """Of a tensor."""
        return self._base.slice(self.stored(name)).get_shape()


def _wide(value: Tensor) -> Tensor:
    """In the dtype in which PEFT merges."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _ends(name: str, ends: list[str]) -> bool:
    """Whether a module's name is one of these or ends with one, as PEFT has it."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _refuse(settings: Mapping[str, Any], where: str) -> None:
    """Refuse what is not plain LoRA, by its name."""
    kind, merge = (
        str(settings.get("peft_type")),
        "merge it with PEFT's merge_and_unload and save that",
    )
    if kind in _PROMPTS:
        raise ArchiveError(
            f"{where}: peft_type {kind} puts trained vectors before the text, so that its first "
            "token is not P0; it is not measured"
        )
    if kind != "LORA":
        raise ArchiveError(
            f"{where}: peft_type {kind[:80]} is not merged here, LORA alone is; {merge}"
        )
    if _CHANGES_BASE.match(way := str(settings.get("init_lora_weights"))):
        raise ArchiveError(
            f"{where}: init_lora_weights {way[:80]} changed the base before the training; {merge}, "
            "or save it with path_initial_model_for_weight_conversion"
        )
    if given := sorted(name for name, value in settings.items() if value and name not in _INERT):
        raise ArchiveError(f"{where}: {foreign.some(given)} is not merged here; {merge}")


def _stored(files: Files) -> dict[str, Slice]:
    """The adapter's tensors, by name."""
    safe, pickled = _FILES
    if files.exists(safe):
        header = read_header(files, safe)
        return {name: SafetensorsSlice(files, safe, place) for name, place in header.items()}
    tensors = torch_file.tensors(torch_file.read(files, pickled))
    return {name: PieceSlice(files, Piece(saved)) for name, saved in tensors.items()}
