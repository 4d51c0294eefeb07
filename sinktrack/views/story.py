"""A run in plain sentences: what formed, where, since when, who writes it, what decides it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sinktrack.metrics.attention import EPSILON
from sinktrack.records.names import name as spelled
from sinktrack.signal import Analysis
from sinktrack.text import interval

_LARGE_EFFECT, _SMALL_SHARE = 0.3, 0.1
"""Of a component whose share hides what it does."""
_FEW = 0.005
"""Share of the other positions below which P0 has no rivals."""
_POSITION, _TOKEN = 0.9, 0.1
"""Share of first tokens from which position decides, and down to which a token does."""

_LONG = 9
"""Sentences from which on a story is long."""
_ASIDES = ("Small in share", "The P0 state of the sink of block", "The sink of block", "P0 has riv")
"""How sentences begin of effects that shares hide, of weaker sinks, and of rivals."""

Record = Mapping[str, Any]


def story(records: Sequence[Record], signal: Analysis) -> list[str]:
    """The run told to somebody who sees it for the first time, the most important first.

    Args:
        records: of one run, on the line of training, in step order; at least one.
        signal: what they say together.
    """
    last = records[-1]
    told = [where(last), *_mind(last), *_since(records, signal), *circuit(last), *decided(last)]
    return told + _changed(records, signal)


def asides(told: Sequence[str]) -> list[str]:
    """Those sentences of a long story that can wait; of a short one none can."""
    return [] if len(told) < _LONG else [line for line in told if line.startswith(_ASIDES)]


def where(record: Record) -> str:
    """Which blocks rest on P0."""
    phases = sinks(record)
    rate = record.get("sink_rate")
    bounds = record["intervals"].get("sink_rate")
    sure = "" if bounds is None else f" ({interval(bounds, '.1%')})"
    sink_rate = "" if rate is None else f" Sink rate {rate:.1%}{sure}."
    if (why := untold(record)) is not None:
        first = record.get("first_sink_block")
        heads = "" if first is None else f" The first block with a sink head is block {first}."
        return f"Which blocks rest on P0 was not measured.{heads}{sink_rate} The reason: {why}."
    if not phases:
        known = [(v, b) for b, v in enumerate(record["concentration"]) if v is not None]
        largest, block = max(known, default=(0.0, 0))
        measured = record.get("measured_blocks")
        first = "" if measured is None else f" of the first {measured}, the only ones measured,"
        if unseen := _unseen(record):
            first = f" whose attention could be measured (not {_listed(map(str, unseen))})"
        return (
            f"No sink has formed: no block{first} rests on P0. The most that a block gives it is "
            f"{largest:.0%} of its attention (block {block}); {EPSILON:.0%} would begin a sink."
            f"{sink_rate}"
        )
    main, *others = by_mass(phases)
    text = (
        f"A sink has formed: {_span(main)} rest{_s(main)} on P0 with "
        f"{_attention(record, main):.0%} of {_their(main)} attention."
    )
    if others:
        weaker = ", ".join(f"{_span(one)} ({_attention(record, one):.0%})" for one in others)
        text = (
            f"{_count(len(phases))} sinks in series have formed. The main one: {_span(main)} "
            f"rest{_s(main)} on P0 with {_attention(record, main):.0%} of {_their(main)} "
            f"attention. Weaker: {weaker}."
        )
    return text + sink_rate


def _mind(record: Record) -> list[str]:
    """What the probe cannot show, where a number of the record depends on it."""
    why = (record.get("missing") or {}).get("probe")
    return [] if why is None else [f"Mind the probe: {why}."]


def untold(record: Record) -> str | None:
    """Why the record does not say whether a sink has formed; None where it does."""
    known = any(value is not None for value in record["concentration"])
    if record.get("formed") is not None and known:
        return None
    missing = record.get("missing") or {}
    for name in ("sinks", "formed", "concentration"):
        if name in missing:
            return str(missing[name])
    if not known:
        return "the record holds no attention to P0 by block"
    return "the record does not say whether a sink has formed"


def _unseen(record: Record) -> list[int]:
    """Blocks with softmax attention that was not measured, among those that were to be."""
    count = record.get("measured_blocks")
    values = record["concentration"][: len(record["concentration"]) if count is None else count]
    return [
        block
        for block, (kind, value) in enumerate(zip(record["block_kinds"], values, strict=False))
        if value is None and kind not in ("linear", "mlp")
    ]


def circuit(record: Record) -> list[str]:
    """Who writes the state of each phase, who erases it, and what a share does not say."""
    sentences = []
    phases = by_mass(sinks(record))
    why = (record.get("missing") or {}).get("shares")
    if phases and why is not None:
        sentences.append(f"Who writes the P0 state cannot be told: {why}.")
    for phase in phases:
        of = "the main sink" if phase is phases[0] else f"the sink of {_span(phase)}"
        of = "the sink" if len(phases) == 1 else of
        if phase["first_block"] == 0:
            sentences.append(
                f"{of[0].upper()}{of[1:]} stands from block 0 on, before anything is written."
            )
        elif writers := main_writers(phase):
            named = ", ".join(f"{spelled(part)} ({part['share']:.0%})" for part in writers)
            more = writers[0]["share"] > 1
            beyond = ": more than is left of it, as others take some back" if more else ""
            text = f"The P0 state of {of} is written by {named}{beyond}."
            if erasers := phase.get("erasers"):
                text += f" Erased by {_listed(spelled(part) for part in erasers[:4])}."
            sentences.append(text)
        shares = {
            (part["kind"], part["block"]): part["share"] for part in phase.get("writers") or ()
        }
        hidden = [
            row
            for row in (phase.get("total_effects") or () if shares else ())
            if row.get("index") is None
            and row.get("effect") is not None
            and row["effect"] >= _LARGE_EFFECT
            and shares.get((row["kind"], row["block"]), 0.0) < _SMALL_SHARE
        ]
        if hidden:
            falls = ", ".join(
                f"by {row['effect']:.0%} without {spelled(row)}"
                for row in sorted(hidden, key=lambda row: -row["effect"])[:3]
            )
            sentences.append(f"Small in share, large in effect: that state falls {falls}.")
    return sentences


def decided(record: Record) -> list[str]:
    """Does position or a token decide, and is P0 alone?"""
    sentences = []
    share = record.get("position_share")
    if share is not None:
        of = record["first_token"]["tokens"]
        tried = f"{share:.0%} of {of} single first tokens make a P0 state of half that size or more"
        if share >= _POSITION:
            sentences.append(f"Position decides, whatever token stands first: {tried}.")
        elif share <= _TOKEN:
            sentences.append(f"A token decides, not the position alone: {tried}.")
        else:
            sentences.append(f"Position and token decide together: {tried}.")
    sentences += carded(record.get("position_card"))
    rivals = record.get("rivals") or []
    for phase in by_mass(sinks(record)) if rivals else ():
        there = rivals[phase["peak_block"]]
        if there is not None and there >= _FEW:
            sentences.append(
                f"P0 has rivals at block {phase['peak_block']}: {there:.1%} of the other positions "
                "have at least half its norm."
            )
    for field, says in (
        ("sink_logit_mass", "Learned sink logits take {:.0%} of the attention (mean over heads)."),
        ("attention_gate", "Heads are gated: {:.0%} of their output passes (mean over heads)."),
    ):
        values = [v for row in record.get(field) or () for v in row or () if v is not None]
        if values:
            sentences.append(says.format(sum(values) / len(values)))
    return sentences


def carded(card: Mapping[str, Any] | None) -> list[str]:
    """The answer of the position card, with the sink rates that it rests on."""
    if card is None:
        return []
    if card.get("answer") is None:
        why = (card.get("missing") or {}).get("answer", "it was not measured")
        return [f"The position card cannot tell whether position or a token decides: {why}."]
    rates = {name: card[name]["sink_rate"] for name in CARD if card.get(name) is not None}
    best = max((name for name in ("as_is", "with_start") if name in rates), key=rates.__getitem__)
    text = (
        f"{_ANSWERS[card['answer']]} by the position card: the sink rate is "
        f"{rates['random_first']:.0%} with random first tokens, {rates[best]:.0%} with "
        f"{CARD[best]}."
    )
    if "repeated" in rates:
        text += (
            f" With one token repeated, so that no position mixes more than P0, it is "
            f"{rates['repeated']:.0%}."
        )
    return [text]


CARD = {
    "as_is": "the probe as it is",
    "without_start": "no start token",
    "with_start": "the start token",
    "random_first": "random first tokens",
    "repeated": "one token repeated",
}
"""What the position card compares, in words."""
_ANSWERS = {
    "position": "Position decides,",
    "token": "A token decides,",
    "both": "Position and token decide together,",
}


def sinks(record: Record) -> list[Mapping[str, Any]]:
    """The record's phases in order; of a record of schema 1, one from its reference block on."""
    phases = record.get("sinks")
    if phases is not None:
        return list(phases)
    if not record.get("formed"):
        return []
    first, last = record["reference_block"], len(record["concentration"]) - 1
    mass = sum(value or 0.0 for value in record["concentration"][first:])
    peak = min(record["peak_block"] or first, last)
    return [{"first_block": first, "last_block": last, "mass": mass, "peak_block": peak}]


