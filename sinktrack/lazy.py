"""Torch, imported when it is first used.

The metrics declare their fields beside their arithmetic; whoever only reads records and draws them
takes the fields without waiting for torch. Modules on that way write ``from sinktrack.lazy import
torch`` in place of ``import torch``.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    """Stands for a module that is imported when one of its names is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _Lazy("torch")
