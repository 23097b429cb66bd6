"""``sync``: when it returns, all that was published before is there after a power cut."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from embodichain_rl.errors import DiskFullError
from embodichain_rl.replay.durable.commits import (
    CHANGES,
    EPOCH,
    NEVER,
    OFFSET,
    TEXTS,
    WITH_SCHEMA,
    CommitLog,
    Piece,
)
from embodichain_rl.replay.host import HostMemory
from embodichain_rl.replay.ledger import END, NO_ROOMS, LedgerState, state_of_ledger
from embodichain_rl.replay.schema import Schema, SharedSchema, TextTable
from embodichain_rl.shared import FileBlock

__all__ = ["SyncThread", "Syncer"]

LOGGER = logging.getLogger("embodichain_rl.replay")

CARRIED = 512 * 1024
"""Up to so many bytes of steps are carried by the commit record: one write to the disk in place of two or three."""

LOG_BYTES = 8 << 20
"""Size of a log, in bytes, from which the other one is begun; more in a buffer of very many trajectories."""


class Syncer:
    """Writes the commit records of one buffer.

    Args:
        memory: arena, table and ledger.
        schema: the shared schema.
        texts: the table of texts.
        log: the log of commit records.
    """

    def __init__(self, memory: HostMemory, schema: SharedSchema, texts: TextTable, log: CommitLog) -> None:
        self._memory, self._schema, self._texts, self._log = memory, schema, texts, log
        self._log_bytes = max(LOG_BYTES, 8 * 8 * memory.ledger.row_words * memory.ledger.max_trajectories)

    def sync(self) -> None:
        """Wait until all that was published before this call is on the disk.

        Processes and threads that sync at the same time share one write.

        Raises:
            DiskFullError: if the disk is full.
            ReadOnlyBufferError: if the buffer was opened for reading only.
        """
        with self._naming_full_disk():
            self._sync()

    @staticmethod
    @contextmanager
    def _naming_full_disk() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, DiskFullError):
                raise
            raise DiskFullError(
                error.errno,
                "The disk is full, so the last trajectories of the buffer are not safe from a power cut. What was "
                "synced before is. Free some room and call rb.sync() again",
            ) from error

    def _sync(self) -> None:
        ledger = self._memory.ledger
        wanted = ledger.changes
        with self._log.sync_lock:
            self._finish_changes()
            last, schema = self._log.last(), self._opened()
            new_epoch = last[EPOCH] == NEVER or last[OFFSET] >= self._log_bytes
            new_epoch = new_epoch or (schema is not None and not last[WITH_SCHEMA])
            if last[CHANGES] >= wanted and not new_epoch and not ledger.priorities.built:
                return
            state = state_of_ledger(ledger, 0 if new_epoch else last[END])
            if schema is None:
                schema = self._opened()  # what the state names was written with one
                new_epoch = new_epoch or schema is not None
            if schema is None or schema.blobs is None:
                state = state._replace(rooms=NO_ROOMS)
            pieces: list[Piece] = []
            if schema is not None:
                size = self._memory.size_of(schema, state.regions[:, 1], state.rooms)
                if new_epoch or size > CARRIED:
                    self._flush(self._memory.arena_block)
                    self._flush(self._memory.table_block)
                else:
                    pieces = self._pieces(schema, state)
            if new_epoch:
                self._flush(self._schema.block)
                self._log.prepare((last[EPOCH] + 1) % 2, self._log_bytes)
            texts = len(self._texts)
            if texts != last[TEXTS]:
                self._flush(self._texts.block)
            self._log.append(state, texts, pieces, new_epoch=new_epoch, with_schema=schema is not None)

    def relabel(self, changes: Sequence[Piece]) -> int:
        """Replace bytes of trajectories, each as a whole also after a power cut; return how many were live.

        Args:
            changes: the new bytes: the trajectory, the element of :attr:`Ledger.memory`, and the offset there.

        Raises:
            DiskFullError: if the disk is full; nothing is changed.
        """
        ledger = self._memory.ledger
        with self._naming_full_disk(), self._log.sync_lock:
            self._finish_changes()
            ledger.take_journal(max(len(change.content) for change in changes))
            last = self._log.last()
            named = [change for change in changes if last[EPOCH] != NEVER and change.trajectory < last[END]]
            if named:
                texts = len(self._texts)
                if texts != last[TEXTS]:
                    self._flush(self._texts.block)
                self._log.append_changes(named, texts)
            changed = self._change(changes)
            self._log.end_changes()
        if self._log.last()[OFFSET] >= self._log_bytes:
            self.sync()
        return changed

    def _change(self, changes: Sequence[Piece]) -> int:
        ledger = self._memory.ledger
        return sum(
            ledger.relabel(number, target, offset, np.frombuffer(content, dtype=np.uint8))
            for number, target, offset, content in changes
        )

    def _finish_changes(self) -> None:
        """Make the changes of a process that was killed in :meth:`relabel`. Inside the lock of syncs."""
        self._opened()
        changes = self._log.unfinished_changes()
        if changes:
            self._change(changes)
        self._log.end_changes()

    def _opened(self) -> Schema | None:
        """Return the schema, if it is set; the memory is open then, and the ledger has its sizes in this process."""
        schema = self._schema.get()
        if schema is not None:
            self._memory.open(schema)
        return schema

    def _pieces(self, schema: Schema, state: LedgerState) -> list[Piece]:
        ledger, pieces = self._memory.ledger, list[Piece]()
        regions, rooms = state.regions.tolist(), state.rooms.tolist() or itertools.repeat(0)
        for trajectory, (start, length), room in zip(state.ids.tolist(), regions, rooms, strict=False):
            row = trajectory % ledger.num_rows
            for block, offset, nbytes in self._memory.ranges(schema, start, length, row, room):
                content = os.pread(block.fd, nbytes, offset) if isinstance(block, FileBlock) else b""
                pieces.append(Piece(trajectory, int(block is self._memory.table_block), offset, content))
        return pieces

    @staticmethod
    def _flush(block: object) -> None:
        if isinstance(block, FileBlock):
            block.flush()


class SyncThread:
    """A thread that syncs at regular intervals, until its owner is gone.

    Args:
        syncer: what syncs.
        every: seconds between two calls.
    """

    def __init__(self, syncer: Syncer, every: float) -> None:
        self._ended = threading.Event()
        ended = self._ended
        thread = threading.Thread(target=_sync_regularly, args=(syncer, every, ended), name="sync", daemon=True)
        thread.start()
        weakref.finalize(self, ended.set)


def _sync_regularly(syncer: Syncer, every: float, ended: threading.Event) -> None:
    while not ended.wait(every):
        try:
            syncer.sync()
        except Exception:
            LOGGER.exception("The buffer could not be synced; it is tried again in %g s", every)
