"""Reads of a mapped file, announced to the disk before the first byte is touched.

A copy from a mapped file waits for one page fault after the other, and each fault may read far more than it needs. So
the parts of a batch are announced together (``POSIX_FADV_WILLNEED``), and the disk reads them together.
"""

from __future__ import annotations

import mmap
import os
import resource
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np

from embodichain_rl.shared.files import FileBlock
from embodichain_rl.shared.memory import SharedBlock

__all__ = ["PATIENCE", "PIECE", "Part", "ReadAhead", "pieces_of"]

PIECE = 128 * 1024
"""Most bytes that are announced at once. The kernel ignores what goes beyond the device's limit, which is no lower."""

PATIENCE = 16
"""Number of reads of a thread that read nothing from a disk, one after the other, after which it announces nothing.
Several are needed, because a batch may be read in several parts, of which some are always in memory."""

_IN_MEMORY: AbstractContextManager[None] = nullcontext()

Part = tuple[np.ndarray, np.ndarray | int]
"""Addresses that are read, ``int64`` ``[n]``, and the number of bytes at each."""


class ReadAhead:
    """Announces what is read from a block to the disk, if there is one, as long as reads wait for it.

    An announcement of pages that are in memory already is a system call for nothing. So a thread stops announcing when
    its last :data:`PATIENCE` reads have read nothing from a disk, and begins again when one has.

    Args:
        block: the block, which this process has mapped.

    Attributes:
        on_disk (bool): whether the block is a file, so that a read may have to wait for a disk.
    """

    def __init__(self, block: SharedBlock) -> None:
        self._file = block if isinstance(block, FileBlock) and not block.in_memory else None
        self.on_disk = self._file is not None
        self._begin = block.mapped().data_ptr()
        self._thread = threading.local()

    def reading(self, parts: Iterable[Part]) -> AbstractContextManager[None]:
        """Announce parts of the block, which are read inside the ``with`` block.

        Args:
            parts: see :data:`Part`. It is not iterated if nothing is announced.
        """
        return _IN_MEMORY if self._file is None else self._announced(self._file, parts)

    @contextmanager
    def _announced(self, file: FileBlock, parts: Iterable[Part]) -> Iterator[None]:
        before = _read_so_far()
        idle: int = getattr(self._thread, "idle", 0)
        if idle < PATIENCE:
            for address, nbytes in pieces_of(parts):
                os.posix_fadvise(file.fd, address - self._begin, nbytes, os.POSIX_FADV_WILLNEED)
        yield
        self._thread.idle = idle + 1 if _read_so_far() == before else 0


def pieces_of(parts: Iterable[Part]) -> Iterator[tuple[int, int]]:
    """Return the pages of parts, each page once, in ascending pieces of at most :data:`PIECE` bytes.

    Example:
        >>> list(pieces_of([(np.array([8192, 100]), 8), (np.array([4000]), 200)]))
        [(0, 12288)]
    """
    addresses, sizes = [], []
    for begin, nbytes in parts:
        addresses.append(begin)
        sizes.append(np.broadcast_to(nbytes, begin.shape))
    if not addresses:
        return
    begins, counts = np.concatenate(addresses), np.concatenate(sizes)
    begins, counts = begins[counts > 0], counts[counts > 0]
    if not len(begins):
        return
    ends = -(-(begins + counts) // mmap.PAGESIZE) * mmap.PAGESIZE
    begins = begins // mmap.PAGESIZE * mmap.PAGESIZE
    order = np.argsort(begins)
    begins, ends = begins[order], np.maximum.accumulate(ends[order])
    first = np.concatenate([[True], begins[1:] > ends[:-1]])  # of a run of pages
    last = np.concatenate([first[1:], [True]])
    for begin, end in zip(begins[first].tolist(), ends[last].tolist(), strict=True):
        for at in range(begin, end, PIECE):
            yield at, min(PIECE, end - at)


def _read_so_far() -> int:
    """Return a number that grows when this thread reads from a disk, or waits for one."""
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_inblock + usage.ru_majflt
