"""A lock between processes and threads that the kernel releases when its holder dies."""

from __future__ import annotations

import fcntl
import os
import threading
import time
import weakref
from types import TracebackType

import numpy as np

from embodichain_rl.errors import LedgerLockTimeoutError
from embodichain_rl.shared.memory import SharedBlock

__all__ = ["CrossProcessLock"]

LOCK_TIMEOUT = 60.0
"""Seconds after which taking the lock gives up: its holder needs microseconds, so it must be stopped."""


class CrossProcessLock:
    """An exclusive lock between processes and threads which the kernel releases when its holder dies.

    It is ``flock(2)`` on the block's own memory. A ``flock`` belongs to the open file description, so every thread of
    every process opens one for itself: threads exclude each other as processes do, a forked child does not hold what
    its parent held, and a section that Ctrl-C tore out of is released when its thread comes by again or ends.

    Args:
        block: the shared memory whose file carries the lock.
        holder: an ``int64`` array of one element in shared memory, where the holder notes its process id.

    Raises:
        LedgerLockTimeoutError: on entering, when the lock is not free within ``LOCK_TIMEOUT`` seconds.

    Example:
        >>> block = SharedBlock(4096)
        >>> lock = CrossProcessLock(block, block.array(np.int64, (1,)))
        >>> with lock:
        ...     pass
    """

    def __init__(self, block: SharedBlock, holder: np.ndarray) -> None:
        self._block = block
        self._holder = holder
        self._start_anew()
        _locks.add(self)

    def _start_anew(self) -> None:
        self._of_thread = threading.local()
        self._opened: weakref.WeakSet[_LockFile] = weakref.WeakSet()
        self._pid = os.getpid()

    def _lock_file(self) -> _LockFile:
        lock_file: _LockFile | None = getattr(self._of_thread, "lock_file", None)
        if lock_file is None:
            lock_file = self._of_thread.lock_file = _LockFile(self._block.open_lock_file())
            self._opened.add(lock_file)
        return lock_file

    def __enter__(self) -> None:
        fd = self._lock_file().fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._wait_for(fd)
        self._holder[0] = self._pid

    def _wait_for(self, fd: int) -> None:
        # flock() knows no time limit, so a taken lock is asked for again after a pause that grows to 1 ms.
        deadline = time.monotonic() + LOCK_TIMEOUT
        pause = 20e-6
        while True:
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LedgerLockTimeoutError(
                        f"The ledger's lock was not free after {LOCK_TIMEOUT:.0f} s: process {int(self._holder[0])} "
                        "holds it and does not go on. It is needed for microseconds only, so that process is stopped "
                        "(SIGSTOP, a debugger): continue it or end it."
                    ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fcntl.flock(self._of_thread.lock_file.fd, fcntl.LOCK_UN)

    def _renew_in_forked_child(self) -> None:
        # What was inherited is the parent's description: as long as it stays open here, the parent's death would not
        # release the parent's lock.
        for lock_file in list(self._opened):
            lock_file.close()
        self._start_anew()


class _LockFile:
    """One open file description, closed with the thread that it was opened for."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    __del__ = close


_locks: weakref.WeakSet[CrossProcessLock] = weakref.WeakSet()


def _renew_locks_in_forked_child() -> None:
    for lock in list(_locks):
        lock._renew_in_forked_child()


os.register_at_fork(after_in_child=_renew_locks_in_forked_child)
