"""The blocks of shared memory in which a ``DataLoader`` worker sends batches."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from embodichain_rl.datasets.transport.incoming import HEADER, MAPPED, too_many
from embodichain_rl.replay.kernels import BlockLayout, Spec
from embodichain_rl.shared import ALIGNMENT, map_shared

__all__ = ["Block", "aligned", "end_of"]


class Block:
    """A mapped ``memfd`` that contains a header and the data of one batch at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        try:
            self._fd = os.memfd_create("embodichain_rl-batch", os.MFD_CLOEXEC)
            self._close = weakref.finalize(self, os.close, self._fd)
            os.ftruncate(self._fd, size)
            self._bytes = map_shared(f"/proc/self/fd/{self._fd}", size)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise too_many(error) from error
            raise
        self._inode = os.fstat(self._fd).st_ino
        self.words = self._bytes[:HEADER].view(np.int64).data
        self.address = self._bytes.ctypes.data
        self._used = HEADER
        self._leases: list[weakref.ref[np.ndarray]] = []

    @property
    def room(self) -> int:
        """The number of bytes that are not taken."""
        return self.size - self._used

    def clear(self) -> None:
        """Give back all bytes."""
        self._used = HEADER
        self._leases.clear()

    def take(self, nbytes: int) -> np.ndarray:
        """Return the next ``nbytes`` bytes."""
        start = self._used
        self._used += aligned(nbytes)
        return self._bytes[start : start + nbytes]

    def tensors(self, specs: Sequence[Spec]) -> list[torch.Tensor]:
        """Return an uninitialised tensor for each ``(shape, dtype)``, one after the other."""
        layout = _layout_of(tuple(specs))
        lease = self.take(layout.nbytes)
        self._leases.append(weakref.ref(lease))
        return layout.tensors(torch.from_numpy(lease))

    def is_leased(self) -> bool:
        """Return whether a tensor of this process is in the block."""
        return any(lease() is not None for lease in self._leases)

    def close_if_mapped(self) -> bool:
        """Close the descriptor if the receiver does not need it any more; return whether it is closed."""
        if self.words[MAPPED]:
            self._close()
        return not self._close.alive

    def ticket(self) -> tuple[int, int, int, int]:
        """Return what a receiver needs to find the block."""
        return os.getpid(), self._fd, self._inode, self.size


def aligned(nbytes: int) -> int:
    """Return a number of bytes, rounded up to the alignment of tensors in a block."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def end_of(specs: Sequence[Spec]) -> int:
    """Return the size of aligned tensors, one after the other, in bytes."""
    return _layout_of(tuple(specs)).nbytes


@lru_cache(maxsize=256)
def _layout_of(specs: tuple[Spec, ...]) -> BlockLayout:
    return BlockLayout(specs)
