"""Seeding of random streams: an independent stream for every rank, worker and iteration over a dataset."""

from __future__ import annotations

import os
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch.distributed as dist

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.shared import CrossProcessLock, SharedBlock

__all__ = ["MAX_WORKERS", "IterationCounter", "current_rank", "item_seed", "stream_seeds"]

MAX_WORKERS = 4095
"""The maximum number of workers of one ``DataLoader``."""


def current_rank() -> int:
    """Return the rank of this process.

    It is the rank of ``torch.distributed`` if that is initialised, else the environment variable ``RANK``, else 0.

    Raises:
        InvalidArgumentError: ``RANK`` is not a non-negative integer.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    rank = os.environ.get("RANK", "0")
    if not rank.isdecimal():
        raise InvalidArgumentError(f"Got RANK={rank!r} in the environment; it must be a non-negative integer.")
    return int(rank)


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


class IterationCounter:
    """Counter of the iterations over a dataset that each ``DataLoader`` worker has started.

    A ``DataLoader`` starts new workers for every epoch, each with the same state of the dataset. So the counts are kept
    in shared memory. A process that is started with the dataset shares them. A copy made in any other way
    (``copy.deepcopy``, ``pickle``) continues from the current counts independently.

    Example:
        >>> iterations = IterationCounter()
        >>> iterations.begin(worker=0), iterations.begin(worker=0), iterations.begin(worker=1)
        (0, 1, 0)
    """

    def __init__(self) -> None:
        self._block = SharedBlock(8 * (1 + MAX_WORKERS))
        self._map()

    def _map(self) -> None:
        holder, self._counts = np.split(self._block.array(np.int64, (1 + MAX_WORKERS,)), [1])
        # Two loaders may iterate over one dataset at the same time, so two workers may have the same index.
        self._lock = CrossProcessLock(self._block, holder)

    def begin(self, worker: int) -> int:
        """Start an iteration of ``worker`` and return its number, counted from 0.

        Raises:
            InvalidArgumentError: ``worker`` is not below ``MAX_WORKERS``.
        """
        if worker >= MAX_WORKERS:
            raise InvalidArgumentError(
                f"Got num_workers of more than {MAX_WORKERS}; use at most {MAX_WORKERS} workers."
            )
        with self._lock:
            iteration = int(self._counts[worker])
            self._counts[worker] = iteration + 1
        return iteration

    def next(self, worker: int) -> int:
        """Return the number of the next iteration of ``worker``."""
        return int(self._counts[worker])

    def continue_after(self, worker: int, iteration: int) -> None:
        """Set the next iteration of ``worker`` to the one after ``iteration``."""
        with self._lock:
            self._counts[worker] = iteration + 1

    @property
    def total(self) -> int:
        """The number of iterations that all workers have started."""
        return int(self._counts.sum())

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is None:
            return {"counts": self._counts.copy()}
        return {"block": self._block}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "block" in state:
            self._block = state["block"]
            self._map()
        else:
            self.__init__()  # type: ignore[misc]
            self._counts[:] = state["counts"]
