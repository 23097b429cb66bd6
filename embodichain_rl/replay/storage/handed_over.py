"""Whether a storage was handed to other processes, and whether one of these has failed since."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
import weakref
from multiprocessing.context import get_spawning_popen
from typing import Any

__all__ = ["HandedOver"]

ENDED_ON_REQUEST = {0, -2, -15}
"""Exit codes of processes that ended by themselves, or by SIGINT or SIGTERM."""

PAUSE = 0.2
"""Seconds between two looks at the children."""


class HandedOver:
    """Notes the child processes that are started with a storage, and watches them on a thread.

    A child that ends with an error can't write any more, and whoever waits for its data would wait for ever. So its end
    is warned of at once, and the error of an empty buffer names it.

    Args:
        storage: the storage.
        is_set: whether it was handed over before.

    Attributes:
        is_set (bool): whether another process may have the memory of the storage.
        watched (bool): False: somebody else looks after the children.
    """

    def __init__(self, storage: Any, *, is_set: bool = False) -> None:
        self.is_set = is_set
        self.watched = True
        self._children: list[Any] = []
        self._failed: list[str] = []
        self._thread: threading.Thread | None = None
        _instances.add(self)

    def to_child(self) -> None:
        """Take note that the storage is being pickled for a child that is being started."""
        self.is_set = True
        child = get_spawning_popen()
        if child is None or not self.watched or child in self._children:
            return
        self._children.append(child)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=_watch, args=(weakref.ref(self),), daemon=True, name="children of rb"
            )
            self._thread.start()

    @property
    def failed(self) -> list[str]:
        """What is known of the children that ended with an error, one text for each."""
        return list(self._failed)

    def look(self) -> bool:
        """Warn of children that have failed since the last look; return whether there are some that are alive."""
        alive = False
        for child in list(self._children):
            if getattr(child, "pid", None) is None:  # it is being started
                alive = True
                continue
            code = _exit_code(child)
            if code is None:
                alive = True
                continue
            with contextlib.suppress(ValueError):  # another thread was faster
                self._children.remove(child)
                if code not in ENDED_ON_REQUEST and self.watched:
                    self._note(child.pid, code)
        return alive

    def _note(self, pid: int, code: int) -> None:
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._failed.append(f"process {pid} {ended}")
        warnings.warn(
            f"A process that this buffer was handed to has failed: {self._failed[-1]}. It writes nothing any more, and "
            "a loop that waits for its data waits for ever. Its traceback is above.",
            stacklevel=3,
        )


def _exit_code(child: Any) -> int | None:
    """Return the exit code of a child; None as long as it is not known. Its parent can still wait for it afterwards."""
    if child.returncode is not None or child.method == "forkserver":
        code: int | None = child.returncode
        return code
    try:
        result = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # its parent is about to note the code
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def _watch(watcher: weakref.ref[HandedOver]) -> None:
    while (handed_over := watcher()) is not None and handed_over.look():
        del handed_over
        time.sleep(PAUSE)


_instances: weakref.WeakSet[HandedOver] = weakref.WeakSet()


def _after_fork() -> None:
    for handed_over in list(_instances):
        handed_over.is_set = True


def _after_fork_in_child() -> None:
    _after_fork()
    for handed_over in list(_instances):
        handed_over._children = []
        handed_over._thread = None


os.register_at_fork(after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
