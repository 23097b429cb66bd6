"""check_ledger() reports every violation, and nothing for an intact ledger."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger
from embodichain_rl.replay.ledger.words import (
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
    """Return a ledger with live trajectories 2 to 4, readable retired ones before them, and two writers."""
    ledger = Ledger(3, 30, 90, writer_slots=4)
    for _ in range(5):
        ledger.publish(ledger.reserve(5), 3, policy_version=1)
    ledger.prioritize()
    ledger.reserve(3)
    ledger.reserve(1)
    return ledger


def counter(name: str, value: int) -> Callable[[Ledger], None]:
    def violate(ledger: Ledger) -> None:
        ledger._counters[ledger._active[0] & 1, COUNTERS.index(name)] = value

    return violate


def row(number: int, column: int, value: int) -> Callable[[Ledger], None]:
    def violate(ledger: Ledger) -> None:
        ledger._rows[number, column] = value

    return violate


def slot(number: int, column: int, value: int) -> Callable[[Ledger], None]:
    def violate(ledger: Ledger) -> None:
        ledger._slots[number, column] = value

    return violate


def priorities(ledger: Ledger) -> None:
    ledger.priorities._nodes[1] += 1.0


def maxima(ledger: Ledger) -> None:
    ledger.priorities._maxima[1] += 1.0


def times(ledger: Ledger) -> None:
    ledger._published_at[3] = 0


@pytest.mark.parametrize(
    ("violate", "message"),
    [
        (counter("oldest_id", -1), r"the live ids are \[-1, 5\)"),
        (counter("oldest_id", 6), r"the live ids are \[6, 5\)"),
        (counter("oldest_id", 1), r"3 trajectories are live, their ids are \[1, 5\)"),
        (counter("live", 4), "4 trajectories are live, at most 3"),
        (counter("live_steps", 31), "31 steps are live, at most 30"),
        (counter("live_steps", 16), "have 15 steps, the counter is 16"),
        (counter("gap_start", -1), r"the gap \[-1, 30\)"),
        (counter("gap_start", 31), r"the gap \[31, 30\)"),
        (counter("gap_end", 91), r"the gap \[\d+, 91\) is not below"),
        (counter("high_water", 91), "mark is 91, the arena has 90 steps"),
        (counter("high_water", 29), "mark is 29"),
        (counter("evicted_early", 3), "3 trajectories were evicted early, 2 were evicted"),
        (counter("reclaimed", -1), "a counter is negative"),
        (counter("steps_published", 26), "do not grow by the lengths"),
        (counter("newest_version", 0), "above the newest, 0"),
        (counter("newest_version", 2), "no live trajectory has the newest policy version 2"),
        (counter("newest_version_id", 1), "trajectory 1, recorded as of the newest policy version, is not live"),
        (counter("newest_version_id", 5), "trajectory 5, recorded as of the newest policy version, is not live"),
        (counter("next_id", 6), r"their ids are \[2, 6\)"),
        (row(2, ID, -1), r"live trajectories \[2\] have no rows"),
        (row(2, ID, 2 + ROWS), "carry ids"),
        (row(6, ID, 7), r"rows \[6\] carry ids \[7\]"),
        (row(3, LENGTH, 0), r"live trajectories \[3\] have no steps"),
        (row(3, LENGTH, 6), "have 16 steps, the counter is 15"),
        (row(3, LONGEST_SEGMENT, 6), "a segment is longer"),
        (row(3, STEPS_BEFORE, 9), "do not grow"),
        (row(3, POLICY_VERSION, 2), "above the newest, 1"),
        (row(4, POLICY_VERSION, 0), "trajectory 4 does not have the newest policy version"),
        (row(3, START, 21), "regions overlap"),
        (row(3, START, 88), "regions cover steps"),
        (row(1, START, 12), "can be read and overwritten"),
        (row(0, LENGTH, 90), "can be read and overwritten"),
        (slot(0, TICKET, -2), "ticket -2"),
        (slot(0, TICKET, 8), "ticket 8, which was never assigned"),
        (slot(0, TICKET, 6), "two slots have the same ticket"),
        (slot(0, PID, 0), "process id 0"),
        (slot(0, SLOT_LENGTH, 31), "a region of 31 steps"),
        (slot(0, SLOT_LENGTH, 0), "a region of 0 steps"),
        (slot(0, SLOT_START, 12), "regions overlap"),
        (slot(0, PUBLISHED_AS, 6), "publishes the id 6"),
        (priorities, "inner node of a priority tree"),
        (maxima, "inner node of a priority tree"),
        (times, "published before an older one"),
    ],
)
def test_every_violation_is_reported(violate: Callable[[Ledger], None], message: str) -> None:
    ledger = make_ledger()
    check_ledger(ledger)
    violate(ledger)
    with pytest.raises(AssertionError, match=message):
        check_ledger(ledger)


def test_the_lock_is_free_after_a_violation_was_found() -> None:
    ledger = make_ledger()
    counter("live_steps", 31)(ledger)
    with pytest.raises(AssertionError):
        check_ledger(ledger)
    ledger.publish(ledger.reserve(5))
