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
from embodichain_rl.shared.running_time import Deadline

__all__ = ["CrossProcessLock"]

LOCK_TIMEOUT = 60.0
"""Seconds to wait for the lock, without the time in which the process that waits is stopped itself. A holder needs it
for microseconds, so after this time it must be a stopped process."""


class CrossProcessLock:
    """Exclusive lock between processes and threads; the kernel releases it when its holder dies.

    The lock is a ``flock(2)`` on the file behind a shared memory block. A ``flock`` belongs to an open file
    description, and every thread of every process opens its own. This has three effects:

    * Threads exclude each other in the same way as processes.
    * A forked child does not hold the lock of its parent.
    * A lock that stays taken after Ctrl-C is released when its thread next uses it, or ends.

    Args:
        block: the shared memory whose file carries the lock.
        holder: ``int64`` array of one element in shared memory. The holder writes its process id to it.
        timeout: the longest time to wait, in seconds.

    Raises:
        LedgerLockTimeoutError: on entering, if the lock is not free within ``timeout`` seconds.

    Example:
        >>> block = SharedBlock(4096)
        >>> lock = CrossProcessLock(block, block.array(np.int64, (1,)))
        >>> with lock:
        ...     pass
    """

    def __init__(self, block: SharedBlock, holder: np.ndarray, *, timeout: float | None = None) -> None:
        self._block = block
        self._timeout = timeout
        self._holder = holder
        self._reset()
        _locks.add(self)

    def _reset(self) -> None:
        self._per_thread = threading.local()
        self._lock_files: weakref.WeakSet[_LockFile] = weakref.WeakSet()
        self._pid = os.getpid()

    def _lock_file(self) -> _LockFile:
        lock_file: _LockFile | None = getattr(self._per_thread, "lock_file", None)
        if lock_file is None:
            lock_file = self._per_thread.lock_file = _LockFile(self._block.open_lock_file())
            self._lock_files.add(lock_file)
        return lock_file

    def __enter__(self) -> None:
        fd = self._lock_file().fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._wait_for(fd)
        self._holder[0] = self._pid

    def _wait_for(self, fd: int) -> None:
        # flock() has no timeout, so the lock is polled with a pause that doubles up to 1 ms.
        timeout = LOCK_TIMEOUT if self._timeout is None else self._timeout
        deadline = Deadline(timeout)
        pause = 20e-6
        while True:
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if deadline.passed():
                    raise LedgerLockTimeoutError(
                        f"The ledger's lock was not free after {timeout:.0f} s. Process {int(self._holder[0])} "
                        "holds it and makes no progress. The lock is only needed for microseconds, so that process is "
                        "stopped (SIGSTOP, a debugger): continue it or kill it."
                    ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fcntl.flock(self._per_thread.lock_file.fd, fcntl.LOCK_UN)

    def _reset_in_forked_child(self) -> None:
        # The child inherits the parent's open file descriptions. While they stay open here, the death of the parent
        # does not release a lock that the parent holds.
        for lock_file in list(self._lock_files):
            lock_file.close()
        self._reset()


class _LockFile:
    """One open file description, closed when the thread that opened it ends."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    __del__ = close


_locks: weakref.WeakSet[CrossProcessLock] = weakref.WeakSet()


def _reset_locks_in_forked_child() -> None:
    for lock in list(_locks):
        lock._reset_in_forked_child()


os.register_at_fork(after_in_child=_reset_locks_in_forked_child)
