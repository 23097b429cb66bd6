"""Who draws which random numbers: every process, and every iteration over a dataset, a stream of its own."""

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
"""Workers of one ``DataLoader`` that a dataset can tell apart."""


def current_rank() -> int:
    """Returns this process's rank: of ``torch.distributed`` if it is initialised, else ``RANK`` of the environment.

    Raises:
        InvalidArgumentError: when ``RANK`` is not a non-negative integer.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    rank = os.environ.get("RANK", "0")
    if not rank.isdecimal():
        raise InvalidArgumentError(f"Got RANK={rank!r} in the environment; it must be a non-negative integer.")
    return int(rank)


def stream_seeds(seed: int | None, rank: int, worker: int, iteration: int) -> tuple[int, int]:
    """Returns two seeds below 2**64, for what to draw and for how much, that are a function of the arguments.

    Where ``seed`` is None they come from the operating system.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(rank, worker, iteration))
    chunks, sizes = sequence.generate_state(2, np.uint64).tolist()
    return chunks, sizes


def item_seed(stream: int, position: int) -> int:
    """Returns the seed that the item at ``position`` of a stream is drawn with.

    It has 32 bits, as torch's generators make use of no more. No two of the first 2**32 positions of a stream have the
    same, and two streams have them in another order.

    Args:
        stream: below 2**64, from :func:`stream_seeds`.
        position: how many items came before.
    """
    return _mixed(_mixed((stream + position) & _BITS) ^ stream >> 32)


_BITS = 0xFFFFFFFF


def _mixed(number: int) -> int:
    """One-to-one on 32 bits, each of which depends on all others (the finaliser of MurmurHash3)."""
    number = (number ^ number >> 16) * 0x85EBCA6B & _BITS
    number = (number ^ number >> 13) * 0xC2B2AE35 & _BITS
    return number ^ number >> 16


class IterationCounter:
    """Counts, for each ``DataLoader`` worker, how many iterations over a dataset it has begun.

    Workers are started anew for every epoch, from the same dataset in the same state; what they should remember
    stands in shared memory. It travels with the dataset as every shared block does; a copy made in any other way
    (``copy.deepcopy``, ``pickle``) counts on by itself from where the original stands.

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
        # Two loaders may go over one dataset at the same time, so that two workers have the same number.
        self._lock = CrossProcessLock(self._block, holder)

    def begin(self, worker: int) -> int:
        """Returns the number, from 0, of the iteration that ``worker`` begins with this call.

        Raises:
            InvalidArgumentError: when ``worker`` is not below ``MAX_WORKERS``.
        """
        if worker >= MAX_WORKERS:
            raise InvalidArgumentError(f"Got num_workers of more than {MAX_WORKERS}; use as many at most.")
        with self._lock:
            iteration = int(self._counts[worker])
            self._counts[worker] = iteration + 1
        return iteration

    def next(self, worker: int) -> int:
        """Returns the number of the iteration that ``worker`` begins next."""
        return int(self._counts[worker])

    def go_on_after(self, worker: int, iteration: int) -> None:
        """Has ``worker`` begin with the iteration after ``iteration`` next."""
        with self._lock:
            self._counts[worker] = iteration + 1

    @property
    def total(self) -> int:
        """How many iterations all workers have begun."""
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
