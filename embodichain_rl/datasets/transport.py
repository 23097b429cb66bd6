"""Zero-copy transfer of batches from a ``DataLoader`` worker to the training process.

By default, torch copies every tensor of a batch into a new shared-memory file when it is sent, and passes one file
descriptor for each. Mapping the new pages of these files takes several times longer than the copy. Here, a batch is
gathered into one block of shared memory from the start, and blocks are reused:

* In a worker, :func:`outgoing_memory` provides the memory. A tensor in it is sent as ``(process, descriptor, inode)``.
  The block, a ``memfd`` like all shared memory of this library, is then *lent*.
* The receiver opens the block through ``/proc/<process>/fd/<descriptor>`` and builds ordinary tensors over it. When the
  last of these tensors is released, the receiver marks the block as free in its header, and the worker reuses it.

No process waits for another: a worker that finds no free block makes a new one. Blocks are never leaked: the kernel
frees a block when the worker has ended and the receiver holds no tensor in it.

The transfer works on the storages of tensors. So transforms and collate functions need not know of it. A tensor outside
of these blocks is sent in torch's usual way. All tensors are sent in that way if a process has no permission to read
``/proc`` of its worker.
"""

from __future__ import annotations

import atexit
import itertools
import mmap
import multiprocessing
import os
import threading
import weakref
from collections.abc import Sequence
from functools import cache
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch.multiprocessing.reductions import reduce_storage
from torch.utils.data import get_worker_info

from embodichain_rl.errors import SharingError
from embodichain_rl.replay.host import MAX_IDLE, size_class
from embodichain_rl.replay.schema import is_nested
from embodichain_rl.shared import ALIGNMENT

__all__ = ["OutgoingMemory", "finish_sending_at_exit", "outgoing_memory"]

HEADER = ALIGNMENT
"""Size of the header of a block, in bytes. It contains two words, ``LENT`` and ``SPOILED``."""

LENT = 0
"""Index of the word that the worker sets when it sends the block. The receiver clears it when it has released its last
tensor in the block."""

SPOILED = 1
"""Index of the word that a process sets if it forks while it has tensors in the block. Such a block is never reused,
since it is unknown when the last child process has released its tensors."""

FEEDER_THREAD = "QueueFeederThread"
"""The name of the feeder threads of ``multiprocessing.Queue``, which pickle the objects to send."""

FEEDER_TIMEOUT = 1.0
"""Seconds that an exiting worker waits for each of them. A feeder whose queue is no longer read blocks outside of
torch's code, where stopping it is safe."""


@cache
def finish_sending_at_exit() -> None:
    """Have this ``DataLoader`` worker join its queues' feeder threads at exit, for a graceful shutdown.

    A spawned worker exits with the interpreter, which stops daemon threads at any point. If a feeder thread is inside
    torch's C++ code at that moment, the process aborts ("terminate called without an active exception"). The
    ``DataLoader`` then raises an error in the main process.
    """
    atexit.register(_join_feeders)


def _join_feeders() -> None:
    for thread in threading.enumerate():
        if thread.name == FEEDER_THREAD:
            thread.join(FEEDER_TIMEOUT)


def outgoing_memory() -> OutgoingMemory | None:
    """Return the memory for outgoing batches of this ``DataLoader`` worker, or None in any other process."""
    worker = get_worker_info()
    return None if worker is None else _outgoing_memory()


@cache
def _outgoing_memory() -> OutgoingMemory | None:
    parent = multiprocessing.parent_process()
    if parent is None or not _can_read_proc_of(parent.pid):
        return None
    memory = OutgoingMemory()
    ForkingPickler.register(torch.UntypedStorage, memory.reduce)
    os.register_at_fork(before=memory.spoil, after_in_child=_outgoing_memory.cache_clear)
    return memory


def _can_read_proc_of(pid: int | None) -> bool:
    """Return whether this process may read ``/proc`` of another process.

    Both are run by the same user, so the other process may then read ``/proc`` of this one.
    """
    try:
        os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return False
    return True


