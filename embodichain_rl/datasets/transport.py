"""Zero-copy transfer of batches from a ``DataLoader`` worker to the training process.

By default, torch copies every tensor of a batch into a new shared-memory file when it is sent, and passes one file
descriptor for each. Mapping the new pages of these files takes several times longer than the copy, and where
``/dev/shm`` is too small for them the main process waits forever. Here, a batch is gathered into one block of shared
memory from the start, and blocks are reused:

* In a worker, :func:`outgoing_memory` provides the memory. A block, a ``memfd`` like all shared memory of this
  library, is *lent* when a tensor in it is sent.
* The receiver (``incoming.py``) opens the block through ``/proc/<process>/fd/<descriptor>``, maps it and builds
  ordinary tensors over it. From then on the block needs no descriptor in either process. When the last of these tensors
  is released, the receiver marks the block as free in its header, and the worker reuses it.

No process waits for another: a worker that finds no free block makes a new one. Blocks are never leaked: the kernel
frees a block when the worker has ended and the receiver holds no tensor in it.

The transfer works on what is pickled: the storages of tensors, and NumPy arrays. So transforms and collate functions
need not know of it, whatever objects they return. What is outside of the blocks is copied into one when it is sent, if
possible into the block of the same batch.

Two kinds of tensors are sent in torch's usual way: those on another device, and those that the user placed in torch's
shared memory. All tensors are sent in that way if a process has no permission to read ``/proc`` of its worker, and with
``torch.multiprocessing.set_sharing_strategy("file_system")``.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import threading
from bisect import bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch._utils import ExceptionWrapper
from torch.multiprocessing import get_sharing_strategy
from torch.multiprocessing.reductions import reduce_storage
from torch.utils.data import get_worker_info
from torch.utils.data._utils import collate as torch_collate

from embodichain_rl.datasets.blocks import Block, aligned, end_of
from embodichain_rl.datasets.incoming import (
    DROPPED,
    HEADER,
    LENT,
    SPOILED,
    receive_array,
    receive_storage,
)
from embodichain_rl.replay.host import MAX_IDLE, size_class
from embodichain_rl.shared import Deadline, dumps_by_value

__all__ = ["OutgoingMemory", "enter_worker", "outgoing_memory"]

COLLECT_ALWAYS = 64
"""Number of blocks in use from which on free blocks are searched for only at some allocations."""

CLOSE_TESTS = 8
"""Number of open descriptors that are tested at each allocation."""

INLINE_ARRAY = 4096
"""Size in bytes below which a NumPy array is pickled into the message itself."""

FEEDER_THREAD = "QueueFeederThread"
"""The name of the feeder threads of ``multiprocessing.Queue``, which pickle the objects to send."""

FEEDER_TIMEOUT = 1.0
"""Seconds that an exiting worker waits for each of them. A feeder whose queue is no longer read blocks outside of
torch's code, where stopping it is safe."""


@cache
def enter_worker() -> None:
    """Prepare this ``DataLoader`` worker: it sends through shared memory, and shuts down gracefully.

    A spawned worker exits with the interpreter, which stops daemon threads at any point. If a feeder thread of a queue
    is inside torch's C++ code at that moment, the process aborts ("terminate called without an active exception"). The
    ``DataLoader`` then raises an error in the main process. So the feeder threads are joined at exit.
    """
    outgoing_memory()
    atexit.register(_join_feeders)


def _join_feeders() -> None:
    for thread in threading.enumerate():
        if thread.name == FEEDER_THREAD:
            Deadline(FEEDER_TIMEOUT).join(thread)


def outgoing_memory() -> OutgoingMemory | None:
    """Return the memory for outgoing batches of this ``DataLoader`` worker, or None in any other process."""
    worker = get_worker_info()
    return None if worker is None else _outgoing_memory()


