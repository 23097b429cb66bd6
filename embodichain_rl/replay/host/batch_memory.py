"""The pool of recycled output memory.

The pages of a fresh allocation are mapped one by one when they are first written: for a batch of images that takes
longer than the copy. So large batches are gathered into blocks that were used before. A block comes back when nobody
holds a tensor, an array or a view on it any more, and not earlier: a batch that somebody still holds is never
overwritten.

Whoever knows better where a batch should lie, because it is on its way to another process, say, brings a memory of its
own: see :func:`gathering_into`.
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
"""Bytes from which recycling pays; smaller tensors come from torch's allocator, which keeps such memory warm itself."""

MAX_IDLE = 1 << 30
"""Bytes of unused blocks that are kept at most."""


class BatchMemory:
    """Hands out uninitialised tensors over recycled memory.

    Example:
        >>> memory = BatchMemory()
        >>> images = memory.empty((16, 16 * 96 * 96 * 3), torch.uint8)
        >>> del images               # the next tensor of about that size gets the same, warm, memory
    """

    def __init__(self, max_idle: int = MAX_IDLE) -> None:
        self.max_idle = max_idle
        self._forget()
        _pools.add(self)

    def _forget(self) -> None:
        self._idle: OrderedDict[int, np.ndarray] = OrderedDict()  # by address, longest idle first
        self._idle_bytes = 0
        self._leases: dict[int, weakref.ref[np.ndarray]] = {}
        # Reentrant: a tensor can be collected, and its block come back, while this thread is inside.
        self._mutex = threading.RLock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Returns a contiguous CPU tensor of undefined content; its memory comes back when its last user is gone."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < POOL_FROM:
            return torch.empty(shape, dtype=dtype)
        size = size_class(nbytes)
        block = self._take(size)
        if block is None:
            # torch's memory begins at a cache line, numpy's does not, and copies to it are slower.
            block = torch.empty(size, dtype=torch.uint8).numpy()
        lease = block[:nbytes]
        address = block.ctypes.data
        with self._mutex:
            self._leases[address] = weakref.ref(lease, lambda _: self._come_back(address, block))
        return torch.from_numpy(lease).view(dtype).view(shape)

    def _take(self, size: int) -> np.ndarray | None:
        with self._mutex:
            for address in reversed(self._idle):  # the one that was used last is the warmest
                if len(self._idle[address]) == size:
                    self._idle_bytes -= size
                    return self._idle.pop(address)
        return None

    def _come_back(self, address: int, block: np.ndarray) -> None:
        with self._mutex:
            self._leases.pop(address, None)
            self._idle[address] = block
            self._idle_bytes += len(block)
            while self._idle_bytes > self.max_idle:
                self._idle_bytes -= len(self._idle.popitem(last=False)[1])

    def __reduce__(self) -> tuple[type[BatchMemory], tuple[int]]:
        return BatchMemory, (self.max_idle,)


def size_class(nbytes: int) -> int:
    """Rounds up to a quarter of a power of two, so that chunks of changing length share blocks."""
    step = 1 << max(nbytes.bit_length() - 3, 12)
    return -(-nbytes // step) * step


class Destination(Protocol):
    """Memory that batches are gathered into."""

    def empty_together(self, specs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
        """Returns a contiguous CPU tensor of undefined content for each ``(shape, dtype)``: one batch."""


_destination: ContextVar[Destination | None] = ContextVar("destination", default=None)


@contextmanager
def gathering_into(memory: Destination | None) -> Iterator[None]:
    """Lets the chunks that this thread gathers within the block lie in ``memory``; with None, where they always do."""
    token = _destination.set(memory)
    try:
        yield
    finally:
        _destination.reset(token)


def destination() -> Destination | None:
    """Returns the memory of the innermost :func:`gathering_into` around, None outside of any."""
    return _destination.get()


_pools: weakref.WeakSet[BatchMemory] = weakref.WeakSet()


def _forget_pools_in_forked_child() -> None:
    # The mutex may have been held by a thread that does not exist in the child.
    for pool in list(_pools):
        pool._forget()


os.register_at_fork(after_in_child=_forget_pools_in_forked_child)
