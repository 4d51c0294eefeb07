"""Run a probe under taps and leave no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from sinktrack.collect import Collector
from sinktrack.errors import MeasurementError, require
from sinktrack.measurement import Measurement
from sinktrack.models.base import adapt
from sinktrack.models.guard import out_of_memory, preserve_state, probe_context, refuse_unreadable
from sinktrack.models.parallel import is_apart
from sinktrack.models.passes import Digest, Passes
from sinktrack.probe import Probe

if TYPE_CHECKING:  # transformers is slow to import
    from sinktrack.models.any_decoder.decoder import Decoder as AnyDecoder
    from sinktrack.models.gathered import Gathered
    from sinktrack.models.huggingface import Decoder
    from sinktrack.models.streaming import Streamed


def measure(
    model: nn.Module | list[nn.Module] | AnyDecoder | Streamed,
    probe: Probe,
    *,
    batch_size: int | None = None,
    in_training: bool = False,
) -> Measurement:
    """Measure the P0 sink of a live model with one forward pass of the probe.

    The model is evaluated in its own dtype without dropout, autocast or gradients, and left as it
    was found: hooks, attention implementation, modes, gradients, random states, buffers, and what
    hangs on the attributes of its modules.

    Args:
        model: a transformers decoder, bare or wrapped (DDP, FSDP, torch.compile, PEFT, a module of
            your own that holds no other), or the text decoder of a vision-language model; or a
            Megatron-Core model, bare, wrapped or as the list of chunks of ``get_model``; or any
            other PyTorch decoder, by itself where it holds one evident list of blocks, else as a
            `sinktrack.Decoder` that names them; or a checkpoint as `measure_streamed` takes it.
            Where no process holds the whole model, every one must call, and each gets the
            measurement.
        probe: the fixed batch.
        batch_size: sequences per forward pass; all at once by default.
        in_training: leave out the total effects where they would cost over a tenth of the rest.

    Raises:
        ProbeError: the probe does not fit the model's vocabulary or positions.
        MeasurementError: the model cannot be measured exactly, which names the block and the
            reason; or there is not enough memory, which names the number to lower.
    """
    adapted = adapt(model)
    if adapted.backend == "megatron":
        from sinktrack.models.megatron.measure import measure_chunks

        return measure_chunks(model, probe, batch_size, in_training)
    if adapted.backend == "torch":
        from sinktrack.models.any_decoder.passes import measure_decoder

        return measure_decoder(adapted.model, probe, batch_size, in_training)
    if adapted.backend == "streamed":
        return measure_streamed(
            adapted.model, probe, batch_size=batch_size, in_training=in_training
        )
    if is_apart(adapted.model):
        return _measure_apart(adapted.model, probe, batch_size, in_training)
    from sinktrack.models.huggingface import watch
    from sinktrack.models.live import device_of, forward, readable, refuse_another_model

    passes = Passes(probe, batch_size)
    decoder = readable(adapted.model, probe)
    device = device_of(decoder)
    refuse_another_model(decoder, probe)
    with probe_context(decoder.model, passes.size, probe):
        for observer, batches in passes.both:
            with watch(decoder, observer):
                for tokens in batches:
                    forward(decoder.model, tokens.to(device))
        passes.ablate(decoder, decoder.model.base_model, in_training)
        for index in decoder.blocks:
            passes.step_ablated(index)
    digest = Digest(decoder.model.get_input_embeddings().weight, passes.first)
    for block in decoder.blocks.values():
        digest.add(block)
    _refuse_a_part(decoder, passes.collected)
    return passes.measurement(decoder, digest.hex())


def _measure_apart(
    model: nn.Module, probe: Probe, batch_size: int | None, in_training: bool
) -> Measurement:
    """Measure a model that no process holds whole; every process calls."""
    require("transformers", "hf")
    from sinktrack.models.blockwise import BlockwiseUnsupported
    from sinktrack.models.gathered import Gathered, all_or_none

    def gathered() -> Gathered:
        refuse_unreadable(model)
        return Gathered(model)

    with preserve_state(nn.Identity()):
        try:
            return measure_streamed(
                all_or_none(gathered), probe, batch_size=batch_size, in_training=in_training
            )
        except BlockwiseUnsupported as error:
            raise MeasurementError(
                f"{error}, and no process holds the whole model; measure the saved checkpoints "
                "with `sinktrack scan`"
            ) from error


@torch.no_grad()
def measure_streamed(
    streamed: Streamed | Gathered,
    probe: Probe,
    *,
    blocks: int | None = None,
    batch_size: int | None = None,
    in_training: bool = False,
) -> Measurement:
    """As `measure`, over a checkpoint of which one block at a time is in memory.

    Args:
        streamed: the checkpoint, or a live model that is gathered from several processes.
        probe: the fixed batch.
        blocks: measure the first blocks only. What depends on all is left out then: nan or None.
        batch_size: sequences per forward pass of a block; all at once by default.
        in_training: as of `measure`.

    Raises:
        BlockwiseUnsupported: the blocks do not run one by one; load the model and use `measure`.
        ArchiveError: a weight is missing or damaged.
        ProbeError, MeasurementError: as `measure`.
    """
    (measured,) = measure_together(
        streamed, [probe], blocks=blocks, batch_size=batch_size, in_training=in_training
    )
    return measured


@torch.no_grad()
def measure_together(
    streamed: Streamed | Gathered,
    probes: Sequence[Probe],
    *,
    blocks: int | None = None,
    batch_size: int | None = None,
    in_training: bool = False,
) -> list[Measurement]:
    """`measure_streamed` of several probes, for which each block is read once.

    Total effects and the digest of the weights are of the first probe alone; by its size, all of
    the first go through a block at once, and as many of the others.
    """
    from sinktrack.models.blockwise import BlockwiseForward
    from sinktrack.models.huggingface import watch
    from sinktrack.models.live import check

    own, *others = probes
    size = batch_size or own.sequences
    passes = [Passes(own, batch_size), *(Passes(other, size) for other in others)]
    decoder = streamed.decoder
    for probe in probes:
        check(probe, decoder)
    streamed.load_surroundings(torch.cat([probe.tokens.flatten() for probe in probes]))
    total = len(decoder.blocks)
    count = total if blocks is None else min(blocks, total)
    shown = dataclasses.replace(
        decoder, blocks={index: decoder.blocks[index] for index in range(count)}
    )
    embedding = streamed.base.get_input_embeddings()
    device = embedding.weight.device
    digest = Digest(embedding.weight, passes[0].first)
    with out_of_memory(size, own), preserve_state(embedding):
        walks = [
            (
                observer,
                [BlockwiseForward(decoder, streamed.base, tokens.to(device)) for tokens in batches],
            )
            for of_probe in passes
            for observer, batches in of_probe.both
        ]
        passes[0].ablate(decoder, streamed.base, in_training)
        for index in range(count):
            with streamed.block(index, count - 1) as block:
                digest.add(block)
                for observer, group in walks:
                    with watch(shown, observer):
                        for walk in group:
                            walk.step(index)
                passes[0].step_ablated(index)
    for of_probe in passes:
        _refuse_a_part(decoder, of_probe.collected)
    weights = [digest.hex() if count == total else None, *[None] * len(others)]
    return [
        of_probe.measurement(decoder, own) for of_probe, own in zip(passes, weights, strict=True)
    ]


def _refuse_a_part(found: Decoder, collected: Collector) -> None:
    """Refuse fewer or more than the configuration says: heads, experts, blocks and width."""
    from sinktrack.models.huggingface import experts_held

    counts = [("blocks", "the model", len(found.blocks), found.number("num_hidden_layers"))]
    for index, block in found.blocks.items():
        name = f"block {index} ({type(block).__name__})"
        if attended := collected.of("attention", "p0").get(index):
            counts.append(("attention heads", name, attended[0].shape[1], found.heads(index)))
        if entered := collected.of("state", "row").get(index):
            width = found.number("hidden_size", block=index)
            counts.append(("channels", name, entered[0].shape[1], width))
        counts += [("experts", name, held, found.experts_of(index)) for held in experts_held(block)]
    for what, where, seen, said in counts:
        if said is not None and seen != said:
            raise MeasurementError(
                f"{where} shows {seen} {what}, by its configuration it has {said}: a part is not "
                "measured as if it were all; give the whole model, or measure the saved "
                "checkpoints with `sinktrack scan`"
            )
