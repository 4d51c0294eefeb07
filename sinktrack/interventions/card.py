"""The position card: does position zero draw the sink, or a token that stands there?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sinktrack.errors import ProbeError
from sinktrack.interventions.results import PositionCard, Rates
from sinktrack.measure import measure
from sinktrack.measurement import Measurement
from sinktrack.metrics.attention import EPSILON, alphas, rate
from sinktrack.metrics.base import number
from sinktrack.metrics.bootstrap import interval, weights
from sinktrack.probe import Probe

POSITION, TOKEN = 0.75, 0.25
"""Part of the sink rate that stays with random first tokens, from which position decides, and down
to which a token does."""
LEAST = 0.05
"""Sink rate below which there is nothing to decide."""


@dataclass(frozen=True)
class Start:
    """The token that sequences of the model's training begin with."""

    token: int
    of: str
    """Who names it: ``caller``, ``tokenizer``, ``probe`` or ``config``."""


def position_card(
    model: Any,
    probe: Probe,
    measured: Measurement | None = None,
    *,
    start_token: int | None = None,
    batch_size: int | None = None,
) -> PositionCard:
    """Sink rates of a live model under other first tokens; the record's ``position_card``.

    ``as_is``: the probe. ``without_start`` and ``with_start``: its sequences without and with the
    start token before them, at most as long as they were. ``random_first``: each sequence's first
    token is another one of the probe's. ``repeated``: each sequence repeats one such token. Of
    each, ``sink_rate`` and ``sink_rate_from_2`` with 95 % intervals over sequences, and the
    concentration by block; None with the reason in ``missing`` where it cannot be had. ``answer``:
    ``position``, where the rate stays with random first tokens; ``token``, where it goes;
    ``both``; None where it cannot be told.

    Args:
        model: as `sinktrack.measure` takes it.
        probe: the fixed batch.
        measured: the model's measurement with it, where there is one.
        start_token: the id of [BOS], or of what stands for it; by default the one that all
            sequences of the probe begin with, else that of the model's configuration.
        batch_size: sequences per forward pass; by default as many as the probe has.

    Raises:
        ProbeError: the start token is no token of the model's.
        MeasurementError: as of `sinktrack.measure`.
    """
    start = None if start_token is None else Start(start_token, "caller")
    start = start or start_of(probe, getattr(model, "config", None))
    if measured is None:
        measured = measure(model, probe, batch_size=batch_size, in_training=True)
    return card(probe, measured, start, measured_beside(model, probe, start, batch_size))


def measured_beside(
    model: Any, probe: Probe, start: Start | None, batch_size: int | None = None
) -> Measurement | None:
    """The measurement of what a card asks for `beside` the probe; arguments as above."""
    several = beside(probe, start)
    if several is None:
        return None
    return measure(model, several, batch_size=batch_size or probe.sequences, in_training=True)


def beside(probe: Probe, start: Start | None) -> Several | None:
    """The sequences that a card needs measured beside the probe's own, if there are any."""
    rows = [row for rows in _new(probe, _variants(probe, start)[0]).values() for row in rows]
    return Several(rows) if rows else None


def _new(probe: Probe, made: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: rows for name, rows in made.items() if rows is not probe.rows}


def start_of(probe: Probe, config: Any = None, tokenizer: Any = None) -> Start | None:
    """The start token, by the tokenizer, the probe or the model's configuration, in this order."""
    if tokenizer is not None:
        token = getattr(tokenizer, "bos_token_id", None)
        if token is None:
            token = next(iter(tokenizer("")["input_ids"]), None)
        if token is not None:
            return Start(int(token), "tokenizer")
    begin = torch.stack([row[0] for row in probe.rows])
    if len(begin) > 1 and len(begin.unique()) == 1:
        return Start(int(begin[0]), "probe")
    text = getattr(config, "get_text_config", None)
    token = getattr(config if text is None else text(decoder=True), "bos_token_id", None)
    return Start(token, "config") if isinstance(token, int) else None


def card(
    probe: Probe, measured: Measurement, start: Start | None, seen: Measurement | None
) -> PositionCard:
    """The card of a model, however it is run.

    Args:
        probe: the fixed batch.
        measured: the measurement with it.
        start: the start token, where one is known.
        seen: the measurement of what is needed `beside` the probe.
    """
    made, missing = _variants(probe, start)
    new = _new(probe, made)
    rates = {name: _rates(measured) for name in ("as_is", *made)}
    if seen is not None:
        several = Several([row for rows in new.values() for row in rows])
        parts = several.places.split([len(rows) for rows in new.values()])
        rates |= {name: _rates(seen, at) for name, at in zip(new, parts, strict=True)}
    answer, why = _answer(rates, measured)
    if why is not None:
        missing["answer"] = why
    filled: PositionCard = {
        "start_token": None if start is None else {"id": start.token, "of": start.of},
        "as_is": rates["as_is"],
        "without_start": rates.get("without_start"),
        "with_start": rates.get("with_start"),
        "random_first": rates.get("random_first"),
        "repeated": rates.get("repeated"),
        "answer": answer,
    }
    if missing:
        filled["missing"] = missing
    return filled


