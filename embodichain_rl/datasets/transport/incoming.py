"""The receiving side of the transfer of batches: tensors over the blocks of a ``DataLoader`` worker.

The package explains the transfer. Unpickling a message calls the functions ``receive_...`` in the main
process.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.errors import SharingError
from embodichain_rl.replay.schema import Nest, numpy_dtype
from embodichain_rl.shared import ALIGNMENT, map_shared

__all__ = [
    "DROPPED",
    "HEADER",
    "LENT",
    "MAPPED",
    "SPOILED",
    "BatchLayout",
    "TensorPlace",
    "receive_array",
    "receive_batch",
    "receive_storage",
    "receive_tensor",
    "too_many",
]

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

MAX_LAYOUTS = 256
"""The number of layouts of batches that are kept."""

SWEEP_INTERVAL = 64
"""Number of received storages between two searches for dropped blocks."""


Ticket = tuple[int, int, int, int]
"""What a receiver needs to find a block: the process id of the worker, its descriptor of the block, and the inode and
the size of the block."""


class TensorPlace(NamedTuple):
    """Where a tensor is in the blocks of a batch."""

    block: int
    """The number of the block among those of the batch."""
    offset: int
    """In bytes."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""
    dtype: torch.dtype


class BatchLayout:
    """The layout of a batch in its blocks.

    Args:
        nest: builds the TensorDict.
        batch_size: its batch size.
        device: its device, the CPU or None.
        places: of each of its tensors.
    """

    def __init__(
        self,
        nest: Nest,
        batch_size: tuple[int, ...],
        device: torch.device | None,
        places: Sequence[TensorPlace],
    ) -> None:
        self._description = nest, batch_size, device, [(*place[:2], tuple(place[2]), *place[3:]) for place in places]
        self._fill = nest.fill
        self._batch_size, self._device = torch.Size(batch_size), device
        self._views = [_view_of(place) for place in places]
        self._converted = [(number, view[-1]) for number, view in enumerate(self._views) if view[-1] is not None]

    def to_bytes(self) -> bytes:
        """Return the layout as bytes; see :meth:`of_bytes`."""
        return pickle.dumps(self._description)

    @staticmethod
    @lru_cache(maxsize=MAX_LAYOUTS)
    def of_bytes(layout: bytes) -> BatchLayout:
        """Return the layout that :meth:`to_bytes` was called of."""
        nest, batch_size, device, places = pickle.loads(layout)
        return BatchLayout(nest, batch_size, device, [TensorPlace(*place) for place in places])

    def build(self, blocks: Sequence[np.ndarray]) -> TensorDict:
        """Return a batch over its blocks. Each tensor has a storage of its own."""
        array, from_numpy = np.ndarray, torch.from_numpy
        tensors = [
            from_numpy(array(shape, kind, blocks[block], offset, strides))
            for block, shape, kind, offset, strides, _ in self._views
        ]
        for number, dtype in self._converted:
            tensors[number] = tensors[number].view(dtype)
        return self._fill(tensors, self._batch_size, self._device)


def _view_of(
    place: TensorPlace,
) -> tuple[int, tuple[int, ...], np.dtype, int, tuple[int, ...], torch.dtype | None]:
    """Return the arguments of an array over a tensor, and the dtype to view it as, if that is another one."""
    block, offset, shape, stride, dtype = place
    kind = numpy_dtype(dtype)
    strides = tuple(each * kind.itemsize for each in stride)
    other = torch.from_numpy(np.empty(0, kind)).dtype != dtype
    return block, tuple(shape), kind, offset, strides, dtype if other else None


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


def receive_storage(block: Ticket, offset: int, nbytes: int) -> torch.UntypedStorage:
    """Return a storage over part of a block.

    Args:
        block: where to find the block.
        offset: start of the part, in bytes.
        nbytes: size of the part.

    Raises:
        SharingError: the worker has ended, or this process can open no more files or memory mappings.
    """
    return torch.from_numpy(_borrow(block, offset, nbytes)).untyped_storage()


def receive_tensor(
    block: Ticket, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return a tensor over part of a block, with a storage of its own; see :func:`receive_storage`.

    Args:
        block: where to find the block.
        offset: where the tensor begins, in bytes.
        shape: its shape; it has elements.
        stride: its strides, in elements.
        dtype: its dtype.
    """
    _, shape, kind, _, strides, other = _view_of(TensorPlace(0, offset, shape, stride, dtype))
    end = sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + kind.itemsize
    tensor = torch.from_numpy(np.ndarray(shape, kind, _borrow_array(block, offset, end), 0, strides))
    return tensor if other is None else tensor.view(other)


def receive_batch(blocks: Sequence[Ticket], layout: bytes) -> TensorDict:
    """Return a batch over blocks; see :func:`receive_storage`.

    Args:
        blocks: where to find each block.
        layout: what :meth:`BatchLayout.to_bytes` returned.
    """
    return BatchLayout.of_bytes(layout).build([_borrow_array(block, 0, block[-1]) for block in blocks])


def receive_array(block: Ticket, offset: int, dtype: np.dtype, shape: tuple[int, ...], transposed: bool) -> np.ndarray:
    """Return an array over part of a block; see :func:`receive_storage`."""
    nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    array = _borrow_array(block, offset, nbytes).view(dtype).reshape(shape)
    return array.T if transposed else array


def _borrow(block: Ticket, offset: int, nbytes: int) -> np.ndarray:
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


def _borrow_array(block: Ticket, offset: int, nbytes: int) -> np.ndarray:
    """Return the bytes of a part of a block, which views of them hold.

    The array is that of a tensor, which holds the borrowed part. NumPy lets views of a view refer to what the first
    one is a view of. So the part itself would be released at once, and the block reused under its views.
    """
    return torch.from_numpy(_borrow(block, offset, nbytes)).numpy()


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
