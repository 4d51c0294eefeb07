"""Run Megatron-Core over gloo on a CPU, which it does not foresee: stand-ins for what wants CUDA.

For tests and for `megatron_tiny_moe.py`; nothing of this is needed where there is a GPU.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

warnings.filterwarnings("ignore", message=".*Transformer Engine.*")
warnings.filterwarnings("ignore", message=".*Apex.*")


class _OnCpu(TorchFunctionMode):
    """Sends what is asked for on ``cuda`` to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")  # optimizers insist on it
        return func(*args, **kwargs)


class _NoTracker:
    """A tracker of CUDA's random states, of which there are none."""

    def is_initialized(self) -> bool:
        return True

    def add(self, name: str, seed: int) -> None:
        pass

    @contextlib.contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        yield

    def get_states(self) -> dict[str, Any]:
        return {}

    def set_states(self, states: dict[str, Any]) -> None:
        pass


class _NoEvent:
    """An event of CUDA, which has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _NoStream:
    """A stream of CUDA, which nothing runs on."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _NoEvent:
        return _NoEvent()

    def synchronize(self) -> None:
        pass


class _Mesh(DeviceMesh):
    """A mesh of CPUs where one of GPUs is asked for."""

    @staticmethod
    def from_group(group: Any, device_type: str, *_: Any, **__: Any) -> DeviceMesh:
        return DeviceMesh.from_group(group, "cpu")


def stand_in() -> None:
    """Make Megatron-Core run in this process without CUDA. Call it before building a model."""
    from megatron.core.distributed import torch_fully_sharded_data_parallel
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if isinstance(random._CUDA_RNG_STATE_TRACKER, _NoTracker):
        return
    torch._dynamo.config.disable = True  # compiling takes longer than what is compiled
    _OnCpu().__enter__()  # type: ignore[no-untyped-call]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.current_stream = lambda *args: _NoStream()  # type: ignore[assignment]
    torch.cuda.Stream = _NoStream  # type: ignore[assignment,misc]
    torch.cuda.Event = _NoEvent  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda *args: contextlib.nullcontext()  # type: ignore[assignment]
    random._CUDA_RNG_STATE_TRACKER = _NoTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(0)
    random._set_cuda_rng_state = lambda *args, **kwargs: None
    moe_utils.te_general_gemm = None
    torch_fully_sharded_data_parallel.DeviceMesh = _Mesh
    multi_latent_attention.TELinear = _NoTracker  # something that no module is an instance of


def start(**sizes: int) -> None:
    """Join the processes of torchrun, or be the only one, and lay out Megatron's groups.

    Args:
        sizes: of `parallel_state.initialize_model_parallel`, such as
            ``tensor_model_parallel_size``.
    """
    from megatron.core import parallel_state

    stand_in()
    if not dist.is_initialized():
        alone: dict[str, Any] = {
            "store": torch._C._distributed_c10d.HashStore(),
            "rank": 0,
            "world_size": 1,
        }
        dist.init_process_group("gloo", **({} if "RANK" in os.environ else alone))
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)
