"""Position: does another position that attends to itself alone draw the sink, as P0 does?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinktrack.events import Uneditable
from sinktrack.interventions.bench import FIRST_TWO, Bench, Trial, Window, seed_of, windows
from sinktrack.interventions.knockout import AttentionKnockout, RandomDirectionControl
from sinktrack.interventions.plans import Plan, ask
from sinktrack.interventions.replay import Edit, Edits
from sinktrack.interventions.results import Knockout
from sinktrack.metrics.localization import Sink


def position(bench: Bench) -> Plan[list[list[Knockout]]]:
    """Of each phase: another position unmixed, and P0 mixed, in the blocks before it."""
    asked = windows(bench.phases)
    changes = [_knocked_out(bench, *window) for window in asked]
    try:
        (after,) = yield from ask([Edits(changes)])
    except Uneditable as error:  # most often of those that show P0 later keys
        bench.missing["p0_mixed"] = str(error)
        asked = [window for window in asked if window[0] != "p0_mixed"]
        changes = [_knocked_out(bench, *window) for window in asked]
        (after,) = yield from ask([Edits(changes)])
    trials = {
        window: Trial(
            window[0],
            window[2] - 1,
            "lost" if window[0] == "p0_mixed" else "gained",
            outcome,
            before=None if window[1:] == FIRST_TWO else window[2],
        )
        for window, outcome in zip(asked, after, strict=True)
    }
    planned: list[tuple[Trial, str, Edit, bool]] = []
    for window, change in zip(asked, changes, strict=True):
        kind, start, until = window
        trial, mixed = trials[window], kind == "p0_mixed"
        at = bench.p0 if mixed else bench.replay.position
        before = bench.plain.at_p0 if mixed else bench.plain.at_other
        norms = {block: (row - before[block]).norm(dim=-1) for block, row in change.noted.items()}
        nudged = RandomDirectionControl(at, norms, seed_of("nudge", window))
        planned.append((trial, "random_direction", nudged, False))
        if mixed:
            elsewhere = AttentionKnockout(bench.replay.position, (start, until), _everything)
            planned.append((trial, "other_position", elsewhere, False))
        else:
            some = AttentionKnockout(at, (start, until), _half(seed_of("half", window)))
            planned.append((trial, "random_keys", some, False))
    yield from bench.control(planned)
    return [
        [
            _positioned(bench, trials[window], window, phase)
            for window in asked
            if window[2] == phase.first_block or window[1:] == FIRST_TWO
            if bench.reaches(trials[window], phase)
        ]
        for phase in bench.phases
    ]


def _knocked_out(bench: Bench, kind: str, start: int, until: int) -> AttentionKnockout:
    if kind == "p0_mixed":
        return AttentionKnockout(bench.p0, (start, until), _everything)
    return AttentionKnockout(bench.replay.position, (start, until), _only_itself)


def _positioned(bench: Bench, trial: Trial, window: Window, phase: Sink) -> Knockout:
    effect = bench.effect(trial, phase)
    kind, start, until = window
    if until != phase.first_block:
        kind = f"{kind}_in_first_two"
    elif start:
        began = any(start == one.first_block for one in bench.phases)
        kind = f"{kind}_since_last_sink{'_began' if began else ''}"
    mixed = trial.kind == "p0_mixed"
    verdict = "unmixed" if mixed else "follows"
    row: Knockout = {
        "kind": kind,
        "block": None,
        "index": None,
        "blocks": [start, until - 1],
        **effect.to_record(),  # type: ignore[typeddict-item]
        "share_of_two": None if mixed else bench.share_of_two(trial, phase),
        "by_block": bench.by_block(trial),
        "verdict": verdict if effect.holds else None,
    }
    if mixed:
        row |= bench.fate(trial, phase, effect)  # type: ignore[typeddict-item]
    return row


def _only_itself(row: int, at: int, length: int) -> Tensor:
    return torch.arange(length) == at


def _everything(row: int, at: int, length: int) -> Tensor:
    return torch.ones(length, dtype=torch.bool)


def _half(seed: int) -> Callable[[int, int, int], Tensor]:
    """A random half of the earlier keys: fewer, but mixed all the same."""

    def sees(row: int, at: int, length: int) -> Tensor:
        seen = torch.zeros(length, dtype=torch.bool)
        generator = torch.Generator().manual_seed(seed + row)
        seen[torch.randperm(at, generator=generator)[: max(2, at // 2)]] = True
        return seen

    return sees
