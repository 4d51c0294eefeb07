"""Plans: tests that say which jobs they need next, so that those of several run together."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from sinktrack.events import Uneditable
from sinktrack.interventions.replay import Job, Replay

_Result = TypeVar("_Result")

Plan = Generator[Sequence[Job], list[Any], _Result]
"""Yields jobs that do not need one another, and is sent their answers; see `Replay.answer`."""


def ask(jobs: Sequence[Job]) -> Plan[list[Any]]:
    """The outcomes of jobs.

    Raises:
        Uneditable: one of them has none.
    """
    answers = (yield jobs) if jobs else []
    for answer in answers:
        if isinstance(answer, Uneditable):
            raise answer
    return answers


def side_by_side(plans: Sequence[Plan[_Result]]) -> Plan[list[_Result | Uneditable]]:
    """The results of several plans, or what one of them raised in its place."""
    results: dict[int, _Result | Uneditable] = {}
    asked: dict[int, Sequence[Job]] = {}

    def go_on(place: int, answers: list[Any] | None) -> None:
        asked.pop(place, None)
        try:
            plan = plans[place]
            asked[place] = next(plan) if answers is None else plan.send(answers)
        except StopIteration as end:
            results[place] = end.value
        except Uneditable as error:
            results[place] = error

    for place in range(len(plans)):
        go_on(place, None)
    while asked:
        answers = iter((yield [job for jobs in asked.values() for job in jobs]))
        for place, jobs in list(asked.items()):
            go_on(place, [next(answers) for _ in jobs])
    return [results[place] for place in range(len(plans))]


def in_lockstep(plans: Sequence[Plan[_Result]]) -> Plan[list[_Result]]:
    """The same of plans none of which may fail.

    Raises:
        Uneditable: of the first that did.
    """
    outcomes = yield from side_by_side(plans)
    results = []
    for result in outcomes:
        if isinstance(result, Uneditable):
            raise result
        results.append(result)
    return results


def carry_out(replay: Replay, plan: Plan[_Result]) -> _Result:
    """Run what a plan asks for, until it has its result."""
    try:
        jobs = next(plan)
        while True:
            jobs = plan.send(replay.answer(jobs))
    except StopIteration as end:
        result: _Result = end.value
        return result
