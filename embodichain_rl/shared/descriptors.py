"""Open files on their way to a process that is being started."""

from __future__ import annotations

import os
import weakref
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

from embodichain_rl.errors import SharingError

__all__ = ["descriptor_for_child"]

_sent: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()
"""For each process that was started by spawn: the descriptors that it got."""


def descriptor_for_child(descriptor: int) -> Any:
    """Return what to pickle of a descriptor for the process that is being started.

    A process that is spawned can't be given a descriptor twice. But what has one may be pickled twice: as an argument,
    and as part of something that is pickled by itself, such as a function that is pickled by value.

    Returns:
        An object whose ``detach()`` returns the descriptor in the other process, which has to close it.
    """
    child: Any = get_spawning_popen()
    if child.method != "spawn":
        return reduction.DupFd(descriptor)
    sent = _sent.setdefault(child, set())
    if descriptor in sent:
        return _SentBefore(descriptor)
    sent.add(descriptor)
    return reduction.DupFd(descriptor)


class _SentBefore:
    """A descriptor that the other process has got already; it has the same number there."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._file = _file_of(descriptor)

    def detach(self) -> int:
        if _file_of(self._descriptor) != self._file:
            raise SharingError(
                "This process has got the memory of a buffer twice, and has dropped the first one before it read the "
                "second one. Keep what it was started with, such as its arguments."
            )
        return os.dup(self._descriptor)


def _file_of(descriptor: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(descriptor)
    except OSError:  # it is closed
        return None
    return status.st_dev, status.st_ino
