"""What the page draws of records: rounded, packed, and thinned where there are too many."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sinktrack.errors import RecordError
from sinktrack.loggers.curves import causal
from sinktrack.metrics import FIELDS
from sinktrack.metrics.attention import EPSILON
from sinktrack.metrics.axes import by_block, is_by_block, is_by_head, nothing
from sinktrack.metrics.base import Field
from sinktrack.records.lacking import filled
from sinktrack.records.lineage import current
from sinktrack.records.marks import Mark
from sinktrack.records.names import name as named
from sinktrack.records.thinned import evenly
from sinktrack.records.twins import equal_weights, told
from sinktrack.signal import Analysis, analyze, compare, timeline
from sinktrack.signal.loss import Losses
from sinktrack.signal.sensitivity import METHODS
from sinktrack.signal.stages import head_share
from sinktrack.text import natural
from sinktrack.views.story import (
    CARD,
    asides,
    by_mass,
    carded,
    circuit,
    decided,
    main_writers,
    sinks,
    story,
    untold,
    where,
)

BUDGET = 9_700_000
"""Bytes that all records together may take; the page's code takes 5 MB."""
_ROOM = 300_000
"""Bytes that the further fields by block, and by head, may take each where records fill the page;
they are then kept for every so many records."""
MOST_COLOURS = 8
"""Runs that have a colour each."""
_SEED = re.compile(r"seed[-_= ]?\d+[-_. /]?", re.IGNORECASE)
_ABOUT = ("step", "tokens", "source", "seconds")
_WHOLE = ("concentration", "norm_ratio")
"""Fields by block that every record holds to six digits; the others have four."""
_HEAD_SHARE = {
    "title": "share of sink heads", "unit": "share", "scale": "linear", "form": ".1%", "axes": [],
    "help": "Share of the heads that are sink heads; no record here holds a sink rate.",
    "by_block": False, "by_head": False, "number": False,
}  # fmt: skip
"""What stands in for the sink rate, as a field of the page."""
_HEADS = "p0_attention"
"""The field by head that every record holds."""

Records = Sequence[Mapping[str, Any]]


