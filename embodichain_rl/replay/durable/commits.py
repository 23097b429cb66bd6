"""Commit records: what is there for sure after a power cut.

The kernel writes the pages of a mapped file to the disk at any time and in any order. So after a power cut the ledger
and the arena on the disk are of no single moment. What counts then is a *commit record*: it holds the counters and the
rows of the trajectories that it names, with the sizes of their regions where these vary. It is appended to a log with
``write`` and ``fdatasync``, with a checksum. It is written after the steps of these trajectories are on the disk; or it
carries their bytes itself, if they are few, so that one write to the disk is enough.

**What the last record names is not overwritten.** Before the steps, the row or the values of a trajectory that it names
are reused, a record that names only the trajectories from a higher id on (the *floor*) is written. This is rare: it
happens when a gap is opened over such trajectories, not at every write. Every record also has the lists of pinned ids,
holes and stragglers, so it names pinned trajectories below the floor too, and none that was discarded.

**What is relabelled is in a record first.** A record with the new bytes of trajectories that are named already is
written before they are changed in memory. So each has the old values after a power cut, or the new ones. A process that
is killed in between leaves a note in the ledger (``CHANGING``), and who syncs next makes the change.

There are two log files. A record is appended to the one in use. If that is long enough, a record of everything is
written to the beginning of the other one, with the next *epoch*. The log with the highest epoch counts, up to its first
record that is not whole.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embodichain_rl.replay.ledger import (
    COMMIT_COPIES,
    COMMITTED,
    COPY_WORDS,
    END,
    FLOOR,
    Counters,
    Ledger,
    LedgerState,
    Lists,
    LiveIds,
)
from embodichain_rl.shared import CrossProcessLock, FileBlock

__all__ = [
    "CHANGES",
    "EPOCH",
    "NEVER",
    "OFFSET",
    "SEQUENCE",
    "TEXTS",
    "WITH_SCHEMA",
    "CommitLog",
    "Piece",
    "Record",
    "read_log",
]

# Words of a copy of what is known of the last record, after FLOOR and END: the changes of the ledger that it covers,
# the number of texts, where the next record goes, and whether the schema was on the disk when the epoch began.
CHANGES, TEXTS, EPOCH, OFFSET, SEQUENCE, WITH_SCHEMA = range(2, 8)

# Words behind the copies.
ROLLING, LOG_HOLDER, SYNC_HOLDER, CHANGING = range(COMMIT_COPIES + 2 * COPY_WORDS, COMMIT_COPIES + 2 * COPY_WORDS + 4)

NEVER = 0
"""The epoch before the first record."""

MAGIC = 0x6C6F672D656D6263

# Words of the head of a record.
_MAGIC, _CRC, _BYTES, _EPOCH, _SEQUENCE, _FLOOR, _END, _CHANGES, _TEXTS, _CLOCK, _ROWS, _WEIGHTS, _PIECES = range(13)
_UNUSUAL, _PINNED, _HOLES, _STRAGGLERS, _ROOMS = range(13, 18)
HEAD = 24

COUNTERS = len(Counters.__dataclass_fields__)

NO_STATE, NO_WEIGHTS = -1, -1


class Piece(NamedTuple):
    """Some bytes of a trajectory, that the record carries."""

    trajectory: int
    file: int
    """Number of the file, as the caller numbers them."""
    offset: int
    content: bytes


class Record(NamedTuple):
    """A record as it was read."""

    epoch: int
    sequence: int
    floor: int
    end: int
    changes: int
    texts: int
    clock: int
    """Monotonic minus real time at the writing, in nanoseconds."""
    unusual: int
    """See :class:`LedgerState`."""
    lists: Lists
    """The lists of the ledger, of ids below ``end``."""
    state: LedgerState | None
    """Counters, the rows since the record before, and weights; None if the record only raises the floor."""
    pieces: list[Piece]

    @property
    def named(self) -> LiveIds:
        """The ids of the trajectories that the record names."""
        return _named(self.floor, self.end, self.lists)


def clock() -> int:
    """Return monotonic minus real time, in nanoseconds."""
    return time.monotonic_ns() - time.time_ns()


class CommitLog:
    """The log of a ledger in files.

    Args:
        ledger: the ledger.
        files: the two log files.
    """

    def __init__(self, ledger: Ledger, files: Sequence[FileBlock]) -> None:
        self._ledger, self.files = ledger, files
        self._words = ledger.commit_words
        self._lock = CrossProcessLock(files[0], self._words[LOG_HOLDER : LOG_HOLDER + 1])
        self.sync_lock = CrossProcessLock(files[1], self._words[SYNC_HOLDER : SYNC_HOLDER + 1], timeout=float("inf"))

    def last(self) -> list[int]:
        """Return what is known of the last record, ``COPY_WORDS`` numbers."""
        numbers: list[int] = self._ledger.last_commit().tolist()
        return numbers

    def prepare(self, number: int, nbytes: int) -> None:
        """Write zeros to a log file, so that a later write changes no more than its bytes."""
        size = self.files[number].nbytes
        if size < nbytes:
            self.files[number].back(0, nbytes)
            zeros = bytes(min(1 << 20, nbytes))
            for offset in range(size, nbytes, len(zeros)):
                _write(self.files[number].fd, zeros[: nbytes - offset], offset)
            os.fsync(self.files[number].fd)

    def raise_floor(self, floor: int, lists: Lists) -> None:
        """Name only the trajectories that are live by ``floor`` and the lists. Inside the lock of the ledger."""
        with self._lock:
            last = self.last()
            if floor > last[FLOOR] or not self._ledger.plain:
                last[FLOOR] = max(floor, last[FLOOR])
                self._append(last, lists, None, [])

    def append(
        self, state: LedgerState, texts: int, pieces: Sequence[Piece], *, new_epoch: bool, with_schema: bool
    ) -> None:
        """Append a record of the live trajectories.

        Args:
            state: the state of the ledger, with the rows since the record before; all rows in a new epoch.
            texts: the number of texts that are on the disk.
            pieces: the bytes of the trajectories that are not on the disk.
            new_epoch: whether to begin the other log.
            with_schema: whether the schema is on the disk.
        """
        with self._lock:
            last = self.last()
            last[WITH_SCHEMA] = int(with_schema)
            # Not those of the state: what was retired since may be overwritten as soon as this lock is free.
            oldest, lists = self._ledger.current_lists()
            last[FLOOR] = max(last[FLOOR], oldest)
            last[END] = state.counters.next_id
            last[CHANGES], last[TEXTS] = state.changes, texts
            self._append(last, lists, state, pieces, new_epoch=new_epoch)

    def append_changes(self, pieces: Sequence[Piece], texts: int) -> None:
        """Append a record with new bytes of trajectories. Inside the lock of syncs; call :meth:`end_changes` after.

        Args:
            pieces: the new bytes.
            texts: the number of texts that are on the disk.
        """
        with self._lock:
            last = self.last()
            self._words[CHANGING] = last[OFFSET] + 1
            oldest, lists = self._ledger.current_lists()
            last[FLOOR] = max(last[FLOOR], oldest)
            last[TEXTS] = texts
            self._append(last, lists, None, pieces)

    def unfinished_changes(self) -> list[Piece]:
        """Return what a process that was killed has written to a record, and maybe not to the memory."""
        begin, last = int(self._words[CHANGING]) - 1, self.last()
        if begin < 0 or begin >= last[OFFSET]:  # or was killed before its record counted
            return []
        file = self.files[last[EPOCH] % 2]
        found = _record_at(os.pread(file.fd, last[OFFSET] - begin, begin), 0, self._ledger.row_words)
        return [] if found is None else found[0].pieces

    def end_changes(self) -> None:
        """Note that the changes of the last record were made."""
        self._words[CHANGING] = 0

    def _append(
        self,
        last: list[int],
        lists: Lists,
        state: LedgerState | None,
        pieces: Sequence[Piece],
        *,
        new_epoch: bool = False,
    ) -> None:
        if self._words[ROLLING]:
            # A process was killed while it began the next epoch. Its record may be on the disk, and must not count.
            unused = self.files[(last[EPOCH] + 1) % 2].fd
            _write(unused, bytes(8 * HEAD), 0)
            os.fdatasync(unused)
            self._words[ROLLING] = 0
        if new_epoch:
            self._words[ROLLING] = 1
            last[EPOCH], last[OFFSET], last[SEQUENCE] = last[EPOCH] + 1, 0, 0
        content = _packed(last, lists, int(self._ledger._unusual[0]), state, pieces)
        fd = self.files[last[EPOCH] % 2].fd
        _write(fd, content, last[OFFSET])
        os.fdatasync(fd)
        last[OFFSET] += len(content)
        last[SEQUENCE] += 1
        self.set_last(last)
        self._words[ROLLING] = 0

    def set_last(self, last: Sequence[int]) -> None:
        """Note what is known of the last record, with one store."""
        following = int(self._words[COMMITTED]) + 1
        begin = COMMIT_COPIES + COPY_WORDS * (following & 1)
        self._words[begin : begin + COPY_WORDS] = last
        self._words[COMMITTED] = following


def _named(floor: int, end: int, lists: Lists) -> LiveIds:
    return LiveIds.of(min(floor, end), end, lists, 0)


def _packed(
    last: Sequence[int], lists: Lists, unusual: int, state: LedgerState | None, pieces: Sequence[Piece]
) -> bytes:
    head = np.zeros(HEAD, dtype=np.int64)
    head[_EPOCH], head[_SEQUENCE] = last[EPOCH], last[SEQUENCE]
    head[_FLOOR], head[_END], head[_CHANGES], head[_TEXTS] = last[FLOOR], last[END], last[CHANGES], last[TEXTS]
    head[_CLOCK], head[_ROWS], head[_WEIGHTS] = clock(), NO_STATE, NO_WEIGHTS
    lists = Lists(*(ids[ids < last[END]] for ids in lists))
    head[_UNUSUAL] = unusual
    head[_PINNED], head[_HOLES], head[_STRAGGLERS] = map(len, lists)
    parts = [np.concatenate(lists).tobytes()]
    if state is not None:
        named = _named(last[FLOOR], last[END], lists)
        kept = named.contains(state.ids)
        still = set(state.ids[kept].tolist())
        pieces = [piece for piece in pieces if piece.trajectory in still]
        counters = [getattr(state.counters, name) for name in Counters.__dataclass_fields__]
        rows = state.rows[kept]
        head[_ROWS] = len(rows)
        parts += [np.array(counters, dtype=np.int64).tobytes(), rows.tobytes()]
        if len(state.rooms):
            head[_ROOMS] = len(rows)  # 0 in records of versions in which rooms in files never varied
            parts.append(state.rooms[kept].tobytes())
        if state.weights is not None:
            weights = state.weights[named.contains(state.live.all())]  # some may have been retired since
            head[_WEIGHTS] = len(weights)
            parts.append(weights.tobytes())
    head[_PIECES] = len(pieces)
    described = [(piece.trajectory, piece.file, piece.offset, len(piece.content)) for piece in pieces]
    parts += [np.array(described, dtype=np.int64).tobytes(), *(piece.content for piece in pieces)]
    body = b"".join(parts)
    body += bytes(-len(body) % 8)
    head[_BYTES] = 8 * HEAD + len(body)
    checksum = zlib.crc32(body, zlib.crc32(head[2:].tobytes()))
    head[_MAGIC], head[_CRC] = MAGIC, checksum
    return head.tobytes() + body


def _write(fd: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def read_log(contents: Sequence[bytes], columns: int) -> tuple[list[Record], int]:
    """Return the records of the log that counts, oldest first, and its length in bytes.

    Args:
        contents: contents of the two log files.
        columns: number of columns of a row of the ledger.
    """
    logs = [_records(content, columns) for content in contents]
    logs = [log for log in logs if log[0]]
    return max(logs, key=lambda log: log[0][0].epoch, default=([], 0))


def _records(content: bytes, columns: int) -> tuple[list[Record], int]:
    records: list[Record] = []
    offset = 0
    while (found := _record_at(content, offset, columns)) is not None:
        record, nbytes = found
        expected = (records[-1].epoch, records[-1].sequence + 1) if records else (record.epoch, 0)
        if (record.epoch, record.sequence) != expected:
            break
        records.append(record)
        offset += nbytes
    if records and records[0].state is None:
        return [], 0
    return records, offset


def _record_at(content: bytes, offset: int, columns: int) -> tuple[Record, int] | None:
    if offset + 8 * HEAD > len(content):
        return None
    head = np.frombuffer(content, np.int64, HEAD, offset).tolist()
    nbytes = head[_BYTES]
    if head[_MAGIC] != MAGIC or not 8 * HEAD <= nbytes <= len(content) - offset:
        return None
    if zlib.crc32(memoryview(content)[offset + 16 : offset + nbytes]) != head[_CRC]:
        return None
    at = offset + 8 * HEAD

    def take(count: int, dtype: type[np.generic]) -> np.ndarray:
        nonlocal at
        taken = np.frombuffer(content, dtype, count, at)
        at += taken.nbytes
        return taken

    lists = Lists(*(take(head[name], np.int64) for name in (_PINNED, _HOLES, _STRAGGLERS)))
    state, pieces = None, list[Piece]()
    if head[_ROWS] != NO_STATE:
        counters = Counters(*take(COUNTERS, np.int64).tolist())
        rows = take(head[_ROWS] * columns, np.int64).reshape(-1, columns)
        rooms = take(head[_ROOMS], np.int64)
        weights = None if head[_WEIGHTS] == NO_WEIGHTS else take(head[_WEIGHTS], np.float64)
        state = LedgerState(head[_CHANGES], counters, rows, weights, lists, head[_UNUSUAL], rooms)
    described = take(4 * head[_PIECES], np.int64).reshape(-1, 4).tolist()
    for trajectory, file, place, size in described:
        pieces.append(Piece(trajectory, file, place, take(size, np.uint8).tobytes()))
    record = Record(
        head[_EPOCH],
        head[_SEQUENCE],
        head[_FLOOR],
        head[_END],
        head[_CHANGES],
        head[_TEXTS],
        head[_CLOCK],
        head[_UNUSUAL],
        lists,
        state,
        pieces,
    )
    return record, nbytes
