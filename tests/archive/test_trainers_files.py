"""Checkpoints of other trainers measure as the transformers model of their weights does.

Lightning and torch write their own here; the others are laid out as the published code writes them,
by maps of this file's own.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional
from transformers import Olmo2Config, OlmoConfig, Qwen3Config

from sinktrack import ArchiveError, measure, scan
from sinktrack.archive.discover import discover
from sinktrack.archive.follow import lack
from sinktrack.records.run import to_json
from tests.helpers import models
from tests.helpers.commands import two_processes
from tests.helpers.trainings import PROBE

SAME = ("weights", "p0_attention", "norm_ratio")


def llama(**changes: Any) -> Any:
    return models.llama(num_hidden_layers=2, **changes)


def check(
    archive: Path, model: Any, run: Path, step: int, tokens: int | None = None, **options: Any
) -> None:
    """The one checkpoint measures as this model."""
    (record,) = scan(archive, probe=PROBE, run=run, **options)
    live = to_json(measure(model, PROBE).to_record(step, "live", {}))
    assert record["step"] == step and record.get("tokens") == tokens
    for name in SAME:
        assert record[name] == live[name], name


def config(path: Path, model: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(path)
    return path


@pytest.mark.parametrize("attribute", ["model", "net"])
def test_lightning(attribute: str, tmp_path: Path) -> None:
    """Its own trainer's files, with hyperparameters of any class and a metric beside the model."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, given: argparse.Namespace) -> None:
            super().__init__()
            self.save_hyperparameters()
            setattr(self, attribute, llama())
            self.scale = nn.Linear(1, 1)

        def training_step(self, batch: Any) -> Tensor:
            return 0 * self.scale.weight.sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    saved = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1, save_last=True
    )
    trainer = lightning.Trainer(
        max_steps=2, callbacks=[saved], logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    numbers: Any = [0, 1]
    trainer.fit(Module(argparse.Namespace(a=Path("x"))), torch.utils.data.DataLoader(numbers))
    archive = tmp_path / "checkpoints"
    assert {path.name for path in archive.iterdir()} >= {"last.ckpt"}
    hf = config(tmp_path / "hf", llama())
    check(archive, llama(), tmp_path / "run", 2, hf_config=hf)
    (alone,) = discover(archive / "last.ckpt", hf_config=hf)
    assert lack(alone) is None and alone.step == 2


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/sinktrack-was-here"),)


FILES: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], int, int | None]] = {
    "composer": ("ep0-ba40-rank0.pt", lambda w: {"state": {
        "model": {f"model.{k}": v for k, v in w.items()}, "run_name": "x", "rng": [{"a": Evil()}],
        "timestamp": {"Timestamp": {"epoch": 0, "batch": 40, "token": 77}}}}, 40, 77),
    "FSDP whole": ("checkpoint-9/pytorch_model_fsdp.bin", lambda w: w, 9, None),
    "a loop": ("step_30.pt", lambda w: {"model": {f"_orig_mod.{k}": v for k, v in w.items()},
               "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "step": 31}, 30, None),
    "a loop without a name": ("weights.pt", lambda w: {"model_state_dict": w, "step": 31}, 31,
                              None),
    "DeepSpeed 1": ("global_step8/mp_rank_00_model_states.pt", lambda w: {
        "module": {f"module.{k}": v for k, v in w.items()}, "args": Evil(), "ds_version": "0.19",
        "lr_scheduler": None}, 8, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_one_file_by_torch_save(name: str, tmp_path: Path) -> None:
    file, tree, step, tokens = FILES[name]
    path = tmp_path / "a" / file
    path.parent.mkdir(parents=True)
    torch.save(tree(llama().state_dict()), path)
    hf = config(tmp_path / "hf", llama())
    check(tmp_path / "a", llama(), tmp_path / "run", step, tokens, hf_config=hf)
    assert not Path("/tmp/sinktrack-was-here").exists()
    data = path.read_bytes()
    path.write_bytes(data[:-40])  # cut short
    found = discover(tmp_path / "a", hf_config=hf) if name != "a loop without a name" else []
    assert all("truncated or damaged" in str(lack(one)) for one in found)


def test_two_models_in_one_file_are_told(tmp_path: Path) -> None:
    weights = llama().state_dict()
    both = {
        f"{who}.{name}": value for who in ("student", "teacher") for name, value in weights.items()
    }
    torch.save({"state_dict": both, "global_step": 3}, tmp_path / "a.ckpt")
    (found,) = discover(tmp_path, hf_config=config(tmp_path / "hf", llama()))
    assert "holds several models, under student., teacher." in str(lack(found))


def zero3(path: Path, weights: dict[str, Tensor], processes: int) -> None:
    """As DeepSpeed lays it out: two flat rows a process, each weight cut into equal parts."""
    rows: list[Tensor] = []
    for rank in range(processes):
        parts = []
        for value in weights.values():
            share = math.ceil(value.numel() / processes)
            flat = functional.pad(value.flatten(), (0, share * processes - value.numel()))
            parts.append(flat[rank * share : (rank + 1) * share])
        rows.append(torch.cat(parts))
    path.mkdir(parents=True)
    for rank, row in enumerate(rows):
        shapes = {name: value.shape for name, value in weights.items()}
        torch.save(
            {"module": {name: torch.empty(0) for name in weights}, "param_shapes": [shapes],
             "buffer_names": [], "ds_version": "0.19"},
            path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
        )  # fmt: skip
        cut = len(row) // 3
        torch.save(
            {"optimizer_state_dict": {"zero_stage": 3, "partition_count": processes,
             "fp32_flat_groups": [row[:cut].clone(), row[cut:].clone()]}},
            path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )  # fmt: skip


@pytest.mark.parametrize("processes", [1, 3])
def test_deepspeed_zero_3(processes: int, tmp_path: Path) -> None:
    zero3(tmp_path / "a/global_step5", llama().state_dict(), processes)
    hf = config(tmp_path / "hf", llama())
    check(tmp_path / "a", llama(), tmp_path / "run", 5, hf_config=hf)
    (tmp_path / "a/latest").write_text("global_step5")
    inside = (tmp_path / "a").rename(tmp_path / "checkpoint-6")  # in a trainer's checkpoint
    check(inside, llama(), tmp_path / "run2", 6, hf_config=hf)
    if processes > 1:
        (inside / "global_step5/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
        (found,) = discover(inside, hf_config=hf)
        assert "was written by 3 processes, 2 of whose files" in str(lack(found))


def test_deepspeeds_tensor_parallel_parts_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        path = tmp_path / f"global_step5/mp_rank_0{rank}_model_states.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save({"module": llama().state_dict()}, path)
    (found,) = discover(tmp_path, hf_config=config(tmp_path / "hf", llama()))
    assert "split into tensor- or pipeline-parallel parts" in str(lack(found))


@pytest.mark.distributed
def test_verl(tmp_path: Path) -> None:
    """Parts as FSDP 2 leaves them on two processes."""
    two_processes(
        tmp_path,
        """
        from torch.distributed.fsdp import fully_shard
        dist.init_process_group("gloo")
        model = models.llama(num_hidden_layers=2)
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        place = out / "a/global_step4/actor"
        place.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), place / f"model_world_size_2_rank_{dist.get_rank()}.pt")
        if dist.get_rank() == 0:
            model.config.save_pretrained(place / "huggingface")
        dist.destroy_process_group()
        """,
    )
    check(tmp_path / "a", llama(), tmp_path / "run", 4)


def nanogpt(path: Path, model: Any, biased: bool) -> None:
    weights = {}
    for name, value in model.state_dict().items():
        turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        if biased or not name.endswith(".bias"):
            weights[f"_orig_mod.{name}"] = value.T.contiguous() if turned else value
    sizes = model.config
    arguments = {"n_layer": sizes.n_layer, "n_head": sizes.n_head, "n_embd": sizes.n_embd,
                 "block_size": sizes.n_positions, "bias": biased, "vocab_size": sizes.vocab_size,
                 "dropout": 0.0}  # fmt: skip
    torch.save({"model": weights, "model_args": arguments, "iter_num": 250,
                "best_val_loss": torch.tensor(1.0), "config": {"a": 1}}, path)  # fmt: skip


@pytest.mark.parametrize("biased", [True, False])
def test_nanogpt(biased: bool, tmp_path: Path) -> None:
    model = models.gpt2(activation_function="gelu")
    if not biased:
        for name, value in model.named_parameters():
            if name.endswith(".bias"):
                value.data.zero_()
    nanogpt(tmp_path / "ckpt.pt", model, biased)
    check(tmp_path, model, tmp_path / "run", 250)


class NanoChat(nn.Module):
    """The block of nanochat's first releases, written after its source."""

    def __init__(self, weights: dict[str, Tensor], heads: int, groups: int) -> None:
        super().__init__()
        self.weights, self.heads, self.groups = weights, heads, groups

    def forward(self, tokens: Tensor) -> Tensor:
        w, length = self.weights, tokens.shape[1]
        hidden = w["transformer.wte.weight"].shape[1]
        width = hidden // self.heads

        def norm(x: Tensor) -> Tensor:
            return functional.rms_norm(x, (x.shape[-1],))

        angles = torch.outer(
            torch.arange(length).float(), 10000.0 ** -(torch.arange(0, width, 2) / width)
        )
        cos, sin = angles.cos(), angles.sin()

        def rotated(x: Tensor) -> Tensor:
            one, two = x.chunk(2, -1)
            return norm(torch.cat([one * cos + two * sin, two * cos - one * sin], -1))

        x = norm(functional.embedding(tokens, w["transformer.wte.weight"]))
        block = 0
        while f"transformer.h.{block}.attn.c_q.weight" in w:
            at, y = f"transformer.h.{block}", norm(x)
            q, k, v = (
                (y @ w[f"{at}.attn.c_{n}.weight"].T).view(*y.shape[:2], -1, width).transpose(1, 2)
                for n in "qkv"
            )
            mixed = functional.scaled_dot_product_attention(
                rotated(q), rotated(k), v, is_causal=True, enable_gqa=True
            )
            x = x + mixed.transpose(1, 2).flatten(2) @ w[f"{at}.attn.c_proj.weight"].T
            y = functional.relu(norm(x) @ w[f"{at}.mlp.c_fc.weight"].T).square()
            x = x + y @ w[f"{at}.mlp.c_proj.weight"].T
            block += 1
        logits = norm(x) @ w["lm_head.weight"].T
        return 15 * torch.tanh(logits / 15)


def nanochat(path: Path, rows: int = models.VOCABULARY) -> dict[str, Tensor]:
    path.mkdir()
    torch.manual_seed(0)
    hidden, heads, groups, blocks = 32, 4, 2, 3
    few = hidden // heads * groups
    sizes = {"attn.c_q": (hidden, hidden), "attn.c_k": (few, hidden), "attn.c_v": (few, hidden),
             "attn.c_proj": (hidden, hidden), "mlp.c_fc": (4 * hidden, hidden),
             "mlp.c_proj": (hidden, 4 * hidden)}  # fmt: skip
    weights = {name: torch.randn(rows, hidden) for name in
               ("transformer.wte.weight", "lm_head.weight")}  # fmt: skip
    for block in range(blocks):
        for name, shape in sizes.items():
            weights[f"transformer.h.{block}.{name}.weight"] = 0.2 * torch.randn(shape)
    meta = {"step": 500, "total_batch_size": 1024, "model_config": {
        "sequence_len": 128, "vocab_size": models.VOCABULARY, "n_layer": blocks, "n_head": heads,
        "n_kv_head": groups, "n_embd": hidden}}  # fmt: skip
    torch.save(weights, path / "model_000500.pt")
    (path / "meta_000500.json").write_text(json.dumps(meta))
    torch.save({}, path / "optim_000500_rank0.pt")
    return weights


def test_nanochat(tmp_path: Path) -> None:
    from sinktrack.archive.huggingface import load

    weights = nanochat(tmp_path / "a", rows=models.VOCABULARY + 7)  # a padded vocabulary
    (found,) = discover(tmp_path / "a")
    model = load(found)
    tokens = PROBE.tokens
    cut = {
        k: v[: models.VOCABULARY] if len(v) > 65 and "h." not in k else v
        for k, v in weights.items()
    }
    own = NanoChat(cut, 4, 2)(tokens)
    torch.testing.assert_close(model(tokens).logits, own, atol=1e-4, rtol=1e-4)
    check(tmp_path / "a", model, tmp_path / "run", 500, 500 * 1024)
    meta = json.loads((tmp_path / "a/meta_000500.json").read_text())
    meta["model_config"]["window_pattern"] = "SSSL"
    (tmp_path / "a/meta_000500.json").write_text(json.dumps(meta))
    assert "has window_pattern, of a later release" in str(lack(found))


def olmo(model: Any, path: Path, **sizes: Any) -> None:
    """As the first trainer names them."""
    path.mkdir(parents=True)
    w, found = model.state_dict(), {}
    found["model.transformer.wte.weight"] = w["model.embed_tokens.weight"]
    found["model.transformer.ff_out.weight"] = w["lm_head.weight"]
    if "model.norm.weight" in w:
        found["model.transformer.ln_f.weight"] = w["model.norm.weight"]
    renamed = {"self_attn.o_proj": "attn_out", "mlp.down_proj": "ff_out",
               "self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm",
               "post_attention_layernorm": "attn_norm",
               "post_feedforward_layernorm": "ff_norm"}  # fmt: skip
    for block in range(model.config.num_hidden_layers):
        at, own = f"model.layers.{block}", f"model.transformer.blocks.{block}"
        found[f"{own}.att_proj.weight"] = torch.cat(
            [w[f"{at}.self_attn.{n}_proj.weight"] for n in "qkv"]
        )
        found[f"{own}.ff_proj.weight"] = torch.cat(
            [w[f"{at}.mlp.{n}_proj.weight"] for n in ("up", "gate")]
        )
        for name, new in renamed.items():
            if f"{at}.{name}.weight" in w:
                found[f"{own}.{new}.weight"] = w[f"{at}.{name}.weight"]
    torch.save({k.removeprefix("model."): v for k, v in found.items()}, path / "model.pt")
    c = model.config
    values = {"d_model": c.hidden_size, "n_heads": c.num_attention_heads,
              "n_layers": c.num_hidden_layers, "mlp_hidden_size": 2 * c.intermediate_size,
              "vocab_size": c.vocab_size, "embedding_size": c.vocab_size, "weight_tying": False,
              "max_sequence_length": 128, "rope": True, "include_bias": False, "alibi": False,
              "activation_type": "swiglu", "block_type": "sequential",
              "bias_for_layer_norm": False} | sizes  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump({"model": values, "seed": 1}))


def test_olmos_first_trainer(tmp_path: Path) -> None:
    shared = models.small(num_hidden_layers=2, num_key_value_heads=4)
    one = models.build(OlmoConfig(**shared))
    olmo(one, tmp_path / "one/step1000-unsharded", layer_norm_type="default",
         layer_norm_with_affine=False, attention_layer_norm=False)  # fmt: skip
    check(tmp_path / "one", one, tmp_path / "run1", 1000)
    two = models.build(Olmo2Config(**models.small(num_hidden_layers=2)))
    olmo(two, tmp_path / "two/step2000-unsharded", layer_norm_type="rms", norm_after=True,
         n_kv_heads=2, layer_norm_with_affine=True, attention_layer_norm=True)  # fmt: skip
    check(tmp_path / "two", two, tmp_path / "run2", 2000)
    olmo(one, tmp_path / "three/step1000-unsharded", layer_norm_type="rms")
    (found,) = discover(tmp_path / "three")
    assert "neither OLMo 1 nor OLMo 2" in str(lack(found))


LITGPT: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (llama, {}),
    "qwen3": (lambda: models.build(Qwen3Config(**models.small(head_dim=16, num_hidden_layers=2))),
              {"norm_qk": True, "head_size": 16}),
    "gpt_neox": (lambda: models.gpt_neox(), {
        "mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm", "bias": True,
        "parallel_residual": True, "rotary_percentage": 0.25, "n_query_groups": 4}),
}  # fmt: skip


def litgpt(model: Any, path: Path, grouped: bool, **sizes: Any) -> None:
    """As litgpt names them; its releases before 0.5.4 had queries, keys and values by group."""
    path.mkdir(parents=True)
    c, neox = model.config, model.config.model_type == "gpt_neox"
    width = sizes.get("head_size", c.hidden_size // c.num_attention_heads)
    values = {"n_layer": c.num_hidden_layers, "n_embd": c.hidden_size, "block_size": 128,
              "n_head": c.num_attention_heads, "n_query_groups": 2, "vocab_size": 60,
              "padded_vocab_size": c.vocab_size, "head_size": width, "norm_eps": 1e-6,
              "intermediate_size": c.intermediate_size, "rope_base": 10000, "bias": False,
              "mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm", "hf_config": {},
              "rotary_percentage": 1.0, "parallel_residual": False} | sizes  # fmt: skip
    values["norm_eps"] = c.layer_norm_eps if neox else c.rms_norm_eps
    renamed = {
        "model.embed_tokens": "transformer.wte", "gpt_neox.embed_in": "transformer.wte",
        "model.norm": "transformer.ln_f", "gpt_neox.final_layer_norm": "transformer.ln_f",
        "embed_out": "lm_head", "model.layers": "transformer.h", "gpt_neox.layers": "transformer.h",
        "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2",
        "self_attn.o_proj": "attn.proj", "attention.dense": "attn.proj", "self_attn.": "attn.",
        "q_norm": "norm_q", "k_norm": "norm_k", "mlp.gate_proj": "mlp.fc_1",
        "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj", "dense_h_to_4h": "fc",
        "dense_4h_to_h": "proj",
    }  # fmt: skip
    found: dict[str, Tensor] = {}
    w = model.state_dict()
    for name, value in w.items():
        if any(n in name for n in ("k_proj", "v_proj", "query_key_value", "inv_freq")):
            continue
        new = name
        for old, own in renamed.items():
            new = new.replace(old, own)
        if "q_proj" in name:
            parts = [w[name.replace("q_proj", f"{n}_proj")] for n in "qkv"]
            new = new.replace("q_proj", "attn" if grouped else "qkv")
            if grouped:
                groups = values["n_query_groups"]
                cut = [part.view(groups, -1, part.shape[-1]) for part in parts]
                found[new] = torch.cat(cut, 1).reshape(-1, value.shape[-1])
            else:
                found[new] = torch.cat(parts)
        else:
            found[new] = value
    for name, value in w.items():
        if "query_key_value" in name:
            block, kind = name.split(".")[2], name.rpartition(".")[2]
            heads = value.view(c.num_attention_heads, 3, width, *value.shape[1:])
            stacked = value if grouped else heads.transpose(0, 1).reshape(value.shape)
            found[f"transformer.h.{block}.attn.{'attn' if grouped else 'qkv'}.{kind}"] = stacked
    torch.save({"model": found, "iter_num": 88, "step_count": 11}, path / "lit_model.pth")
    (path / "model_config.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", LITGPT)
def test_litgpt(name: str, grouped: bool, tmp_path: Path) -> None:
    make, sizes = LITGPT[name]
    model = make()
    litgpt(model, tmp_path / "a/step-00000011", grouped, **sizes)
    check(tmp_path / "a", model, tmp_path / "run", 11)
    if grouped:
        final = (tmp_path / "a/step-00000011").rename(tmp_path / "final")
        assert [found.step for found in discover(final)] == [11]
        litgpt(model, tmp_path / "b/step-1", False, **sizes, final_logit_softcapping=30.0)
        with pytest.raises(ArchiveError, match="convert_from_litgpt"):
            list(scan(tmp_path / "b", probe=PROBE, run=tmp_path / "run2"))
