"""From paired numbers per sequence to effects, intervals and verdicts.

An effect is a sum over sequences of what an intervention changed, over a sum of what was there
before. Sequences are resampled together with their controls (a paired bootstrap), so what varies
between sequences but not between an intervention and its control drops out of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sinktrack.interventions.results import Compared, Control, Unsure
from sinktrack.metrics import bootstrap

LEAST_EFFECT = 0.1
"""Of the attention to P0 that was there: what an effect, and its difference to every control, must
exceed with all of their intervals for a verdict."""
FEWEST_SEQUENCES = 8
"""With fewer, resampling says nothing about other sequences."""


@dataclass(frozen=True)
class Effect:
    """What one intervention changed, with its controls. Tensors are float64 ``[B]``."""

    changed: Tensor
    before: Tensor
    """What the change is a share of."""
    controls: Mapping[str, Tensor]
    """By name, what each control changed instead."""

    @property
    def value(self) -> float:
        """Change over what was there before."""
        return float(self.changed.mean() / self.before.mean())

    @property
    def interval(self) -> list[float]:
        """95 % over sequences."""
        return interval(_resampled(self.changed, self.before))

    @property
    def large(self) -> bool:
        """Is all of the interval above `LEAST_EFFECT`? If not, no control can lead to a verdict."""
        return len(self.changed) >= FEWEST_SEQUENCES and self.interval[0] > LEAST_EFFECT

    @property
    def holds(self) -> bool:
        """Is the effect large, and larger than that of every control by as much?"""
        return (
            self.large
            and bool(self.controls)
            and all(self._difference(other)[0] > LEAST_EFFECT for other in self.controls.values())
        )

    def _difference(self, other: Tensor) -> list[float]:
        return interval(_resampled(self.changed - other, self.before))

    def to_record(self) -> Compared:
        """As it stands in a record."""
        controls: dict[str, Control] = {
            name: {
                "effect": float(other.mean() / self.before.mean()),
                "interval": interval(_resampled(other, self.before)),
                "difference": self._difference(other),
            }
            for name, other in self.controls.items()
        }
        return {"effect": self.value, "interval": self.interval, "controls": controls}


def mean(values: Tensor) -> Unsure:
    """Mean and 95 % interval of ``[B]`` numbers; null for what was not measured."""
    if bool(values.isnan().any()):
        return {"effect": None, "interval": None}
    return {
        "effect": float(values.mean()),
        "interval": interval(bootstrap.weights(len(values)) @ values),
    }


def interval(samples: Tensor) -> list[float]:
    """The middle 95 % of resampled values ``[resamples]``: lower and upper bound, or nan."""
    return bootstrap.interval(samples) or [math.nan, math.nan]


def _resampled(changed: Tensor, before: Tensor) -> Tensor:
    weight = bootstrap.weights(len(changed))
    return (weight @ changed) / (weight @ before)