def embedded(
    runs: Mapping[str, Records],
    losses: Mapping[str, Losses] | None = None,
    marks: Mapping[str, Sequence[Mark]] | None = None,
    live: bool = False,
    settings: Mapping[str, str] | None = None,
) -> str:
    """The page's data as JSON that no HTML parser takes for markup.

    Where the records would take more than `BUDGET`, each run is thinned evenly, its first and its
    last record kept; the page says so. Runs stand in the natural order of their names.

    Args:
        runs: records in the order in which they were written, by the run's name.
        losses: by the run's name, the training loss by step.
        marks: by the run's name, where something but the model changed.
        live: does the page ask its server for more?
        settings: by the run's name, what it is a seed of; see `_settings` for where there is none.

    Raises:
        RecordError: there is no run, or one that holds no records; a setting of no run.
    """
    runs = {name: [filled(record) for record in runs[name]] for name in sorted(runs, key=natural)}
    if not runs:
        raise RecordError("no run to draw")
    for name, records in runs.items():
        if not records:
            raise RecordError(
                f"{name} holds no records yet: train with a callback, or scan an archive"
            )
    losses = losses or {}
    largest = {name: max(_sample(records), key=_size) for name, records in runs.items()}
    expected = sum(_size(largest[name]) * len(records) for name, records in runs.items())
    stride = math.ceil(expected / BUDGET)
    room = max(_ROOM, (BUDGET - expected) // 2) // len(runs)
    noted = marks or {}
    drawn = [
        _run(name, runs[name], losses.get(name), noted.get(name, ()), stride, room) for name in runs
    ]
    fields = {field.name: _described(field) for field in FIELDS.values()}
    heads = all(run["rate"] != "sink rate" for run in drawn)
    if heads:
        fields["head_share"] = _HEAD_SHARE
    of = _settings(list(runs), settings or {})
    for run in drawn:
        run["setting"] = of.get(run["name"])
    return _escaped({
        "epsilon": EPSILON, "live": live, "fields": fields, "runs": drawn,
        "rate": "head_share" if heads else "sink_rate",
        "compared": _compared(runs, losses, of) if of else None,
    })  # fmt: skip


def _settings(names: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """By run the setting that it is a seed of; empty where the runs are not grouped.

    Without one given, more than `MOST_COLOURS` runs are grouped by their names less ``seedN``.
    """
    if unknown := set(given) - set(names):
        raise RecordError(
            f"a setting of {', '.join(sorted(unknown))}, which is none of the runs "
            f"{', '.join(names)}"
        )
    if given:
        return {name: given.get(name, "") or "no setting" for name in names}
    if len(names) <= MOST_COLOURS:
        return {}
    return {name: _SEED.sub("", name).strip("-_. /") or "all seeds" for name in names}


def _compared(
    runs: Mapping[str, Records], losses: Mapping[str, Losses], settings: Mapping[str, str]
) -> dict[str, Any]:
    """What the runs say together, in words, and what they do not say."""
    try:
        known = {name: losses[name] for name in runs if name in losses}
        comparison = compare(runs, settings=settings, losses=known)
    except RecordError as error:  # other probes
        return {"verdict": [], "lines": [], "missing": [str(error)]}
    return {
        "verdict": comparison.verdict(),
        "lines": comparison.lines(),
        "missing": list(comparison.missing),
    }


def _described(field: Field) -> dict[str, Any]:
    """What the page knows of a field; it names none itself."""
    about = ("title", "help", "unit", "scale", "form", "axes")
    return {name: getattr(field, name) for name in about} | {
        "by_block": is_by_block(field) and field.name != _HEADS,
        "by_head": is_by_head(field),
        "number": not field.axes and field.rows is None and bool(field.unit or field.curve),
    }


def _run(
    name: str,
    written: Records,
    losses: Losses | None,
    marks: Sequence[Mark],
    stride: int,
    room: int,
) -> dict[str, Any]:
    analysis = analyze(written, losses, marks)
    stages = dict(zip(analysis.steps, analysis.stages, strict=True))
    records = current(written)
    last = records[-1]
    kept = evenly(len(records), math.ceil(len(records) / stride))
    more = [_thinned(records, kept, of, room) for of in (_by_block, _by_head)]
    stages = stages if len(records) > 1 else {}  # one record is a state, not a course
    told_of = story(records, analysis)
    loss = _loss_at([record["step"] for record in records], losses)
    onset = {"step": analysis.onset, "tokens": analysis.onset_tokens}
    return {
        "name": name,
        "model": last["model"],
        "block_kinds": last["block_kinds"],
        "measured_blocks": last.get("measured_blocks"),
        "probe": last["probe"],
        "versions": last["versions"],
        "total": len(records),
        "same_weights": [told(steps) for steps in equal_weights(records)],
        "story": told_of,
        "asides": asides(told_of),
        "signal": analysis.lines() if len(records) > 1 else [],
        "missing": analysis.missing,
        "rate": analysis.rate,
        "onsets": _onsets(analysis),
        "onset": {axis: at and _rounded([at.value, at.low, at.high]) for axis, at in onset.items()},
        "lives": _lives(written),
        "marks": [_placed(mark, records, losses) for mark in marks],
        "records": [
            _drawn(records[i])
            | {"loss": _rounded(loss[i]), "stage": stages.get(records[i]["step"])}
            | {
                name: of[i]
                for name, of in zip(("by_block", "by_head"), more, strict=True)
                if i in of
            }
            for i in kept
        ],
    }


def _onsets(found: Analysis) -> list[list[Any]]:
    """Thresholds in words, and the onset by each method; empty where none is claimed."""
    if found.sensitivity is None or not found.sensitivity.steps:
        return []
    rows: dict[str, list[float | None]] = {}
    for one in found.sensitivity.onsets:
        rows.setdefault(f"{one.threshold} by {one.over}", []).append(one.step)
    return [["threshold", *METHODS], *([name, *_rounded(steps)] for name, steps in rows.items())]


def _lives(written: Records) -> dict[str, Any] | None:
    """When each head became a sink head for good and when it ceased; None of fewer than 2 records.

    By block and head the step ``since`` which it is one, and at which it ``ceased``, null where it
    did not, and ``births``, of heads that are measured.
    """
    lives = timeline(written)
    if len(lives.moments) < 2:
        return None
    shape = [max(one.block for one in lives.heads) + 1, max(one.head for one in lives.heads) + 1]
    grids: dict[str, list[list[int | None]]] = {
        name: [[None] * shape[1] for _ in range(shape[0])] for name in ("since", "ceased", "births")
    }
    for one in lives.heads:
        grids["since"][one.block][one.head] = None if one.since is None else one.since.step
        grids["ceased"][one.block][one.head] = None if one.ceased is None else one.ceased.step
        grids["births"][one.block][one.head] = one.births
    return grids | {
        "told": str(lives), "steps": [moment.step for moment in lives.moments],
        "tokens": [moment.tokens for moment in lives.moments], "count": list(lives.sink_heads),
        "born": list(lives.births), "died": list(lives.deaths),
    }  # fmt: skip


def _placed(mark: Mark, records: Records, losses: Losses | None) -> dict[str, Any]:
    """A mark on each x axis, between the records around it; null where it is outside of them."""
    known = [(one["step"], one["tokens"]) for one in records if one.get("tokens") is not None]
    tokens = None
    if known and known[0][0] <= mark.step <= known[-1][0]:
        steps, counts = zip(*known, strict=True)
        tokens = float(np.interp(mark.step, steps, counts))
    return mark._asdict() | {"tokens": tokens, "loss": _loss_at([mark.step], losses)[0]}


def _drawn(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page draws of a record."""
    single = [field.name for field in FIELDS.values() if not field.axes and field.rows is None]
    drawn = {name: record.get(name) for name in (*_ABOUT, *single, *_WHOLE)} | {
        "intervals": {
            name: bounds for name, bounds in record["intervals"].items() if name in single
        },
        "shares": [[part["kind"], part["block"], part["share"]] for part in record["shares"] or ()],
        "top_components": [
            [part["kind"], part["block"], part["index"], part["share"], part.get("gate")]
            for part in record["top_components"] or ()
        ],
        "sinks": [_phase(phase) for phase in by_mass(sinks(record))],
        "says": [where(record), *circuit(record), *decided(record)],
        "untold": untold(record),
        "missing": record.get("missing") or {},
    }
    quantiles = (record.get("first_token") or {}).get("norm_ratio") or {}
    drawn["first_tokens"] = [_rounded(quantiles.get(level, []), 4) for level in ("5", "50", "95")]
    if record.get("sink_rate") is None:
        drawn["head_share"] = head_share(record)
    if tests := causal(record):
        drawn["causal"] = tests
    if card := record.get("position_card"):
        drawn["card"] = [[words, card[name]] for name, words in CARD.items()]
        drawn["card_says"] = " ".join(carded(card))
    return {name: _rounded(value) for name, value in drawn.items()} | {
        "heads": _packed(record["p0_attention"])
    }


def _phase(phase: Mapping[str, Any]) -> dict[str, Any]:
    """A sink phase with the names of those that write and erase it, and its total effects."""

    def parts(rows: Sequence[Mapping[str, Any]], number: str) -> list[list[Any]]:
        return [[named(row), row["kind"], row["block"], row[number]] for row in rows]

    effects = [
        row
        for row in phase.get("total_effects") or ()
        if row.get("index") is None and row.get("effect") is not None
    ]
    return {
        "first": phase["first_block"],
        "last": phase["last_block"],
        "peak": phase["peak_block"],
        "writers": parts(main_writers(phase), "share"),
        "erasers": parts((phase.get("erasers") or ())[:4], "share"),
        "effects": parts(sorted(effects, key=lambda row: -abs(row["effect"]))[:8], "effect"),
    }


def _by_block(record: Mapping[str, Any]) -> dict[str, Any]:
    """Its further fields along the blocks, those by head as means."""
    further = {
        field.name: _rounded(by_block(record, field), 4)
        for field in FIELDS.values()
        if is_by_block(field) and field.name not in (*_WHOLE, _HEADS)
    }
    return {name: values for name, values in further.items() if any(v is not None for v in values)}


def _by_head(record: Mapping[str, Any]) -> dict[str, Any]:
    """Its further fields by head."""
    return {
        field.name: _rounded(record[field.name], 3)
        for field in FIELDS.values()
        if is_by_head(field) and field.name != _HEADS and not nothing(record.get(field.name))
    }


def _thinned(
    records: Records,
    kept: Sequence[int],
    of: Callable[[Mapping[str, Any]], dict[str, Any]],
    room: int,
) -> dict[int, dict[str, Any]]:
    """By a record's place: as many of the kept ones, evenly, as there is room."""
    size = len(_compact(of(records[-1])))
    return {kept[i]: of(records[kept[i]]) for i in evenly(len(kept), max(1, room // size))}


def _packed(attention: Sequence[Sequence[float | None]]) -> str:
    """``[L, H]`` probabilities as base64 of little-endian uint16, 65534 for 1, 65535 for none."""
    values = np.array(attention, dtype=float)
    packed = np.where(np.isnan(values), 65535, np.nan_to_num(values) * 65534).round()
    return base64.b64encode(packed.astype("<u2").tobytes()).decode()


def _loss_at(steps: Sequence[int], losses: Losses | None) -> list[float | None]:
    """The loss at each step: between two logged steps on the line, outside of them None."""
    if not losses:
        return [None] * len(steps)
    logged = sorted(losses)
    losses_there = np.interp(steps, logged, [losses[step] for step in logged], math.nan, math.nan)
    return [None if math.isnan(value) else value for value in losses_there.tolist()]


def _sample(records: Records) -> Records:
    return [records[0], records[len(records) // 2], records[-1]]


def _size(record: Mapping[str, Any]) -> int:
    return len(_compact(_drawn(record)))


def _rounded(value: Any, digits: int = 6) -> Any:
    """To some significant digits; null for what is no number."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item, digits) for item in value]
    return value


def _compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _escaped(data: Any) -> str:
    text = _compact(data)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
