"""Open files on their way to a process that is being started."""

from __future__ import annotations

import os
import weakref
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

from embodichain_rl.errors import SharingError

__all__ = ["descriptor_for_child"]

_sent: weakref.WeakKeyDictionary[Any, dict[int, Any]] = weakref.WeakKeyDictionary()
"""For each process that was started: the descriptors that it got, and what was pickled of them."""


def descriptor_for_child(descriptor: int) -> Any:
    """Return what to pickle of a descriptor for the process that is being started.

    What has a descriptor may be pickled twice: as an argument, and as part of something that is pickled by itself, such
    as a function that is pickled by value. But a process that is spawned can't be given a descriptor twice, and a fork
    server passes on no more than 250.

    Returns:
        An object whose ``detach()`` returns the descriptor in the other process, which has to close it.
    """
    sent = _sent.setdefault(get_spawning_popen(), {})
    if descriptor in sent:
        return _SentBefore(sent[descriptor], _file_of(descriptor))
    sent[descriptor] = first = reduction.DupFd(descriptor)
    return first


class _SentBefore:
    """A descriptor that the other process has got already.

    Args:
        first: what was pickled of it then.
        file: what it refers to.
    """

    def __init__(self, first: Any, file: tuple[int, int] | None) -> None:
        self._first, self._file = first, file

    def detach(self) -> int:
        descriptor: int = self._first.detach()
        if _file_of(descriptor) != self._file:
            raise SharingError(
                "This process has got the memory of a buffer twice, and has dropped the first one before it read the "
                "second one. Keep what it was started with, such as its arguments."
            )
        return os.dup(descriptor)


def _file_of(descriptor: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(descriptor)
    except OSError:  # it is closed
        return None
    return status.st_dev, status.st_ino
