"""The ledger at its limits. ``test_ledger_model.py`` compares it with a model."""

from __future__ import annotations

import os
import signal
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest

from embodichain_rl.errors import SharingError, TooManyWritersError, TrajectoryTooLongError
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger
from embodichain_rl.replay.ledger.words import (
    GONE,
    PID,
    PROCESS_START,
    SINCE,
    TICKET,
)
from embodichain_rl.shared import lock

MAX_TRAJECTORIES, MAX_STEPS, ARENA_STEPS, WRITER_SLOTS = 5, 40, 100, 6


def publish(ledger: Ledger, length: int) -> int:
    return ledger.publish(ledger.reserve(length))


def test_ten_thousand_laps_stay_within_the_head_room() -> None:
    rng = np.random.default_rng(0)
    ledger = Ledger(64, 64 * 175, 64 * 175 + 16 * 175)
    for _ in range(10_000):
        publish(ledger, int(rng.integers(50, 301)))
    check_ledger(ledger)
    assert ledger.stats()["evicted_early"] == 0
    assert 58 <= len(ledger) <= 64


@pytest.mark.parametrize("writers", [1, 2, 8])
def test_a_buffer_of_two_always_offers_two(writers: int) -> None:
    ledger = Ledger(2, 600, 600 + 16 * 300)
    publish(ledger, 300), publish(ledger, 300)
    for _ in range(200):
        slow = [ledger.reserve(300) for _ in range(writers)]
        assert len(ledger) == 2
        for reservation in slow:
            ledger.publish(reservation)
            assert len(ledger) == 2
    check_ledger(ledger)
    assert ledger.stats()["evicted_early"] == 0


def test_other_writers_pass_a_writer_that_is_stopped() -> None:
    ledger = Ledger(2, 20, 120)
    slow = ledger.reserve(10)
    for _ in range(1000):
        publish(ledger, 10)
    assert len(ledger) == 2
    trajectory = ledger.publish(slow)
    check_ledger(ledger)
    assert ledger.live_rows().ids[-1] == trajectory
    assert ledger.stats()["evicted_early"] == 0


def test_a_retired_trajectory_stays_intact_until_its_space_is_needed() -> None:
    ledger = Ledger(2, 20, 120)
    first = publish(ledger, 10)
    publish(ledger, 10), publish(ledger, 10)
    assert first not in ledger.live_rows().ids
    assert ledger.still_valid(np.array([first])).all()
    publish(ledger, 10), publish(ledger, 10)
    assert not ledger.still_valid(np.array([first])).any()


def test_a_region_that_is_given_back_is_not_published() -> None:
    ledger = Ledger(2, 20, 120)
    ledger.give_back(ledger.reserve(5))
    assert ledger.stats() | {"trajectories": 0, "published": 0, "writing": 0} == ledger.stats()
    check_ledger(ledger)


def test_too_long_trajectories_and_too_many_writers_are_refused() -> None:
    ledger = Ledger(2, 20, 120, writer_slots=3)
    with pytest.raises(TrajectoryTooLongError, match="21 steps, but max_total_steps=20"):
        publish(ledger, 21)
    for _ in range(3):
        ledger.reserve(5)
    with pytest.raises(TooManyWritersError, match="3 trajectories are being written at the same time"):
        ledger.reserve(5)
    full = Ledger(2, 20, 60)
    for _ in range(3):
        full.reserve(20)
    with pytest.raises(TooManyWritersError, match="No 1 consecutive free steps"):
        full.reserve(1)


def test_the_next_writer_reclaims_a_dead_writer() -> None:
    ledger = Ledger(2, 20, 120)
    pid = os.fork()
    if not pid:
        ledger.reserve(10)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert ledger.stats()["writing"] == 1
    publish(ledger, 10)
    ledger._slots[0, SINCE] -= 10**9  # a second ago
    publish(ledger, 10)
    assert ledger.stats()["writing"] == 0
    assert ledger.stats()["reclaimed"] == 1
    check_ledger(ledger)


def killed_while_it_writes(ledger: Ledger, *lengths: int) -> None:
    """Leave reservations of a dead process, with an age of zero."""
    pid = os.fork()
    if not pid:
        for length in lengths:
            ledger.reserve(length)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    ledger._slots[ledger._slots[:, TICKET] >= 0, SINCE] = time.monotonic_ns()


def test_dead_writers_are_reclaimed_at_once_before_live_trajectories_are_evicted() -> None:
    ledger = Ledger(1, 20, 60)
    assert publish(ledger, 20) == 0
    killed_while_it_writes(ledger, 20, 20)
    region = ledger.reserve(20)
    assert len(ledger) == 1
    assert ledger.publish(region) == 1
    assert ledger.stats() | {"evicted_early": 0, "reclaimed": 2, "writing": 0} == ledger.stats()
    check_ledger(ledger)


def test_dead_writers_are_reclaimed_at_once_before_a_living_writer_is_refused() -> None:
    ledger = Ledger(2, 20, 200, writer_slots=3)
    killed_while_it_writes(ledger, 5, 5, 5)
    assert publish(ledger, 5) == 0
    assert ledger.stats() | {"reclaimed": 3, "writing": 0} == ledger.stats()
    check_ledger(ledger)


