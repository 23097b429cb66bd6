"""Where regions are taken, and which trajectories must go for them."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest

from embodichain_rl.errors import PinLimitError
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger

Region = tuple[int, int]


def regions_of(ledger: Ledger) -> dict[int, Region]:
    """Return the first step and the end of the region of each live trajectory, by its id."""
    rows = ledger.live_rows()
    ends = rows.starts + rows.lengths + ledger.margin
    return dict(zip(rows.ids.tolist(), zip(rows.starts.tolist(), ends.tolist(), strict=True), strict=True))


def widest_gap(regions: list[Region], end: int) -> int:
    """Return the largest number of consecutive steps below ``end`` that are in none of the regions."""
    starts, ends = zip(*sorted(regions), strict=True) if regions else ((), ())
    return max(start - before for before, start in zip((0, *ends), (*starts, end), strict=True))


@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize("keep", [False, True], ids=["", "pins and discards"])
def test_as_few_as_possible_of_the_oldest_go_before_a_trajectory_is_written(margin: int, keep: bool) -> None:
    """All of the arena is used: so what goes early only depends on where the live trajectories lie."""
    ledger = Ledger(60, 600, 680, margin=margin, writer_slots=2, max_pinned=0.1)
    rng = np.random.default_rng(margin)
    went = collections.Counter[int]()
    for turn in range(600):
        length = int(math.exp(rng.uniform(0.0, math.log(300))))
        before, pinned, early = regions_of(ledger), ledger.current_lists()[1].pinned, ledger.stats()["evicted_early"]
        steps = ledger.num_steps
        try:
            region = ledger.reserve(length)
        except PinLimitError:
            continue
        gone = [number for number in before if number not in regions_of(ledger)]
        oldest = [number for number in before if number not in pinned]
        assert gone == oldest[: len(gone)]
        went[len(gone)] += 1
        if gone:
            one_less = [before[number] for number in before if number not in gone[:-1]]
            assert widest_gap(one_less, ledger.arena_steps) < length + margin
        due = len(before) == 60 or steps + length > 600
        assert ledger.stats()["evicted_early"] - early <= len(gone)
        assert due or ledger.stats()["evicted_early"] - early == len(gone)
        number = ledger.publish(region)
        if keep and turn % 7 == 0 and length < 20:
            ledger.unpin(pinned[:1])
            ledger.pin(np.array([number]))
        if keep and turn % 11 == 0:
            ledger.discard(ledger.live().all()[3:5])
        if turn % 20 == 0:
            check_ledger(ledger)
    assert went[0] > 300
    assert sum(went[few] for few in (1, 2, 3)) > 20


def test_what_goes_at_the_publication_anyway_does_not_go_early() -> None:
    ledger = Ledger(100, 100, 110)
    for _ in range(3):
        for _ in range(50):
            ledger.publish(ledger.reserve(2))
        ledger.publish(ledger.reserve(100))  # takes the place of all others
        assert len(ledger) == 1
    check_ledger(ledger)
    assert ledger.stats()["evicted_early"] == 0


def test_what_goes_within_the_limits_is_counted() -> None:
    ledger = Ledger(100, 100, 110)
    for length in (5, 60, 5, 25, 5):
        ledger.publish(ledger.reserve(length))
    ledger.discard(np.array([1, 3]))
    ledger.publish(ledger.reserve(62))  # the gaps have 60, 25 and 10 steps
    assert ledger.live().all().tolist() == [2, 4, 5]
    assert ledger.stats()["evicted_early"] == 1
    check_ledger(ledger)
