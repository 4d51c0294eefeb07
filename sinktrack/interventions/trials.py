"""The causal tests: what is changed, what it is compared with, and the verdicts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from sinktrack.events import Uneditable
from sinktrack.interventions import transplant, unmixing
from sinktrack.interventions.ablation import Ablation
from sinktrack.interventions.bench import Bench
from sinktrack.interventions.candidates import screen
from sinktrack.interventions.card import Start, card, measured_beside, start_of
from sinktrack.interventions.effects import LEAST_EFFECT
from sinktrack.interventions.experts import of_bench, profiled
from sinktrack.interventions.first_token import first_token_dependence
from sinktrack.interventions.plans import Plan, carry_out, side_by_side
from sinktrack.interventions.replay import replaying
from sinktrack.interventions.results import CausalTests, Knockout, Necessity, Sufficiency
from sinktrack.measurement import Measurement
from sinktrack.models.base import adapt
from sinktrack.probe import Probe

__all__ = [
    "examine",
    "is_testable",
    "necessity",
    "position",
    "run_causal_tests",
    "screen",
    "sufficiency",
]


def run_causal_tests(
    model: Any,
    probe: Probe,
    measured: Measurement,
    *,
    batch_size: int | None = None,
    start: Start | None = None,
    beside: Measurement | None = None,
) -> CausalTests:
    """Run all causal tests; the record's ``causal``.

    Where no sink has formed, or it begins in block 0 before anything was written, there is nothing
    to test and the lists are empty.

    Args:
        model: the model that was measured, as `sinktrack.measure` takes it.
        probe: the probe that it was measured with.
        measured: the measurement, whose phases pick what is tested.
        batch_size: sequences per forward pass; by default as many as logits of 256 MiB allow.
        start: the start token of the position card, see `sinktrack.position_card`.
        beside: the measurement of what the card needs beside the probe, where there is one.

    Returns:
        ``necessity``, ``sufficiency`` and ``position`` of the main phase, the same of every phase
        in ``phases``, ``experts``, ``meaning`` (dependence on the first token), and
        ``position_card``, which stands beside ``causal`` in a record; plain numbers that
        ``json.dumps`` takes. Where a model cannot be edited as a test asks, that one is empty and
        ``missing`` holds the reason.

    Raises:
        ProbeError, MeasurementError: as `sinktrack.measure` does.
    """
    started = time.perf_counter()
    tests: CausalTests = {  # type: ignore[typeddict-item]  # the rest comes below
        "formed": bool(measured.sinks),
        "reference_block": measured.reference_block,
        "least_effect": LEAST_EFFECT,
        "necessity": [],
        "sufficiency": [],
        "position": [],
        "phases": [],
        "experts": [],
        "meaning": None,
        "forwards": 0.0,
    }
    if is_testable(measured):
        adapt(model).all_or_none(lambda: _examine(tests, model, probe, measured, batch_size))
    start = start or start_of(probe, getattr(model, "config", None))
    if beside is None:
        beside = measured_beside(model, probe, start, batch_size)
    made = card(probe, measured, start, beside)
    tests["position_card"] = made
    if tests["meaning"] is not None:
        tests["meaning"] |= {"as_is": made["as_is"], "random_first": made["random_first"]}
    tests["seconds"] = time.perf_counter() - started
    return tests


def _examine(
    found: CausalTests, model: Any, probe: Probe, measured: Measurement, batch_size: int | None
) -> None:
    """Fill in what the tests find."""
    with _tests(model, probe, measured, batch_size) as tests:
        found["phases"] = [
            {"first_block": phase.first_block, "last_block": phase.last_block,
             "peak_block": phase.peak_block, "necessity": [], "sufficiency": [], "position": []}
            for phase in tests.phases
        ]  # fmt: skip
        plans: list[Plan[Any]] = [*(test(tests) for test in _TESTS.values()), profiled(tests)]
        *of_tests, profile = carry_out(tests.replay, side_by_side(plans))
        for name, by_phase in zip(_TESTS, of_tests, strict=True):
            if isinstance(by_phase, Uneditable):
                tests.missing[name] = str(by_phase)
                by_phase = [[] for _ in tests.phases]
            for phase, rows in zip(found["phases"], by_phase, strict=True):
                phase[name] = rows
            found[name] = tests.of_main(by_phase)
        if isinstance(profile, Uneditable):
            tests.missing["experts"] = str(profile)
        else:
            found["experts"] = of_bench(tests, profile, found["necessity"])
        if tests.missing:
            found["missing"] = tests.missing
        found["forwards"] = tests.replay.forwards
        seen = tests.seen
    found["meaning"] = first_token_dependence(probe, measured, seen)


examine = run_causal_tests


def necessity(
    model: Any, probe: Probe, measured: Measurement, *, batch_size: int | None = None
) -> list[Necessity]:
    """Ablate each candidate's write at P0 and see how much of the main phase's attention goes.

    ``effect`` is the share of the attention to P0, in the phase's blocks after the ablated one,
    that is gone when the component writes at P0 what it writes at another position of the sequence
    (resample), and for the embedding, when another token's stands there; ``zero``, ``mean`` and
    ``first_token`` are the same for no write, for the mean over the other positions, and for what
    the component writes at P0 where another token stands there. They stand with the change of
    the next-token loss, P0's own apart, and ``outcome``: ``lost`` where the attention to all
    positions in the sink state goes too, ``diluted`` where it stays and others share it. Verdicts:
    ``necessary``; ``distinguishing``, where the sink goes with another position's write but not
    with nothing, so that P0 need not have its own, but must be without that of the others;
    ``redundant``, neither of these but one of several that stand in for each other: without all of
    them the sink goes, with this one alone it stays.

    Arguments and errors are those of `run_causal_tests`; no test where no sink has formed.
    """
    return _alone("necessity", model, probe, measured, batch_size)


def sufficiency(
    model: Any, probe: Probe, measured: Measurement, *, batch_size: int | None = None
) -> list[Sufficiency]:
    """Put P0's writes, and its whole state at the first block of a phase, on another position.

    ``effect`` is what that position gains in attention from later queries, over the attention to
    P0 that was there. Verdict: ``sufficient``. Arguments and errors are those of
    `run_causal_tests`.
    """
    return _alone("sufficiency", model, probe, measured, batch_size)


def position(
    model: Any, probe: Probe, measured: Measurement, *, batch_size: int | None = None
) -> list[Knockout]:
    """Let another position attend to itself alone before the main phase, and P0 to all.

    ``effect`` is what the other position gains in attention from later queries (verdict
    ``follows``), or what P0 loses when it mixes the values of all positions (verdict ``unmixed``:
    the sink needs P0's attention to itself alone), over the attention to P0 that was there.
    ``share_of_two`` is the other position's part of the attention to both afterwards: 0.5 where it
    draws as much as P0. Arguments and errors are those of `run_causal_tests`.
    """
    return _alone("position", model, probe, measured, batch_size)


def is_testable(measured: Measurement) -> bool:
    """Has a sink formed that something was written for?"""
    return any(sink.first_block for sink in measured.sinks)


_Test = Literal["necessity", "sufficiency", "position"]
_TESTS: dict[_Test, Callable[[Bench], Plan[Any]]] = {
    "necessity": lambda bench: Ablation(bench).by_phase(),
    "sufficiency": transplant.sufficiency,
    "position": unmixing.position,
}
"""By name, what gives the rows of each phase."""


@contextmanager
def _tests(
    model: Any, probe: Probe, measured: Measurement, batch_size: int | None
) -> Iterator[Bench]:
    with replaying(model, probe, batch_size) as replay:
        yield Bench(replay, probe, measured)


def _alone(
    test: _Test,
    model: Any,
    probe: Probe,
    measured: Measurement,
    batch_size: int | None,
) -> list[Any]:
    if not is_testable(measured):
        return []
    with _tests(model, probe, measured, batch_size) as tests:
        return tests.of_main(carry_out(tests.replay, _TESTS[test](tests)))