def test_a_dead_writer_whose_process_id_was_reused_is_reclaimed() -> None:
    ledger = Ledger(2, 20, 120)
    region = ledger.reserve(10)
    slot = ledger._slots[region.slot]
    slot[PROCESS_START] -= 100  # another process made the reservation, under the process id that this process now has
    slot[SINCE] -= 10**9
    publish(ledger, 10)
    assert ledger.stats()["writing"] == 0
    assert ledger.stats()["reclaimed"] == 1
    check_ledger(ledger)


def test_a_living_writer_is_not_reclaimed_however_long_it_takes() -> None:
    ledger = Ledger(2, 20, 120)
    slow = ledger.reserve(10)
    ledger._slots[slow.slot, SINCE] -= 3600 * 10**9
    publish(ledger, 10)
    ledger.publish(slow)
    assert len(ledger) == 2
    assert ledger.stats()["reclaimed"] == 0


@pytest.mark.parametrize("start", [2**31 - 3, 2**40])
def test_counters_do_not_overflow(start: int) -> None:
    ledger = Ledger(3, 30, 120)
    counters = ledger._read_counters()
    counters.next_id = counters.oldest_id = counters.next_ticket = counters.steps_written = start
    ledger._commit(counters)
    for n in range(20):
        assert publish(ledger, 7) == start + n
    assert ledger.live_rows().ids.tolist() == [start + 17, start + 18, start + 19]
    assert ledger.steps_written == start + 140
    check_ledger(ledger)


@pytest.mark.parametrize("trajectories", [64, 100_000])
def test_a_gap_serves_many_reservations_in_a_large_buffer(trajectories: int) -> None:
    ledger = Ledger(trajectories, trajectories * 4, trajectories * 4 + max(64, trajectories // 4))
    passes = 0
    open_gap = ledger._open_gap

    def counted(*args: object) -> None:
        nonlocal passes
        passes += 1
        open_gap(*args)  # type: ignore[arg-type]

    ledger._open_gap = counted  # type: ignore[method-assign]
    for _ in range(trajectories + 1000):
        publish(ledger, 4)
    assert passes <= max(1000, trajectories // 100)


def test_regions_that_were_given_back_are_free_again() -> None:
    ledger = Ledger(2, 20, 120, writer_slots=4)
    for _ in range(20 * ledger.num_rows):
        ledger.give_back(ledger.reserve(5))
    publish(ledger, 20)
    check_ledger(ledger)
    assert ledger.live_rows().lengths.tolist() == [20]


def test_publishing_a_reclaimed_reservation_raises() -> None:
    ledger = Ledger(2, 20, 120)
    slow = ledger.reserve(10)
    slot = ledger._slots[slow.slot]
    slot[PID : SINCE + 1] = (2**22 - 1, 1, 0)  # what a process in another pid namespace looks like
    publish(ledger, 10)
    with pytest.raises(SharingError, match="pid namespace"):
        ledger.publish(slow)
    assert len(ledger) == 1
    check_ledger(ledger)


def test_resuming_from_a_checkpoint_starts_empty_at_the_given_id() -> None:
    ledger = Ledger(2, 20, 120)
    publish(ledger, 10)
    ledger.resume_from(next_id=7)
    check_ledger(ledger)
    assert len(ledger) == 0
    assert publish(ledger, 5) == 7
    assert ledger.live_rows().ids.tolist() == [7]
    assert (ledger.rows_of(np.arange(1, 7)).lengths == GONE).all()


def test_reads_take_no_more_memory_in_a_large_ledger() -> None:
    """A read that scanned all rows would take more memory, and more time."""

    def peak(max_trajectories: int) -> int:
        ledger = Ledger(max_trajectories, 10 * max_trajectories, 40 * max_trajectories)
        ids = np.array([publish(ledger, 5) for _ in range(10)])
        tracemalloc.start()
        try:
            ledger.live_range()
            ledger.rows_of(ids)
            ledger.still_valid(ids)
            ledger.steps_before(ids)
            ledger.live_since(0, ledger.live())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(1_000_000) < peak(10) + 1000


@pytest.mark.parametrize("read", [Ledger.stats, Ledger.live_range, Ledger.num_steps.fget, Ledger.next_id.fget])
def test_counters_that_change_during_a_read_are_read_again(read: Any) -> None:
    ledger = Ledger(2, 20, 120)
    publish(ledger, 5), publish(ledger, 6), publish(ledger, 7)
    right, active, counters = read(ledger), ledger._active, ledger._counters
    looked: list[int] = []

    class Changing:
        def __getitem__(self, copy: int) -> np.ndarray:
            if not looked:  # one change was committed since, and a second one is half done in this copy
                counters[1 - copy] = counters[copy]
                active[0] += 1
                counters[copy, :7] = -1
            looked.append(int(copy))
            return counters[copy]

    ledger._counters = Changing()
    assert read(ledger) == right
    assert len(set(looked)) == 2


def test_the_child_of_a_parent_that_is_killed_inside_the_lock_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LOCK_TIMEOUT", 5.0)
    ledger = Ledger(2, 20, 120)
    receiver, sender = os.pipe()
    parent = os.fork()
    if not parent:
        publish(ledger, 5)  # which opens the lock's file
        child = os.fork()
        if not child:
            signal.pause()
        os.write(sender, child.to_bytes(8, "big"))
        with ledger.frozen():
            os.kill(os.getpid(), signal.SIGKILL)
    child = int.from_bytes(os.read(receiver, 8), "big")
    os.waitpid(parent, 0)
    try:
        assert publish(ledger, 6) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(receiver)
        os.close(sender)
