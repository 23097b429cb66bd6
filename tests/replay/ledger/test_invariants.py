"""The check of the ledger sees whatever is broken, and nothing where nothing is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger
from embodichain_rl.replay.ledger.table import (
    COUNTERS,
    ID,
    LENGTH,
    LONGEST_SEGMENT,
    PID,
    POLICY_VERSION,
    PUBLISHED_AS,
    SLOT_LENGTH,
    SLOT_START,
    START,
    STEPS_BEFORE,
    TICKET,
)

ROWS = 3 + 2 * 4


def make_ledger() -> Ledger:
    """Three live trajectories, 2 to 4, retired ones before them that can still be read, and two writers."""
    ledger = Ledger(3, 30, 90, writer_slots=4)
    for _ in range(5):
        ledger.publish(ledger.reserve(5), 3, policy_version=1)
    ledger.prioritize()
    ledger.reserve(3)
    ledger.reserve(1)
    return ledger


def counter(name: str, value: int) -> Callable[[Ledger], None]:
    def break_it(ledger: Ledger) -> None:
        ledger._counters[ledger._active[0] & 1, COUNTERS.index(name)] = value

    return break_it


def row(number: int, column: int, value: int) -> Callable[[Ledger], None]:
    def break_it(ledger: Ledger) -> None:
        ledger._rows[number, column] = value

    return break_it


def slot(number: int, column: int, value: int) -> Callable[[Ledger], None]:
    def break_it(ledger: Ledger) -> None:
        ledger._slots[number, column] = value

    return break_it


def priorities(ledger: Ledger) -> None:
    ledger.priorities._nodes[1] += 1.0


def maxima(ledger: Ledger) -> None:
    ledger.priorities._maxima[1] += 1.0


def times(ledger: Ledger) -> None:
    ledger._published_at[3] = 0


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (counter("oldest_id", -1), "ids from -1 to 5 are live"),
        (counter("oldest_id", 6), "ids from 6 to 5 are live"),
        (counter("oldest_id", 1), "4 trajectories are live of 3 at most"),
        (counter("live_steps", 31), "31 steps are live of 30 at most"),
        (counter("live_steps", 16), "have 15 steps, counted are 16"),
        (counter("window", -1), r"the window \[-1, 30\)"),
        (counter("window", 31), r"the window \[31, 30\)"),
        (counter("window_end", 91), r"the window \[\d+, 91\) is not in use"),
        (counter("high_water", 91), "91 steps are in use of 90"),
        (counter("high_water", 29), "29 steps are in use"),
        (counter("evicted_early", 3), "3 trajectories were evicted early of 2"),
        (counter("reclaimed", -1), "less than 0 times"),
        (counter("steps_published", 26), "do not grow by their lengths"),
        (counter("newest_version", 0), "a policy newer than 0"),
        (counter("newest_version", 2), "no live trajectory was made with the newest policy version 2"),
        (counter("newest_version_id", 1), "trajectory 1, said to be of the newest policy version, is not live"),
        (counter("newest_version_id", 5), "trajectory 5, said to be of the newest policy version, is not live"),
        (counter("next_id", 6), "have lost their rows|4 trajectories"),
        (row(2, ID, -1), r"live trajectories \[2\] have lost their rows"),
        (row(2, ID, 2 + ROWS), "carry ids"),
        (row(6, ID, 7), r"rows \[6\] carry ids \[7\]"),
        (row(3, LENGTH, 0), r"live trajectories \[3\] have no steps"),
        (row(3, LENGTH, 6), "have 16 steps, counted are 15"),
        (row(3, LONGEST_SEGMENT, 6), "a segment is longer"),
        (row(3, STEPS_BEFORE, 9), "do not grow"),
        (row(3, POLICY_VERSION, 2), "a policy newer than 1"),
        (row(4, POLICY_VERSION, 0), "trajectory 4 was not made with the newest policy version"),
        (row(3, START, 21), "regions overlap"),
        (row(3, START, 88), "are taken, in use are those to"),
        (row(1, START, 12), "can be read where others write"),
        (row(0, LENGTH, 90), "can be read where others write"),
        (slot(0, TICKET, -2), "ticket -2"),
        (slot(0, TICKET, 8), "ticket 8, which was not given out"),
        (slot(0, TICKET, 6), "two writers have one ticket"),
        (slot(0, PID, 0), "process id 0"),
        (slot(0, SLOT_LENGTH, 31), "a region of 31 steps"),
        (slot(0, SLOT_LENGTH, 0), "a region of 0 steps"),
        (slot(0, SLOT_START, 12), "regions overlap"),
        (slot(0, PUBLISHED_AS, 6), "publishes the trajectory 6"),
        (priorities, "a sum of priorities"),
        (maxima, "a sum of priorities, or a maximum"),
        (times, "published before an older one"),
    ],
)
def test_whatever_is_broken_is_seen(break_it: Callable[[Ledger], None], message: str) -> None:
    ledger = make_ledger()
    check_ledger(ledger)
    break_it(ledger)
    with pytest.raises(AssertionError, match=message):
        check_ledger(ledger)


def test_a_ledger_that_was_found_broken_is_not_locked() -> None:
    ledger = make_ledger()
    counter("live_steps", 31)(ledger)
    with pytest.raises(AssertionError):
        check_ledger(ledger)
    ledger.publish(ledger.reserve(5))