class OutgoingMemory:
    """Shared memory for batches that are sent to another process."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []  # the most recently used block is last
        self._by_address: dict[int, _Block] = {}
        self._pid = os.getpid()

    def empty_together(self, specs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
        """Return an uninitialised contiguous CPU tensor for each ``(shape, dtype)``, all in one block.

        The block is reused after all of them are released, in this process and in the receiver.
        """
        offsets = [0]
        for shape, dtype in specs:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            offsets.append(offsets[-1] + -(-nbytes // ALIGNMENT) * ALIGNMENT)
        storage = self._block_of(offsets[-1]).lease(offsets[-1])
        return [
            torch.empty(0, dtype=dtype).set_(storage, offset // dtype.itemsize, shape)  # type: ignore[call-overload]
            for (shape, dtype), offset in zip(specs, offsets, strict=False)
        ]

    def _block_of(self, nbytes: int) -> _Block:
        size = size_class(HEADER + nbytes)
        found: _Block | None = None
        idle = 0
        kept = []
        for block in reversed(self._blocks):
            # In this order: a block that is sent is marked as lent before this process releases its tensors.
            if block.is_leased() or block.words[LENT]:
                kept.append(block)
            elif block.words[SPOILED]:
                continue
            elif block.size == size and found is None:
                found = block
            elif idle + block.size <= MAX_IDLE:
                idle += block.size
                kept.append(block)
        found = found or _Block(size)
        self._blocks = [*reversed(kept), found]
        self._by_address = {block.address: block for block in self._blocks}
        return found

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor is in this memory."""
        return tensor.untyped_storage().data_ptr() in self._by_address

    def pack(self, data: TensorDict) -> TensorDict:
        """Return ``data`` with all tensors in this memory. Tensors outside of it are copied into one block."""
        loose = [(key, leaf) for key, leaf in data.items(True, True) if _is_plain(leaf) and not self.holds(leaf)]
        if not loose:
            return data
        packed = data.clone(recurse=False)
        copies = self.empty_together([(leaf.shape, leaf.dtype) for _, leaf in loose])
        for (key, leaf), copy in zip(loose, copies, strict=True):
            packed.set(key, copy.copy_(leaf))
        return packed

    def stack(self, items: Sequence[TensorDictBase]) -> TensorDict:
        """Stack TensorDicts with the same keys into this memory, as ``torch.stack`` does."""
        leaves = dict(items[0].items(True, True))
        if not all(map(_is_plain, leaves.values())):
            return torch.stack(list(items))
        stacks = self.empty_together([((len(items), *leaf.shape), leaf.dtype) for leaf in leaves.values()])
        for key, stack in zip(leaves, stacks, strict=True):
            torch.stack([item.get(key) for item in items], out=stack)
            leaves[key] = stack
        batch_size = torch.Size([len(items), *items[0].batch_size])
        stacked = items[0].named_apply(lambda key, _: leaves[key], nested_keys=True, batch_size=batch_size)
        # Nested TensorDicts have the batch size of the root now: restore their own dimensions.
        for key, nested in items[0].items(True):
            if is_nested(nested) and nested.batch_size != items[0].batch_size:
                stacked.get(key).batch_size = [len(items), *nested.batch_size]
                if nested._has_names():
                    stacked.get(key).names = [None, *nested.names]
        return stacked

    def reduce(self, storage: torch.UntypedStorage) -> tuple[Any, ...]:
        """Return how to pickle a storage: lend its block, if it is in a block that is not lent yet."""
        block = self._by_address.get(storage.data_ptr())
        if block is None or block.words.any() or self._pid != os.getpid():
            return reduce_storage(storage)
        block.words[LENT] = 1
        return _receive, (self._pid, block.fd, block.inode, storage.nbytes())

    def spoil(self) -> None:
        """Mark the blocks in use as never to be reused, since a forked child process is about to inherit them."""
        for block in self._blocks:
            if block.is_leased():
                block.words[SPOILED] = 1


