"""nanotron's checkpoints measure as the transformers model of their weights does.

They are laid out here as releases 0.4 and later write them, by a map of this file's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, SmolLM3Config

from sinktrack import ArchiveError, measure, scan
from sinktrack.archive.discover import discover
from sinktrack.records.run import to_json
from tests.helpers import models
from tests.helpers.trainings import PROBE

SAME = ("weights", "p0_attention", "norm_ratio", "shares")
HEADS, GROUPS, WIDTH = 4, 2, 8
SIZES = dict(
    vocab_size=models.VOCABULARY + 1, hidden_size=HEADS * WIDTH, intermediate_size=48,
    num_hidden_layers=4, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
    rms_norm_eps=1e-6, rope_theta=5e4, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
KINDS: dict[str, Any] = {
    "first": (LlamaConfig, {"is_llama_config": True}, True),
    "llama": (LlamaConfig, {"is_llama_config": True, "rope_interleaved": False}, False),
    "pairs": (LlamaConfig, {"is_llama_config": True, "rope_interleaved": True}, True),
    "qwen": (Qwen2Config, {"is_qwen2_config": True, "attention_bias": True}, False),
    "plain": (LlamaConfig, {"is_qwen2_config": True, "attention_bias": False}, False),
    "smollm3": (SmolLM3Config, {"is_qwen2_config": True, "no_rope_layer": 2}, False),
}


def model_of(kind: str, tied: bool = False) -> Any:
    sizes: dict[str, Any] = SIZES | {"tie_word_embeddings": tied}
    if kind == "smollm3":
        sizes |= {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False, "pad_token_id": None}
    base = sizes.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": 1e4 if kind == "first" else base}
    return models.build(KINDS[kind][0](**sizes, rope_parameters=rope))


def write(path: Path, kind: str, model: Any, ranks: int, **changes: Any) -> None:
    """As so many tensor-parallel processes save it; the blocks in two stages of a pipeline."""
    _, said, pairs = KINDS[kind]
    w, tied = model.state_dict(), model.config.tie_word_embeddings
    root = path / "model/model"
    save(root / "token_position_embeddings/pp_block/token_embedding", "weight",
         w["model.embed_tokens.weight"], ranks, 0)  # fmt: skip
    if not tied:
        save(root / "lm_head/pp_block", "weight", w["lm_head.weight"], ranks, 0, stage=1)
    whole(root / "final_layer_norm/pp_block", w["model.norm.weight"])
    for block in range(4):
        at, own = f"model.layers.{block}", root / f"decoder/{block}/pp_block"
        stage = block // 2
        for norm in ("input_layernorm", "post_attention_layernorm"):
            whole(own / norm, w[f"{at}.{norm}.weight"])
        for ending in ("weight", "bias") if kind == "qwen" else ("weight",):
            parts = [w[f"{at}.self_attn.{letter}_proj.{ending}"] for letter in "qkv"]
            if pairs:
                parts[:2] = [together(part) for part in parts[:2]]
            save(own / "attn/qkv_proj", ending, torch.cat(parts), ranks, 0,
                 chunks=[len(part) for part in parts], stage=stage)  # fmt: skip
        save(own / "attn/o_proj", "weight", w[f"{at}.self_attn.o_proj.weight"], ranks, 1, stage)
        both = [w[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        save(own / "mlp/gate_up_proj", "weight", torch.cat(both), ranks, 0, stage, [48, 48])
        save(own / "mlp/down_proj", "weight", w[f"{at}.mlp.down_proj.weight"], ranks, 1, stage)
    step = int(path.name)
    sizes = {k: v for k, v in SIZES.items() if kind != "first" or k != "rope_theta"}
    config = sizes | said | {"tie_word_embeddings": tied, "hidden_act": "silu"} | changes
    (path / "model_config.json").write_text(json.dumps(config))
    metas = {"last_train_step": step, "consumed_tokens_total": step * 1000}
    described = {"version": "1.5", "tp": ranks, "dp": 1, "metas": metas}
    (path / "checkpoint_metadata.json").write_text(json.dumps(described))
    (path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_method": {"std": 0.02}}}))
    (path.parent / "latest.txt").write_text(str(step))


def together(rows: Tensor) -> Tensor:
    """The two of each rotary pair side by side, row by row."""
    order = [head * WIDTH + half * WIDTH // 2 + pair for head in range(len(rows) // WIDTH)
             for pair in range(WIDTH // 2) for half in range(2)]  # fmt: skip
    return rows[order]


def whole(directory: Path, value: Tensor) -> None:
    directory.mkdir(parents=True)
    save_file({"data": value}, directory / "model_weight.safetensors", {})


def save(
    directory: Path,
    ending: str,
    value: Tensor,
    ranks: int,
    dim: int,
    stage: int = 0,
    chunks: list[int] | None = None,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        parts, pairs, local, begin = [], [], 0, 0
        for chunk in chunks or [value.shape[dim]]:
            size = chunk // ranks
            first = begin + rank * size
            parts.append(value.narrow(dim, first, size))
            ends = [(f"{local},{local + size}", f"{first},{first + size}")] * value.ndim
            if not chunks:
                ends = [("None,None", f"{first},{first + size}")] * value.ndim
            sides = [
                "|".join(f"{end[side]},None" if d == dim else "None,None,None"
                         for d, end in enumerate(ends))
                for side in range(2)
            ]  # fmt: skip
            pairs.append("#".join(sides))
            local, begin = local + size, begin + chunk
        name = f"model_{ending}_pp-rank-{stage}-of-2_tp-rank-{rank}-of-{ranks}.safetensors"
        notes = {
            "version": "1.5",
            "local_global_slices_pairs": ";".join(pairs),
            "unsharded_shape": str(tuple(value.shape)),
        }
        save_file({"data": torch.cat(parts, dim).contiguous()}, directory / name, notes)


@pytest.mark.parametrize(
    ("kind", "ranks", "tied"),
    [("first", 1, False), ("llama", 2, True), ("pairs", 2, False), ("qwen", 2, True),
     ("plain", 1, True), ("smollm3", 2, True)],
)  # fmt: skip
def test_as_the_whole_model(kind: str, ranks: int, tied: bool, tmp_path: Path) -> None:
    model = model_of(kind, tied)
    for step in (20, 100):
        write(tmp_path / f"a/{step}", kind, model, ranks)
    (tmp_path / "a/lighteval").mkdir()
    found = discover(tmp_path / "a")
    assert [(one.step, one.tokens, one.format) for one in found] == [
        (20, 20_000, "nanotron"), (100, 100_000, "nanotron"),
    ]  # fmt: skip
    records = list(scan(tmp_path / "a", probe=PROBE, run=tmp_path / "run"))
    wanted = to_json(measure(model, PROBE).to_record(0, "", {}))
    for record in records:
        assert [record[name] for name in SAME] == [wanted[name] for name in SAME]
    alone = discover(tmp_path / "a/100")
    assert [(one.step, one.tokens) for one in alone] == [(100, 100_000)]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"moe_config": {"num_experts": 8}}, "moe_config"),
    "windows": ({"sliding_window_size": 16}, "sliding_window_size 16"),
    "scaled": ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
    "interpolated": ({"rope_seq_len_interpolation_factor": 2.0}, "interpolation_factor 2.0"),
    "starcoder": ({"is_llama_config": False, "is_starcoder2_config": True}, "is_starcoder2_config"),
    "biased": ({"attention_bias": True}, "attention_bias"),
    "deeper": ({"num_hidden_layers": 5}, r"no decoder\.4"),
    "shallower": ({"num_hidden_layers": 3}, r"decoder\.3"),
    "untied": ({"tie_word_embeddings": False}, r"no lm_head\.pp_block\.weight"),
    "wider": ({"intermediate_size": 40}, r"gate_up_proj\.weight has shape \[96, 32\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused(name: str, tmp_path: Path) -> None:
    changes, said = REFUSED[name]
    write(tmp_path / "a/1", "llama", model_of("llama", True), 1, **changes)
    with pytest.raises(ArchiveError, match=said):
        list(scan(tmp_path / "a", probe=PROBE, run=tmp_path / "run"))


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a/1", "llama", model_of("llama", True), 2)
    where = tmp_path / "a/1/model/model/decoder/0/pp_block/attn/qkv_proj"
    first, second = sorted(where.iterdir())
    kept = second.read_bytes()

    def refused(said: str) -> None:
        with pytest.raises(ArchiveError, match=said):
            list(scan(tmp_path / "a", probe=PROBE, run=tmp_path / "run"))

    second.unlink()
    refused("1 files of 2 processes")
    second.write_bytes(first.read_bytes())
    refused("do not make one tensor")
    second.write_bytes(kept[:-4])
    refused("truncated or damaged")
    second.write_bytes(kept.replace(b"None#", b"Nine#", 1))
    refused("no part of a tensor")
    second.write_bytes(kept)
    scaled = {"model": {"init_method": {"use_mup": True}}}
    (tmp_path / "a/1/config.yaml").write_text(yaml.safe_dump(scaled))
    refused("use_mup")
