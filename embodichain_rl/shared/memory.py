"""Nameless memory that other processes can map.

On Linux a :class:`SharedBlock` is a ``memfd``: it has no name to clash with or to leave behind, is the same under fork,
spawn and forkserver, and does not count against the size of ``/dev/shm`` (64 MB in a default container).
Elsewhere it is torch's own shared memory.

A block travels to a child only while that child is being started; any other pickling raises
:class:`~embodichain_rl.errors.SharingError`.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import SharingError

__all__ = ["ALIGNMENT", "SharedBlock"]

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
