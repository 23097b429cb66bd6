"""Anonymous shared memory that other processes can map.

On Linux a :class:`SharedBlock` is a ``memfd``. It has no name, so that no two blocks collide and no file stays behind.
It works in the same way under fork, spawn and forkserver, and it does not count against the size of ``/dev/shm`` (64 MB
in a default container). On other systems it is torch's own shared memory.

A block can be sent to a child process only while that child is being started. Any other pickling raises
:class:`~embodichain_rl.errors.SharingError`.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
import weakref
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import SharingError
from embodichain_rl.shared.descriptors import descriptor_for_child
from embodichain_rl.shared.shortage import naming_shortage

__all__ = ["ALIGNMENT", "SharedBlock", "map_shared"]

ALIGNMENT = 64
"""Alignment of every array in a block, in bytes: one cache line."""


class SharedBlock:
    """Zero-filled bytes in memory that several processes share.

    Args:
        nbytes: size, in bytes. With None, one of the processes sets it later with :meth:`allocate`. A page takes no
            memory before its first page fault.
        name: what the memory is called in lists of open files.

    Raises:
        SharingError: if pickled other than into a child process that is being started.

    Example:
        >>> block = SharedBlock(4096)
        >>> counters = block.array(np.int64, (8,))
        >>> counters[0] = 1          # visible to every process that has the block
    """

    read_only = False
    """Whether the bytes can only be read."""

    def __init__(self, nbytes: int | None = None, *, name: str = "embodichain_rl") -> None:
        self._bytes: torch.Tensor | None = None
        if sys.platform == "linux":
            with naming_shortage("The creation of a block of shared memory"):
                self._adopt(os.memfd_create(name, os.MFD_CLOEXEC))
        else:
            self._fd = None
            lock_file, self._lock_path = tempfile.mkstemp(prefix="embodichain_rl-", suffix=".lock")
            os.close(lock_file)
            weakref.finalize(self, _unlink_in_creator, os.getpid(), self._lock_path)
        if nbytes is not None:
            self.allocate(nbytes)

    def _adopt(self, fd: int) -> None:
        self._fd: int | None = fd
        weakref.finalize(self, os.close, fd)

    def allocate(self, nbytes: int) -> None:
        """Set the size, in bytes. Only one process may call this, once.

        Raises:
            ResourceShortageError: the limit of address space (``ulimit -v``) or of files (``ulimit -f``) is too low.
        """
        with naming_shortage(f"The allocation of {nbytes:,} bytes of shared memory"):
            if self._fd is None:
                self._bytes = torch.zeros(nbytes, dtype=torch.uint8).share_memory_()
            else:
                os.ftruncate(self._fd, nbytes)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the pages that were written so far: the memory that the block takes."""
        if self._fd is None:
            return 0 if self._bytes is None else self._bytes.nbytes
        return 512 * os.fstat(self._fd).st_blocks

    def reserve(self, offset: int, nbytes: int) -> None:
        """Take the memory of some bytes now, before they are written.

        Raises:
            OSError: if there is not enough memory.
        """
        if self._fd is not None and nbytes:
            os.posix_fallocate(self._fd, offset, nbytes)

    def give_back(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Give the memory of some bytes back to the system. They are zero from now on, in every process that maps them.

        The memory of a page is given back if all of its bytes are among them. This is possible on Linux only;
        elsewhere nothing happens.

        Args:
            offset: the first byte.
            nbytes: the number of bytes; None: all from there on.
        """
        if self._fd is not None:
            nbytes = os.fstat(self._fd).st_size - offset if nbytes is None else nbytes
            _punch_hole(self._fd, offset, nbytes)

    @property
    def number(self) -> int:
        """Number (inode) of the file behind the block, unique on this machine; 0 if there is none."""
        return 0 if self._fd is None else os.fstat(self._fd).st_ino

    def mapped(self) -> torch.Tensor:
        """Return all bytes, ``uint8`` ``[n]``, mapped into this process. The address is the same at every call."""
        if self._bytes is None:
            assert self._fd is not None, "a block without a descriptor has its bytes from allocate()"
            nbytes = os.fstat(self._fd).st_size
            with naming_shortage(f"The mapping of {nbytes:,} bytes of shared memory"):
                self._bytes = torch.from_numpy(map_shared(f"/proc/self/fd/{self._fd}", nbytes))
        return self._bytes

    def back(self, offset: int, nbytes: int) -> None:
        """Take room for a range of the bytes, before it is first written. Only a block in a file needs it."""

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> torch.Tensor:
        """Return a tensor of this dtype and shape over the shared bytes, beginning at byte ``offset``."""
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        return self.mapped()[offset : offset + nbytes].view(dtype).view(shape)

    def array(self, dtype: type[np.generic], shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
        """Return the same as :meth:`tensor`, as a NumPy array."""
        nbytes = np.dtype(dtype).itemsize * torch.Size(shape).numel()
        return self.mapped().numpy()[offset : offset + nbytes].view(dtype).reshape(shape)

    def open_lock_file(self) -> int:
        """Open the file behind the block anew, so that the descriptor has its own ``flock``; return the descriptor."""
        path = self._lock_path if self._fd is None else f"/proc/self/fd/{self._fd}"
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is None:
            raise SharingError(
                "A shared buffer can be sent to another process only while that process is started (as an argument "
                "of multiprocessing.Process, a TorchRL collector or a DataLoader), not through a pipe or a queue. The "
                "tasks of a pool (multiprocessing.Pool, concurrent.futures, joblib) go through a queue: pass it as "
                "initargs of the pool, or use threads (for joblib: backend='threading')."
            )
        if self._fd is not None:
            return {"fd": descriptor_for_child(self._fd)}
        if self._bytes is None:
            raise SharingError("On this platform a buffer must be allocated (storage.allocate) before it is shared.")
        return {"bytes": self._bytes, "lock_path": self._lock_path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bytes = state.get("bytes")
        if "fd" in state:
            self._adopt(state["fd"].detach())
        else:
            self._fd, self._lock_path = None, state["lock_path"]


def map_shared(path: str, nbytes: int) -> np.ndarray:
    """Map the first bytes of a file, shared with all processes that map it.

    The mapping needs no open file, and exists until the last array or tensor over it is gone. Python's ``mmap`` keeps a
    duplicate of the descriptor instead.

    Args:
        path: the file; ``/proc/self/fd/<fd>`` for an open one.
        nbytes: the number of bytes. The file must have at least as many.

    Returns:
        A writable array ``uint8`` ``[nbytes]``.

    Raises:
        OSError: the file can't be opened or mapped.
    """
    try:
        storage: Any = torch.UntypedStorage.from_file(path, shared=True, nbytes=nbytes)
    except RuntimeError as error:
        number = re.search(r"\((\d+)\)\s*$", str(error).splitlines()[0])
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), path) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _punch_hole(fd: int, offset: int, nbytes: int) -> None:
    """Deallocate the pages of a file, and keep its size."""
    if nbytes <= 0:
        return
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    keep_size, punch_hole = 1, 2
    if fallocate(fd, keep_size | punch_hole, offset, nbytes):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _unlink_in_creator(creator: int, path: str) -> None:
    if os.getpid() == creator:  # a forked child runs the finalizers that it inherits
        Path(path).unlink(missing_ok=True)
