"""The arguments of the kernels: where everything is, and the draws of one batch.

``kernels.c`` has the same structures. All of them are arrays of 8-byte words, so that their addresses can be handed to
the compiled kernels, and their content read by the NumPy twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, TypeVar

import numpy as np

from embodichain_rl.errors import SharingError
from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.shared import ReadAhead

__all__ = [
    "CHUNKS",
    "DRAW_ARRAYS",
    "EMPTY",
    "HEADER_WORDS",
    "IDS",
    "LENGTHS",
    "MISSING",
    "OFFSETS",
    "PUBLISHED",
    "STARTS",
    "TODO",
    "TODO_SIZE",
    "VERSIONS",
    "Column",
    "Draws",
    "PlainChunks",
    "SamplePlan",
    "Targets",
    "keep",
]

Batches = TypeVar("Batches")

MAX_BATCHES = 128
"""Number of requests for plain chunks for which :func:`keep` keeps what makes their batches."""

EMPTY = -(2**63)
"""Result of a draw if there is no trajectory."""

TODO_SIZE, CHUNKS = 0, 1
"""Words of the header of :class:`Draws`: the number of chunks that are to be copied, and the first of the six words
about the ages of a batch (see :class:`Draws`)."""

HEADER_WORDS = 8

IDS, STARTS, LENGTHS, VERSIONS, PUBLISHED, OFFSETS, TODO, MISSING = range(8)
"""Numbers of the arrays of :class:`Draws`."""

DRAW_ARRAYS = 8


class PlainChunks(NamedTuple):
    """A request for batches of plain chunks of one length, which are drawn uniformly.

    Args:
        batch_size: the number of chunks of a batch.
        length: the number of steps of a chunk.
        first: the first offset that may be drawn in a trajectory.
        extra: the number of offsets that a trajectory has besides its steps; negative.
        squeeze: whether batches are ``[batch_size]`` in place of ``[batch_size, length]``; only for chunks of one step.
    """

    batch_size: int
    length: int
    first: int
    extra: int
    squeeze: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a batch."""
        return (self.batch_size,) if self.squeeze else (self.batch_size, self.length)


def keep(batches: dict[PlainChunks, Batches], chunks: PlainChunks, new: Batches) -> Batches:
    """Keep and return what makes the batches of a request; forget the oldest where there are too many."""
    while len(batches) >= MAX_BATCHES:
        batches.pop(next(iter(batches)), None)
    batches[chunks] = new
    return new


@dataclass(frozen=True, slots=True)
class Column:
    """What is copied of each chunk to one tensor of a batch.

    Args:
        steps: the bytes of each step, ``uint8`` ``[F, bytes of a step]``, contiguous; or with ``per_trajectory`` those
            of each row of the ledger.
        chunk_steps: the number of copied steps; or how often the value is repeated.
        per_trajectory: whether there is one value per trajectory, in the row of the ledger with the same number.
    """

    steps: np.ndarray
    chunk_steps: int
    per_trajectory: bool = False

    @property
    def chunk_bytes(self) -> int:
        """Bytes that are copied of each chunk."""
        return self.chunk_steps * self.steps.shape[1]


class SamplePlan:
    """A request for batches of plain chunks, and the memory that they come from.

    A plan has the addresses of mapped memory. So it belongs to one mapping of one process and the children that it
    forks, and cannot be pickled.

    Args:
        ledger: the table of trajectories.
        columns: what is copied.
        chunks: the request.
        ahead: announces what is read of the steps, if they may lie on a disk; None: they do not.

    Attributes:
        address (int): of the structure that the compiled kernels take.
    """

    __slots__ = ("_words", "address", "ahead", "columns", "count", "extra", "first", "ledger", "length")

    def __init__(
        self, ledger: Ledger, columns: Sequence[Column], chunks: PlainChunks, *, ahead: ReadAhead | None = None
    ) -> None:
        self.ledger = ledger
        self.columns = tuple(columns)
        self.count, self.length, self.first, self.extra, _ = chunks
        self.ahead = ahead if ahead is not None and ahead.on_disk else None
        words = [*ledger.addresses(), *chunks[:4], int(self.ahead is not None), len(self.columns)]
        for column in self.columns:
            assert column.steps.flags.c_contiguous
            words += [column.steps.ctypes.data, column.steps.shape[1], column.chunk_bytes, int(column.per_trajectory)]
        self._words = np.array(words, dtype=np.int64)
        self.address = self._words.ctypes.data

    def __reduce__(self) -> NoReturn:
        raise SharingError("A plan has addresses of this process; make one where it is needed.")


class Draws:
    """The draws of one batch, in memory that is used again for the next one.

    Args:
        count: the number of chunks.

    Attributes:
        address (int): of the words.
        header (np.ndarray): ``int64`` ``[HEADER_WORDS]``: how many chunks are to be copied; then, of a whole batch, the
            number of chunks, the sum and the maximum of their ages in nanoseconds, the number of those whose policy
            version is known, and the sum and the maximum of their lags.
        arrays (np.ndarray): ``int64`` ``[DRAW_ARRAYS, count]``: what is known of the trajectory of each chunk, its
            offset, and the numbers of the chunks that are to be copied, and of those that have no draw yet.
    """

    __slots__ = ("address", "arrays", "header", "notes")

    def __init__(self, count: int) -> None:
        words = np.zeros(HEADER_WORDS + DRAW_ARRAYS * count, dtype=np.int64)
        self.address = words.ctypes.data
        self.header = words[:HEADER_WORDS]
        self.notes = words[CHUNKS : CHUNKS + 6]
        self.arrays = words[HEADER_WORDS:].reshape(DRAW_ARRAYS, count)

    def missing(self, count: int) -> np.ndarray:
        """Return a copy of the numbers of the ``count`` chunks that have no draw yet."""
        return self.arrays[MISSING, :count].copy()

    def set_all(self, rows: Rows, offsets: np.ndarray) -> None:
        """Set the draws of all chunks, none of which is copied yet; see :meth:`set_missing`."""
        everyone = np.arange(self.arrays.shape[1])
        self.arrays[TODO], self.arrays[MISSING] = everyone, everyone
        self.header[TODO_SIZE] = len(everyone)
        self.set_missing(rows, offsets)

    def set_missing(self, rows: Rows, offsets: np.ndarray) -> None:
        """Set the draws of the chunks that have none yet.

        Args:
            rows: a trajectory for each of these chunks.
            offsets: ``int64`` ``[n]``, the offset in each trajectory.
        """
        drawn = rows.ids, rows.starts, rows.lengths, rows.policy_versions, rows.published_at, offsets
        chunks = self.arrays[MISSING, : len(offsets)]
        for number, values in zip((IDS, STARTS, LENGTHS, VERSIONS, PUBLISHED, OFFSETS), drawn, strict=True):
            self.arrays[number, chunks] = values


class Targets:
    """Where the kernels write a batch: at some byte of a block for each column, and for the ids and the steps.

    Args:
        offsets: one per column of the plan; then those of the trajectory ids and of the steps, each ``int64``
            ``[count, length]``.

    Attributes:
        address (int): of the offsets.
    """

    __slots__ = ("address", "offsets")

    def __init__(self, offsets: Sequence[int]) -> None:
        self.offsets = np.array(offsets, dtype=np.int64)
        self.address = self.offsets.ctypes.data
