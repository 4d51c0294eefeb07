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
        self._some: dict[tuple[int, ...], Any] = {}

    def gather(self, value: Any) -> list[Any]:
        """One value from each, on all."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self.group)
        return found

    def together(self, step: Callable[[], _Result]) -> _Result:
        """Take a step on every process; where one fails, all do.

        Raises:
            MeasurementError: another process failed, which is named; or this one's own error.
        """
        result, failure = None, None
        try:
            result = step()
        except Exception as error:
            failure = error
        reasons = self.gather(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise MeasurementError(f"process {rank} failed: {reason}")
        return result  # type: ignore[return-value]

    def gather_to_rank0(self, value: Any, some: tuple[int, ...]) -> list[Any]:
        """The values of some processes, process 0 among them, on process 0; none on others."""
        if len(some) == 1:
            return [value] if self.rank in some else []
        if some not in self._some:
            self._some[some] = dist.new_group(list(some), backend="gloo")
        if self.rank not in some:
            return []
        found: list[Any] = [None] * len(some)
        into = found if self.rank == 0 else None
        dist.gather_object(value, into, dst=0, group=self._some[some])
        return found if self.rank == 0 else []

    def from_first(self, value: Any) -> Any:
        """Process 0's value on all."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]


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
