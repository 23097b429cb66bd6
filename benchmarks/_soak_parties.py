"""The processes of a soak test. Each repeats one task, checks the results, and counts in shared memory."""

from __future__ import annotations

import contextlib
import enum
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _checked_steps import count_torn, make_trajectory, new_numbers
from torch.utils.data import DataLoader

from embodichain_rl import TrajectoryReplayBuffer, TrajectoryStorage
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.engine.data import OnlineDataEngine
from embodichain_rl.errors import CheckpointError, CheckpointWriteError, ChunkTooLongError, TrajectoryEvictedError
from embodichain_rl.shared.memory import SharedBlock

__all__ = ["LOADER_WORKERS", "PARTIES", "Count", "Party", "run_party"]

LOADER_WORKERS = 2

BATCH = 32


class Count(enum.IntEnum):
    """The words of a process's row, which outlives the process."""

    CALLS = 0
    """Completed calls."""
    BEGUN = enum.auto()
    """Started calls."""
    SINCE = enum.auto()
    """Start of the running call, in nanoseconds of ``time.monotonic_ns``; 0 between calls."""
    SLOWEST = enum.auto()
    """Time of the slowest call in nanoseconds, excluding the time for which its process was stopped."""
    STOPPED = enum.auto()
    """Nanoseconds for which the process was stopped. Written by the process that stops it."""
    CHUNKS = enum.auto()
    """Checked chunks, or whole trajectories."""
    TORN = enum.auto()
    """Checked chunks or trajectories that were not intact."""
    REFUSED = enum.auto()
    """Calls that raised an expected error: no trajectory as long as the chunk, or evicted during the read."""
    DISK_FULL = enum.auto()
    """Checkpoints that failed because of a full disk."""
    REBUILT = enum.auto()
    """DataLoaders that lost a worker and were re-created."""
    WORKERS = enum.auto()
    """Process ids of the workers of a DataLoader, ``LOADER_WORKERS`` words."""
    WORDS = WORKERS + LOADER_WORKERS


@dataclass
class Party:
    """The inputs of a soak process.

    Args:
        engine: the engine to sample, and whose buffer is written.
        counts: the rows of all processes.
        shape: number of processes and words.
        slot: the row of this process.
        longest: maximum steps of a trajectory.
        longest_chunk: maximum steps of a chunk.
        folder: the folder for checkpoints.
    """

    engine: OnlineDataEngine
    counts: SharedBlock
    shape: tuple[int, int]
    slot: int
    longest: int
    longest_chunk: int
    folder: Path

    def __post_init__(self) -> None:
        self.random = random.Random()

    @property
    def row(self) -> np.ndarray:
        return self.counts.array(np.int64, self.shape)[self.slot]

    @property
    def stop(self) -> bool:
        """Return whether the soak is over, which the last row says."""
        return bool(self.counts.array(np.int64, self.shape)[-1, 0])

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Count the block as one call if it completes or raises an expected error."""
        row = self.row
        stopped = row[Count.STOPPED]
        row[Count.BEGUN] += 1
        row[Count.SINCE] = begun = time.monotonic_ns()
        try:
            yield
        except (ChunkTooLongError, TrajectoryEvictedError):
            row[Count.REFUSED] += 1
        except CheckpointWriteError:
            row[Count.DISK_FULL] += 1
        taken = time.monotonic_ns() - begun - (row[Count.STOPPED] - stopped)
        row[Count.SLOWEST] = max(row[Count.SLOWEST], taken)
        row[Count.SINCE] = 0
        row[Count.CALLS] += 1

    def check(self, chunks: Any) -> None:
        self.row[Count.TORN] += count_torn(chunks)
        self.row[Count.CHUNKS] += len(chunks)


def write(party: Party) -> None:
    """Extend the buffer in parallel with the engine's workers."""
    buffer = party.engine.replay_buffer
    schema = buffer.storage.schema
    assert schema is not None
    keys = [field.key if len(field.key) > 1 else field.key[0] for field in schema.fields]
    newest = -1
    for number in new_numbers():
        if party.stop:
            return
        trajectory = make_trajectory(number, party.random.randint(1, party.longest), keys)
        with party.call():
            (written,) = set(buffer.extend(trajectory).tolist())
        assert written > newest, "an id was given out twice"
        newest = written


