"""Seeding of random streams: an independent stream for every rank, worker and iteration over a dataset."""

from __future__ import annotations

import os
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch.utils.data import get_worker_info

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.sampling import RandomStreams, first_numbers
from embodichain_rl.shared import CrossProcessLock, SharedBlock

__all__ = [
    "MAX_WORKERS",
    "ItemStreams",
    "IterationCounter",
    "Rank",
    "current_rank",
    "item_seed",
    "item_seeds",
    "loader_seed",
    "stream_seeds",
]

MAX_WORKERS = 4095
"""The maximum number of workers of one ``DataLoader``."""

MAX_RANKS = 64
"""The number of ranks that count their iterations apart from each other: the most ranks of one machine."""

ITEMS_AHEAD = 512
"""The number of items whose random numbers are computed at once. In NumPy, many take as long as a few."""

LOADERS = 8
"""The number of loaders that may iterate over one dataset at the same time."""


class Rank(NamedTuple):
    """The rank of a process in a distributed training."""

    rank: int
    world_size: int | None
    """The number of ranks; None if it is unknown."""


def current_rank(handed_over: Rank | None = None) -> Rank:
    """Return the rank of this process.

    It is the rank of ``torch.distributed`` if that is initialised, else given by the environment variables ``RANK`` and
    ``WORLD_SIZE``, else ``handed_over``, else 0 of 1. A ``DataLoader`` worker has the rank of the process that started
    it, whatever the environment says.

    Args:
        handed_over: the rank of the process that sent the dataset to this one; None if it was not sent.

    Raises:
        InvalidArgumentError: a variable is not an integer in the valid range.
    """
    if dist.is_available() and dist.is_initialized():
        return Rank(dist.get_rank(), dist.get_world_size())
    if handed_over is not None and get_worker_info() is not None:
        return handed_over
    if "RANK" not in os.environ:
        return handed_over or Rank(0, 1)
    rank = _from_environment("RANK", 0)
    return Rank(rank, _from_environment("WORLD_SIZE", rank + 1) if "WORLD_SIZE" in os.environ else None)


def _from_environment(name: str, minimum: int) -> int:
    text = os.environ[name]
    if not text.isdecimal() or int(text) < minimum:
        needed = "a non-negative integer" if name == "RANK" else f"an integer of at least {minimum}"
        raise InvalidArgumentError(f"Got {name}={text!r} in the environment; it must be {needed}.")
    return int(text)


def loader_seed() -> int | None:
    """Return a number that the workers of one iteration of a ``DataLoader`` share; None in any other process."""
    worker = get_worker_info()
    return None if worker is None else worker.seed - worker.id


