"""Simulated power cuts: is everything there that ``sync`` returned for, and is nothing torn?

A process writes to a small buffer in a file, evicts, pins, discards, relabels, sets priorities, and syncs now and
then, with small logs, so that the other one is often begun. ``_power_cut.py`` models the disk. The power fails at
random moments, also between the writes of a sync. The buffer is then opened as after a start of the machine, and
checked: every trajectory that a returned sync covers and that was not evicted or discarded since is there, and pinned
if it was, every value of every trajectory is intact, the invariants of the ledger hold, and it can be written to.

    python benchmarks/power_cuts.py --cuts 1000
    python benchmarks/power_cuts.py --cuts 1000 --ragged

With ``--ragged``, steps have points, of another number at each, and images whose bytes lie beside the columns too. They
take more bytes than expected, so that regions are longer than their trajectories.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from _checked_steps import TASKS, count_torn, make_trajectory
from _power_cut import Disk

from embodichain_rl import ByPriority, ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.errors import PinLimitError
from embodichain_rl.replay.durable import syncing
from embodichain_rl.replay.ledger.invariants import check_ledger

NAMES = ("cuts", "trajectories", "pinned", "relabelled")

BROKEN = ("lost", "unpinned", "torn", "wrong ids", "wrong weights", "wrong tasks")
"""The counts that must be 0."""

KEYS = ["observation", "pixels", "action", "task"]

RAGGED = {"ragged": ["points"], "every": {"pixels": 1}, "ragged_bytes": 512}


@dataclass(frozen=True)
class Config:
    """The options."""

    cuts: int = 1000
    """Number of power cuts."""
    seed: int = 0
    """Seed of everything."""
    likely: float = 0.2
    """Probability of a cut at each moment."""
    ragged: bool = False
    """Whether steps have values of unequal sizes."""


class Run:
    """One buffer, its disk, and what was found at the cuts."""

    def __init__(self, config: Config, seed: int, folder: Path, *, compact: bool) -> None:
        self.config, self.folder = config, folder
        self.keys = [*KEYS, "points", "points_lengths"] if config.ragged else KEYS
        self.disk: Disk
        self.rb = self.made(folder / "buffer", compact=compact)
        self.compact = compact
        self.found: Counter[str] = Counter()
        self.disk = Disk(folder / "buffer", seed, self.perhaps_cut)
        self.random = self.disk.random
        self.synced: set[int] = set()
        self.pinned: set[int] = set()
        self.number_of: dict[int, int] = {}
        self.newest_task: dict[int, int] = {}
        self.tasks: dict[int, set[int]] = {}
        """What relabelled trajectories may have as their task: the latest one since the last sync, or one before."""

    def made(self, path: Path, *, compact: bool) -> TrajectoryReplayBuffer:
        sampler = ChunkSampler(2, weights=ByPriority(alpha=1.0))
        limits = {"max_trajectories": 6, "max_total_steps": 60}
        formats = RAGGED if self.config.ragged else {}
        return TrajectoryReplayBuffer(**limits, **formats, sampler=sampler, batch_size=4, compact=compact, path=path)

    def go(self, cuts: int) -> None:
        """Write until the power has failed so many times."""
        number = 0
        with self.disk:
            while self.found["cuts"] < cuts:
                for _ in range(self.random.choice([1, 1, 1, 2, 4, 20])):
                    self.number_of[self.rb.storage.ledger.next_id] = number
                    ids = self.rb.extend(make_trajectory(number, self.random.randint(1, 20), self.keys))
                    self.number_of[int(ids[0])] = number
                    number += 1
                    self.disk.moment()
                if self.random.random() < 0.3 and len(self.rb):
                    self.rb.sample()
                    live = self.rb.storage.ledger.live().all()
                    self.rb.update_priority(live[[0, -1]].tolist(), [2.0, 3.0])
                if number > 10:  # before that, nothing was ever pinned
                    self.pin_and_discard()
                    self.relabel()
                if self.random.random() < 0.8:
                    covered, pinned = self.live(self.rb), set(self.rb.pinned.tolist())
                    self.rb.sync()
                    self.synced, self.pinned = covered, pinned
                    self.tasks = {number: {task} for number, task in self.newest_task.items()}
                    self.disk.moment()

    @staticmethod
    def live(rb: TrajectoryReplayBuffer) -> set[int]:
        """Return the live ids."""
        return set(rb.storage.ledger.live().all().tolist())

    def pin_and_discard(self) -> None:
        """Pin, unpin or discard a trajectory, or nothing."""
        live, pinned, chance = sorted(self.live(self.rb)), self.rb.pinned.tolist(), self.random.random()
        if not live:
            return
        if chance < 0.3 and len(pinned) < 2:
            with contextlib.suppress(PinLimitError):
                self.rb.pin(self.random.choice(live))
        elif chance < 0.5 and pinned:
            self.pinned.discard(pinned[0])
            self.rb.unpin(pinned[0])
        elif chance < 0.7:
            gone = self.random.choice(live)
            self.pinned.discard(gone)
            self.rb.discard(gone)

    def relabel(self) -> None:
        """Give a trajectory another task, or do nothing."""
        live = sorted(self.live(self.rb))
        if not live or self.random.random() > 0.3:
            return
        number, task = self.random.choice(live), self.random.randint(100, 200)
        before = self.tasks.setdefault(number, {self.number_of[number] % TASKS})
        before.add(task)
        self.rb.relabel("task", lambda trajectory: torch.full_like(trajectory["task"], task), ids=[number])
        self.newest_task[number] = task
        self.disk.moment()

    def perhaps_cut(self, disk: Disk) -> None:
        if disk.random.random() < self.config.likely:
            self.cut()

    def cut(self) -> None:
        """Let the power fail now; check what the machine finds when it starts."""
        self.found["cuts"] += 1
        target = self.folder / "after"
        real = self.disk
        # Before the ledger says so, trajectories may be evicted by a change that is being prepared.
        still_live = self.synced & self.live(self.rb)
        real.fail(target)
        real.__exit__()
        try:
            rb = self.made(target, compact=self.compact)
            ledger = rb.storage.ledger
            check_ledger(ledger)
            found = self.live(rb)
            self.found["lost"] += not still_live <= found
            self.found["unpinned"] += not self.pinned & still_live <= set(rb.pinned.tolist())
            self.found["pinned"] += len(rb.pinned)
            if len(rb):
                whole = rb.storage[:]
                mask, label = whole["collector", "mask"], whole["label"]
                ids = whole["trajectory", "id"][:, 0].tolist()
                for row, number in enumerate(ids):
                    tasks = set(whole["task"][row][mask[row]].tolist())
                    allowed = self.tasks.get(number)
                    if allowed is not None:
                        self.found["wrong tasks"] += len(tasks) != 1 or not tasks <= allowed
                        self.found["relabelled"] += 1
                        whole["task"][row] = self.number_of[number] % TASKS
                steps = whole.exclude("index", "trajectory")[mask][:, None]
                self.found["torn"] += count_torn(steps) + int((mask.sum(-1) != label[:, 0, 2]).sum())
                self.found["torn"] += int((label[..., 1] != torch.arange(mask.shape[1]))[mask].sum())
                numbers = [self.number_of.get(number) for number in ids]
                self.found["wrong ids"] += numbers != whole["label"][:, 0, 0].tolist()
                self.found["trajectories"] += len(rb)
                weights = ledger.weights_of(ledger.live().all())
                self.found["wrong weights"] += not (ledger.priorities.built is False or (weights > 0).all())
            for number in range(8):
                rb.extend(make_trajectory(number, 5, self.keys))
            check_ledger(ledger)
            rb.sync()
            del rb
            gc.collect()
        finally:
            real.__enter__()
            shutil.rmtree(target)


def run(config: Config) -> dict[str, int]:
    """Cut the power so many times; return the counts of what was found."""
    found: Counter[str] = Counter()
    carried, log_bytes = syncing.CARRIED, syncing.LOG_BYTES
    try:
        for number, (carry, compact) in enumerate([(512 * 1024, False), (0, False), (4096, True), (512 * 1024, True)]):
            syncing.CARRIED, syncing.LOG_BYTES = carry, 16 * 1024
            with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
                one = Run(config, config.seed + number, Path(folder), compact=compact)
                one.go(config.cuts // 4)
                found += one.found
    finally:
        syncing.CARRIED, syncing.LOG_BYTES = carried, log_bytes
    return {name: found[name] for name in (*NAMES, *BROKEN)}


if __name__ == "__main__":
    print(run(tyro.cli(Config, description=__doc__)))