def sample(party: Party) -> None:
    """Sample the engine: chunks of all lengths, padded or not. Compare different chunks of one trajectory."""
    number_of: dict[int, int] = {}
    while not party.stop:
        length = party.random.randint(1, party.longest_chunk)
        pad = party.random.choice(["none", "none", "both"])
        chunks = None
        with party.call():
            chunks = party.engine.sample_batch(BATCH, chunk_size=length, pad=pad)
        if chunks is None:
            continue
        party.check(chunks)
        ids, numbers = chunks["trajectory", "id"][:, 0].tolist(), chunks["label"][:, 0, 0].tolist()
        for identity, number in zip(ids, numbers, strict=True):
            party.row[Count.TORN] += number_of.setdefault(identity, number) != number
        if len(number_of) > 100_000:
            number_of.clear()


def load(party: Party) -> None:
    """Iterate over a DataLoader with workers, in batches or single chunks. Re-create it when it loses a worker."""
    while not party.stop:
        whole_batches = party.random.random() < 0.5
        length = party.random.randint(1, party.longest_chunk)
        dataset = OnlineDataset(party.engine, length, BATCH if whole_batches else None, pad="after")
        # Forked, since torch then reports a killed worker immediately; otherwise it polls every 5 s.
        loader = DataLoader(
            dataset,
            batch_size=None if whole_batches else BATCH,
            num_workers=LOADER_WORKERS,
            multiprocessing_context="fork",
        )
        try:
            _iterate(party, iter(loader))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            party.row[Count.REBUILT] += 1


def _iterate(party: Party, batches: Any) -> None:
    party.row[Count.WORKERS :] = [worker.pid for worker in batches._workers]
    for _ in range(2000):
        if party.stop:
            return
        with party.call():
            chunks = next(batches)
        party.check(chunks)
        del chunks


def save(party: Party) -> None:
    """Save the buffer, load the checkpoint into another buffer, and check it completely. Sometimes the disk is full."""
    party.folder.mkdir(exist_ok=True)
    buffer, folder = party.engine.replay_buffer, party.folder / "checkpoint"
    storage = buffer.storage
    copy = TrajectoryReplayBuffer(
        storage=TrajectoryStorage(storage.max_size, storage.max_total_steps, compact=storage.compact), chunk_size=1
    )
    _check_saved(party, copy, folder)  # left by a process that was killed while saving
    while not party.stop:
        space = party.random.choice([resource.RLIM_INFINITY] * 9 + [party.random.randint(0, 10_000)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (space, resource.RLIM_INFINITY))  # maximum size of a file in bytes
        with party.call():
            buffer.dumps(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        _check_saved(party, copy, folder)
        if party.random.random() < 0.2:
            shutil.rmtree(folder)


def _check_saved(party: Party, copy: TrajectoryReplayBuffer, folder: Path) -> None:
    """Check every trajectory of a checkpoint that can be loaded. A damaged one must raise its error."""
    try:
        copy.loads(folder)
    except CheckpointError:
        return
    for number in range(len(copy)):
        trajectory = copy.storage[number].unsqueeze(0)
        is_whole = trajectory.shape[1] == trajectory["label"][0, 0, 2]
        party.row[Count.TORN] += not is_whole
        party.check(trajectory)


PARTIES: dict[str, Callable[[Party], None]] = {
    "writer": write,
    "consumer": sample,
    "DataLoader consumer": load,
    "saver": save,
}


def run_party(kind: str, party: Party) -> None:
    """Run a soak process from start to end."""
    torch.set_num_threads(1)
    PARTIES[kind](party)
