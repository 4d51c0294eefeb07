"""Megatron-Core's own HybridModel (MambaModel in 0.16) at a tiny size, and what runs it.

As a script, under torchrun: ``megatron_hybrid.py OUT CASE...`` measures cases, a pattern and a
layout each, and saves what it finds in the file OUT, on process 0. Layers, stacks, attentions,
experts and gated delta nets are Megatron's. Its Mamba mixer wants kernels for GPUs: a plain one
stands in for it, inside of Megatron's MambaLayer.
"""

from __future__ import annotations

import re
import sys
import traceback
from typing import Any

import megatron_cpu
import torch
import torch.distributed as dist

from sinktrack import measure
from sinktrack.interventions.patching import Patch, Term
from sinktrack.interventions.replay import replaying
from tests.helpers import megatron_models as models
from tests.helpers.megatron_models import (
    DEEPSEEK,
    FEATURES,
    GATED,
    MLA,
    PROBE,
    VOCABULARY,
    Norm,
    PlainAttention,
    config,
    fill,
    layout,
    measured,
)

FEATURES |= {
    "hybrid": GATED | {"num_query_groups": 2},
    "hybrid experts": DEEPSEEK | {"moe_layer_freq": [0, 1], "qk_layernorm": True},
    "hybrid delta": GATED
    | {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [1, 0],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "deterministic_mode": True,
    },
    "hybrid latent": DEEPSEEK | MLA | {"moe_layer_freq": [0, 1]},
    "hybrid windows": GATED | {"window_size": (5, 0), "window_attn_skip_freq": 3},
    "hybrid gate": GATED | {"attention_output_gate": True},
}


class MambaMixer(torch.nn.Module):
    """Stands in for Megatron's: same call, same kind of result; a decaying sum over positions."""

    def __init__(self, config: Any, d_model: int, **_: Any) -> None:
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        super().__init__()
        given = {"config": config, "init_method": config.init_method, "bias": False}
        self.in_proj = ColumnParallelLinear(d_model, d_model, gather_output=False, **given)
        self.out_proj = RowParallelLinear(
            d_model, d_model, input_is_parallel=True, skip_bias_add=True, **given
        )

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        inner, _ = self.in_proj(hidden_states)
        state, outputs = torch.zeros_like(inner[0]), []
        for row in inner:
            state = 0.8 * state + row
            outputs.append(state)
        return self.out_proj(torch.stack(outputs))


def classes() -> tuple[Any, Any, Any, str]:
    """The model, the stack, what its layers are told by, and what its pattern is called."""
    try:
        from megatron.core.models.hybrid import hybrid_block as block
        from megatron.core.models.hybrid.hybrid_model import HybridModel as Model
    except ImportError:
        from megatron.core.models.mamba.mamba_model import MambaModel as Model
        from megatron.core.ssm import mamba_block as block

        block.TENorm = Norm  # it takes no other for the last one
        return Model, block.MambaStack, block.MambaStackSubmodules, "hybrid_override_pattern"
    block.TENorm = Norm
    return Model, block.HybridStack, block.HybridStackSubmodules, "hybrid_layer_pattern"


def _delta_net() -> Any:
    """Megatron's gated delta net, by its own computation in torch."""
    import megatron.core.ssm.gated_delta_net as delta
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    home = getattr(delta, "common", delta)
    for name in (home, getattr(delta, "gdn", delta)):
        name.l2norm = lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    home.HAVE_FLA = True  # only asked for: nothing of it is called in deterministic mode
    return ModuleSpec(
        module=delta.GatedDeltaNet,
        submodules=delta.GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=Norm, out_proj=RowParallelLinear
        ),
    )