def by_mass(phases: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The main phase first."""
    return sorted(phases, key=lambda phase: -phase["mass"])


def main_writers(phase: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The largest writers, up to those that carry three quarters together; three at most."""
    writers: list[Mapping[str, Any]] = []
    for part in phase.get("writers") or ():
        if len(writers) == 3 or sum(one["share"] for one in writers) >= 0.75:
            break
        writers.append(part)
    return writers


def _since(records: Sequence[Record], signal: Analysis) -> list[str]:
    """When it formed, as far as several records can tell."""
    if len(records) == 1:
        return ["One record shows a state, not a course: since when is not known."]
    last = records[-1]
    if signal.onset is not None:
        value, low, high = signal.onset
        left = f"The {signal.rate} left its floor"
        if low <= signal.steps[0]:
            return [f"{left} by step {high:,.0f}; how long before is not known."]
        other = signal.sensitivity.steps if signal.sensitivity is not None else []
        between = f"; by other definitions between {other[0]:,.0f} and {other[-1]:,.0f}"
        sure = interval((low, high), ",.0f", "95 %: to the step")
        return [f"{left} at step {value:,.0f} ({sure}{between if other else ''})."]
    if last.get("formed") is None:
        return []
    if not last["formed"]:
        ever = [record["step"] for record in records if record.get("formed")]
        return [f"There was one, last at step {ever[-1]:,}."] if ever else []
    first = records[-1]
    for record in reversed(records):
        if record.get("formed") is None:
            return [
                f"It is there since step {first['step']:,} at the latest: the record before does "
                "not say."
            ]
        if not record["formed"]:
            return [f"It is there since step {first['step']:,}, in every record from then on."]
        first = record
    return [f"It is there since the first record, step {first['step']:,}."]


def _changed(records: Sequence[Record], signal: Analysis) -> list[str]:
    """The last change of the sink phases, and of the signal's stage."""
    sentences = (
        [f"Last change, {event}." for event in signal.phases[-1:]] if len(records) > 1 else []
    )
    moves = signal.first_sink_block
    if untold(records[-1]) is not None and len(moves) > 1:
        blocks = ["none" if one.block is None else str(one.block) for one in moves]
        turn = " in turn" if len(moves) > 2 else ""
        sentences.append(
            f"The first block with a sink head was {_few(blocks[:-1])}{turn} from step "
            f"{moves[0].step:,} on; since step {moves[-1].step:,} it is {blocks[-1]}."
        )
    stages = signal.stages
    if len(records) > 1 and signal.stage is not None:
        since = len(stages) - 1
        while since and stages[since - 1] == signal.stage:
            since -= 1
        sentences.append(
            f"Stage: {signal.stage}, as could be told from step {signal.steps[since]:,} on; a "
            "candidate signal of convergence, not an established one."
        )
    return sentences


def _attention(record: Record, phase: Mapping[str, Any]) -> float:
    """Mean concentration over the phase's blocks with softmax attention."""
    inside = record["concentration"][phase["first_block"] : phase["last_block"] + 1]
    known = [value for value in inside if value is not None]
    return sum(known) / len(known) if known else 0.0


def _span(phase: Mapping[str, Any]) -> str:
    first, last = phase["first_block"], phase["last_block"]
    return f"block {first}" if first == last else f"blocks {first} to {last}"


def _s(phase: Mapping[str, Any]) -> str:
    return "s" if phase["first_block"] == phase["last_block"] else ""


def _their(phase: Mapping[str, Any]) -> str:
    return "its" if phase["first_block"] == phase["last_block"] else "their"


def _count(number: int) -> str:
    words = {2: "Two", 3: "Three", 4: "Four", 5: "Five"}
    return words.get(number, str(number))


def _few(words: Sequence[str]) -> str:
    """One after the other; of many the first and the last."""
    return ", ".join(words) if len(words) <= 8 else f"{words[0]}, ..., {words[-1]}"


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
