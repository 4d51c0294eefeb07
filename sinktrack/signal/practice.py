"""What a record means for who evicts keys, quantizes or prunes: from what is measured, no more.

Sources: Xiao et al. 2024 (arXiv 2309.17453) for keeping the first and the recent keys; Sun et al.
2024 (arXiv 2402.17762) for massive activations; Su et al. (arXiv 2507.23279) for super experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEAST = 0.9
"""Attention to P0 from which on a head's other keys are few."""
_SHARE, _EFFECT = 0.1, 0.3
"""Of the P0 state, from which on an expert is named: written by it; gone without it."""
_CHANNEL = 0.05
"""Share of P0's squared norm from which on a channel is named."""
_WORKS = ("full", "sliding")


@dataclass(frozen=True)
class KVHead:
    """A key head of a block, and whether its keys beyond P0 and the recent ones may go."""

    block: int
    kv_head: int
    heads: tuple[int, ...]
    """Query heads that read it."""
    rest: float | None
    """Largest over these heads: mean attention to other keys than P0, sink logits taken off."""
    keep: str | None
    """``p0_and_recent``, or ``all``; None where it was not measured."""


@dataclass(frozen=True)
class Expert:
    """A routed expert that the sink hangs on."""

    block: int
    expert: int
    why: tuple[str, ...]


@dataclass(frozen=True)
class Practice:
    """Numbers of practice of one record. They are of its probe, and advice of none is tested."""

    step: int
    probe: str | None
    least: float
    blocks: int | None
    """How many, where the first blocks alone were measured."""
    queries: float | None
    """Queries after the first per sequence of the probe, the most of any block."""
    keys: tuple[KVHead, ...]
    first_key: bool | None
    """Must the key at position 0 stay? None where it is not known."""
    start_token: bool | None
    """Must the start token stand there? False where position decides; None where not known."""
    channels: tuple[dict[str, Any], ...]
    """Of the P0 state at the main phase's peak: ``channel`` and ``share`` of its squared norm."""
    largest: dict[str, Any] | None
    """The largest activation: ``value``, ``channel``, ``block`` at whose input (``at_output``: of
    the last one's output), ``at_p0``, and its ``ratio`` to the median."""
    experts: tuple[Expert, ...]
    missing: dict[str, str]
    """By topic: why nothing is said."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, with the sentences of `lines`."""
        return asdict(self) | {"words": self.lines()}

    def lines(self) -> list[str]:
        """In words, as careful as the numbers are."""
        return [*self._keys(), *self._first(), *self._outliers(), *self._experts()]

    def _keys(self) -> list[str]:
        if why := self.missing.get("keys"):
            return [f"Keys: {why}."]
        few = [one for one in self.keys if one.keep == "p0_and_recent"]
        known = sum(one.keep is not None for one in self.keys)
        span = "" if self.queries is None else f", {self.queries:.0f} queries a sequence"
        if not few:
            nearest = min(
                (one for one in self.keys if one.keep is not None and one.rest is not None),
                key=lambda one: one.rest or 0.0,
            )
            return [
                f"Keys: none of {known} key heads{self._seen()} leaves other keys than P0 at most "
                f"{1 - self.least:.0%} of the attention, on average over the probe{span}, with a "
                f"sink in every sequence; the nearest, {nearest.kv_head} of block {nearest.block}, "
                f"leaves them {nearest.rest:.0%}. So none is a candidate for keeping P0 and recent "
                "keys alone."
            ]
        text = (
            f"Keys: {len(few)} of {known} key heads{self._seen()} leave other keys than P0 at most "
            f"{1 - self.least:.0%} of the attention, on average over the probe{span}, and are "
            "sinks in every sequence: candidates for keeping P0 and recent keys alone."
        )
        by_block: dict[int, list[int]] = {}
        for one in few:
            by_block.setdefault(one.block, []).append(one.kv_head)
        named = "; ".join(
            f"block {block}: {', '.join(map(str, heads))}" for block, heads in by_block.items()
        )
        text += f" They are {named}."
        return [
            text,
            "How many recent keys they need, and what it costs in loss or on longer contexts, was "
            "not measured.",
        ]

    def _seen(self) -> str:
        return "" if self.blocks is None else f" of the first {self.blocks} blocks"

    def _first(self) -> list[str]:
        sentences = []
        if self.first_key is None:
            sentences.append(f"First key: {self.missing['first_key']}.")
        elif not self.first_key:
            sentences.append("First key: no block rests on it, so nothing here asks to keep it.")
        else:
            sentences.append(
                "First key: keep it: blocks rest on position 0, and what they would do without it "
                "was not measured."
            )
            if self.start_token is None:
                sentences.append(f"[BOS]: {self.missing['start_token']}.")
            elif self.start_token:
                sentences.append(
                    "[BOS]: keep it; with other first tokens the sink is gone or smaller."
                )
            else:
                sentences.append(
                    "[BOS]: not needed for the sink; what stands first takes its part."
                )
        return sentences

    def _outliers(self) -> list[str]:
        if self.largest is None:
            return [f"Outliers: {self.missing['outliers']}."]
        of = self.largest
        where = "at P0" if of["at_p0"] else "elsewhere than at P0"
        size = f"{of['value']:,.0f}" if of["value"] >= 100 else f"{of['value']:.3g}"
        block = (
            "the last block's output" if of["at_output"] else f"the input of block {of['block']}"
        )
        text = (
            f"Outliers: the largest activation{self._seen()}, {size} in channel {of['channel']} "
            f"{where} at {block}, is {of['ratio']:,.0f} times the median; "
            "one scale for the whole tensor would follow it."
        )
        if self.channels:
            named = ", ".join(f"{one['channel']} ({one['share']:.0%})" for one in self.channels)
            text += f" Channels of the P0 state, by their share of its squared norm: {named}."
        return [text]

    def _experts(self) -> list[str]:
        if why := self.missing.get("experts"):
            return [f"Experts: {why}."]
        if not self.experts:
            return ["Experts: none stands out, by its share, its effect or its output."]
        named = "; ".join(
            f"expert {one.expert} of block {one.block} ({', '.join(one.why)})"
            for one in self.experts
        )
        return [f"Experts to prune or quantize last, and not untested: {named}."]


