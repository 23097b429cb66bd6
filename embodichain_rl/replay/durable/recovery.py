"""What happens when a buffer in a directory is opened by the first process.

While the machine was not started anew, the files are as the processes left them, whatever instruction they were killed
at: only the reservations of those processes are reclaimed. After a start of the machine the files on the disk may be of
many moments: the ledger is set to the last commit record.
"""

from __future__ import annotations

import os

import numpy as np

from embodichain_rl.errors import BufferFileError
from embodichain_rl.replay.durable.commits import EPOCH, OFFSET, SEQUENCE, TEXTS, CommitLog, Record, clock, read_log
from embodichain_rl.replay.host import HostMemory
from embodichain_rl.replay.ledger import COPY_WORDS, END, FLOOR, LedgerState, reclaim_all, restore_ledger
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
    if not np.array_equal(state.ids, np.arange(last.floor, last.end)):
        raise BufferFileError(f"The commit records of the buffer at {where} do not fit together. It is damaged.")
    if last.end and not schema.is_readable():
        raise BufferFileError(f"The schema of the buffer at {where} is damaged.")
    files = [memory.arena_block, memory.table_block]
    for record in records:
        for piece in record.pieces:
            if piece.trajectory >= last.floor:
                content = np.frombuffer(piece.content, dtype=np.uint8)
                files[piece.file].back(piece.offset, len(content))
                files[piece.file].array(np.uint8, content.shape, piece.offset)[:] = content
    texts.resume_from(last.texts)
    restore_ledger(memory.ledger, state, later=clock() - last.clock)
    known = [0] * COPY_WORDS
    known[FLOOR], known[END], known[TEXTS] = last.floor, last.end, last.texts
    known[EPOCH], known[OFFSET], known[SEQUENCE] = last.epoch, nbytes, last.sequence + 1
    memory.ledger.commit_words[:] = 0
    log.set_last(known)


def _combined(records: list[Record]) -> LedgerState:
    """Return the state that the records describe together."""
    floor = records[-1].floor
    states = [record.state for record in records if record.state is not None]
    rows = np.concatenate([state.rows for state in states])
    newest = states[-1]
    rows = rows[rows[:, 0] >= floor]
    weights = newest.weights
    if weights is not None:
        weights = weights[len(weights) - len(rows) :]
    return newest._replace(rows=rows, weights=weights)


def _start_anew(memory: HostMemory, schema: SharedSchema, texts: TextTable) -> None:
    """Empty the buffer: nothing was ever synced."""
    memory.ledger.commit_words[:] = 0
    empty = LedgerState(0, memory.ledger.empty_counters(), np.empty((0, memory.ledger.row_words), np.int64), None)
    restore_ledger(memory.ledger, empty, later=0)
    schema.forget()
    texts.resume_from(1)
    for block in (memory.arena_block, memory.table_block):
        if isinstance(block, FileBlock):
            os.ftruncate(block.fd, 0)


def _content(file: FileBlock) -> bytes:
    return os.pread(file.fd, file.nbytes, 0)