class _Block:
    """A mapped ``memfd`` that contains a header and the data of one batch at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("embodichain_rl-batch", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)
        self.inode = os.fstat(self.fd).st_ino
        self._mapping = _Mapping(self.fd)
        self.words = self._mapping.words
        self.address = self._mapping.bytes[HEADER:].ctypes.data
        self._lease: weakref.ref[np.ndarray] | None = None

    def lease(self, nbytes: int) -> torch.UntypedStorage:
        lease = self._mapping.bytes[HEADER : HEADER + nbytes]
        self._lease = weakref.ref(lease)
        return torch.from_numpy(lease).untyped_storage()

    def is_leased(self) -> bool:
        """Return whether a tensor of this process is in the block."""
        return self._lease is not None and self._lease() is not None


def _is_plain(leaf: object) -> bool:
    return (
        type(leaf) is torch.Tensor
        and leaf.device.type == "cpu"
        and leaf.layout is torch.strided
        and not leaf.requires_grad
    )


class _Mapping:
    """The memory of a block in this process. It stays mapped while this object or an array over it exists."""

    def __init__(self, fd: int) -> None:
        self.bytes = np.frombuffer(mmap.mmap(fd, 0), dtype=np.uint8)
        self.words = self.bytes[:HEADER].view(np.int64)


# ------------------------------------------------------------------------------------------------------- the receiver


def _receive(pid: int, fd: int, inode: int, nbytes: int) -> torch.UntypedStorage:
    mapping = _known.get(inode) or _open(pid, fd, inode)
    lease = mapping.bytes[HEADER : HEADER + nbytes]
    number = next(_numbers)
    _borrowed[number] = inode, mapping.words
    weakref.finalize(lease, _give_back, number).atexit = False
    return torch.from_numpy(lease).untyped_storage()


_numbers = itertools.count()
_borrowed: dict[int, tuple[int, np.ndarray]] = {}
"""Inodes and headers of the blocks in which this process has tensors, by the number of the lease."""


def _give_back(number: int) -> None:
    _, words = _borrowed.pop(number)
    words[LENT] = 0


def _open(pid: int, fd: int, inode: int) -> _Mapping:
    try:
        own_fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(own_fd).st_ino != inode:
                raise ProcessLookupError("the process id or the descriptor has been reused")
            mapping = _Mapping(own_fd)
        finally:
            os.close(own_fd)
    except OSError as error:
        raise SharingError(f"The DataLoader worker {pid} ended before the batch that it sent was received.") from error
    _remember(pid, inode, mapping)
    return mapping


_known: dict[int, _Mapping] = {}
"""Cache of mappings of blocks that may be received again, by inode. An inode is not reused while its file is mapped.
The cache exists because mapping a block again, page by page, takes longer than copying its content."""

_senders: dict[int, set[int]] = {}
"""The inodes of the cached blocks of each child process, by process id."""


def _remember(pid: int, inode: int, mapping: _Mapping) -> None:
    if pid not in _senders:
        worker = next((child for child in multiprocessing.active_children() if child.pid == pid), None)
        if worker is None:  # not a child: its end is not observed, so its blocks could never be removed from the cache
            return
        weakref.finalize(worker, _forget, pid).atexit = False
    _senders.setdefault(pid, set()).add(inode)
    _known[inode] = mapping
    known = list(_known.items())
    excess = sum(len(mapping.bytes) for _, mapping in known) - MAX_IDLE
    for oldest, mapping in known[:-1]:
        if excess <= 0:
            break
        _known.pop(oldest, None)
        excess -= len(mapping.bytes)


def _forget(pid: int) -> None:
    for inode in _senders.pop(pid, ()):
        _known.pop(inode, None)


def _spoil_before_fork() -> None:
    for inode, words in list(_borrowed.values()):
        words[SPOILED] = 1
        _known.pop(inode, None)


def _reset_in_forked_child() -> None:
    _known.clear()
    _senders.clear()


os.register_at_fork(before=_spoil_before_fork, after_in_child=_reset_in_forked_child)
