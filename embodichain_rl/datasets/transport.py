"""How a batch gets from a ``DataLoader`` worker to the process that trains, without being copied on the way.

Left to itself, torch copies every tensor of a batch into a shared-memory file of its own when it is sent, and passes
one file descriptor each. The pages of all these files are new ones: mapping them takes several times longer than the
copy. Here a batch is put together in one block of shared memory from the start, and blocks are used again:

* In a worker, :func:`outgoing_memory` hands out the memory, and what is in it is sent as ``(process, descriptor,
  inode)``. The block, a ``memfd`` like all shared memory of this library, is now *lent*.
* The receiver opens it through ``/proc/<process>/fd/<descriptor>`` and builds ordinary tensors over it. When the last
  of them is gone, it writes into the head of the block that it is free, and the worker gathers into it again.

Nobody waits for anybody: a worker that finds no free block makes a new one. Nothing outlives its users: the kernel
frees a block when the worker is gone and the receiver holds no tensor on it.

It works on the storages of tensors, below whatever holds them: transforms and collate functions need not know of it,
and what does not lie in a block goes torch's way. So does everything where a process can't look into ``/proc`` of its
worker.
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
"""Bytes before the data of a block: two words, ``LENT`` and ``SPOILED``."""

LENT = 0
"""Set by the worker when it sends the block, cleared by the receiver when its last tensor on the block is gone."""

SPOILED = 1
"""Set by whoever forks while it has tensors on the block: nobody knows when the last child is done with them."""


FEEDER_THREAD = "QueueFeederThread"
"""The name of the threads of ``multiprocessing.Queue`` that pickle what is sent."""

FEEDER_PATIENCE = 1.0
"""Seconds that an ending worker waits for them; one that nobody reads from any more stands still outside of torch."""


@cache
def finish_sending_at_exit() -> None:
    """Makes this ``DataLoader`` worker end in peace.

    A spawned worker ends with the interpreter, which stops daemon threads wherever they are. A queue's feeder that is
    inside of torch's C++ code at that moment takes the process down ("terminate called without an active exception"),
    and the ``DataLoader`` raises in the main process that a worker was aborted.
    """
    atexit.register(_join_feeders)


def _join_feeders() -> None:
    for thread in threading.enumerate():
        if thread.name == FEEDER_THREAD:
            thread.join(FEEDER_PATIENCE)


def outgoing_memory() -> OutgoingMemory | None:
    """Returns this ``DataLoader`` worker's memory for batches to be sent; None in any other process."""
    worker = get_worker_info()
    return None if worker is None else _outgoing_memory()


@cache
def _outgoing_memory() -> OutgoingMemory | None:
    parent = multiprocessing.parent_process()
    if parent is None or not _sees_into(parent.pid):
        return None
    memory = OutgoingMemory()
    ForkingPickler.register(torch.UntypedStorage, memory.reduce)
    os.register_at_fork(before=memory.spoil, after_in_child=_outgoing_memory.cache_clear)
    return memory


def _sees_into(pid: int | None) -> bool:
    """Whether this process may look into ``/proc`` of another one, and so, run by the same user, it into this one's."""
    try:
        os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return False
    return True