def stream_seeds(seed: int | None, rank: int, worker: int, iteration: int) -> tuple[int, int]:
    """Return two seeds below 2**64, one for the chunks and one for the chunk sizes.

    They are a function of the arguments. If ``seed`` is None, they come from the entropy of the operating system.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(rank, worker, iteration))
    chunks, sizes = sequence.generate_state(2, np.uint64).tolist()
    return chunks, sizes


def item_seed(stream: int, position: int) -> int:
    """Return the seed of the item at ``position`` of a stream.

    It has 32 bits, since torch's CPU generators use no more. The first 2**32 positions of a stream have distinct seeds,
    and their order differs between streams.

    Args:
        stream: the seed of the stream, below 2**64, from :func:`stream_seeds`.
        position: the number of items before this one.
    """
    return _mixed(_mixed((stream + position) & _BITS) ^ stream >> 32)


_BITS = 0xFFFFFFFF


def _mixed(number: int) -> int:
    """Mix the bits of a 32-bit number with the finaliser of MurmurHash3, a one-to-one mapping."""
    number = (number ^ number >> 16) * 0x85EBCA6B & _BITS
    number = (number ^ number >> 13) * 0xC2B2AE35 & _BITS
    return number ^ number >> 16


def item_seeds(stream: int, begin: int, count: int) -> np.ndarray:
    """Return the seeds of the items at the positions from ``begin`` on, ``int64`` ``[count]``."""
    positions = np.arange(begin & _BITS, (begin & _BITS) + count, dtype=np.uint64) + np.uint64(stream & _BITS)
    mixed = _mixed_all(positions.astype(np.uint32)) ^ np.uint32(stream >> 32)
    return _mixed_all(mixed).astype(np.int64)


def _mixed_all(numbers: np.ndarray) -> np.ndarray:
    numbers = (numbers ^ numbers >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    numbers = (numbers ^ numbers >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return numbers ^ numbers >> np.uint32(16)


class ItemStreams:
    """The random numbers of the items of one stream, computed for many items at a time.

    Args:
        stream: the seed of the stream, below 2**64, from :func:`stream_seeds`.
    """

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self._begin, self._numbers = 0, np.empty((0, 0))

    def of(self, begin: int, count: int) -> RandomStreams:
        """Return the random numbers of the items at the positions from ``begin`` on."""
        return RandomStreams(item_seeds(self.stream, begin, count), lambda: self._first_numbers(begin, count))

    def _first_numbers(self, begin: int, count: int) -> np.ndarray:
        if not self._begin <= begin <= begin + count <= self._begin + len(self._numbers):
            self._begin = begin
            self._numbers = first_numbers(item_seeds(self.stream, begin, max(count, ITEMS_AHEAD)))
        return self._numbers[begin - self._begin : begin - self._begin + count]


class IterationCounter:
    """Counter of the iterations over a dataset that each rank and each ``DataLoader`` worker has started.

    A ``DataLoader`` starts new workers for every epoch, each with the same state of the dataset. So the counts are kept
    in shared memory. A process that is started with the dataset shares them. A copy made in any other way
    (``copy.deepcopy``, ``pickle``) continues from the current counts independently.

    The workers of one iteration of a loader get the same number, also if some of the workers of an earlier iteration
    ended before they began it.

    Example:
        >>> iterations = IterationCounter()
        >>> iterations.begin(0, worker=0), iterations.begin(0, worker=0), iterations.begin(0, worker=1)
        (0, 1, 0)
        >>> iterations.begin(1, worker=0)  # of another rank
        0
    """

    def __init__(self) -> None:
        self._block = SharedBlock(8 * (HEADER + MAX_RANKS * ROW))
        self._map()

    def _map(self) -> None:
        holder = self._block.array(np.int64, (1,))
        self._used = self._block.array(np.int64, (MAX_RANKS,), 8)
        self._rows = self._block.array(np.int64, (MAX_RANKS, ROW), 8 * HEADER)
        # Two loaders may iterate over one dataset at the same time, so two workers may have the same index.
        self._lock = CrossProcessLock(self._block, holder)

    def begin(self, rank: int, worker: int, loader: int | None = None) -> int:
        """Start an iteration and return its number, counted from 0.

        Args:
            rank: the rank of the process.
            worker: the index of the ``DataLoader`` worker.
            loader: what the workers of one iteration of a loader share, from :func:`loader_seed`.

        Raises:
            InvalidArgumentError: ``worker`` is not below ``MAX_WORKERS``.
        """
        if worker >= MAX_WORKERS:
            raise InvalidArgumentError(
                f"Got num_workers of more than {MAX_WORKERS}; use at most {MAX_WORKERS} workers."
            )
        with self._lock:
            row = self._row_of(rank)
            iteration = int(row[COUNTS + worker])
            if loader is not None:
                iteration = max(iteration, self._start_of(row, loader))
            self._set_begun(row, worker, iteration)
            row[BEGUN] += 1
        return iteration

    def _row_of(self, rank: int) -> np.ndarray:
        self._used[rank % MAX_RANKS] = 1
        return self._rows[rank % MAX_RANKS]

    @staticmethod
    def _start_of(row: np.ndarray, loader: int) -> int:
        """Return the number of the first iteration of a loader."""
        loaders = row[LOADERS_AT:COUNTS].reshape(LOADERS, 2)
        known = np.flatnonzero(loaders[:, 0] == loader)
        if not len(known):
            at = int(row[SEEN]) % LOADERS
            row[SEEN] += 1
            loaders[at] = loader, row[NEXT]
            return int(row[NEXT])
        return int(loaders[known[0], 1])

    @staticmethod
    def _set_begun(row: np.ndarray, worker: int, iteration: int) -> None:
        row[COUNTS + worker] = iteration + 1
        row[NEXT] = max(int(row[NEXT]), iteration + 1)

    def next(self, rank: int, worker: int) -> int:
        """Return the number of the next iteration of ``worker``."""
        return int(self._row_of(rank)[COUNTS + worker])

    def continue_after(self, rank: int, worker: int, iteration: int, loader: int | None = None) -> None:
        """Set the next iteration of ``worker`` to the one after ``iteration``."""
        with self._lock:
            row = self._row_of(rank)
            row[COUNTS + worker] = row[NEXT] = iteration + 1
            loaders = row[LOADERS_AT:COUNTS].reshape(LOADERS, 2)
            if loader is not None:
                loaders[loaders[:, 0] == loader, 1] = iteration

    def begun(self, rank: int) -> int:
        """Return the number of iterations that all workers of a rank have started."""
        return int(self._row_of(rank)[BEGUN])

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is None:
            return {"rows": {rank: self._rows[rank].copy() for rank in np.flatnonzero(self._used).tolist()}}
        return {"block": self._block}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "block" in state:
            self._block = state["block"]
            self._map()
        else:
            self.__init__()  # type: ignore[misc]
            for rank, row in state["rows"].items():
                self._used[rank] = 1
                self._rows[rank] = row


HEADER = 512
"""Words before the rows: the holder of the lock, and which rows are in use. One page, as the others are sparse."""

# Words of a row: the iterations begun, the number after the highest one, the loaders seen, the latest of these with
# their first iteration, and then the next iteration of each worker.
BEGUN, NEXT, SEEN, LOADERS_AT = range(4)
COUNTS = LOADERS_AT + 2 * LOADERS
ROW = 4608
"""Words of a row: a multiple of a page, of which only those pages take memory that are used."""
