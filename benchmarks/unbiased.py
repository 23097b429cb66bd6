"""Is what is drawn what was asked for? The distribution of millions of draws, held against its definition.

Three processes write to one buffer. The fast one writes short trajectories, the slow one long ones. The buffer is
filled, and turned over many times; the processes are killed and replaced in between. After every turn they rest, and
each kind of draw takes its share of chunks from what the buffer holds at that moment. In the last rows they do not
rest: a batch counts if the same trajectories were live before and after it.

What was drawn is counted in a table of writer x length x position in the trajectory. What was asked for is computed
chunk by chunk, without the library (``_expected_draws.py``). Pearson's chi-square test compares them: chunks are drawn
independently of each other. If the draws are right, a p-value below 0.01 comes once in a hundred seeds. So at least 19
of 20 seeds must be above it.

    python benchmarks/unbiased.py
    python benchmarks/unbiased.py --seeds 2 --draws 100000

The exit code is 0 if all kinds of draws pass.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from _expected_draws import Chunks, Offsets, Tally, Trajectories, Weight, chunks_of
from _harness import print_table, write_report
from tensordict import TensorDict
from torch.utils.data import DataLoader

from embodichain_rl import ByGroup, ByPriority, ByRecency, ChunkSampler, OnlineDataset, TrajectoryReplayBuffer
from embodichain_rl.errors import ChunkTooLongError, TrajectoryEvictedError
from embodichain_rl.shared.memory import SharedBlock

WRITERS = 3
CHUNK = 8
BATCH = 250
SEGMENT = 12
CAPACITY = 60
PAUSES = (0.002, 0.005, 0.015)
"""Seconds between two trajectories of each writer."""
LENGTHS = ((1, 20), (10, 40), (30, 60))
"""Shortest and longest trajectory of each writer: the faster, the shorter."""
LAG = 3
MIXTURE = {0: 0.2, 1: 0.2, 2: 0.6}
LIMIT = 120.0
"""Seconds after which a wait for a writer is given up."""
LEAST_P = 0.01
SEED_STRIDE = 1_000_003
"""Between the seeds of the same kind of draws in one turn, when they begin anew."""


@dataclass(frozen=True)
class Config:
    """The options of the test."""

    seeds: int = 20
    """Number of independent repetitions."""
    draws: int = 1_000_000
    """Chunks that each kind of draw takes per seed; those that pass through a ``DataLoader`` take a tenth."""
    turns: int = 10
    """States of the buffer among which the draws are divided."""
    kinds: tuple[str, ...] = ()
    """Names of the kinds of draws; none: all."""
    out: Path | None = None
    """Path of the JSON file for the report."""


# ------------------------------------------------------------------------------------------------------------ the kinds


def whole(length: int, segment: int) -> np.ndarray:
    return np.arange(max(length - CHUNK + 1, 0))


def padded(before: int, after: int) -> Offsets:
    return lambda length, segment: np.arange(-before, max(length - CHUNK + 1 + after, -before))


def within_segments(length: int, segment: int) -> np.ndarray:
    begins = np.arange(0, length, segment)
    return np.concatenate([np.arange(at, max(min(at + segment, length) - CHUNK + 1, at)) for at in begins.tolist()])


def across_segments(length: int, segment: int) -> np.ndarray:
    return np.setdiff1d(whole(length, segment), within_segments(length, segment)).astype(int)


def windows(first: int, last: int) -> Offsets:
    return lambda length, segment: np.arange(-first, max(length - last, -first))


def evenly(trajectories: Trajectories, counts: np.ndarray) -> np.ndarray:
    return np.ones(len(counts))


def by_steps(trajectories: Trajectories, counts: np.ndarray) -> np.ndarray:
    return counts.astype(float)


def by_recency(trajectories: Trajectories, counts: np.ndarray) -> np.ndarray:
    return np.exp2(-(trajectories.newest - trajectories.ids) / 10)


def by_group(mixture: dict[int, float] | None) -> Weight:
    def weight(trajectories: Trajectories, counts: np.ndarray) -> np.ndarray:
        fits = counts > 0
        weights = np.zeros(len(counts))
        for group in np.unique(trajectories.groups[fits]):
            members = fits & (trajectories.groups == group)
            weights[members] = (mixture[int(group)] if mixture else 1.0) / members.sum()
        return weights

    return weight


def by_priority(trajectories: Trajectories, counts: np.ndarray) -> np.ndarray:
    return (trajectories.priorities + 1e-8) ** 0.6


def recent_policy(trajectories: Trajectories, counts: np.ndarray) -> np.ndarray:
    return (trajectories.versions >= trajectories.versions.max() - LAG).astype(float)


@dataclass(frozen=True)
class Kind:
    """One way to draw: its options, what they ask for, and how the chunks are fetched."""

    options: dict[str, Any]
    offsets: Offsets = whole
    weight: Weight = evenly
    items: bool = False
    workers: int | None = None
    """None: without a ``DataLoader``."""
    stopped: bool = True
    """Whether the writers rest meanwhile."""


KINDS: dict[str, Kind] = {
    "uniform": Kind({}),
    "weights='steps'": Kind({"weights": "steps"}, weight=by_steps),
    "ByRecency": Kind({"weights": ByRecency(half_life=10)}, weight=by_recency),
    "ByGroup, balanced": Kind({"weights": ByGroup("writer")}, weight=by_group(None)),
    "ByGroup, a mixture": Kind({"weights": ByGroup("writer", MIXTURE)}, weight=by_group(MIXTURE)),
    "ByPriority": Kind({"weights": ByPriority(alpha=0.6)}, weight=by_priority),
    "max_policy_lag": Kind({"max_policy_lag": LAG}, weight=recent_policy),
    "pad='both'": Kind({"pad": "both"}, padded(CHUNK - 1, CHUNK - 1)),
    "pad='after', by steps": Kind({"pad": "after", "weights": "steps"}, padded(0, CHUNK - 1), by_steps),
    "pad_before=1, pad_after=3": Kind({"pad_before": 1, "pad_after": 3}, padded(1, 3)),
    "within segments": Kind({"sampling_mode": "segment"}, within_segments),
    "across segments": Kind({"sampling_mode": "boundary"}, across_segments),
    "windows": Kind({"windows": {"step": (-2, 5)}}, windows(-2, 5)),
    "windows, padded": Kind({"windows": {"step": (-2, 5)}, "pad": "both"}, windows(0, 0)),
    "items": Kind({}, items=True, workers=0),
    "items, by steps, 2 workers": Kind({"weights": "steps"}, weight=by_steps, items=True, workers=2),
    "batches, 1 worker": Kind({}, workers=1),
    "batches, mixture, 4 workers": Kind({"weights": ByGroup("writer", MIXTURE)}, weight=by_group(MIXTURE), workers=4),
    "uniform, while they write": Kind({}, stopped=False),
    "by steps, while they write": Kind({"weights": "steps"}, weight=by_steps, stopped=False),
    "mixture, while they write": Kind({"weights": ByGroup("writer", MIXTURE)}, weight=by_group(MIXTURE), stopped=False),
}


def batches_of(rb: TrajectoryReplayBuffer, kind: Kind, seed: int) -> Iterator[TensorDict]:
    """Yield batches of this kind for ever."""
    options = dict(kind.options)
    chunk_size = None if "windows" in options else CHUNK
    batch_size = None if kind.items else BATCH
    dataset = OnlineDataset(rb, chunk_size, batch_size=batch_size, seed=seed, **options)
    if kind.workers is None:
        yield from dataset
    elif kind.items:
        yield from DataLoader(dataset, batch_size=BATCH, num_workers=kind.workers)
    else:
        yield from DataLoader(dataset, batch_size=None, num_workers=kind.workers)


def origins_of(batch: TensorDict) -> tuple[np.ndarray, np.ndarray]:
    """Return the trajectory ids and the offsets ``[B]`` of the chunks."""
    ids, steps = batch["trajectory", "id"].numpy(), batch["trajectory", "step"].numpy()
    if ids.ndim == 1:  # windows: the step that they surround
        return ids, steps
    mask = batch.get(("collector", "mask"), None)
    first = np.zeros(len(ids), int) if mask is None else mask.numpy().argmax(1)
    rows = np.arange(len(ids))
    return ids[:, 0], steps[rows, first] - first


# ---------------------------------------------------------------------------------------------------------- the writers


def write(rb: TrajectoryReplayBuffer, words: SharedBlock, writer: int, life: int, seed: int) -> None:
    """Extend the buffer until the process is killed; rest while the first of the shared words is set."""
    shared = words.array(np.int64, (1 + WRITERS,))
    torch.set_num_threads(1)
    choice = random.Random(f"{seed} {writer} {life}")
    while True:
        while shared[0]:
            shared[1 + writer] = 1
            time.sleep(0.0005)
        shared[1 + writer] = 0
        length = choice.randint(*LENGTHS[writer])
        done = torch.zeros(length, 1, dtype=torch.bool)
        done[-1] = True
        steps = TensorDict({"writer": torch.full((length,), writer), "step": torch.arange(length)}, [length])
        steps["segment_id"] = torch.arange(length) // SEGMENT
        steps["policy_version"] = torch.full((length,), rb.storage.ledger.live_range()[1] // 8)
        steps["next", "done"] = done
        rb.extend(steps)
        time.sleep(PAUSES[writer])


class Writers:
    """The processes that write."""

    def __init__(self, rb: TrajectoryReplayBuffer, seed: int) -> None:
        self._rb, self._seed = rb, seed
        self._block = SharedBlock(8 * (1 + WRITERS))
        self._words = self._block.array(np.int64, (1 + WRITERS,))
        self._context = multiprocessing.get_context("fork")
        self._lives = [0] * WRITERS
        self._processes = [self._start(writer) for writer in range(WRITERS)]

    def _start(self, writer: int) -> Any:
        arguments = (self._rb, self._block, writer, self._lives[writer], self._seed)
        process = self._context.Process(target=write, args=arguments, daemon=True)
        self._lives[writer] += 1
        process.start()
        return process

    def run_until(self, inserted: int) -> None:
        """Let them write until so many trajectories were written in all."""
        self._wait(lambda: self._rb.storage.ledger.live_range()[1] >= inserted)

    def replace(self, writer: int) -> None:
        """Kill one of them, whatever it is doing, and start another one in its place."""
        self._processes[writer].kill()
        self._processes[writer].join()
        self._processes[writer] = self._start(writer)

    def rest(self) -> None:
        """Return when all of them rest between two trajectories."""
        self._words[0] = 1
        self._wait(lambda: bool(self._words[1:].all()))

    def rest_when_each_fits(self) -> Trajectories:
        """Rest as soon as the buffer has a trajectory of each of them that is long enough; return what it has."""
        deadline = time.monotonic() + LIMIT
        while True:
            self.rest()
            held = held_by(self._rb)
            if every_writer_fits(held):
                return held
            if time.monotonic() > deadline:
                raise SystemExit(f"For {LIMIT:.0f} s, the buffer never had chunks of each writer.")
            self.go_on()
            self.run_until(self._rb.storage.ledger.live_range()[1] + 1)

    def go_on(self) -> None:
        self._words[1:] = 0
        self._words[0] = 0

    @staticmethod
    def _wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit(f"The writers did nothing for {LIMIT:.0f} s.")
            time.sleep(0.001)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


# ------------------------------------------------------------------------------------------------------------- the test


def held_by(rb: TrajectoryReplayBuffer) -> Trajectories:
    """Return what the buffer holds; it must not change meanwhile."""
    ids = np.arange(*rb.storage.ledger.live_range())
    lengths = rb.trajectory_lengths(ids).numpy()
    starts = [rb.trajectory(int(number))[0] for number in ids]
    groups = np.array([int(start["writer"]) for start in starts])
    versions = np.array([int(start["policy_version"]) for start in starts])
    return Trajectories(ids, lengths, groups, versions, 1.0 + ids % 5, SEGMENT)


def every_writer_fits(trajectories: Trajectories) -> bool:
    """Return whether there is a chunk of each writer. Draws by group raise an error otherwise."""
    return len(np.unique(trajectories.groups[trajectories.lengths >= CHUNK])) == WRITERS


def draw(rb: TrajectoryReplayBuffer, kind: Kind, chunks: Chunks, tally: Tally, draws: int, seed: int) -> None:
    """Draw this many chunks from a buffer that does not change."""
    left = math.ceil(draws / BATCH)
    for batch in batches_of(rb, kind, seed):
        tally.add(chunks, *origins_of(batch))
        left -= 1
        if not left:
            return


def draw_while_they_write(rb: TrajectoryReplayBuffer, kind: Kind, tally: Tally, draws: int, seed: int) -> None:
    """Draw this many chunks in batches before and after which the same trajectories were live."""
    ledger, known = rb.storage.ledger, _Known(rb)
    batches = batches_of(rb, kind, seed)
    drawn, deadline = 0, time.monotonic() + LIMIT
    while drawn < draws:
        if time.monotonic() > deadline:
            raise SystemExit("The buffer is never the same for the time of a batch.")
        before = ledger.live_range()
        trajectories = known.held(*before)
        if trajectories is None or not every_writer_fits(trajectories) or ledger.live_range() != before:
            continue
        try:
            origins = origins_of(next(batches))
        except ChunkTooLongError:  # the last trajectory of a writer that is long enough was evicted meanwhile
            batches = batches_of(rb, kind, seed + SEED_STRIDE * (drawn + 1))
            continue
        if ledger.live_range() != before:
            continue
        tally.add(chunks_of(trajectories, kind.offsets, kind.weight), *origins)
        drawn, deadline = drawn + BATCH, time.monotonic() + LIMIT


class _Known:
    """The lengths and writers of trajectories by id, each looked up once."""

    def __init__(self, rb: TrajectoryReplayBuffer) -> None:
        self._rb = rb
        self._of: dict[int, tuple[int, int]] = {}

    def held(self, first: int, end: int) -> Trajectories | None:
        """Return the trajectories of this range; None if one was evicted before it could be looked up."""
        for number in range(first, end):
            if number not in self._of:
                try:
                    steps = self._rb.trajectory(number)
                except TrajectoryEvictedError:
                    return None
                self._of[number] = len(steps), int(steps["writer"][0])
        ids = np.arange(first, end)
        lengths, groups = np.array([self._of[number] for number in range(first, end)]).T
        return Trajectories(ids, lengths, groups, np.zeros(len(ids)), np.ones(len(ids)), SEGMENT)


def run(config: Config, seed: int) -> dict[str, Tally]:
    """Draw with every kind from one stream of trajectories, and return what was drawn."""
    rb = TrajectoryReplayBuffer(
        max_trajectories=CAPACITY,
        max_total_steps=CAPACITY * 25,  # so that both limits evict
        sampler=ChunkSampler(CHUNK, weights=ByPriority(alpha=0.6)),  # priorities can be set
        batch_size=BATCH,
    )
    kinds = {name: KINDS[name] for name in config.kinds or KINDS}
    tallies = {name: Tally() for name in kinds}
    victims = random.Random(seed)
    writers = Writers(rb, seed)
    try:
        for turn in range(config.turns):
            writers.run_until(20 + turn * CAPACITY // 2)  # the first turns come before the buffer is full
            for name, kind in kinds.items():
                if not kind.stopped:
                    draws = config.draws // config.turns
                    draw_while_they_write(rb, kind, tallies[name], draws, seed * 1000 + turn)
            held = writers.rest_when_each_fits()
            rb.update_priority(torch.from_numpy(held.ids), torch.from_numpy(held.priorities))
            for name, kind in kinds.items():
                if kind.stopped:
                    draws = config.draws // config.turns // (1 if kind.workers is None else 10)
                    chunks = chunks_of(held, kind.offsets, kind.weight)
                    draw(rb, kind, chunks, tallies[name], draws, seed * 1000 + turn)
            writers.go_on()
            writers.replace(victims.randrange(WRITERS))
    finally:
        writers.end()
    return tallies


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Run the test, print its table, and return the p-values of each kind."""
    config = tyro.cli(Config, description=__doc__, args=arguments)
    p_values: dict[str, list[float]] = {}
    draws: dict[str, int] = {}
    for seed in range(config.seeds):
        for name, tally in run(config, seed).items():
            p_values.setdefault(name, []).append(tally.p_value())
            draws[name] = draws.get(name, 0) + tally.draws
        print(f"seed {seed}: lowest p-value {min(values[-1] for values in p_values.values()):.4f}", flush=True)
    allowed = max(1, config.seeds // 20)
    rows, failed = [], []
    for name, values in p_values.items():
        low = sum(value < LEAST_P for value in values)
        if low > allowed:
            failed.append(name)
        rows.append(
            [name, f"{draws[name]:,}", f"{min(values):.4f}", f"{np.median(values):.2f}", f"{low}/{len(values)}"]
        )
    print_table("What was drawn against what was asked for", ["", "draws", "lowest p", "median p", "p < 0.01"], rows)
    write_report(config.out, [{"kind": name, "p_values": values} for name, values in p_values.items()])
    if failed:
        raise SystemExit(f"not what was asked for: {', '.join(failed)}")
    return p_values


if __name__ == "__main__":
    main()
