"""What causal tests and the position card return, as they stand in a record: plain numbers.

Effects are parts of the attention to P0 that was there; intervals are the middle 95 % over
resampled sequences, lower and upper bound. Lists by block have a number for each of the model's.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Change(TypedDict):
    """An effect with its interval."""

    effect: float
    interval: list[float]


class Unsure(TypedDict):
    """A mean change with its interval; null where it was not measured."""

    effect: float | None
    interval: list[float] | None


class Control(Change):
    """The effect of a control, and the interval of what the tested one has beyond it."""

    difference: list[float]


class Compared(Change):
    """An effect beside those of its controls, by name."""

    controls: dict[str, Control]


class BeforeAfter(TypedDict):
    """A mean over sequences without the change and with it; null where there is none."""

    before: float | None
    after: float | None


class Fate(TypedDict):
    """Is the sink lost, or is P0 one of several positions that share it?"""

    p0_norm_ratio: BeforeAfter
    """Norm of the P0 state over the median of the other positions, at the phase's peak."""
    set_size: BeforeAfter
    """Positions in the sink state, per sequence."""
    attention_to_set: BeforeAfter
    """Attention to all of them."""
    diluted: float | None
    """Part of the lost attention that others draw; null where the effect is not large."""
    outcome: str | None
    """``lost``, ``diluted`` or ``both``."""


class Necessity(Compared, Fate):
    """A component, or several together, whose write at P0 gave way to another position's."""

    kind: str
    block: int | None
    index: int | None
    """Of a head or an expert."""
    share: float | None
    zero: Compared | None
    """With no write at all; null, as the two that follow, where the effect is not large."""
    mean: Compared | None
    """With the mean over the other positions."""
    first_token: Compared | None
    """With what it writes at P0 where another token stands there."""
    loss: Unsure
    """Change of the next-token loss in nats, P0's own apart."""
    p0_loss: Unsure
    by_block: list[float | None]
    """Attention that P0 loses."""
    verdict: str | None
    """``necessary``, ``distinguishing`` or ``redundant``."""
    components: NotRequired[list[dict[str, Any]]]
    """Those that were changed together."""


class Sufficiency(Compared):
    """P0's write, or its whole state, put on another position."""

    kind: str
    block: int
    index: None
    share_of_two: float | None
    """The other position's part of the attention to it and P0 together."""
    loss: Unsure
    by_block: list[float | None]
    """Attention that the other position gains."""
    verdict: str | None
    """``sufficient``."""


class Knockout(Compared):
    """Another position that attends to itself alone in some blocks, or P0 that attends to all."""

    kind: str
    block: None
    index: None
    blocks: list[int]
    """The first and the last of them."""
    share_of_two: float | None
    by_block: list[float | None]
    verdict: str | None
    """``follows`` or ``unmixed``."""
    p0_norm_ratio: NotRequired[BeforeAfter]
    set_size: NotRequired[BeforeAfter]
    attention_to_set: NotRequired[BeforeAfter]
    diluted: NotRequired[float | None]
    outcome: NotRequired[str | None]


class Phase(TypedDict):
    """The tests of one sink phase."""

    first_block: int
    last_block: int
    peak_block: int
    necessity: list[Necessity]
    sufficiency: list[Sufficiency]
    position: list[Knockout]


class Expert(TypedDict):
    """A routed expert at P0 before the reference block, or one of extreme output."""

    block: int
    index: int
    p0_rate: float
    """Part of the sequences whose P0 is routed to it."""
    first_token_rate: float
    """The same over distinct first tokens."""
    gate: float | None
    output_norm: float | None
    largest_output: float | None
    share: float | None
    necessity: float | None
    verdict: str | None
    super_expert: bool | None


class NormRatios(TypedDict):
    """Norm ratios of the P0 state over distinct first tokens."""

    bos: float | None
    """Of the token that all sequences begin with."""
    quantiles: dict[str, float]
    values: list[float]


class Rates(TypedDict):
    """Sink rates over some sequences."""

    concentration: list[float | None]
    """By block."""
    sink_rate: float | None
    sink_rate_from_2: float | None
    """From block 2 on."""
    intervals: dict[str, list[float] | None]


class FirstTokenDependence(TypedDict):
    """The P0 state over distinct first tokens."""

    bos: int | None
    tokens: int
    norm_ratio: NormRatios
    as_is: NotRequired[Rates | None]
    random_first: NotRequired[Rates | None]


class PositionCard(TypedDict):
    """Sink rates under other first tokens; see `sinktrack.position_card`."""

    start_token: dict[str, Any] | None
    as_is: Rates | None
    without_start: Rates | None
    with_start: Rates | None
    random_first: Rates | None
    repeated: Rates | None
    answer: str | None
    """``position``, ``token`` or ``both``."""
    missing: NotRequired[dict[str, str]]
    """Why what is null could not be had."""


class CausalTests(TypedDict):
    """What `run_causal_tests` returns; the lists are those of the main phase."""

    formed: bool
    reference_block: int | None
    least_effect: float
    necessity: list[Necessity]
    sufficiency: list[Sufficiency]
    position: list[Knockout]
    phases: list[Phase]
    experts: list[Expert]
    meaning: FirstTokenDependence | None
    forwards: float
    """Passes over the whole probe that this cost."""
    missing: NotRequired[dict[str, str]]
    """Why a test could not be run."""
    position_card: NotRequired[PositionCard]
    """In a record it stands beside ``causal``."""
    seconds: float
