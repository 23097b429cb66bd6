"""What happens when a buffer in a directory is opened by the first process.

While the machine was not started anew, the files are as the processes left them, whatever instruction they were killed
at: only the reservations of those processes are reclaimed. After a start of the machine the files on the disk may be of
many moments: the ledger is set to the last commit record.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from embodichain_rl.errors import BufferFileError
from embodichain_rl.replay.durable.commits import (
    EPOCH,
    OFFSET,
    SEQUENCE,
    TEXTS,
    WITH_SCHEMA,
    CommitLog,
    Record,
    clock,
    read_log,
)
from embodichain_rl.replay.host import HostMemory
from embodichain_rl.replay.ledger import COPY_WORDS, END, FLOOR, LedgerState, Lists, reclaim_all, restore_ledger
from embodichain_rl.replay.schema import SharedSchema, TextTable
from embodichain_rl.shared import FileBlock

__all__ = ["recover"]


def recover(
    memory: HostMemory, schema: SharedSchema, texts: TextTable, log: CommitLog, *, rebooted: bool, where: str
) -> None:
    """Bring the parts of a buffer to a state that can be used. No other process uses them.

    Args:
        memory: arena, table and ledger.
        schema: the shared schema.
        texts: the table of texts.
        log: the commit records.
        rebooted: whether the machine was started anew since the files were used.
        where: the directory, for messages.

    Raises:
        BufferFileError: if the files do not match the commit record.
    """
    if not rebooted:
        reclaim_all(memory.ledger)
        return
    columns = memory.ledger.row_words
    records, nbytes = read_log([_content(file) for file in log.files], columns)
    if not records:
        _start_anew(memory, schema, texts)
        return
    last = records[-1]
    state = _combined(records)
    if not np.array_equal(state.ids, last.named.all()):
        raise BufferFileError(f"The commit records of the buffer at {where} do not fit together. It is damaged.")
    if last.end and not schema.is_readable():
        raise BufferFileError(f"The schema of the buffer at {where} is damaged.")
    found = schema.get() if schema.is_readable() else None
    if found is None:
        schema.forget()
    else:
        memory.resize(found)
    files, named = [memory.arena_block, memory.table_block], set(state.ids.tolist())
    for record in records:
        for piece in record.pieces:
            if piece.trajectory in named:
                content = np.frombuffer(piece.content, dtype=np.uint8)
                files[piece.file].back(piece.offset, len(content))
                files[piece.file].array(np.uint8, content.shape, piece.offset)[:] = content
    texts.resume_from(last.texts)
    restore_ledger(memory.ledger, state, later=clock() - last.clock)
    known = [0] * COPY_WORDS
    known[FLOOR], known[END], known[TEXTS] = last.floor, last.end, last.texts
    known[EPOCH], known[OFFSET], known[SEQUENCE] = last.epoch, nbytes, last.sequence + 1
    known[WITH_SCHEMA] = int(found is not None)
    memory.ledger.commit_words[:] = 0
    log.set_last(known)


def _combined(records: list[Record]) -> LedgerState:
    """Return the state that the records describe together."""
    last = records[-1]
    named = last.named
    by_state = [record for record in records if record.state is not None]
    states = [record.state for record in by_state if record.state is not None]
    rows, rooms = (
        np.concatenate(parts) for parts in zip(*((state.rows, state.rooms) for state in states), strict=True)
    )
    kept = named.contains(rows[:, 0])
    newest = states[-1]
    weights = newest.weights
    if weights is not None:
        weights = weights[named.contains(by_state[-1].named.all())]
    counters = replace(newest.counters, oldest_id=named.oldest)
    rooms = rooms[kept] if len(rooms) else rooms
    return LedgerState(newest.changes, counters, rows[kept], weights, last.lists, last.unusual, rooms)


def _start_anew(memory: HostMemory, schema: SharedSchema, texts: TextTable) -> None:
    """Empty the buffer: nothing was ever synced."""
    memory.ledger.commit_words[:] = 0
    nothing = np.empty(0, np.int64)
    rows = np.empty((0, memory.ledger.row_words), np.int64)
    empty = LedgerState(0, memory.ledger.empty_counters(), rows, None, Lists(nothing, nothing, nothing))
    restore_ledger(memory.ledger, empty, later=0)
    schema.forget()
    texts.resume_from(1)
    for block in (memory.arena_block, memory.table_block):
        if isinstance(block, FileBlock):
            os.ftruncate(block.fd, 0)


def _content(file: FileBlock) -> bytes:
    return os.pread(file.fd, file.nbytes, 0)
