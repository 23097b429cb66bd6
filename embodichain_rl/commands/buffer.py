"""``embodichain-rl buffer``: look at a buffer in a file, also while it is in use."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import tyro

from embodichain_rl.replay.ledger import check_ledger
from embodichain_rl.replay.storage import TrajectoryStorage, read_existing

__all__ = ["COMMAND"]

BufferPath = Annotated[Path, tyro.conf.Positional]


def info(path: BufferPath) -> None:
    """Print counts, limits, ages and the keys of a step.

    Args:
        path: the directory of the buffer.
    """
    storage = TrajectoryStorage.open(path, "r")
    ledger = storage.ledger
    rows = ledger.live_rows()
    live, steps = len(ledger), ledger.num_steps
    print(f"path: {storage.path}")
    print(f"trajectories: {live:,} of at most {storage.max_size:,}")
    print(f"steps: {steps:,} of at most {storage.max_total_steps:,}")
    print(f"free: {storage.max_size - live:,} trajectories, {storage.max_total_steps - steps:,} steps")
    stored_once = "yes" if storage.compact else "no"
    print(f"observations stored once: {stored_once}")
    for name, value in ledger.stats().items():
        if name not in ("trajectories", "steps"):
            print(f"{name}: {value:,}")
    if len(rows.ids):
        ages = (time.monotonic_ns() - rows.published_at) / 1e9
        print(f"ids: {rows.ids[0]} to {rows.ids[-1]}")
        print(f"age: {ages.min():.1f} s to {ages.max():.1f} s")
        print(f"length: {rows.lengths.min():,} to {rows.lengths.max():,} steps")
    print(f"synced up to id: {int(ledger.last_commit()[1])}")
    print(f"texts: {len(storage.texts):,}")
    schema = storage.schema
    if schema is None:
        print("schema: nothing was written yet")
        return
    print(f"bytes of a step: {schema.nbytes:,}")
    for key, (shape, dtype, is_text) in schema.kinds.items():
        print(f"  {'/'.join(key)}: {list(shape)} {'text' if is_text else str(dtype).removeprefix('torch.')}")


def verify(path: BufferPath) -> None:
    """Check the invariants of the ledger, and read every trajectory.

    Args:
        path: the directory of the buffer.
    """
    storage = TrajectoryStorage.open(path, "r+")
    check_ledger(storage.ledger)
    read = 0
    if storage.initialized:
        ids = storage.ledger.live().all()
        for number in range(len(ids)):
            read += len(read_existing(storage.view, ids[number : number + 1]).rows.ids)
    check_ledger(storage.ledger)
    print(f"{storage.path}: the invariants hold, {read:,} trajectories were read")


def sync(path: BufferPath) -> None:
    """Wait until all that is published is on the disk; recovers a buffer after a power cut.

    Args:
        path: the directory of the buffer.
    """
    storage = TrajectoryStorage.open(path, "r+")
    storage.sync()
    print(f"{storage.path}: {len(storage):,} trajectories are safe on the disk")


COMMAND = {"info": info, "verify": verify, "sync": sync}
