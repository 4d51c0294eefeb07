"""What holds around forward passes that are Megatron's own, and is undone after them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sinktrack.models.guard import restore_on_exit


@contextmanager
def synced(found: Any) -> Iterator[None]:
    """Parameters are gathered, and no hook gathers them anew; around `probe_context`.

    `probe_context` would put the handles of these hooks back where something of the model leads to
    them, as ``no_sync_func`` does, after new hooks are set.
    """
    gathering = {
        wrapped: len(handles)
        for wrapped in found.models
        if (handles := getattr(wrapped, "remove_forward_pre_hook_handles", None))
    }

    def undo() -> None:
        for wrapped, count in gathering.items():
            handles = wrapped.remove_forward_pre_hook_handles
            if len(handles) != count:  # none, or some where disabling broke off
                while handles:
                    handles.popitem()[1].remove()
                wrapped.enable_forward_pre_hook()

    with restore_on_exit(undo):
        for wrapped in gathering:
            wrapped.disable_forward_pre_hook()
        yield


@contextmanager
def ready(found: Any) -> Iterator[None]:
    """No timers, no logits, no jitter; inside `probe_context`, which ends it."""
    scalers = {scaler: scaler.main_loss_backward_scale for scaler in _scalers()}
    own = {name: getattr(found.config, name) for name in ("timers", "param_sync_func")}

    def undo() -> None:
        for name, value in own.items():
            setattr(found.config, name, value)
        for scaler, scale in scalers.items():
            scaler.main_loss_backward_scale = scale

    with restore_on_exit(undo):
        for name in own:
            setattr(found.config, name, None)
        for scaler in scalers:  # a schedule writes into the tensor that is there
            scaler.main_loss_backward_scale = None
        for chunk in found.bare:
            chunk.post_process = chunk.mtp_process = False  # no logits, no further tokens
            for module in chunk.modules():
                if hasattr(module, "apply_input_jitter"):
                    module.apply_input_jitter = lambda input: input
        yield


def _scalers() -> list[Any]:
    """Where a schedule leaves the factor of the auxiliary losses, for the backward pass."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    return [MoEAuxLossAutoScaler, MTPLossAutoScaler]