def specification(settings: Any) -> Any:
    """Of the stack: Megatron's local layers, cut into one sublayer each."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer import TransformerLayer, TransformerLayerSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    latent = settings.multi_latent_attention

    def whole(experts: int | None) -> Any:
        return get_gpt_layer_local_spec(
            num_experts=experts,
            moe_grouped_gemm=False,
            qk_layernorm=settings.qk_layernorm,
            multi_latent_attention=latent,
            normalization=settings.normalization,
        ).submodules

    dense, bda = whole(None), get_bias_dropout_add
    attention = dense.self_attention
    for name in ("q_layernorm", "k_layernorm"):
        if settings.qk_layernorm:
            setattr(attention.submodules, name, Norm)
    if latent or settings.context_parallel_size > 1:
        attention.submodules.core_attention = PlainAttention

    def attends(of: Any) -> Any:
        parts = TransformerLayerSubmodules(
            input_layernorm=Norm, self_attention=of, self_attn_bda=bda
        )
        return ModuleSpec(module=TransformerLayer, submodules=parts)

    def feeds(module: Any, of: Any) -> Any:
        parts = TransformerLayerSubmodules(pre_mlp_layernorm=Norm, mlp=of, mlp_bda=bda)
        return ModuleSpec(module=module, submodules=parts)

    _, stack, kind, _ = classes()
    mixer = MambaLayerSubmodules(norm=Norm, mixer=ModuleSpec(module=MambaMixer), mamba_bda=bda)
    layers = {
        "mamba_layer": ModuleSpec(module=MambaLayer, submodules=mixer),
        "attention_layer": attends(attention),
        "mlp_layer": feeds(MLPLayer, dense.mlp),
    }
    if "mla_layer" in kind.__dataclass_fields__:
        layers["mla_layer"] = attends(attention)
    if settings.num_moe_experts:
        layers["moe_layer"] = feeds(TransformerLayer, whole(settings.num_moe_experts).mlp)
    if getattr(settings, "experimental_attention_variant", None):
        layers["gdn_layer"] = attends(_delta_net())
    return ModuleSpec(module=stack, submodules=kind(**layers))


def build(name: str, pattern: str, **changes: Any) -> Any:
    """The part that this process holds, with weights that do not depend on the layout."""
    from megatron.core import parallel_state as state

    settings = config(name, num_layers=len(pattern.replace("|", "")), **changes)
    settings.moe_layer_freq = 1
    model, _, _, called = classes()
    if called == "hybrid_override_pattern":
        pattern = pattern.replace("|", "")
    chunk = model(
        settings,
        specification(settings),
        VOCABULARY,
        max_sequence_length=128,
        pre_process=state.is_pipeline_first_stage(),
        post_process=state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        **{called: pattern},
    )
    fill(chunk)
    return chunk


def seen(chunk: Any) -> dict[str, Any]:
    """The stream around every block, and the attention matrices, by hooks of our own."""
    states: list[torch.Tensor] = []
    matrices: dict[int, torch.Tensor] = {}
    handles = []
    for block, layer in enumerate(chunk.decoder.layers):

        def entered(_: Any, args: Any, kwargs: Any) -> None:
            states.append((args[0] if args else kwargs["hidden_states"]).transpose(0, 1))

        def left(_: Any, args: Any, output: Any) -> None:
            states.append((output[0] if isinstance(output, tuple) else output).transpose(0, 1))

        handles.append(layer.register_forward_pre_hook(entered, with_kwargs=True))
        if block == len(chunk.decoder.layers) - 1:
            handles.append(layer.register_forward_hook(left))
        core = getattr(getattr(layer, "self_attention", None), "core_attention", None)
        if core is None:
            continue

        def kept(core: Any, args: Any, output: Any, block: int = block) -> None:
            matrices[block] = getattr(core, "probabilities", output).detach()

        of = getattr(core, "scale_mask_softmax", core)
        handles.append(of.register_forward_hook(kept))
    tokens = PROBE.tokens
    with torch.no_grad():
        chunk.eval()(tokens, torch.arange(tokens.shape[1]).expand(len(tokens), -1), None)
    for handle in handles:
        handle.remove()
    return {"states": torch.stack(states).double(), "matrices": matrices}


def as_gpt() -> tuple[Any, Any]:
    """Measurements of a GPTModel and of the hybrid one whose sublayers are its blocks'."""
    megatron_cpu.start()
    (gpt,) = models.build(config("hybrid experts", num_layers=2))
    hybrid = build("hybrid experts", "*-*E")
    named = gpt.state_dict()
    with torch.no_grad():
        for name, value in hybrid.state_dict().items():
            if isinstance(value, torch.Tensor):
                value.copy_(named[_in_gpt(name)])
    return measured([gpt])[0], measured([hybrid])[0]


