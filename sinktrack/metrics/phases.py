"""Sink phases: stretches of consecutive blocks that rest on P0. A model can have several.

SmolLM2-135M rests on P0 in blocks 3 to 9 on what MLPs 1 and 2 write, erases that state, and rests
again in blocks 12 to 29 on what MLP 11 writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sinktrack.lazy import torch
from sinktrack.metrics.attention import EPSILON
from sinktrack.metrics.base import Field, Metric, Row, Seen, number

if TYPE_CHECKING:
    from torch import Tensor

GOES_ON = EPSILON / 2
"""Concentration with which a phase that began goes on."""


@dataclass(frozen=True)
class Phase:
    """A stretch of consecutive blocks that rest on P0, and where its state grows and falls."""

    first_block: int
    last_block: int
    mass: float
    """Sum of the blocks' concentrations."""
    peak_block: int
    """At whose input, of the phase's blocks, the norm ratio is highest."""
    step_up_block: int | None
    """The block of the largest gain up to the peak, since the phase before; None where the peak is
    block 0's input."""
    step_down_block: int | None
    """The block of the largest fall after the peak, up to the next phase; None where none falls."""

    def to_record(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {name: getattr(self, name) for name in Phase.__dataclass_fields__}


def _rows(phases: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Numbers of each phase and of its components, ``level`` the phase's place."""
    for place, phase in enumerate(phases):
        for name in Phase.__dataclass_fields__:
            yield {"metric": f".{name}", "level": place, "value": phase[name]}
        for name in ("writers", "erasers", "top_components"):
            for row in component_rows(phase.get(name, ())):
                yield {**row, "metric": f".{name}{row.get('metric', '')}", "level": place}
        for effect in phase.get("total_effects") or ():
            where = {key: effect[key] for key in ("kind", "block", "index")}
            value = effect["effect"]
            yield {**where, "metric": ".total_effects", "level": place, "value": value}


def component_rows(parts: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Long-form rows of components as records hold them: their shares, and experts' gates."""
    for part in parts:
        where = {key: part[key] for key in ("kind", "block", "index")}
        yield {**where, "value": part["share"]}
        yield {"metric": ".gate", **where, "value": part.get("gate")}


class Phases(Metric):
    """The phases, and the one of largest mass, of which the story is told first."""

    fields = (
        Field("formed", "a sink has formed", "Is there a sink phase?"),
        Field("reference_block", "first block of the main phase", "The first block of the sink "
              "phase of largest mass.", (), "block", form=".0f", curve=True),
        Field("sinks", "sink phases", "Stretches of consecutive blocks that rest on P0: they begin "
              "at a concentration of 0.3 and go on down to 0.15.", ("phase",), rows=_rows),
        Field("gain", "gain", "Log of the growth of the norm ratio over a block.", ("block",), "",
              form="+z.2f"),
        Field("peak_block", "peak of the norm ratio", "The block at whose input the norm ratio is "
              "highest; the number of blocks for the last one's output.", (), "block",
              form=".0f"),
        Field("first_two_gain", "first-two gain", "Share of the growth of the log norm ratio up to "
              "its peak that lies in blocks 0 and 1.", (), "share", form=".1%", curve=True),
    )  # fmt: skip

    def compute(self, seen: Seen, found: Mapping[str, Any]) -> dict[str, Any]:
        """As the fields say; ``main`` is the phase of largest mass, or None."""
        concentration = found["concentration"][: seen.measured]
        ratio = found["norm_ratio"][: seen.measured + 1]
        phases = phases_of(concentration, ratio)
        main = max(phases, key=lambda phase: phase.mass, default=None)
        gain, peak, early = amplification(ratio)
        return {
            "formed": bool(phases),
            "reference_block": None if main is None else main.first_block,
            "sinks": phases,
            "main": main,
            "gain": seen.padded(gain),
            "peak_block": None if seen.partial else peak,
            "first_two_gain": None if seen.partial else early,
        }


def stretches(concentration: Sequence[float | None]) -> list[tuple[int, int]]:
    """First and last block of each phase.

    A phase begins at `EPSILON`, goes on over `GOES_ON` and over blocks without softmax attention
    (None), which neither begin nor end one, and ends before the first block below.
    """
    spans: list[tuple[int, int]] = []
    begun = False
    for block, value in enumerate(concentration):
        if value is None:
            continue
        if begun and value >= GOES_ON:
            spans[-1] = spans[-1][0], block
        elif value >= EPSILON:
            spans.append((block, block))
            begun = True
        else:
            begun = False
    return spans


def phases_of(concentration: Tensor, norm_ratio: Tensor) -> tuple[Phase, ...]:
    """The sink phases in order.

    Args:
        concentration: ``[L]``, nan where a block has no softmax attention.
        norm_ratio: ``[L + 1]``.
    """
    values = [number(value) for value in concentration]
    gain = norm_ratio.double().log().diff()
    spans = stretches(values)
    peaks = [first + int(norm_ratio[first : last + 1].argmax()) for first, last in spans]
    phases = []
    for place, ((first, last), peak) in enumerate(zip(spans, peaks, strict=True)):
        start = spans[place - 1][1] if place else 0
        end = spans[place + 1][0] if place + 1 < len(spans) else len(gain)
        up, down = gain[start:peak], gain[peak:end]
        phases.append(
            Phase(
                first,
                last,
                sum(value for value in values[first : last + 1] if value is not None),
                peak,
                start + int(up.argmax()) if len(up) else None,
                peak + int(down.argmin()) if len(down) and float(down.min()) < 0 else None,
            )
        )
    return tuple(phases)


def amplification(norm_ratio: Tensor) -> tuple[Tensor, int, float | None]:
    """Per-block gain, the peak, and the share of the growth in the first two blocks.

    Args:
        norm_ratio: float ``[L + 1]``.

    Returns:
        ``gain`` float64 ``[L]``, log of the growth per block; ``peak_block``, at whose input (L: at
        the last block's output) the ratio is highest; ``first_two_gain``, None while the peak is
        below twice the start.
    """
    logs = norm_ratio.double().log()
    peak = int(norm_ratio.argmax())
    return logs.diff(), peak, number(first_two_gain(logs, peak))


def first_two_gain(logs: Tensor, peak: int) -> Tensor:
    """Share of the growth up to the peak that lies in blocks 0 and 1.

    Args:
        logs: ``[..., L + 1]``, log norm ratios.
        peak: where they are highest.

    Returns:
        ``[...]``; nan while the peak is below twice the start.
    """
    grown = logs[..., peak] - logs[..., 0]
    early = logs[..., min(2, peak)] - logs[..., 0]
    return torch.where(grown >= math.log(2), early / grown, torch.nan)
