"""Send functions and classes to a process that is being started even if it can't import them.

multiprocessing pickles a function by its name. That does not work for a lambda or a local function, nor for what is
defined in a notebook, at a prompt or in a script on standard input: the process that is started has no such module.
Here they are pickled by value, by ``cloudpickle``. What can be imported is pickled by its name as before.

Importing this module has this effect on all processes that are started from this one. Messages between running
processes are not affected.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import ChainMap
from contextvars import ContextVar
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from types import FunctionType
from typing import Any

import torch

from embodichain_rl.shared.generators import reduce_generator

__all__ = ["dumps_by_value", "dumps_for_other_machine", "main_is_importable"]

_elsewhere: ContextVar[bool] = ContextVar("elsewhere", default=False)
"""Whether what is pickled goes to another machine."""


_MAIN = ("__main__", "__mp_main__")


def main_is_importable() -> bool:
    """Return whether a process that is started can import the main module of this one.

    It can't in a notebook, at a prompt, with ``python -c``, and if the script is read from standard input.
    """
    main = sys.modules["__main__"]
    return getattr(main, "__file__", None) is not None or getattr(main, "__spec__", None) is not None


def _reduce_by_value(pickler: ForkingPickler, thing: Any) -> Any:
    if isinstance(thing, (FunctionType, type)) and not _is_importable(thing):
        return pickle.loads, (dumps_by_value(thing),)
    return NotImplemented


def _is_importable(thing: Any) -> bool:
    if thing.__module__ in _MAIN and not main_is_importable():
        return False
    if isinstance(thing, type):
        return "<locals>" not in thing.__qualname__
    found: Any = sys.modules.get(thing.__module__)
    for part in thing.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is thing


def dumps_by_value(thing: Any) -> bytes:
    """Return a pickle of ``thing`` for another process, in which functions and classes need not exist."""
    import cloudpickle  # type: ignore[import-untyped]

    if _elsewhere.get():
        return _dumps_without_main(thing)

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, part: Any) -> Any:
            # cloudpickle would copy all of the main module that is used. But the copy of a class is another class.
            if isinstance(part, (FunctionType, type)) and part.__module__ in _MAIN and _is_importable(part):
                return NotImplemented
            return super().reducer_override(part)

    stream = io.BytesIO()
    pickler = Pickler(stream)
    # Tensors and pipes inside are sent as multiprocessing sends them.
    pickler.dispatch_table = ChainMap(ForkingPickler(io.BytesIO()).dispatch_table, Pickler.dispatch_table)
    pickler.dump(thing)
    return stream.getvalue()


def dumps_for_other_machine(thing: Any) -> bytes:
    """Return a pickle of ``thing`` for a process on another machine, which has other main modules and memory.

    What is defined in the main module is pickled by value. All other modules must be importable there.
    """
    token = _elsewhere.set(True)
    try:
        return _dumps_without_main(thing)
    finally:
        _elsewhere.reset(token)


def _dumps_without_main(thing: Any) -> bytes:
    import cloudpickle

    stream = io.BytesIO()
    pickler = cloudpickle.Pickler(stream)
    pickler.dispatch_table = ChainMap({torch.Generator: reduce_generator}, pickler.dispatch_table)
    pickler.dump(thing)
    return stream.getvalue()


class _WhileStarting:
    """The attribute ``reducer_override`` of multiprocessing's pickler. It exists only while a process is started.

    So pickling messages takes no longer than before.
    """

    def __get__(self, pickler: ForkingPickler | None, kind: type[ForkingPickler]) -> Any:
        if pickler is None or get_spawning_popen() is None:
            raise AttributeError("reducer_override")
        return _reduce_by_value.__get__(pickler)


setattr(ForkingPickler, "reducer_override", _WhileStarting())  # noqa: B010 - type checkers know it as a method

# A process that is started looks for the file of the main module, and fails if that is standard input. Without a file,
# it starts as from a notebook.
if getattr(sys.modules["__main__"], "__file__", None) == "<stdin>":
    del sys.modules["__main__"].__file__