def practice(record: Mapping[str, Any], least: float = LEAST) -> Practice:
    """Read a record for who evicts keys, quantizes or prunes.

    Args:
        record: as written, of schema 2.
        least: mean attention to P0 from which on a head's other keys are few, in (0, 1].

    Raises:
        ValueError: ``least`` is none.
    """
    if not 0 < least <= 1:
        raise ValueError(f"least={least}: wanted more than 0 and at most 1")
    missing: dict[str, str] = {}
    keys = _keys(record, least, missing)
    first_key, start_token = _first(record, missing)
    counts = [count for count in record.get("visible_queries") or () if count is not None]
    return Practice(
        step=record["step"],
        probe=record.get("probe"),
        least=least,
        blocks=record.get("measured_blocks"),
        queries=max(counts, default=None),
        keys=keys,
        first_key=first_key,
        start_token=start_token,
        channels=tuple(
            {"channel": one["channel"], "share": one["share"]}
            for one in record.get("p0_channels") or ()
            if one["share"] >= _CHANNEL
        ),
        largest=_largest(record, missing),
        experts=_experts(record, missing),
        missing=missing,
    )


def _keys(record: Mapping[str, Any], least: float, missing: dict[str, str]) -> tuple[KVHead, ...]:
    """Key heads of the blocks with softmax attention, by block."""
    attention = record.get("p0_attention") or ()
    kv_heads = []
    lacking = [name for name in ("block_kinds", "sink_sequences") if not record.get(name)]
    if lacking:
        reasons = record.get("missing") or {}
        missing["keys"] = reasons.get(lacking[0], f"the record holds no {lacking[0]}")
        return ()
    for block, (kind, row) in enumerate(zip(record["block_kinds"], attention, strict=False)):
        if kind not in _WORKS or not row:
            continue
        groups = _groups(record, block, len(row))
        if groups is None:
            missing["keys"] = (record.get("missing") or {}).get(
                "value_ratio", "which heads share a key head is not recorded"
            )
            return ()
        logits = _of(record, "sink_logit_mass", block) or [0.0] * len(row)
        always = _of(record, "sink_sequences", block) or [None] * len(row)
        for number, heads in enumerate(groups):
            rests = [None if row[h] is None else 1 - row[h] - (logits[h] or 0.0) for h in heads]
            known = [rest for rest in rests if rest is not None]
            if len(known) < len(rests) or kind == "sliding":  # a window drops P0 by itself
                kv_heads.append(KVHead(block, number, heads, max(known, default=None), None))
                continue
            if any(always[h] is None for h in heads):
                kv_heads.append(KVHead(block, number, heads, max(known), None))
                continue
            few = max(known) <= 1 - least and all(always[h] == 1 for h in heads)
            kv_heads.append(
                KVHead(block, number, heads, max(known), "p0_and_recent" if few else "all")
            )
    if not any(one.keep for one in kv_heads):
        missing["keys"] = "no block's full attention was measured head by head"
    return tuple(kv_heads)


