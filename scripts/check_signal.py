"""How often the signal is right on curves of known truth.

Draws curves with a known onset, plateau and drop under several kinds of noise, analyzes each as a
run, and counts: how often the 95 % intervals hold the truth, how often a plateau is claimed that is
none, how often a fall is that did not happen, and how often a new main sink phase, which shifts the
depth, is taken for a move of the circuit. No model is trained.

    python scripts/check_signal.py [--curves 1000] [--seed 0] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sinktrack.signal import Analysis, analyze
from sinktrack.signal.robust import change
from sinktrack.signal.stages import MIN_CHANGE

END, EVERY = 10_000, 100
UNIFORM_LEVEL = 0.02
FORMED = 0.25


@dataclass(frozen=True)
class Truth:
    """One run as it would be without noise, and the noise that is put on it."""

    onset: float
    width: float
    """Steps from the onset to the plateau; to the end where there is none."""
    shape: str
    """``linear``, ``smooth``, ``sudden``, ``endless`` (rises to the end) or ``slow`` (like the
    logarithm of the step)."""
    top: float
    drop: float | None
    """Step of the drop."""
    dropped: float
    """Level after it."""
    noise: float
    lasting: float
    """Autocorrelation of neighbouring records."""
    probe: float
    """Standard error over the probe's sequences: an offset that all records share."""
    spacing: str
    """``even``, ``irregular``, ``gaps`` or ``growing`` (as powers of a number, then even)."""
    restart: bool
    """Training fell over, and went on from an older checkpoint."""
    second: float | None = None
    """Step at which a second sink phase forms behind the first and becomes the main one; the depth
    jumps by that alone."""

    def rate(self, steps: np.ndarray) -> np.ndarray:
        """The sink rate, ``[steps]``."""
        part = np.clip((steps - self.onset) / self.width, 0, None)
        if self.shape == "smooth":
            rise = np.where(part < 1, part * part * (3 - 2 * part), 1)
        elif self.shape == "sudden":
            rise = (part > 0).astype(float)
        elif self.shape == "slow":
            rise = np.log1p(9 * part) / np.log(10)
        else:
            rise = np.minimum(part, 1)
        rate = UNIFORM_LEVEL + (self.top - UNIFORM_LEVEL) * rise
        return rate if self.drop is None else np.where(steps >= self.drop, self.dropped, rate)


def draw(rng: np.random.Generator) -> Truth:
    """A run out of all that is tried."""
    onset = float(rng.uniform(1500, 3500))
    shape = str(
        rng.choice(["linear", "smooth", "sudden", "endless", "slow"], p=[0.3, 0.2, 0.1, 0.2, 0.2])
    )
    ends = shape not in ("endless", "slow")
    top = float(rng.uniform(0.4, 0.8))
    return Truth(
        onset=onset,
        width=float(rng.uniform(400, 2000)) if ends else END - onset,
        shape=shape,
        top=top,
        drop=float(rng.uniform(7000, 9000)) if ends and rng.random() < 0.4 else None,
        dropped=UNIFORM_LEVEL + (top - UNIFORM_LEVEL) * float(rng.uniform(0, 0.6)),
        noise=float(rng.choice([0.005, 0.02, 0.05])),
        lasting=float(rng.choice([0.0, 0.5])),
        probe=float(rng.choice([0.0, 0.01, 0.02])),
        spacing=str(rng.choice(["even", "irregular", "gaps", "growing"])),
        restart=bool(rng.random() < 0.3),
        second=float(rng.uniform(5000, 6500)) if rng.random() < 0.3 else None,
    )  # fmt: skip


def records(truth: Truth, rng: np.random.Generator) -> list[dict[str, Any]]:
    """The run's records in the order of writing."""
    steps = np.arange(0, END + 1, EVERY)
    if truth.spacing == "irregular":
        steps = np.unique(rng.integers(0, END, len(steps)))
    elif truth.spacing == "gaps":
        steps = steps[rng.random(len(steps)) > 0.3]
    elif truth.spacing == "growing":
        steps = np.unique(np.concatenate([2 ** np.arange(9), steps]))
    offset = truth.probe * float(rng.normal())
    written = []
    if truth.restart:
        back, failed = sorted(rng.choice(np.arange(1000, 6000), 2, replace=False))
        first = steps[steps < failed + 500]
        collapsed = np.where(first >= failed, UNIFORM_LEVEL, truth.rate(first))
        written += _records(truth, first, collapsed, offset, rng)
        steps = np.unique(np.concatenate([[back], steps[steps > back]]))
    return written + _records(truth, steps, truth.rate(steps), offset, rng)


