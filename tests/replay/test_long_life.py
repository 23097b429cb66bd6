"""A buffer that has run for very long: counters far beyond 32 bits, every row used again and again, nothing grows."""

from __future__ import annotations

import copy
import gc
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import assert_uniform, check_chunk, contents, make_buffer, make_trajectory, numbers_of, small

from embodichain_rl import ByGroup, ByPriority, ByRecency, ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage
from embodichain_rl.replay.ledger.invariants import check_ledger

STARTS = [2**31 - 4, 2**32 - 4, 2**40, 2**53 - 4, 2**61]
"""Where the counters stand: shortly before they leave 31 and 32 bits, and what a float64 can tell apart."""

A_DAY = 86_400 * 2_000
"""Trajectories of a day of writing at full speed."""

SAMPLERS: dict[str, Any] = {
    "uniform": ChunkSampler(3),
    "steps": ChunkSampler(3, weights="steps"),
    "recency": ChunkSampler(3, weights=ByRecency(half_life=100)),
    "group": ChunkSampler(3, weights=ByGroup(("robot", "mode"))),
    "priority": ChunkSampler(3, weights=ByPriority()),
    "one pass": ChunkSampler(3, replacement=False),
    "of the last hour": ChunkSampler(3, max_age=3600.0),
    "by the newest policies": ChunkSampler(3, max_policy_lag=1),
}


def fast_forward(rb: TrajectoryReplayBuffer, to: int) -> None:
    """Set the counters of an empty buffer as if it had written ``to`` trajectories and steps, in ``to`` changes."""
    ledger = rb.storage.ledger
    assert len(ledger) == 0
    counters = ledger._read_counters()
    counters.next_id = counters.oldest_id = counters.next_ticket = to
    counters.steps_written = counters.steps_published = to
    ledger._active[0] += to // 2 * 2
    ledger._commit(counters)
    check_ledger(ledger)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_what_is_written_and_sampled_is_right_wherever_the_counters_stand(start: int, compact: bool) -> None:
    fields = ["observation", ("next", "reward"), ("robot", "mode")]
    rb = make_buffer(storage=TrajectoryStorage(4, 100, compact=compact))
    rb.storage.allocate(make_trajectory(0, 3, fields=fields))
    fast_forward(rb, start)
    for number in range(12):
        assert set(rb.extend(make_trajectory(number, 4 + number % 5, fields=fields)).tolist()) == {start + number}
        chunks = check_chunk(rb.sample())
        assert int(chunks["trajectory", "id"].max()) <= start + number
        assert (chunks["trajectory", "id"][:, 0] - start).tolist() == numbers_of(chunks)
        check_ledger(rb.storage.ledger)
    assert contents(rb) == [(number, 4 + number % 5) for number in range(8, 12)]
    assert rb.write_count == start + sum(4 + number % 5 for number in range(12))
    assert rb.stats()["published"] == start + 12


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_way_to_draw_draws_alike_wherever_the_counters_stand(name: str, start: int) -> None:
    rb = make_buffer(
        storage=TrajectoryStorage(4, 100),
        sampler=copy.copy(SAMPLERS[name]),
        batch_size=40,
        generator=torch.Generator().manual_seed(0),
    )
    mode = torch.zeros(6, dtype=torch.int64)
    rb.storage.allocate(small(0, 3).set(("robot", "mode"), mode[:3]).set("policy_version", mode[:3]))
    fast_forward(rb, start)
    for number in range(7):
        trajectory = small(number, 6).set(("robot", "mode"), mode).set("policy_version", mode + start)
        rb.extend(trajectory)
    if name == "priority":
        rb.update_priority(torch.arange(start + 3, start + 7), torch.ones(4))
    drawn = []
    for _ in range(10):
        chunks = rb.sample()
        chunks = check_chunk(chunks.exclude(("robot", "mode")))
        drawn += [(n, s) for n, s in zip(numbers_of(chunks), chunks["label"][:, 0, 1].tolist(), strict=True)]
    assert_uniform(drawn, [(number, first) for number in (3, 4, 5, 6) for first in range(4)])


def test_a_day_passes() -> None:
    """Reuse every row, writer slot and gap many times, with the counters of the previous day."""
    storage = TrajectoryStorage(4, 40)
    rb = make_buffer(storage=storage)
    storage.allocate(small(0, 3))
    rows, arena = storage.ledger.num_rows, storage.ledger.arena_steps
    fast_forward(rb, A_DAY)
    lengths = [1 + (number * 7) % 10 for number in range(5 * rows)]
    for number, length in enumerate(lengths):
        rb.extend(small(number, length))
        if number % 97 == 0:
            check_ledger(storage.ledger)
            assert contents(rb) == list(enumerate(lengths))[max(0, number - 3) : number + 1]
    assert sum(lengths) > 50 * arena
    assert rb.stats()["published"] == A_DAY + 5 * rows
    assert rb.stats()["evicted_early"] == 0


def test_nothing_grows() -> None:
    rb = make_buffer(max_trajectories=8, max_total_steps=100, chunk_size=4)
    trajectories = [make_trajectory(number, 4 + number % 8, fields=["observation", "pixels"]) for number in range(16)]

    def use(times: int) -> None:
        for number in range(times):
            rb.extend(trajectories[number % 16][:2])  # in pieces
            rb.extend(trajectories[number % 16][2:])
            rb.sample()

    def taken() -> tuple[int, int, int, int]:
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        mapped = len(Path("/proc/self/maps").read_text().splitlines())
        return resident, mapped, len(os.listdir("/proc/self/fd")), len(gc.get_objects())

    use(2000)
    readings = [taken()]
    for _ in range(6):
        use(1000)
        readings.append(taken())
    # What leaks grows in every round; what the allocator of a process with a past takes, it takes in some.
    growth = [[now - then for then, now in pairwise(values)] for values in zip(*readings, strict=True)]
    memory, mappings, descriptors, objects = (min(of_rounds) for of_rounds in growth)
    assert memory < 2**17, growth
    assert mappings <= 0, growth
    assert descriptors <= 0, growth
    assert objects < 50, growth
    assert rb.stats()["pending_steps"] == 0