@cache
def _outgoing_memory() -> OutgoingMemory | None:
    parent = multiprocessing.parent_process()
    if parent is None or get_sharing_strategy() == "file_system" or not _can_read_proc_of(parent.pid):
        return None
    memory = OutgoingMemory()
    memory.serve_this_process()
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
        self._busy: list[Block] = []
        self._idle: OrderedDict[int, list[Block]] = OrderedDict()  # by size, the most recently used last
        self._idle_bytes = 0
        self._since_collected = 0  # blocks taken since the last search for free ones
        self._open: deque[Block] = deque()  # with an open descriptor
        self._addresses: list[int] = []  # of the blocks, sorted
        self._by_address: dict[int, Block] = {}
        self._lock = threading.Lock()  # a worker gathers on its main thread and sends on another
        self._pid = os.getpid()
        self._of_thread = threading.local()
        self._room_beside = 0  # bytes that the last message had beside its batch
        self._room_alone = 0  # the same for a message without a batch of this memory

    def serve_this_process(self) -> None:
        """Send everything that this process pickles for another process through this memory."""
        ForkingPickler.register(torch.UntypedStorage, self.reduce)
        ForkingPickler.register(np.ndarray, self.reduce_array)
        dumps: Callable[..., Any] = ForkingPickler.dumps.__func__  # type: ignore[attr-defined]

        def dumps_as_one_message(kind: type[ForkingPickler], obj: Any, protocol: int | None = None) -> Any:
            try:
                with self.one_message():
                    return dumps(kind, obj, protocol)
            except (AttributeError, pickle.PicklingError):
                pass  # it has an object of a class that a notebook defines
            except Exception:
                return dumps(kind, _with_error(obj), protocol)
            try:
                with self.one_message():
                    return dumps_by_value(obj)
            except Exception:
                # The feeder thread would print the error, and the main process would wait forever.
                return dumps(kind, _with_error(obj), protocol)

        ForkingPickler.dumps = classmethod(dumps_as_one_message)  # type: ignore[method-assign, assignment]
        # In a worker, torch collates tensors into files in /dev/shm.
        torch_collate.default_collate_fn_map[torch.Tensor] = _stack_in_private_memory

    # --------------------------------------------------------------------------------------------------- allocation

    def empty_together(self, specs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
        """Return an uninitialised contiguous CPU tensor for each ``(shape, dtype)``, all in one block.

        The block is reused after all of them are released, in this process and in the receiver.
        """
        with self._lock:
            nbytes = end_of(specs)
            block = self._block_of(nbytes + self._room_beside)
            return block.tensors(specs)

    def _block_of(self, nbytes: int) -> Block:
        """Return a free block with at least ``nbytes`` bytes beside its header."""
        size = size_class(HEADER + nbytes)
        self._close_mapped()
        self._since_collected += 1
        if len(self._busy) < COLLECT_ALWAYS or self._since_collected * 8 > len(self._busy):
            self._collect()
        free = self._idle.get(size)
        if free:
            block = free.pop()
            self._idle_bytes -= size
        else:
            block = Block(size)
            self._by_address[block.address] = block
            insort(self._addresses, block.address)
            self._open.append(block)
        block.clear()
        self._busy.append(block)
        return block

    def _collect(self) -> None:
        """Find the blocks that are free again, and drop those of them that exceed ``MAX_IDLE``."""
        self._since_collected = 0
        busy = []
        for block in self._busy:
            words = block.words
            # LENT last: a block that is sent is marked as lent before this process releases its tensors. And first,
            # because it is the quickest test, and most blocks are lent if the receiver keeps many batches.
            if words[LENT] or block.is_leased() or words[LENT]:
                busy.append(block)
            elif words[SPOILED]:
                self._drop(block)
            else:
                self._idle.setdefault(block.size, []).append(block)
                self._idle.move_to_end(block.size)
                self._idle_bytes += block.size
        self._busy = busy
        while self._idle_bytes > MAX_IDLE:
            size, blocks = next(iter(self._idle.items()))  # the size that has not been used for the longest time
            if blocks:
                self._drop(blocks.pop(0))
                self._idle_bytes -= size
            else:
                del self._idle[size]

    def _close_mapped(self) -> None:
        """Close the descriptors that the receiver does not need any more."""
        for _ in range(min(len(self._open), CLOSE_TESTS)):
            block = self._open.popleft()
            if not block.close_if_mapped():
                self._open.append(block)

    def _drop(self, block: Block) -> None:
        block.words[DROPPED] = 1
        if block in self._open:
            self._open.remove(block)
        del self._by_address[block.address]
        del self._addresses[bisect_right(self._addresses, block.address) - 1]

    def _block_at(self, address: int) -> Block | None:
        """Return the block that contains an address."""
        number = bisect_right(self._addresses, address)
        if number == 0:
            return None
        block = self._by_address[self._addresses[number - 1]]
        return block if address < block.address + block.size else None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor is in this memory."""
        with self._lock:
            return self._block_at(tensor.untyped_storage().data_ptr()) is not None

    # ------------------------------------------------------------------------------------------------------- batches

    def pack(self, data: TensorDict) -> TensorDict:
        """Return ``data`` with all tensors in this memory. Tensors outside of it are copied into one block."""
        with self._lock:
            leaves = [(key, leaf) for key, leaf in data.items(True, True) if _is_plain(leaf)]
            blocks = [self._block_at(leaf.untyped_storage().data_ptr()) for _, leaf in leaves]
            loose = [leaf for leaf, block in zip(leaves, blocks, strict=True) if block is None]
            if not loose:
                return data
            specs = [(tuple(leaf.shape), leaf.dtype) for _, leaf in loose]
            nbytes = end_of(specs)
            beside = next((block for block in blocks if block is not None and not block.words[LENT]), None)
            if beside is not None:
                self._room_beside = max(self._room_beside, nbytes)
            if beside is None or beside.room < nbytes:
                beside = self._block_of(nbytes)
            copies = beside.tensors(specs)
        packed = data.clone(recurse=False)
        for (key, leaf), copy in zip(loose, copies, strict=True):
            packed.set(key, copy.copy_(leaf))
        return packed

    def stack(self, columns: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Stack each of several lists of tensors into this memory, as ``torch.stack`` does."""
        alike = [
            all(map(_is_plain, column)) and len({(leaf.shape, leaf.dtype) for leaf in column}) == 1
            for column in columns
        ]
        specs = [((len(column), *column[0].shape), column[0].dtype) for column in columns]
        into = iter(self.empty_together([spec for spec, fits in zip(specs, alike, strict=True) if fits]))
        return [
            torch.stack(list(column), out=next(into)) if fits else torch.stack(list(column))
            for column, fits in zip(columns, alike, strict=True)
        ]

    # ------------------------------------------------------------------------------------------------------- sending

    @contextmanager
    def one_message(self) -> Iterator[None]:
        """Send what this thread pickles in the ``with`` block through this memory, in as few blocks as possible."""
        message = self._of_thread.message = _Message()
        try:
            yield
        except BaseException:
            for block in message.blocks:  # nobody will receive them
                block.words[LENT] = 0
            raise
        finally:
            self._of_thread.message = None
        if message.gathered:
            self._room_beside = max(message.loose, self._room_beside - self._room_beside // 8)
        elif message.loose:
            self._room_alone = message.loose

    def _current_message(self) -> _Message | None:
        # A forked child must not wait for the lock, which may be held by a thread that it does not have.
        return None if self._pid != os.getpid() else getattr(self._of_thread, "message", None)

    def reduce(self, storage: torch.UntypedStorage) -> tuple[Any, ...]:
        """Return how to pickle a storage: where it is in this memory, into which it is copied if necessary."""
        message, nbytes = self._current_message(), storage.nbytes()
        if message is None or storage.device.type != "cpu" or nbytes == 0:
            return reduce_storage(storage)
        address = storage.data_ptr()
        block = self._lend(message, address)
        if block is None:
            if storage.is_shared():
                return reduce_storage(storage)
            block, copy = self._place(message, nbytes)
            torch.from_numpy(copy).copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
            address = copy.ctypes.data
        return receive_storage, (block.ticket(), address - block.address, nbytes)

    def reduce_array(self, array: np.ndarray) -> str | tuple[Any, ...]:
        """Return how to pickle an array: as a storage, unless it is small or of objects."""
        message = self._current_message()
        if message is None or array.dtype.hasobject or array.nbytes < INLINE_ARRAY:
            return array.__reduce_ex__(4)
        transposed = array.flags.f_contiguous and not array.flags.c_contiguous
        given = array.T if transposed else array
        address = given.ctypes.data
        block = self._lend(message, address) if given.flags.c_contiguous else None
        if block is None:
            block, copy = self._place(message, array.nbytes)
            copy.view(array.dtype).reshape(given.shape)[...] = given
            address = copy.ctypes.data
        return receive_array, (block.ticket(), address - block.address, array.dtype, given.shape, transposed)

    def _lend(self, message: _Message, address: int) -> Block | None:
        """Lend the block at an address to a message, unless another message has it; return the block."""
        with self._lock:
            block = self._block_at(address)
            if block is None or block in message.blocks:
                return block
            if block.words[LENT] or block.words[SPOILED]:
                return None
            block.words[LENT] = 1
        message.blocks.append(block)
        message.gathered = True
        return block

    def _place(self, message: _Message, nbytes: int) -> tuple[Block, np.ndarray]:
        """Return uninitialised bytes in a block of a message, and the block."""
        room = aligned(nbytes)
        with self._lock:
            block = next((block for block in message.blocks if block.room >= room), None)
            if block is None:
                block = self._block_of(max(room, 0 if message.gathered else self._room_alone - message.loose))
                block.words[LENT] = 1
                message.blocks.append(block)
            message.loose += room
            return block, block.take(nbytes)

    def spoil(self) -> None:
        """Mark the blocks in use as never to be reused, since a forked child process is about to inherit them."""
        for block in list(self._busy):
            if block.is_leased():
                block.words[SPOILED] = 1


class _Message:
    """What is known of the message that is being pickled."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.loose = 0  # bytes that were copied into this memory
        self.gathered = False  # whether there are tensors that were in this memory already


def _is_plain(leaf: object) -> bool:
    return (
        type(leaf) is torch.Tensor
        and leaf.device.type == "cpu"
        and leaf.layout is torch.strided
        and not leaf.is_nested
        and not leaf.requires_grad
    )


_torch_collate_tensors = torch_collate.default_collate_fn_map[torch.Tensor]


def _stack_in_private_memory(batch: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    """Collate tensors as torch does, but in memory of this process, from where they are copied into one block."""
    if all(map(_is_plain, batch)):
        return torch.stack(list(batch))
    stacked: torch.Tensor = _torch_collate_tensors(batch, collate_fn_map=collate_fn_map)
    return stacked


def _with_error(message: Any) -> Any:
    """Put the current exception in the place of the batch in a message of a ``DataLoader`` worker."""
    worker = get_worker_info()
    if worker is None or not isinstance(message, tuple) or len(message) != 2:
        raise
    error = ExceptionWrapper(where=f"in DataLoader worker process {worker.id}")
    index, batch = message
    if isinstance(batch, tuple) and len(batch) == 3 and batch[1] == worker.id:  # torchdata adds the worker's state
        return index, (error, *batch[1:])
    return index, error
