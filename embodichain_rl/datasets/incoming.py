"""The receiving side of the transfer of batches: tensors over the blocks of a ``DataLoader`` worker.

See ``transport.py``, which explains the transfer. Unpickling a message calls :func:`receive_storage` and
:func:`receive_array` in the main process.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import weakref

import numpy as np
import torch

from embodichain_rl.errors import SharingError
from embodichain_rl.shared import ALIGNMENT, map_shared

__all__ = ["DROPPED", "HEADER", "LENT", "MAPPED", "SPOILED", "receive_array", "receive_storage", "too_many"]

HEADER = ALIGNMENT
"""Size of the header of a block, in bytes. It contains the four words that follow."""

LENT = 0
"""Index of the word that the worker sets when it sends the block. The receiver clears it when it has released its last
tensor in the block."""

SPOILED = 1
"""Index of the word that a process sets if it forks while it has tensors in the block. Such a block is never reused,
since it is unknown when the last child process has released its tensors."""

MAPPED = 2
"""Index of the word that the receiver sets when it has mapped the block and keeps the mapping. The worker then closes
its descriptor, so that a batch that is kept takes none."""

DROPPED = 3
"""Index of the word that the worker sets when it removes the block. The receiver then removes its mapping."""

SWEEP_INTERVAL = 64
"""Number of received storages between two searches for dropped blocks."""


class _Mapping:
    """A block that is mapped in this process. It stays mapped while this object or an array over it exists."""

    def __init__(self, path: str, nbytes: int) -> None:
        self.bytes = map_shared(path, nbytes)
        self.words = self.bytes[:HEADER].view(np.int64).data


class _Loan:
    """The use of one block by one message. It ends when the last tensor of the message is released."""

    def __init__(self, words: memoryview) -> None:
        self.words = words
        # Not __del__: another thread could still get the loan from its weak reference while that runs.
        weakref.finalize(self, _give_back, words).atexit = False


def _give_back(words: memoryview) -> None:
    words[LENT] = 0


_known: dict[int, _Mapping] = {}
"""Mappings of the blocks that may be received again, by inode. An inode is not reused while its file is mapped. They
are kept because mapping a block again, page by page, takes longer than copying its content."""

_senders: dict[int, set[int]] = {}
"""The inodes of the kept mappings of each child process, by process id."""

_loans: weakref.WeakValueDictionary[int, _Loan] = weakref.WeakValueDictionary()
"""The current loan of each block in which this process has tensors, by inode."""

_received = 0


def receive_storage(block: tuple[int, int, int, int], offset: int, nbytes: int) -> torch.UntypedStorage:
    """Return a storage over part of a block.

    Args:
        block: the process id of the worker, its descriptor of the block, and the inode and size of the block.
        offset: start of the part, in bytes.
        nbytes: size of the part.

    Raises:
        SharingError: the worker has ended, or this process can open no more files or memory mappings.
    """
    return torch.from_numpy(_borrow(block, offset, nbytes)).untyped_storage()


def receive_array(
    block: tuple[int, int, int, int], offset: int, dtype: np.dtype, shape: tuple[int, ...], transposed: bool
) -> np.ndarray:
    """Return an array over part of a block; see :func:`receive_storage`."""
    nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    # Through a tensor, which holds the borrowed part: NumPy lets views of a view refer to what the first one is a view
    # of, so the part would be released at once, and the block reused under the array.
    array = torch.from_numpy(_borrow(block, offset, nbytes)).numpy().view(dtype).reshape(shape)
    return array.T if transposed else array


def _borrow(block: tuple[int, int, int, int], offset: int, nbytes: int) -> np.ndarray:
    global _received
    pid, fd, inode, size = block
    mapping = _known.get(inode) or _open(pid, fd, inode, size)
    loan = _loans.get(inode)
    if loan is None:
        loan = _loans[inode] = _Loan(mapping.words)
    part = mapping.bytes[offset : offset + nbytes]
    # The registry of finalizers holds the loan until the array is gone.
    weakref.finalize(part, _end, loan).atexit = False
    _received += 1
    if _received % SWEEP_INTERVAL == 0:
        _sweep()
    return part


def _end(loan: _Loan) -> None:
    """Release the reference to a loan."""


def _open(pid: int, fd: int, inode: int, size: int) -> _Mapping:
    try:
        own_fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(own_fd).st_ino != inode:
                raise ProcessLookupError("the process id or the descriptor has been reused")
            mapping = _Mapping(f"/proc/self/fd/{own_fd}", size)
        finally:
            os.close(own_fd)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise too_many(error) from error
        raise SharingError(f"The DataLoader worker {pid} ended before the batch that it sent was received.") from error
    _remember(pid, inode, mapping)
    return mapping


def too_many(error: OSError) -> SharingError:
    """Return the error for a process that can open no more files or memory mappings."""
    return SharingError(
        f"No further block for a batch could be opened: {error.strerror}. Every batch that is kept takes a memory "
        "mapping. Keep fewer batches, keep copies (batch.clone()), or raise the limit: `ulimit -n` for open files, "
        "`sysctl vm.max_map_count` for memory mappings. Or call "
        "torch.multiprocessing.set_sharing_strategy('file_system'), so that torch sends the batches in its own way."
    )


def _remember(pid: int, inode: int, mapping: _Mapping) -> None:
    if pid not in _senders:
        worker = next((child for child in multiprocessing.active_children() if child.pid == pid), None)
        if worker is None:  # not a child: its end is not observed, so its blocks could never be removed
            return
        weakref.finalize(worker, _forget, pid).atexit = False
    _senders.setdefault(pid, set()).add(inode)
    _known[inode] = mapping
    mapping.words[MAPPED] = 1


def _sweep() -> None:
    for inode, mapping in list(_known.items()):
        if mapping.words[DROPPED]:
            _known.pop(inode, None)
            for inodes in list(_senders.values()):
                inodes.discard(inode)


def _forget(pid: int) -> None:
    for inode in _senders.pop(pid, ()):
        _known.pop(inode, None)


def _spoil_before_fork() -> None:
    for inode, loan in list(_loans.items()):
        loan.words[SPOILED] = 1
        _known.pop(inode, None)


def _reset_in_forked_child() -> None:
    _known.clear()
    _senders.clear()


os.register_at_fork(before=_spoil_before_fork, after_in_child=_reset_in_forked_child)