def _records(
    truth: Truth, steps: np.ndarray, rates: np.ndarray, offset: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    wander = rng.normal(size=len(steps))
    for index in range(1, len(steps)):
        fresh = np.sqrt(1 - truth.lasting**2) * wander[index]
        wander[index] = truth.lasting * wander[index - 1] + fresh
    formed = rates > FORMED
    noisy = np.clip(rates + truth.noise * wander + offset * formed, 0, 1)
    half = 1.96 * truth.probe
    second = steps >= (np.inf if truth.second is None else truth.second)
    return [
        {
            "step": int(step),
            "tokens": int(step) * 2048,
            "source": "callback",
            "sink_rate": float(rate),
            "formed": bool(there),
            "first_two_share": float(0.8 + 0.02 * rng.normal()),
            "depth": float((5.5 if one_more else 0.5) + 0.05 * rng.normal()),
            "sinks": _sinks(bool(there), bool(one_more)),
            "intervals": {"sink_rate": [max(0.0, rate - half), min(1.0, rate + half)]},
        }
        for step, rate, there, one_more in zip(steps, noisy, formed, second, strict=True)
    ]


def _sinks(there: bool, one_more: bool) -> list[dict[str, Any]]:
    spans = [(2, 4, 1.5)] * there + [(7, 12, 4.0)] * (there and one_more)
    return [dict(zip(("first_block", "last_block", "mass"), span, strict=True)) for span in spans]


def judge(seed: int) -> tuple[dict[str, Any], dict[str, bool | None]]:
    """One curve and what came of it; None where nothing was claimed, or there was no occasion."""
    rng = np.random.default_rng(seed)
    truth = draw(rng)
    written = records(truth, rng)
    signal = analyze(written)
    flat = truth.shape in ("linear", "smooth", "sudden") and truth.drop is None
    true_drop = None if truth.drop is None else truth.top - truth.dropped
    fall = next((r for r in signal.regressions if r.quantity == "sink_rate"), None)
    false_falls = [
        r for r in signal.regressions if truth.drop is None or r.quantity != "sink_rate"
        or r.since.high < truth.drop
    ]  # fmt: skip
    lost_early = [
        step for step, stage in zip(signal.steps, signal.stages, strict=True)
        if stage == "lost" and (truth.drop is None or step < truth.drop)
    ]  # fmt: skip
    moved = [
        step
        for step, stage in zip(signal.steps, signal.stages, strict=True)
        if stage == "migrating"
    ] + [r for r in signal.regressions if r.quantity == "depth"]
    main = [event for event in signal.phases if event.what == "main"]
    new = truth.second is not None and _formed(truth, truth.second + EVERY * 10)
    seen = {
        "onset claimed": signal.onset is not None,
        "onset in its interval": signal.onset and _in(signal.onset, truth.onset),
        "plateau claimed": signal.plateau is not None if flat else None,
        "level in its interval": _in(signal.plateau.level, truth.top)
        if flat and signal.plateau else None,
        "start of the plateau in its interval": _in(
            signal.plateau.since, truth.onset + truth.width
        ) if flat and signal.plateau and truth.shape != "sudden" else None,
        "drop found": fall is not None if true_drop else None,
        "drop's size in its interval": _in(fall.size, true_drop) if fall and true_drop else None,
        "drop's step in its interval": _in(fall.since, truth.drop)
        if fall and truth.drop else None,
        "false plateau": _false_plateau(truth, signal),
        "false fall": bool(false_falls or lost_early),
        "new main phase told at its step": any(
            truth.second is not None and 0 <= event.step - truth.second < 4 * EVERY
            for event in main
        ) if new else None,
        "new main phase taken for a move": bool(moved) if new else None,
        "move claimed where nothing moved": bool(moved) if not new else None,
    }  # fmt: skip
    return asdict(truth), {name: None if v is None else bool(v) for name, v in seen.items()}


def _formed(truth: Truth, step: float) -> bool:
    return bool(truth.rate(np.array([step]))[0] > FORMED)


def _in(interval: Any, value: float) -> bool:
    return bool(interval.low <= value <= interval.high)


def _false_plateau(truth: Truth, signal: Analysis) -> bool:
    """Was the rate called settled while its true trend over the same window was material?"""
    steps = np.array(signal.steps, dtype=float)
    rates = truth.rate(steps)
    for index, (stage, because) in enumerate(zip(signal.stages, signal.because, strict=True)):
        if stage == "settled" and (truth.drop is None or steps[index] < truth.drop):
            window = slice(int(np.searchsorted(steps, because["window"])), index + 1)
            most = MIN_CHANGE * (rates[: index + 1].max() - UNIFORM_LEVEL)
            true = rates[window]
            if np.ptp(true) > most and abs(change(steps[window], true).value) > most:
                return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.curves)
    with ProcessPoolExecutor(options.processes) as pool:
        outcomes = list(pool.map(judge, seeds, chunksize=10))
    if options.json:
        print(json.dumps({name: share for name, (share, _) in table(outcomes).items()}))
        return
    whole = table(outcomes)
    for name, (share, count) in whole.items():
        print(f"{name:40} {share:6.1%} of {count}")
    for part in ("shape", "noise", "lasting", "probe", "spacing", "restart"):
        print(f"\nby {part}")
        for value in sorted({truth[part] for truth, _ in outcomes}):
            chosen = table([one for one in outcomes if one[0][part] == value])
            cells = ", ".join(f"{name} {share:.1%}" for name, (share, _) in chosen.items())
            print(f"  {value}: {cells}")


def table(
    outcomes: list[tuple[dict[str, Any], dict[str, bool | None]]],
    wanted: Callable[[dict[str, Any]], bool] = lambda truth: True,
) -> dict[str, tuple[float, int]]:
    """Share of curves, and of how many, by what was seen."""
    found: dict[str, list[bool]] = defaultdict(list)
    for truth, seen in outcomes:
        for name, value in seen.items():
            if value is not None and wanted(truth):
                found[name].append(value)
    return {name: (float(np.mean(values)), len(values)) for name, values in found.items()}


if __name__ == "__main__":
    main()
