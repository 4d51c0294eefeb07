"""How the signal stands to the loss: does it say anything that the step count does not?"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinktrack import text
from sinktrack.errors import RecordError
from sinktrack.signal import robust
from sinktrack.signal.quantiles import ranks
from sinktrack.signal.robust import Curve, Interval

Losses = Mapping[int, float]

MIN_RECORDS = 20
"""Records with a loss from which anything is said."""
_SMALL = 0.2
"""Rank correlation within which "nothing" is said of one."""
_RESAMPLES = 500
_RUNS = 5
"""Runs of neighbouring records that a resample is made of."""
_TAILS = ((1 - robust.CONFIDENCE) / 2, (1 + robust.CONFIDENCE) / 2)
_LARGEST = 64 * 2**20
_STEP = ("step", "global_step", "train/global_step", "_step")
_LOSS = ("loss", "train/loss", "train_loss")


@dataclass(frozen=True)
class Relation:
    """The sink rate beside the loss, over the records that have both."""

    records: int
    correlation: Interval
    """Spearman's."""
    beyond_step: Interval
    """Spearman's of their changes from record to record, each less a smooth curve over the step:
    what the rate says that the step count does not."""
    adds: bool
    """Does the rate say anything about the loss that the step count does not? Only if the interval
    of `beyond_step` leaves 0 out and one curve turned against the other does worse."""

    def lines(self) -> list[str]:
        """What was found, in words."""
        rank, beyond = self.correlation, self.beyond_step
        return [
            f"rank correlation of sink rate and loss {rank.value:+.2f} (95 %: {rank.low:+.2f} to "
            f"{rank.high:+.2f}); two curves that both follow the step correlate by that alone",
            f"beyond the step count {beyond.value:+.2f} (95 %: {beyond.low:+.2f} to "
            f"{beyond.high:+.2f}): "
            + (
                "the rate moves with the loss where the step does not say so"
                if self.adds
                else "nothing that the step count does not say"
                if max(-beyond.low, beyond.high) <= _SMALL
                else "whether the rate says more than the step count cannot be told yet"
            ),
        ]


def read_losses(path: str | Path) -> dict[int, float]:
    """Loss by step from a file.

    Args:
        path: a ``trainer_state.json``, or a directory that holds one; or a CSV with the columns
            ``step`` (or ``global_step``, ``train/global_step``, ``_step``) and ``loss`` (or
            ``train/loss``, ``train_loss``); W&B puts a run's name and a dash before it.

    Raises:
        RecordError: no such file, or no loss in it; says what was looked for.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "trainer_state.json"
    try:
        if path.stat().st_size > _LARGEST:
            raise RecordError(f"{path} is larger than {_LARGEST // 2**20} MiB")
        content = text.read(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecordError(f"cannot read losses from {path}: {reason}") from error
    rows = _from_json(path, content) if path.suffix == ".json" else _from_csv(path, content)
    losses = {}
    for row in rows:
        step, loss = _first(row, _STEP), _first(row, _LOSS)
        if step is not None and loss is not None:
            losses[int(step)] = loss
    if not losses:
        there = ", ".join(map(str, rows[0])) if rows and isinstance(rows[0], Mapping) else "nothing"
        raise RecordError(
            f"no loss in {path}: looked for numbers under {', '.join(_STEP)}, and under "
            f"{', '.join(_LOSS)}; its first row holds {there[:200]}"
        )
    return losses


def relate(steps: Sequence[int], rates: Sequence[float], losses: Losses) -> Relation | str:
    """Compare sink rate and loss.

    The loss at a record's step is that of the straight line between the logged ones around it;
    records outside of the logged steps do not count. Intervals come from 500 resamples of blocks of
    neighbouring records, which keep what neighbours share.

    Args:
        steps: of the records, ascending.
        rates: the sink rates.
        losses: by step.

    Returns:
        the relation, or why nothing is said.
    """
    known = sorted(step for step, loss in losses.items() if math.isfinite(loss))
    if not known:
        return "loss: none of the losses is a number"
    inside = [i for i, step in enumerate(steps) if known[0] <= step <= known[-1]]
    if len(inside) < MIN_RECORDS:
        missing = MIN_RECORDS - len(inside)
        return (
            f"loss: {missing} more record{'s' if missing > 1 else ''} at steps with a loss "
            f"({len(inside)} of {MIN_RECORDS})"
        )
    x = np.array([steps[i] for i in inside], dtype=np.float64)
    rate = np.array([rates[i] for i in inside], dtype=np.float64)
    loss = np.interp(x, known, [losses[step] for step in known])
    if np.ptp(rate) == 0 or np.ptp(loss) == 0:
        return "loss: the sink rate or the loss is the same at every record"
    plain = (ranks(rate), ranks(loss))
    rest = (_beyond_step(x[1:], np.diff(rate)), _beyond_step(x[1:], np.diff(loss)))
    beyond = _correlation(*rest)
    return Relation(
        records=len(x),
        correlation=_correlation(*plain),
        beyond_step=beyond,
        adds=(beyond.low > 0 or beyond.high < 0) and _beyond_chance(*rest),
    )


def _beyond_step(x: Curve, y: Curve) -> Curve:
    """Ranks less a cubic of the step's rank and of the logarithm of the step."""
    place = np.linspace(-1, 1, len(x))
    logs = np.log1p(x - x[0])
    logs = 2 * logs / logs[-1] - 1
    terms = np.stack([place**power for power in range(4)] + [logs**power for power in (1, 2, 3)])
    ranked = ranks(y)
    fitted, *_ = np.linalg.lstsq(terms.T, ranked, rcond=None)
    return np.asarray(ranked - terms.T @ fitted)


