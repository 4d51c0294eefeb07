"""Pickles read as data: classes are admitted by name, and none of their code is ever run.

``torch.distributed.checkpoint`` and Megatron write pickles, and a pickle can call anything. Here a
name that a pickle imports becomes a ``Global``, which is a string and cannot be called; an object
becomes a ``Record``. Names that the caller did not admit are refused.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sinktrack.errors import ArchiveError

Build = Callable[..., Any]
"""Makes a value out of the arguments that a pickled object was constructed with."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle imports, ``module.name``."""

    name: str


class Record:
    """A pickled object of an admitted class: never an instance of it."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, *arguments: Any) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def get(self, key: str) -> Any:
        """An attribute from the pickled state, or None."""
        return self.state.get(key) if isinstance(self.state, dict) else None


def dtypes() -> dict[str, Build | None]:
    """The names of torch's dtypes, to be admitted."""
    return {
        f"torch.{name}": None
        for name in dir(torch)
        if isinstance(getattr(torch, name), torch.dtype)
    }


def load(data: bytes, admitted: Mapping[str, Build | None], what: str) -> Any:
    """Read a pickle.

    Args:
        data: the pickle.
        admitted: by ``module.name``, what makes a value of the constructor's arguments, or None
            for a ``Record``. A name that ends in ``.*`` stands for all names below it, ``*`` for
            every name: what a trainer keeps beside the weights is then data that nobody looks at.
        what: the file's name, for errors.

    Raises:
        ArchiveError: the pickle is damaged, or imports a name that is not admitted.
    """
    try:
        return _Unpickler(io.BytesIO(data), admitted, what).load()
    except ArchiveError:
        raise
    except MemoryError as error:
        raise ArchiveError(f"{what} does not fit into memory") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise ArchiveError(
            f"{what} is damaged or is no pickle ({type(error).__name__}: {error})"
        ) from error


class _Memo(list[Any]):
    """What a pickle refers back to, in the order in which every pickler numbers it."""

    def __setitem__(self, index: Any, value: Any) -> None:
        if index == len(self):
            self.append(value)
        else:
            super().__setitem__(index, value)


_MOVED = {"pathlib._local": "pathlib"}
"""What Python 3.13 calls a module of before and after."""
_Interpreter: Any = vars(pickle)["_Unpickler"]


class _Unpickler(_Interpreter):  # type: ignore[misc]
    """The interpreter written in Python: the one in C lets a pickle choose the size of its memo."""

    def __init__(self, file: io.BytesIO, admitted: Mapping[str, Build | None], what: str) -> None:
        super().__init__(file)
        self.memo = _Memo()
        self.admitted, self.what, self.any = admitted, what, "*" in admitted

    def find_class(self, module: str, name: str) -> Any:
        module = _MOVED.get(module, module)
        full = f"{module}.{name}"
        dtype = getattr(torch, name, None) if module == "torch" else None
        if full in self.admitted and isinstance(dtype, torch.dtype):
            return dtype
        if full in self.admitted or f"{module.split('.')[0]}.*" in self.admitted or self.any:
            return Global(full)
        raise ArchiveError(
            f"{self.what} is a pickle that imports {full}, which a checkpoint has no need of; it "
            "was not imported, and the file is not read any further"
        )

    def persistent_load(self, pid: Any) -> Any:
        return Record("storage", pid)

    def _make(self, called: Any, arguments: Any) -> Any:
        if self.any and isinstance(called, Record):  # what nobody looks at, of several steps
            return Record(called.name)
        if not isinstance(called, Global) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("calls something that is not a class")
        build = self.admitted.get(called.name)
        return build(*arguments) if build is not None else Record(called.name, *arguments)

    def _load_call(self) -> None:
        arguments = self.stack.pop()
        self.stack.append(self._make(self.stack.pop(), arguments))

    def _load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state
        elif (
            self.stack[-1] is not None and not self.any
        ):  # None is what a builder leaves of what nobody needs
            raise pickle.UnpicklingError("sets the state of something that is not an object")

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def _load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(self.stack[-1], items)

    def _load_append(self) -> None:
        item = self.stack.pop()
        self._extend(self.stack[-1], [item])

    def _extend(self, target: Any, items: list[Any]) -> None:
        if type(target) is list:
            target.extend(items)
        elif not (self.any and isinstance(target, Record)):
            raise pickle.UnpicklingError("appends to something that is not a list")

    def _set(self, target: Any, items: list[Any]) -> None:
        if self.any and isinstance(target, Record):
            return
        if type(target) is not dict:
            raise pickle.UnpicklingError("sets items of something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # the hash of a tuple nested without end would overflow the interpreter's stack
            if type(key) is tuple and any(type(part) is tuple for part in key):
                raise pickle.UnpicklingError("nested tuple as a key")
            target[key] = value

    dispatch = {
        code: function
        for code, function in _Interpreter.dispatch.items()
        if bytes([code])
        not in (
            pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4,
            pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.ADDITEMS,
            pickle.FROZENSET,
        )
    } | {
        pickle.REDUCE[0]: _load_call, pickle.NEWOBJ[0]: _load_call, pickle.BUILD[0]: _load_build,
        pickle.SETITEM[0]: _load_setitem, pickle.SETITEMS[0]: _load_setitems,
        pickle.APPEND[0]: _load_append, pickle.APPENDS[0]: _load_appends,
    }  # fmt: skip
