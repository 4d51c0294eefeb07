"""The processes of a run: what they tell each other, and that they fail together or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from sinktrack.errors import MeasurementError

_Result = TypeVar("_Result")


class Processes:
    """The processes of a run, over gloo: what they exchange is small and on the CPU."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo") if self.size > 1 else None
        self._steps = self._depth = 0
        self._some: dict[tuple[int, ...], Any] = {}

    def gather(self, value: Any) -> list[Any]:
        """One value from each, on all.

        Raises:
            MeasurementError: another process failed on its way here, in a step that is taken
                `together`.
        """
        return self._round(value)

    def all_or_none(self, step: Callable[[], _Result]) -> _Result:
        """Take a step on every process; where one fails, all do.

        A step may gather, and take steps together: who fails before says so in the round that the
        others wait in, whichever that is.

        Raises:
            MeasurementError: another process failed, which is named; or this one's own error.
        """
        self._steps += not self._depth
        self._depth += 1
        try:
            result = step()
        except Exception as error:
            if not self._is_told(error):
                self._tell(error)
                self._round(None, f"{type(error).__name__}: {error}")
            raise
        finally:
            self._depth -= 1
        self._round(None)
        return result

    def _tell(self, error: Exception) -> None:
        """All know of this error, or will from the round that follows."""
        error.__dict__["told"] = self._steps

    def _is_told(self, error: BaseException | None) -> bool:
        """Do all know of an error, or of the one in this step that led to it?"""
        while error is not None:
            if error.__dict__.get("told") == self._steps:
                return True
            error = error.__cause__ or error.__context__
        return False

    def _round(self, value: Any, failure: str | None = None) -> list[Any]:
        """Each process gives a value, or says why it fails; then all fail."""
        answers: list[Any] = [(value, failure)] * self.size
        if self.size > 1:
            dist.all_gather_object(answers, (value, failure), group=self.group)
        for rank, (_, reason) in enumerate(answers):
            if failure is None and reason is not None:
                error = MeasurementError(f"process {rank} failed: {reason}")
                self._tell(error)
                raise error
        return [value for value, _ in answers]

    def gather_to_rank0(self, value: Any, some: tuple[int, ...]) -> list[Any]:
        """The values of some processes, process 0 among them, on process 0; none on others."""
        if len(some) == 1:
            return [value] if self.rank in some else []
        if some not in self._some:
            self._some[some] = dist.new_group(list(some), backend="gloo")
        if self.rank not in some:
            return []
        gathered: list[Any] = [None] * len(some)
        into = gathered if self.rank == 0 else None
        dist.gather_object(value, into, dst=0, group=self._some[some])
        return gathered if self.rank == 0 else []

    def from_first(self, value: Any) -> Any:
        """Process 0's value on all."""
        return self.gather(value if self.rank == 0 else None)[0]


_processes: tuple[Any, Processes] | None = None


def processes() -> Processes:
    """Those of the default process group; made once, on all at the same time.

    Raises:
        MeasurementError: there is no process group.
    """
    global _processes
    if not dist.is_initialized():
        raise MeasurementError(
            "torch.distributed is not initialized; Megatron-Core models need it, and the groups of "
            "parallel_state.initialize_model_parallel"
        )
    if _processes is None or _processes[0] is not dist.group.WORLD:
        _processes = dist.group.WORLD, Processes()
    return _processes[1]