def _correlation(one: Curve, other: Curve) -> Interval:
    rows = _resamples(len(one))
    value = float(_each_correlation(one[None], other[None])[0])
    low, high = np.quantile(_each_correlation(one[rows], other[rows]), _TAILS)
    return Interval(value, float(min(low, value)), float(max(high, value)))


def _resamples(count: int) -> NDArray[np.int64]:
    """Rows ``[resamples, count]`` made of runs of neighbouring rows."""
    size = count // _RUNS
    starts = np.random.default_rng(0).integers(
        0, count - size + 1, (_RESAMPLES, -(-count // size), 1)
    )
    return (starts + np.arange(size)).reshape(_RESAMPLES, -1)[:, :count]


def _beyond_chance(one: Curve, other: Curve) -> bool:
    """Is the correlation larger than with one curve turned against the other?"""
    least = len(one) // 8
    turned = np.stack([np.roll(one, turn) for turn in range(least, len(one) - least)])
    size = np.abs(_each_correlation(np.vstack([one, turned]), other[None]))
    return bool(size[0] > np.quantile(size[1:], robust.CONFIDENCE))


def _each_correlation(ones: Curve, others: Curve) -> Curve:
    """Pearson's, row by row of ``[rows, n]`` or ``[1, n]``; 0 where one is constant."""
    ones = ones - ones.mean(-1, keepdims=True)
    others = others - others.mean(-1, keepdims=True)
    size = np.sqrt(np.square(ones).sum(-1) * np.square(others).sum(-1))
    return np.asarray((ones * others).sum(-1) / np.where(size > 0, size, np.inf))


def _first(row: Mapping[str, Any], names: Sequence[str]) -> float | None:
    for name in names:
        try:
            value = float(row[name])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(value):
            return value
    return None


def _from_json(path: Path, content: str) -> list[Mapping[str, Any]]:
    try:
        history = json.loads(content)["log_history"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(f"{path} is no trainer_state.json: no log_history in it") from error
    return history if isinstance(history, list) else []


def _from_csv(path: Path, content: str) -> list[dict[str, Any]]:
    """Of a chart that W&B exports, each column's name begins with its run's and a dash."""
    try:
        rows = list(csv.DictReader(io.StringIO(content, newline="")))
    except csv.Error as error:
        raise RecordError(f"{path} is no CSV: {error}") from error
    parts = {name: str(name).rpartition(" - ") for name in (rows[0] if rows else ())}
    runs = {run for run, _, plain in parts.values() if plain in _LOSS}
    if len(runs) > 1:
        raise RecordError(f"{path} holds losses of {len(runs)} runs; export one by itself")
    return [{parts[name][2]: value for name, value in row.items()} for row in rows]
