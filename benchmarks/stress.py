"""A stress test: writers and readers at full speed, some of them killed. Is a chunk ever torn, or does a call hang?

Writer processes extend a small buffer and reader processes sample it, both as fast as possible. At intervals, a process
of the chosen side receives SIGKILL and is replaced. Every key of every step carries the number of its trajectory and of
the step, and every reader checks every key of every chunk. After every kill, the invariants of the ledger are checked
while the other processes continue.

    python benchmarks/stress.py --seconds 60 --kill writers
    python benchmarks/stress.py --seconds 60 --kill readers
    python benchmarks/stress.py --seconds 60 --kill both --ragged --edits

The exit code is 0 if no chunk was torn, no invariant was violated, no call took longer than 5 s and both sides ran
until the end.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import tyro
from _checked_steps import MOST_POINTS, NOTE, count_torn, make_trajectory

from embodichain_rl import ByGroup, ByPriority, ByRecency, ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.errors import EmptyBufferError, PinLimitError, TrajectoryEvictedError
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.shared.memory import SharedBlock

HANG = 5.0
"""Seconds after which a call counts as hung."""

START_LIMIT = 60.0
"""Timeout for the start of a process, in seconds."""


@dataclass(frozen=True)
class Config:
    """The options of the test."""

    seconds: float = 60.0
    """Duration of the test."""
    kill: Literal["writers", "readers", "both", "none"] = "writers"
    """The side whose processes receive SIGKILL."""
    every: float = 1.0
    """Average seconds between two kills."""
    writers: int = 2
    """Number of writer processes."""
    readers: int = 2
    """Number of reader processes."""
    max_trajectories: int = 8
    """Number of trajectories that the buffer keeps."""
    longest: int = 64
    """Maximum steps of a trajectory."""
    chunk_size: int = 8
    """Steps of a chunk."""
    batch_size: int = 16
    """Chunks per batch."""
    start_method: Literal["fork", "spawn", "forkserver"] = "fork"
    """Start method of the processes."""
    weights: Literal["uniform", "steps", "recency", "group", "priority"] = "uniform"
    """Weights of the trajectories; with "priority" the readers also update priorities."""
    compact: bool = False
    """Write next images too, and store every image once."""
    ragged: bool = False
    """Write also a key whose size differs from step to step."""
    edits: bool = False
    """The readers also pin, unpin, discard and relabel trajectories."""
    seed: int = 0
    """Seed of the lengths and the victims."""
    patience: float = 1.0
    """Factor on all time limits; more than 1 on a machine that is busy with other things."""
    json: bool = False
    """Print the report as JSON."""


WEIGHTS: dict[str, Any] = {
    "uniform": "uniform",
    "steps": "steps",
    "recency": ByRecency(half_life=2),
    "group": ByGroup("task"),
    "priority": ByPriority(),
}

# The counters of each reader and each writer, in shared memory, so that they outlive the process.
COUNTERS = ("calls", "chunks", "torn", "slowest_us", "empty")


def keys_of(config: Config) -> list[Any]:
    """The keys of a trajectory besides its label and its end."""
    return [
        *("observation", "pixels", "action", "task"),
        *([("next", "pixels")] if config.compact else []),
        *(["points", "points_lengths"] if config.ragged else []),
        *([NOTE] if config.edits else []),
    ]


def write(rb: TrajectoryReplayBuffer, config: Config, slot: int, counters: SharedBlock, life: int) -> None:
    """Extend the buffer until the process is killed."""
    torch.set_num_threads(1)
    mine = dict(zip(COUNTERS, range(len(COUNTERS)), strict=True))
    counts = counters.array(np.int64, (config.writers + config.readers, len(COUNTERS)))[slot]
    lengths = random.Random(f"{config.seed} {slot} {life}")
    number = (slot * 1000 + life) << 9
    while True:
        number = (number + 1) & 0xFFFFF
        trajectory = make_trajectory(number, lengths.randint(config.chunk_size, config.longest), keys_of(config))
        before = time.monotonic()
        rb.extend(trajectory)
        elapsed = int((time.monotonic() - before) * 1e6)
        counts[mine["slowest_us"]] = max(counts[mine["slowest_us"]], elapsed)
        counts[mine["calls"]] += 1


def read(rb: TrajectoryReplayBuffer, config: Config, slot: int, counters: SharedBlock, life: int) -> None:
    """Sample the buffer and check the chunks until the process is killed."""
    torch.set_num_threads(1)
    torch.manual_seed(hash((config.seed, slot, life)))
    mine = dict(zip(COUNTERS, range(len(COUNTERS)), strict=True))
    counts = counters.array(np.int64, (config.writers + config.readers, len(COUNTERS)))[slot]
    chance = random.Random(f"{config.seed} {slot} {life}")
    while True:
        before = time.monotonic()
        try:
            chunks = rb.sample()
        except EmptyBufferError:
            counts[mine["empty"]] += 1
            continue
        elapsed = int((time.monotonic() - before) * 1e6)
        counts[mine["slowest_us"]] = max(counts[mine["slowest_us"]], elapsed)
        if config.weights == "priority":
            rb.update_tensordict_priority(chunks.set("td_error", torch.rand(chunks.shape)))
        counts[mine["torn"]] += count_torn(chunks)
        counts[mine["chunks"]] += len(chunks)
        if config.edits:
            edit(rb, chunks["trajectory", "id"][0, 0].item(), chance)
        counts[mine["calls"]] += 1


def edit(rb: TrajectoryReplayBuffer, drawn: int, chance: random.Random) -> None:
    """Pin, unpin, discard and relabel one trajectory each."""
    pinned = rb.pinned.tolist()
    with contextlib.suppress(TrajectoryEvictedError, PinLimitError):
        rb.pin(drawn)
    if len(pinned) > 1:
        rb.unpin(chance.choice(pinned))
    note = chance.randrange(2**62)
    rb.relabel(NOTE, lambda steps: torch.full_like(steps[NOTE], note), ids=rb.storage.ledger.live().all()[-2:])
    if len(rb) > 2:
        rb.discard(rb.storage.ledger.live().all()[:1])


def run(config: Config) -> dict[str, float]:
    """Run the processes, kill some of them, and return the report."""
    context = multiprocessing.get_context(config.start_method)
    rb = TrajectoryReplayBuffer(
        max_trajectories=config.max_trajectories,
        max_total_steps=config.max_trajectories * config.longest,
        sampler=ChunkSampler(config.chunk_size, weights=WEIGHTS[config.weights]),
        batch_size=config.batch_size,
        compact=config.compact,
        ragged=["points"] if config.ragged else None,
        ragged_bytes=8 * MOST_POINTS if config.ragged else None,
    )
    for number in range(config.max_trajectories):
        rb.extend(make_trajectory(number, config.longest, keys_of(config)))
    slots = config.writers + config.readers
    counters = SharedBlock(8 * slots * len(COUNTERS))
    table = counters.array(np.int64, (slots, len(COUNTERS)))
    lives = [0] * slots

    def start(slot: int) -> multiprocessing.process.BaseProcess:
        target = write if slot < config.writers else read
        process = context.Process(target=target, args=(rb, config, slot, counters, lives[slot]), daemon=True)
        lives[slot] += 1
        process.start()
        return process

    def targets() -> range:
        return {
            "writers": range(config.writers),
            "readers": range(config.writers, slots),
            "both": range(slots),
            "none": range(0),
        }[config.kill]

    processes = [start(slot) for slot in range(slots)]
    victims = random.Random(config.seed)
    kills = hung = died = 0
    hang, start_limit = HANG * config.patience, START_LIMIT * config.patience
    begin = time.monotonic()
    while not table[:, 0].all():
        if time.monotonic() > begin + start_limit:
            raise SystemExit(f"Not all processes had started after {start_limit:.0f} s.")
        time.sleep(0.01)
    begin = now = time.monotonic()
    next_kill = begin + config.every
    last_calls, last_change = table[:, 0].copy(), np.full(slots, begin)
    while now < begin + config.seconds:
        time.sleep(0.01)
        now = time.monotonic()
        changed = table[:, 0] != last_calls
        last_calls, last_change[changed] = table[:, 0].copy(), now
        for slot in np.flatnonzero(now - last_change > hang):
            hung += 1
            last_change[slot] = now
        if targets() and now >= next_kill:
            next_kill = now + config.every * victims.uniform(0.5, 1.5)
            slot = victims.choice(targets())
            os.kill(processes[slot].pid, signal.SIGKILL)
            processes[slot].join(hang)
            check_ledger(rb.storage.ledger)
            kills += 1
            processes[slot] = start(slot)
            last_change[slot] = now + start_limit - hang  # the limit applies to calls, not to the start of a process
        for slot, process in enumerate(processes):
            if process.exitcode is not None:
                died += 1
                processes[slot] = start(slot)
    end_calls, deadline = table[:, 0].copy(), time.monotonic() + start_limit
    while (going := int((table[:, 0] > end_calls).sum())) < slots and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join(hang)
    check_ledger(rb.storage.ledger)
    stats = rb.stats()
    writers, readers = table[: config.writers], table[config.writers :]
    return {
        "seconds": round(config.seconds, 1),
        "kills": kills,
        "trajectories_written": int(writers[:, 0].sum()),
        "batches_read": int(readers[:, 0].sum()),
        "chunks_checked": int(readers[:, 1].sum()),
        "torn": int(readers[:, 2].sum()),
        "hung": hung,
        "died_by_themselves": died,
        "found_empty": int(readers[:, 4].sum()),
        "slowest_sample_ms": readers[:, 3].max() / 1e3,
        "slowest_extend_ms": writers[:, 3].max() / 1e3,
        "going_on_at_the_end": going,
        "processes": slots,
        "live_trajectories": stats["trajectories"],
        "evicted_early": stats["evicted_early"],
        "reclaimed": stats["reclaimed"],
    }


def violations(report: dict[str, float]) -> dict[str, float]:
    """Return the counts of a report that must be 0 and are not."""
    counts = {name: report[name] for name in ("torn", "hung", "died_by_themselves", "found_empty")}
    counts["stopped before the end"] = report["processes"] - report["going_on_at_the_end"]
    return {name: count for name, count in counts.items() if count}


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    multiprocessing.set_forkserver_preload(["embodichain_rl.replay.buffer"])  # the package loads its parts at first use
    report = run(config)
    if config.json:
        print(json.dumps({"config": asdict(config), "report": report}))
    else:
        for name, value in report.items():
            print(f"{name.replace('_', ' '):22} {value:,}")
    if violations(report):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