_FROM: dict[Literal["sink_rate", "sink_rate_from_2"], int] = {
    "sink_rate": 0,
    "sink_rate_from_2": 2,
}
"""From which block on each of the rates is taken."""
NAMES = ("as_is", "without_start", "with_start", "random_first", "repeated")
"""Of what is compared."""


class Several(Probe):
    """Sequences of several lengths, to be measured once; no probe that is kept."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        longest = max(map(len, rows))
        filled = [torch.cat([row, row[:1].expand(longest - len(row))]) for row in rows]
        super().__init__(torch.stack(filled))
        self.rows = list(rows)

    @property
    def places(self) -> Tensor:
        """``[N]``: where each sequence stands in a measurement, which takes them by length."""
        lengths = [len(row) for row in self.rows]
        order = sorted(range(len(lengths)), key=lambda at: lengths.index(lengths[at]))
        return torch.tensor(order).argsort()

    def check(
        self, vocab_size: int | None, positions: int | None, padding: int | None = None
    ) -> None:
        """As of a probe; that its tokens are text was checked with the probe itself."""
        super().check(vocab_size, positions)


def _variants(probe: Probe, start: Start | None) -> tuple[dict[str, list[Tensor]], dict[str, str]]:
    """Sequences by name, the probe's own list where nothing changes; and why some cannot be."""
    rows = probe.rows
    made: dict[str, list[Tensor]] = {}
    missing: dict[str, str] = {}
    if start is None:
        why = "no start token is known: neither a tokenizer nor the configuration names one"
        missing |= {"without_start": why, "with_start": why}
    else:
        if start.token < 0:
            raise ProbeError(f"start token {start.token} is negative")
        begins = [int(row[0]) == start.token for row in rows]
        token = torch.tensor([start.token])
        without = [row[1:] if has else row for row, has in zip(rows, begins, strict=True)]
        before = [
            row if has else torch.cat([token, row[:-1]])
            for row, has in zip(rows, begins, strict=True)
        ]
        made["with_start"] = rows if all(begins) else before
        if min(map(len, without)) < 2:
            missing["without_start"] = (
                "a sequence has one token beside the start token, so no query after its P0"
            )
        else:
            made["without_start"] = without if any(begins) else rows
    others = probe.first_tokens()
    if start is not None:
        others = others[others != start.token]
    own = torch.stack([row[0] for row in rows])
    if len(others) < 2:
        why = "the probe has fewer than two distinct tokens beside the start token"
        return made, missing | {"random_first": why, "repeated": why}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(others), (2, len(rows)), generator=generator)
    first = torch.where(others[drawn[0]] == own, (drawn[0] + 1) % len(others), drawn[0])
    made["random_first"] = [
        torch.cat([token[None], row[1:]]) for token, row in zip(others[first], rows, strict=True)
    ]
    made["repeated"] = [
        token.expand(len(row)) for token, row in zip(others[drawn[1]], rows, strict=True)
    ]
    return made, missing


def _rates(measured: Measurement, at: Tensor | None = None) -> Rates:
    """Sink rates from block 0 and from block 2 over some of the sequences, with intervals."""
    visible, attention, own = (
        rows if at is None else rows[at]
        for rows in (
            measured.visible_queries_by_sequence,
            measured.p0_attention_by_sequence,
            measured.own_attention_by_sequence,
        )
    )
    alpha = alphas(visible, attention, own)
    over = torch.where(alpha.isnan(), torch.nan, (alpha > EPSILON).double())
    weight = weights(len(alpha))
    concentration = [number(value) for value in attention.mean(0).nanmean(-1)]
    rates: Rates = {
        "concentration": concentration, "intervals": {}, "sink_rate": None, "sink_rate_from_2": None
    }  # fmt: skip
    for name, first in _FROM.items():
        value = rate(alpha[:, first:], EPSILON)
        rates[name] = None if math.isnan(value) else value
        rates["intervals"][name] = interval(weight @ over[:, first:].nanmean((1, 2)))
    return rates


def _answer(found: Mapping[str, Rates], measured: Measurement) -> tuple[str | None, str | None]:
    """What decides, or why that cannot be told."""
    count = measured.visible_queries_by_sequence.double().mean(0)
    evenly = (measured.uniform.double() * count + 1) / (count + 1)
    if bool((evenly > EPSILON).any()):
        return None, (
            f"the sequences are so short that attention spread evenly counts as a sink ("
            f"{float(evenly.nan_to_num().max()):.2f} of it would be on P0)"
        )
    if "random_first" not in found:
        return None, "there are no random first tokens to compare with"
    rates = {name: rates["sink_rate"] or 0.0 for name, rates in found.items()}
    most = max(rates[name] for name in ("as_is", "with_start") if name in rates)
    if most < LEAST:
        return None, f"no sink: the sink rate is {most:.1%}, with the start token or without"
    stays = rates["random_first"] / most
    return ("position" if stays >= POSITION else "token" if stays <= TOKEN else "both"), None