def _in_gpt(name: str) -> str:
    """What GPTModel calls a weight of a model of twice as many blocks."""
    halved = re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) // 2}", name)
    return halved.replace("final_norm", "final_layernorm")


def edits() -> dict[str, tuple[Any, Any]]:
    """By what is edited, the losses of `replaying` and of plain hooks in the model's forward."""
    megatron_cpu.start()
    chunk = build("hybrid experts", "*-*EM*E").eval()
    first = torch.zeros(PROBE.sequences, dtype=torch.long)
    at = {"mlp": 1, "mixer": 4, "head": 2, "experts": 3}
    terms = {
        what: Term({"experts": "mlp"}.get(what, what), block, 2 if what == "head" else None)
        for what, block in at.items()
    }
    with replaying([chunk], PROBE) as replay:
        wanted = [Patch([term], first, "zero") for term in terms.values()]
        found = dict(zip(terms, replay.run(wanted, loss=True), strict=True))

    def none(module: Any, args: Any, output: Any) -> Any:
        added = output[0] if output[1] is None else output[0] + output[1]
        return torch.cat([torch.zeros_like(added[:1]), added[1:]]), None

    def no_head(module: Any, args: Any) -> Any:
        mixed = args[0].clone()
        mixed[0].unflatten(-1, (4, -1))[:, 2] = 0
        return (mixed, *args[1:])

    results = {}
    tokens = PROBE.tokens
    for what, block in at.items():
        layer = chunk.decoder.layers[block]
        if what == "head":
            handle = layer.self_attention.linear_proj.register_forward_pre_hook(no_head)
        else:
            sublayer = layer.mixer if what == "mixer" else layer.mlp
            handle = sublayer.register_forward_hook(none)
        with torch.no_grad():
            logits = chunk(tokens, torch.arange(tokens.shape[1]).expand(len(tokens), -1), None)
        handle.remove()
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].mT, tokens[:, 1:], reduction="none"
        )
        results[what] = found[what].loss, losses[:, 1:].double().mean(1)
    return results


def trained() -> tuple[Any, Any]:
    """Losses, weights and random state after four steps, without and with a probe at each."""
    results = []
    for probes in (False, True):
        megatron_cpu.start()
        chunk = build("hybrid experts", "*-*EM*E", attention_dropout=0.1, hidden_dropout=0.1)
        optimizer = torch.optim.AdamW(chunk.train().parameters(), lr=1e-2)
        torch.manual_seed(3)
        losses = []
        for _ in range(4):
            tokens = torch.randint(VOCABULARY, (2, 12))
            positions = torch.arange(12).expand(2, -1)
            loss = chunk(tokens, positions, None, labels=tokens).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if probes:
                measure([chunk], PROBE)
        weights = [value.detach().clone() for value in chunk.parameters()]
        results.append((losses, weights, torch.get_rng_state(), chunk.training))
    return results[0], results[1]


def main(out: str, *cases: str) -> None:
    """Each case is a model's name, its pattern and a layout, with colons between; or a function."""
    results: dict[str, Any] = {}
    for case in cases:
        if ":" not in case:
            results[case] = globals()[case]()
            continue
        name, pattern, text = case.split(":")
        sizes, changes = layout(text)
        megatron_cpu.start(**sizes)
        try:
            chunk = build(name, pattern, **changes)
            one = dist.get_world_size() == 1
            found = measured([chunk], **({} if one else {"batch_size": 2}))
            results[case] = (*found, seen(chunk)) if one else found
        except Exception:
            results[case] = traceback.format_exc()
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
