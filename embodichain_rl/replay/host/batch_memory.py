"""A pool of recycled memory for batches.

Every page of a fresh allocation causes a page fault when it is first written. For a batch of images these page faults
take longer than the copy. So large batches are gathered into blocks of memory that were used before. A block returns to
the pool when the last tensor, array or view of it is gone, and not earlier. So a batch that is still referenced is
never overwritten.

A caller can provide other memory for a batch, for example memory that another process can read; see
:func:`gathering_into`.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import numpy as np
import torch

__all__ = ["MAX_IDLE", "POOL_FROM", "BatchMemory", "Destination", "destination", "gathering_into", "size_class"]

POOL_FROM = 1024 * 1024
"""Size in bytes from which tensors are recycled. For smaller tensors torch's allocator already reuses mapped memory."""

MAX_IDLE = 1 << 30
"""Largest total size of the unused blocks that are kept, in bytes."""


class BatchMemory:
    """Pool that allocates uninitialised tensors in recycled memory.

    Args:
        max_idle: largest total size of the unused blocks that are kept, in bytes.

    Example:
        >>> memory = BatchMemory()
        >>> images = memory.empty((16, 16 * 96 * 96 * 3), torch.uint8)
        >>> del images               # the next tensor of about this size gets the same memory, without page faults
    """

    def __init__(self, max_idle: int = MAX_IDLE) -> None:
        self.max_idle = max_idle
        self._reset()
        _pools.add(self)

    def _reset(self) -> None:
        self._idle: OrderedDict[int, np.ndarray] = OrderedDict()  # by address, least recently used first
        self._idle_bytes = 0
        self._leases: dict[int, weakref.ref[np.ndarray]] = {}
        # Reentrant: garbage collection can release a tensor, and so call _release, while this thread holds the mutex.
        self._mutex = threading.RLock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, skew: int = 0) -> torch.Tensor:
        """Return an uninitialised contiguous CPU tensor. Its memory is recycled when its last user is gone.

        Args:
            shape: its shape.
            dtype: its dtype.
            skew: bytes by which a recycled tensor begins behind a cache line.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < POOL_FROM:
            return torch.empty(shape, dtype=dtype)
        size = size_class(nbytes + skew)
        block = self._take(size)
        if block is None:
            # torch aligns memory to a cache line. NumPy does not, which makes copies slower.
            block = torch.empty(size, dtype=torch.uint8).numpy()
        lease = block[skew : skew + nbytes]
        address = block.ctypes.data
        with self._mutex:
            self._leases[address] = weakref.ref(lease, lambda _: self._release(address, block))
        return torch.from_numpy(lease).view(dtype).view(shape)

    def _take(self, size: int) -> np.ndarray | None:
        with self._mutex:
            for address in reversed(self._idle):  # the most recently used block is most likely in the CPU cache
                if len(self._idle[address]) == size:
                    self._idle_bytes -= size
                    return self._idle.pop(address)
        return None

    def _release(self, address: int, block: np.ndarray) -> None:
        with self._mutex:
            self._leases.pop(address, None)
            self._idle[address] = block
            self._idle_bytes += len(block)
            while self._idle_bytes > self.max_idle:
                self._idle_bytes -= len(self._idle.popitem(last=False)[1])

    def __reduce__(self) -> tuple[type[BatchMemory], tuple[int]]:
        return BatchMemory, (self.max_idle,)


def size_class(nbytes: int) -> int:
    """Round a size up to a multiple of a quarter of a power of two, at least 4 KiB.

    So batches of slightly different sizes share blocks.
    """
    step = 1 << max(nbytes.bit_length() - 3, 12)
    return -(-nbytes // step) * step


class Destination(Protocol):
    """Provider of the memory that batches are gathered into."""

    def empty_together(self, specs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
        """Return an uninitialised contiguous CPU tensor for each ``(shape, dtype)``; together they hold one batch."""


_destination: ContextVar[Destination | None] = ContextVar("destination", default=None)


@contextmanager
def gathering_into(memory: Destination | None) -> Iterator[None]:
    """Gather the chunks of this thread into ``memory``, inside the ``with`` block.

    Args:
        memory: provider of the memory; None for the default memory.
    """
    token = _destination.set(memory)
    try:
        yield
    finally:
        _destination.reset(token)


def destination() -> Destination | None:
    """Return the memory of the innermost active :func:`gathering_into`, or None."""
    return _destination.get()


_pools: weakref.WeakSet[BatchMemory] = weakref.WeakSet()


def _reset_pools_in_forked_child() -> None:
    # A thread of the parent, which does not exist in the child, may have held the mutex.
    for pool in list(_pools):
        pool._reset()


os.register_at_fork(after_in_child=_reset_pools_in_forked_child)