def _groups(record: Mapping[str, Any], block: int, heads: int) -> list[tuple[int, ...]] | None:
    """Query heads by key head: neighbours share one; None where their number is not known."""
    count = len(_of(record, "value_ratio", block) or ())
    if not count or heads % count:
        return None
    size = heads // count
    return [tuple(range(g * size, (g + 1) * size)) for g in range(count)]


def _of(record: Mapping[str, Any], name: str, block: int) -> Sequence[Any] | None:
    rows = record.get(name)
    row: Sequence[Any] | None = rows[block] if rows else None
    return row


def _first(record: Mapping[str, Any], missing: dict[str, str]) -> tuple[bool | None, bool | None]:
    """Must the first key stay, and must the start token?"""
    reasons = record.get("missing") or {}
    if record.get("formed") is None:
        missing["first_key"] = (
            reasons.get("formed")
            or reasons.get("sinks")
            or ("the record does not say whether a sink has formed")
        )
        return None, None
    if not record["formed"]:
        if (blocks := record.get("measured_blocks")) is not None:
            missing["first_key"] = f"only the first {blocks} blocks were measured"
            return None, None
        return False, None
    card = record.get("position_card") or {}
    answer = card.get("answer")
    if answer is None and (share := record.get("position_share")) is not None:
        answer = "position" if share >= 0.9 else "token" if share <= 0.1 else "both"
    if answer is None:
        missing["start_token"] = (card.get("missing") or {}).get(
            "answer", "whether another first token would do was not measured (scan --card)"
        )
        return True, None
    if answer == "both":
        missing["start_token"] = (
            "other first tokens make the sink in part, so try it on your data before it goes"
        )
        return True, None
    return True, answer == "token"


def _largest(record: Mapping[str, Any], missing: dict[str, str]) -> dict[str, Any] | None:
    of = record.get("max_activation")
    known = [(ratio, block) for block, ratio in enumerate((of or {}).get("ratio") or ()) if ratio]
    if of is None or not known:
        missing["outliers"] = (record.get("missing") or {}).get(
            "max_activation", "the record holds no largest activation"
        )
        return None
    ratio, block = max(known)
    values = {at: of[at][block] or 0.0 for at in ("p0", "others")}
    at_p0 = values["p0"] >= values["others"]
    at = "p0" if at_p0 else "others"
    channel = of[f"{at}_channel"][block]
    return {
        "value": values[at], "channel": channel, "block": block, "at_p0": at_p0, "ratio": ratio,
        "at_output": block == record["model"]["blocks"],
    }  # fmt: skip


def _experts(record: Mapping[str, Any], missing: dict[str, str]) -> tuple[Expert, ...]:
    """By block: those that write the P0 state, that it goes without, or of extreme output."""
    if not record["model"].get("experts"):
        missing["experts"] = "the model has none"
        return ()
    reasons = record.get("missing") or {}
    if (why := reasons.get("parts")) is not None:
        missing["experts"] = why
        return ()
    if (blocks := record.get("measured_blocks")) is not None:
        missing["experts"] = f"only the first {blocks} blocks were measured"
        return ()
    if record.get("sinks") is None:
        missing["experts"] = reasons.get("sinks", "the record holds no phases of the sink")
        return ()
    why_of: dict[tuple[int, int], dict[str, None]] = {}

    def note(row: Mapping[str, Any], text: str) -> None:
        if row["kind"] == "expert":
            why_of.setdefault((row["block"], row["index"]), {})[text] = None

    for phase in record.get("sinks") or ():
        for row in phase.get("top_components") or ():
            if row["share"] >= _SHARE:
                note(row, f"writes {row['share']:.0%} of the P0 state")
        for row in phase.get("total_effects") or ():
            if row.get("effect") is not None and row["effect"] >= _EFFECT:
                note(row, f"without it {row['effect']:.0%} of that state goes")
    for row in (record.get("causal") or {}).get("experts") or ():
        if row["super_expert"]:
            note({"kind": "expert"} | row, "extreme output")
    return tuple(Expert(block, index, tuple(why)) for (block, index), why in sorted(why_of.items()))
