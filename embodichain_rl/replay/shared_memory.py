"""Nameless memory that other processes can map, and the lock that dies with its holder.

Two things live here, both thin over the operating system:

* :class:`SharedBlock`, a run of bytes that every process of a program sees. On Linux it is a ``memfd``: it has no name
  to clash with or to leave behind, is the same under fork, spawn and forkserver, and does not count against the size
  of ``/dev/shm`` (64 MB in a default container). Elsewhere it is torch's own shared memory.
* :class:`CrossProcessLock`, an exclusive lock that the kernel releases when its holder dies, at whatever instruction.

A block travels to a child only while that child is being started; any other pickling raises
:class:`~embodichain_rl.errors.SharingError`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import tempfile
import threading
import time
import weakref
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import LedgerLockTimeoutError, SharingError

__all__ = ["ALIGNMENT", "CrossProcessLock", "SharedBlock"]

LOCK_TIMEOUT = 60.0
"""Seconds after which taking the lock gives up: its holder needs microseconds, so it must be stopped."""

ALIGNMENT = 64
"""Bytes that every array in a block is aligned to: one cache line."""


class SharedBlock:
    """Zero-filled bytes in memory that the processes of one program share.

    Args:
        nbytes: the size, in bytes; None leaves it open until one of the processes calls :meth:`allocate`. Pages that
            nobody has touched take no memory.

    Raises:
        SharingError: when pickled other than into a child that is being started.

    Example:
        >>> block = SharedBlock(4096)
        >>> counters = block.array(np.int64, (8,))
        >>> counters[0] = 1          # seen by every process that was given the block
    """

    def __init__(self, nbytes: int | None = None) -> None:
        self._bytes: torch.Tensor | None = None
        if sys.platform == "linux":
            self._own(os.memfd_create("embodichain_rl", os.MFD_CLOEXEC))
        else:
            self._fd = None
            lock_file, self._lock_path = tempfile.mkstemp(prefix="embodichain_rl-", suffix=".lock")
            os.close(lock_file)
            weakref.finalize(self, _unlink_as, os.getpid(), self._lock_path)
        if nbytes is not None:
            self.allocate(nbytes)

    def _own(self, fd: int) -> None:
        self._fd: int | None = fd
        weakref.finalize(self, os.close, fd)

    def allocate(self, nbytes: int) -> None:
        """Gives the block its size, in bytes: in one process, once."""
        if self._fd is None:
            self._bytes = torch.zeros(nbytes, dtype=torch.uint8).share_memory_()
        else:
            os.ftruncate(self._fd, nbytes)

    def mapped(self) -> torch.Tensor:
        """Returns all bytes, ``uint8`` ``[n]``, as this process has them mapped: always at the same address."""
        if self._bytes is None:
            assert self._fd is not None, "a block without a descriptor has its bytes from allocate()"
            self._bytes = torch.frombuffer(mmap.mmap(self._fd, os.fstat(self._fd).st_size), dtype=torch.uint8)
        return self._bytes

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> torch.Tensor:
        """Returns ``shape`` elements of ``dtype`` from byte ``offset`` on, as a tensor over the shared bytes."""
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        return self.mapped()[offset : offset + nbytes].view(dtype).view(shape)

    def array(self, dtype: type[np.generic], shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
        """Returns the same as :meth:`tensor`, as a numpy array."""
        nbytes = np.dtype(dtype).itemsize * torch.Size(shape).numel()
        return self.mapped().numpy()[offset : offset + nbytes].view(dtype).reshape(shape)

    def open_lock_file(self) -> int:
        """Returns a descriptor with an open file description of its own: what a ``flock`` belongs to."""
        path = self._lock_path if self._fd is None else f"/proc/self/fd/{self._fd}"
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is None:
            raise SharingError(
                "A shared buffer can be handed to another process only while that process is started (as an argument "
                "of multiprocessing.Process, a TorchRL collector or a DataLoader), not through a pipe or a queue."
            )
        if self._fd is not None:
            return {"fd": reduction.DupFd(self._fd)}
        if self._bytes is None:
            raise SharingError("On this platform a buffer must be allocated (storage.allocate) before it is shared.")
        return {"bytes": self._bytes, "lock_path": self._lock_path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bytes = state.get("bytes")
        if "fd" in state:
            self._own(state["fd"].detach())
        else:
            self._fd, self._lock_path = None, state["lock_path"]


def _unlink_as(owner: int, path: str) -> None:
    if os.getpid() == owner:
        Path(path).unlink(missing_ok=True)


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


# A generator's own way hands its state over in shared memory, which is gone when the child comes to map it.


def _generator(device: str, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(torch.from_numpy(np.frombuffer(state, dtype=np.uint8).copy()))
    return generator


def _reduce_generator(generator: torch.Generator) -> tuple[Any, tuple[str, bytes]]:
    return _generator, (str(generator.device), generator.get_state().numpy().tobytes())


reduction.ForkingPickler.register(torch.Generator, _reduce_generator)
