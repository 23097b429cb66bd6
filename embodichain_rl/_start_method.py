"""Keeps a process as the user has it when TorchRL is imported, which sets multiprocessing's start method to spawn.

With TorchRL's setting, ``DataLoader`` and every other user of multiprocessing in the process would start its workers in
another way than before, only because this package is used.

TorchRL's collectors don't depend on the setting: where the user has chosen no start method, they ask for spawn. But its
buffers create locks and shared values by the global functions of multiprocessing, and those that are created under fork
can't be sent to a process that is spawned. So TorchRL's modules get these functions from the same context as its
collectors.

Where Ray is installed, TorchRL imports it too. What Ray does at the exit of a process makes the interpreter forget that
Ctrl-C ended the program: its exit code is 1, and a loop of a shell goes on. So it is done only where Ray is in use.
"""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import multiprocessing.spawn
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["keeping_start_method"]

PACKAGE = "torchrl"

_PRIMITIVES = frozenset(
    {
        *("Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore", "Event", "Barrier", "Value", "Array"),
        *("Queue", "JoinableQueue", "SimpleQueue"),
    }
)


@contextmanager
def keeping_start_method() -> Iterator[None]:
    """Restore the start method after the ``with`` block, also if none has been chosen yet."""
    before = multiprocessing.get_start_method(allow_none=True)
    try:
        yield
    finally:
        if multiprocessing.get_start_method(allow_none=True) != before:
            multiprocessing.set_start_method(before, force=True)


def _exit_without_ray() -> None:
    """Let Ray, which was just imported, shut down at the exit of this process only if it is in use then."""
    # Ray has no public way to say so. Without this name, Ctrl-C has the exit code 1, which a test notices.
    shutdown = getattr(sys.modules.get("ray._private.worker"), "shutdown", None)
    if shutdown is not None:
        atexit.unregister(shutdown)
        atexit.register(_shut_ray_down)


def _shut_ray_down() -> None:
    import ray  # type: ignore[import-untyped,unused-ignore]

    if ray.is_initialized():
        ray.shutdown(True)


class _Multiprocessing(ModuleType):
    """The module ``multiprocessing``, or torch's, with primitives for the start method that TorchRL uses."""

    def __init__(self, original: ModuleType) -> None:
        super().__init__(original.__name__, original.__doc__)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        if name in _PRIMITIVES:
            return getattr(self._original.get_context(self._start_method()), name)
        return getattr(self._original, name)

    def _start_method(self) -> str:
        return multiprocessing.get_start_method(allow_none=True) or "spawn"


class _TorchRLFinder(MetaPathFinder):
    """Finder of TorchRL's modules, whose imports change neither the start method nor the exit of a process."""

    def __init__(self) -> None:
        self._finding: set[str] = set()

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE or name in self._finding:
            return None
        self._finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._finding.discard(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            has_ray = "ray" in sys.modules
            with keeping_start_method():
                load(module)
            if not has_ray and "ray" in sys.modules:
                _exit_without_ray()
            for variable in ("mp", "multiprocessing"):
                original = vars(module).get(variable)
                if isinstance(original, ModuleType) and not isinstance(original, _Multiprocessing):
                    setattr(module, variable, _Multiprocessing(original))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# A process that is spawned gets the start method of its parent. In asking for it, multiprocessing would choose one for
# the parent, too, for good. So it is told that there is none.
setattr(multiprocessing.spawn, "get_start_method", partial(multiprocessing.get_start_method, allow_none=True))  # noqa: B010

if PACKAGE not in sys.modules:
    sys.meta_path.insert(0, _TorchRLFinder())
