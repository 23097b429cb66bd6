"""Buffers to load from, and loaders whose workers end with the test."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from steps import check_chunk, make_trajectory
from tensordict import TensorDict
from torch.utils.data import DataLoader
from waiting import PATIENCE

from embodichain_rl import TrajectoryReplayBuffer

START_METHODS = ["fork", "spawn", "forkserver"]

LENGTHS = range(12, 32)


def filled_buffer(**kwargs: Any) -> TrajectoryReplayBuffer:
    """Return a buffer with 20 trajectories that have every kind of entry."""
    settings = {"max_trajectories": 40, "max_total_steps": 2000, "chunk_size": 8, "batch_size": 4, **kwargs}
    rb = TrajectoryReplayBuffer(**settings)
    for number, length in enumerate(LENGTHS):
        rb.extend(make_trajectory(number, length))
    return rb


def check_batch(batch: TensorDict) -> TensorDict:
    """Compare all keys of all steps of a batch ``[B, L]``, except padding, with what was written; return the batch."""
    if ("collector", "mask") not in batch.keys(True):
        check_chunk(batch)
        return batch
    for row in batch:
        check_chunk(row[row["collector", "mask"]])
    return batch


@contextmanager
def loading(
    dataset: Any,
    workers: int,
    method: str = "fork",
    *,
    batch_size: int | None = None,
    kind: type[DataLoader] = DataLoader,
    **kwargs: Any,
) -> Iterator[DataLoader]:
    """Yield a loader. Its workers have ended at the end of the block, if no iterator of it is alive then."""
    options: dict[str, Any] = {"num_workers": workers, "batch_size": batch_size, **kwargs}
    if workers:
        options |= {"multiprocessing_context": method, "timeout": PATIENCE}
    before = set(multiprocessing.active_children())
    loader = kind(dataset, **options)
    yield loader
    if workers and loader._iterator is not None:  # of persistent workers, or of a loader that saves them
        loader._iterator._shutdown_workers()
    for process in set(multiprocessing.active_children()) - before:
        process.join(PATIENCE)
        assert not process.is_alive(), "a worker outlives its loader"


@contextmanager
def iterating(dataset: Any, workers: int, method: str = "fork", **kwargs: Any) -> Iterator[Any]:
    """Yield one iterator of a loader; it is shut down at the end of the block."""
    with loading(dataset, workers, method, **kwargs) as loader:
        iteration = iter(loader)
        try:
            yield iteration
        finally:
            if workers:
                iteration._shutdown_workers()


def take(loader: Any, count: int) -> list[Any]:
    """Return copies of the first batches of a new iteration."""
    return [batch.clone() for batch in islice(iter(loader), count)]


def indices(batches: list[Any]) -> list[torch.Tensor]:
    """Return for each batch the trajectory id and the number of every step."""
    return [batch["index"] for batch in batches]


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, indices(left), indices(right)))


def overlap(left: list[Any], right: list[Any]) -> bool:
    """Return whether any batch is in both."""
    return any(torch.equal(a, b) for a in indices(left) for b in indices(right))
