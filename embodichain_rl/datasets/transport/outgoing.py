"""The memory that a ``DataLoader`` worker gathers batches into, and sends them in."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np
import torch

from embodichain_rl.datasets.transport.blocks import Block, aligned, end_of
from embodichain_rl.datasets.transport.incoming import DROPPED, HEADER, LENT, SPOILED
from embodichain_rl.datasets.transport.structure import is_plain
from embodichain_rl.replay.host import MAX_IDLE, size_class

__all__ = ["OutgoingMemory"]

COLLECT_ALWAYS = 64
"""Number of blocks in use from which on free blocks are searched for only at some allocations."""

CLOSE_TESTS = 8
"""Number of open descriptors that are tested at each allocation."""


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
        self.room_beside = 0
        """Bytes to leave free behind each batch, for what is sent with it."""

    # --------------------------------------------------------------------------------------------------- allocation

    def empty_together(self, specs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
        """Return an uninitialised contiguous CPU tensor for each ``(shape, dtype)``, all in one block.

        The block is reused after all of them are released, in this process and in the receiver.
        """
        with self._lock:
            nbytes = end_of(specs)
            block = self._block_of(nbytes + self.room_beside)
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

    def stack(self, columns: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Stack each of several lists of tensors into this memory, as ``torch.stack`` does."""
        alike = [
            all(map(is_plain, column)) and len({(leaf.shape, leaf.dtype) for leaf in column}) == 1 for column in columns
        ]
        specs = [((len(column), *column[0].shape), column[0].dtype) for column in columns]
        into = iter(self.empty_together([spec for spec, fits in zip(specs, alike, strict=True) if fits]))
        return [
            torch.stack(list(column), out=next(into)) if fits else torch.stack(list(column))
            for column, fits in zip(columns, alike, strict=True)
        ]

    # ------------------------------------------------------------------------------------------------------- lending

    @property
    def of_this_process(self) -> bool:
        """Whether this process made the memory. A forked child must not wait for its lock, which may be held."""
        return self._pid == os.getpid()

    def lend(self, address: int, lent: list[Block]) -> Block | None:
        """Lend the block at an address, and add it to those that a message has lent already.

        Returns:
            The block; None, if there is none, or another message has it.
        """
        with self._lock:
            block = self._block_at(address)
            if block is None or block in lent:
                return block
            if block.words[LENT] or block.words[SPOILED]:
                return None
            block.words[LENT] = 1
        lent.append(block)
        return block

    def take(self, nbytes: int, lent: list[Block], *, at_least: int = 0) -> tuple[Block, np.ndarray]:
        """Return uninitialised bytes in a block that a message has lent, or else in another one, which is lent to it.

        Args:
            nbytes: the number of bytes.
            lent: the blocks that the message has lent.
            at_least: the size of the other block.
        """
        room = aligned(nbytes)
        with self._lock:
            block = next((block for block in lent if block.room >= room), None)
            if block is None:
                block = self._block_of(max(room, at_least))
                block.words[LENT] = 1
                lent.append(block)
            return block, block.take(nbytes)

    def spoil(self) -> None:
        """Mark the blocks in use as never to be reused, since a forked child process is about to inherit them."""
        for block in list(self._busy):
            if block.is_leased():
                block.words[SPOILED] = 1
