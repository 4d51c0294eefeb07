"""litgpt's checkpoints: ``lit_model.pth`` beside ``model_config.yaml``.

Read are the models that are Llama, Mistral without windows, Qwen2, Qwen3 or GPT-NeoX (Pythia) but
for their names: litgpt stacks queries, keys and values into one matrix. Since 0.5.4 it holds all
queries, then all keys and values (``attn.qkv``); before, by group (``attn.attn``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from sinktrack.archive import huggingface, yaml_file
from sinktrack.archive.discover import checkpoint_at
from sinktrack.archive.layouts.pieces import Finder, Piece, PieceSource, Stored
from sinktrack.archive.source import Checkpoint, unwrapped
from sinktrack.archive.storage import torch_file
from sinktrack.archive.storage.dcp import Span
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

_FILE, _CONFIG = "lit_model.pth", "model_config.yaml"
_STEPS = ("step_count", "iter_num")
_PLAIN = {
    "norm_qk_type": "default", "post_attention_norm": False, "post_mlp_norm": False,
    "shared_attention_norm": False, "attention_scores_scalar": None, "sliding_window_size": None,
    "attention_logit_softcapping": None, "rope_condense_ratio": 1, "rope_adjustments": None,
    "rope_interleave": False, "n_expert": 0, "scale_embeddings": False, "lm_head_bias": False,
    "final_logit_softcapping": None, "norm_1": True, "norm_2": True, "latent_attention": None,
    "rope_local_base_freq": None,
}  # fmt: skip
"""What every model that is read has; a value of another kind makes it another one."""


def find(files: Files) -> list[Checkpoint]:
    """The directory itself; step by its name, else by the file."""
    if not (files.exists(_FILE) and (files.exists(_CONFIG))):
        return []
    made = checkpoint_at(files, "litgpt")
    if made.step == 0:
        try:
            step = files.once(_step, _FILE)
        except ArchiveError:
            step = 0
        return [Checkpoint(made.files, step, made.tokens, made.format, made.name)]
    return [made]


def _step(files: Files) -> int:
    tree = torch_file.read(files, _FILE)
    steps = [tree.get(key) for key in _STEPS] if isinstance(tree, Mapping) else []
    return next((step for step in steps if type(step) is int and step > 0), 0)


def open(checkpoint: Checkpoint) -> PieceSource:
    """A checkpoint's weights under Hugging Face's names.

    Raises:
        ArchiveError: a file is damaged, or the model is none of those that are read.
    """
    files = checkpoint.files
    tree = torch_file.read(files, _FILE)
    inner = tree.get("model") if isinstance(tree, Mapping) else None
    tensors = torch_file.tensors(inner if isinstance(inner, Mapping) else tree)
    stored: dict[str, Stored] = {own: tensors[name] for own, name in unwrapped(tensors).items()}
    try:
        sizes = yaml_file.read(files, _CONFIG)
        names = _Names(sizes, stored)
        pieces = dict(names.all())
        names.finder.nothing_left(names.config.model_type)
    except ArchiveError as error:
        raise ArchiveError(f"{files.location}: {error}") from error
    return PieceSource(files, names.config, files, pieces)


class _Names:
    """Where litgpt keeps what Hugging Face's modules want."""

    def __init__(self, sizes: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        self.stored, self.finder = stored, Finder(stored)
        self.config = _config(sizes)
        self.neox = self.config.model_type == "gpt_neox"
        self.hidden, self.width = sizes["n_embd"], sizes["head_size"]
        self.heads, self.groups = sizes["n_head"], sizes["n_query_groups"]

    def all(self) -> Iterator[tuple[str, Piece]]:
        rows, middle = self.config.vocab_size, self.config.intermediate_size
        base, h = ("gpt_neox", "transformer") if self.neox else ("model", "transformer")
        embedding, norm, head = (
            ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
            if self.neox
            else ("model.embed_tokens", "model.norm", "lm_head")
        )
        yield self.finder.renamed(embedding, f"{h}.wte", rows, self.hidden)
        yield self.finder.renamed(head, "lm_head", rows, self.hidden)
        yield from self._norm(norm, f"{h}.ln_f")
        for block in range(self.config.num_hidden_layers):
            own, at = f"{h}.h.{block}", f"{base}.layers.{block}"
            yield from self._norm(f"{at}.input_layernorm", f"{own}.norm_1")
            yield from self._norm(f"{at}.post_attention_layernorm", f"{own}.norm_2")
            attention = f"{at}.attention" if self.neox else f"{at}.self_attn"
            yield from self._qkv(attention, f"{own}.attn")
            if self.neox:
                yield from self._linear(
                    f"{attention}.dense", f"{own}.attn.proj", self.hidden, self.heads * self.width
                )
                yield from self._linear(
                    f"{at}.mlp.dense_h_to_4h", f"{own}.mlp.fc", middle, self.hidden
                )
                yield from self._linear(
                    f"{at}.mlp.dense_4h_to_h", f"{own}.mlp.proj", self.hidden, middle
                )
                continue
            yield from self._linear(
                f"{attention}.o_proj", f"{own}.attn.proj", self.hidden, self.heads * self.width
            )
            for name, stored in (("gate", "fc_1"), ("up", "fc_2")):
                yield from self._linear(
                    f"{at}.mlp.{name}_proj", f"{own}.mlp.{stored}", middle, self.hidden
                )
            yield from self._linear(f"{at}.mlp.down_proj", f"{own}.mlp.proj", self.hidden, middle)
            if self.config.model_type == "qwen3":
                for name in "qk":
                    yield self.finder.renamed(
                        f"{attention}.{name}_norm", f"{own}.attn.norm_{name}", self.width
                    )

    def _norm(self, name: str, own: str) -> Iterator[tuple[str, Piece]]:
        yield self.finder.renamed(name, own, self.hidden)
        if self.neox:
            yield f"{name}.bias", Piece(self.finder.take(f"{own}.bias", shape=(self.hidden,)))

    def _linear(self, name: str, own: str, rows: int, columns: int) -> Iterator[tuple[str, Piece]]:
        yield self.finder.renamed(name, own, rows, columns)
        if f"{own}.bias" in self.stored:
            yield f"{name}.bias", Piece(self.finder.take(f"{own}.bias", shape=(rows,)))

    def _qkv(self, name: str, own: str) -> Iterator[tuple[str, Piece]]:
        total = (self.heads + 2 * self.groups) * self.width
        for kind, shape in (("weight", (total, self.hidden)), ("bias", (total,))):
            names = (f"{own}.qkv.{kind}", f"{own}.attn.{kind}")
            there = next((n for n in names if n in self.stored), None)
            if there is None and kind == "bias":
                return
            fused = self.finder.take(*names, shape=shape)
            grouped = there == names[1]
            if self.neox:
                yield (
                    f"{name}.query_key_value.{kind}",
                    Piece(fused, turned=None if grouped else self._by_head),
                )
                continue
            for letter in "qkv":
                yield f"{name}.{letter}_proj.{kind}", Piece(fused, rows=self._rows(letter, grouped))

    def _rows(self, letter: str, grouped: bool) -> tuple[Span, ...]:
        """Of the stacked matrix, those of queries, keys or values."""
        each = self.heads // self.groups
        if grouped:
            begin, count = {"q": (0, each), "k": (each, 1), "v": (each + 1, 1)}[letter]
            firsts = [(group * (each + 2) + begin) * self.width for group in range(self.groups)]
            return tuple((first, first + count * self.width) for first in firsts)
        first = {"q": 0, "k": self.heads, "v": self.heads + self.groups}[letter]
        count = self.heads if letter == "q" else self.groups
        return ((first * self.width, (first + count) * self.width),)

    def _by_head(self, rows: Tensor) -> Tensor:
        """GPT-NeoX has query, key and value of a head one below the other."""
        parts = rows.reshape(3, self.heads, self.width, *rows.shape[1:])
        return parts.transpose(0, 1).reshape(rows.shape)


def _config(sizes: Mapping[str, Any]) -> Any:
    for name, plain in _PLAIN.items():
        if sizes.get(name, plain) != plain:
            raise ArchiveError(
                f"{_CONFIG} has {name} {sizes[name]}, which none of the models has that are read "
                "from litgpt; write it with `litgpt convert_from_litgpt` as a Hugging Face model"
            )
    kind, norm = sizes.get("mlp_class_name"), sizes.get("norm_class_name")
    whole = sizes.get("rotary_percentage", 0.25)
    shared = {
        "vocab_size": sizes["padded_vocab_size"], "hidden_size": sizes["n_embd"],
        "intermediate_size": sizes["intermediate_size"], "num_hidden_layers": sizes["n_layer"],
        "num_attention_heads": sizes["n_head"], "max_position_embeddings": sizes["block_size"],
        "tie_word_embeddings": False,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": float(sizes.get("rope_base", 10000))}
    if (kind, norm) == ("GptNeoxMLP", "LayerNorm") and sizes["n_query_groups"] == sizes["n_head"]:
        exact = sizes.get("gelu_approximate", "none") == "none"
        return huggingface.made_config("gpt_neox", shared | {
            "layer_norm_eps": sizes.get("norm_eps", 1e-5),
            "use_parallel_residual": sizes.get("parallel_residual", True),
            "attention_bias": sizes.get("bias", True),
            "rope_parameters": rope | {"partial_rotary_factor": whole},
            "hidden_act": "gelu" if exact else "gelu_pytorch_tanh",
        })  # fmt: skip
    if (kind, norm, whole) != ("LLaMAMLP", "RMSNorm", 1.0) or sizes.get("parallel_residual"):
        raise ArchiveError(
            f"{_CONFIG} has {kind} with {norm} and rotary_percentage {whole}, which none of the "
            "models has that are read from litgpt; write it with `litgpt convert_from_litgpt`"
        )
    normed, biased = bool(sizes.get("norm_qk")), bool(sizes.get("attn_bias"))
    if sizes.get("bias") or (
        biased and (normed or sizes["head_size"] * sizes["n_head"] != sizes["n_embd"])
    ):
        raise ArchiveError(f"{_CONFIG} has biases as none of the models that are read from litgpt")
    family = "qwen3" if normed else "qwen2" if biased else "llama"
    own = {} if family == "qwen2" else {"head_dim": sizes["head_size"]}
    return huggingface.made_config(family, shared | own | {
        "num_key_value_heads": sizes["n_query_groups"], "rms_norm_eps": sizes["norm_eps"],
        "rope_parameters": rope,
    })  # fmt: skip