class OutgoingMemory:
    """Shared memory for batches that are on their way to another process."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []  # the one used last at the end
        self._by_address: dict[int, _Block] = {}
        self._pid = os.getpid()

    def empty_together(self, specs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
        """Returns a contiguous CPU tensor of undefined content for each ``(shape, dtype)``, all in one block.

        The block is used again when none of them is left, neither here nor at a receiver.
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
            # Asked in this order: what is sent is marked as lent before this process lets go of it.
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
        """Whether the tensor lies in this memory."""
        return tensor.untyped_storage().data_ptr() in self._by_address

    def pack(self, data: TensorDict) -> TensorDict:
        """Returns the same TensorDict with what does not lie in this memory yet copied to it, all to one block."""
        loose = [(key, leaf) for key, leaf in data.items(True, True) if _is_plain(leaf) and not self.holds(leaf)]
        if not loose:
            return data
        packed = data.clone(recurse=False)
        places = self.empty_together([(leaf.shape, leaf.dtype) for _, leaf in loose])
        for (key, leaf), place in zip(loose, places, strict=True):
            packed.set(key, place.copy_(leaf))
        return packed

    def stack(self, items: Sequence[TensorDictBase]) -> TensorDict:
        """Does what ``torch.stack`` does with TensorDicts of the same keys, straight into this memory."""
        leaves = dict(items[0].items(True, True))
        if not all(map(_is_plain, leaves.values())):
            return torch.stack(list(items))
        places = self.empty_together([((len(items), *leaf.shape), leaf.dtype) for leaf in leaves.values()])
        for key, place in zip(leaves, places, strict=True):
            torch.stack([item.get(key) for item in items], out=place)
            leaves[key] = place
        batch_size = torch.Size([len(items), *items[0].batch_size])
        stacked = items[0].named_apply(lambda key, _: leaves[key], nested_keys=True, batch_size=batch_size)
        # The nested ones have the batch size of the root now.
        for key, nested in items[0].items(True):
            if is_nested(nested) and nested.batch_size != items[0].batch_size:
                stacked.get(key).batch_size = [len(items), *nested.batch_size]
                if nested._has_names():
                    stacked.get(key).names = [None, *nested.names]
        return stacked

    def reduce(self, storage: torch.UntypedStorage) -> tuple[Any, ...]:
        """Says to a pickler how to send a storage: by lending its block, where it has one that is not lent yet."""
        block = self._by_address.get(storage.data_ptr())
        if block is None or block.words.any() or self._pid != os.getpid():
            return reduce_storage(storage)
        block.words[LENT] = 1
        return _receive, (self._pid, block.fd, block.inode, storage.nbytes())

    def spoil(self) -> None:
        """Makes sure that what a child of this process is about to inherit is never overwritten."""
        for block in self._blocks:
            if block.is_leased():
                block.words[SPOILED] = 1


class _Block:
    """One ``memfd``, mapped, with a header and the data of one batch at a time."""

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
        """Whether a tensor of this process lies in it."""
        return self._lease is not None and self._lease() is not None


def _is_plain(leaf: object) -> bool:
    return (
        type(leaf) is torch.Tensor
        and leaf.device.type == "cpu"
        and leaf.layout is torch.strided
        and not leaf.requires_grad
    )


class _Mapping:
    """The memory of a block in this process; it stays mapped as long as this, or an array over it, is there."""

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
"""Inodes and heads of the blocks that this process has tensors on."""


def _give_back(number: int) -> None:
    _, words = _borrowed.pop(number)
    words[LENT] = 0


def _open(pid: int, fd: int, inode: int) -> _Mapping:
    try:
        own_fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(own_fd).st_ino != inode:
                raise ProcessLookupError("the process id, or the descriptor, is another one's by now")
            mapping = _Mapping(own_fd)
        finally:
            os.close(own_fd)
    except OSError as error:
        raise SharingError(f"The DataLoader worker {pid} ended before the batch that it sent was received.") from error
    _remember(pid, inode, mapping)
    return mapping


_known: dict[int, _Mapping] = {}
"""Blocks that may come again, by inode, which is no other file's as long as one is mapped: mapping a block anew, page
by page, takes longer than to copy what is in it."""

_senders: dict[int, set[int]] = {}
"""By process id, the inodes of the known blocks of this process's children."""


def _remember(pid: int, inode: int, mapping: _Mapping) -> None:
    if pid not in _senders:
        worker = next((child for child in multiprocessing.active_children() if child.pid == pid), None)
        if worker is None:  # then nothing says when its blocks are to be forgotten
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


def _start_anew_in_forked_child() -> None:
    _known.clear()
    _senders.clear()


os.register_at_fork(before=_spoil_before_fork, after_in_child=_start_anew_in_forked_child)
