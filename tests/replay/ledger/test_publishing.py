"""Several trajectories that are published together: the ledger is as if they had been published one after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from embodichain_rl.errors import SharingError
from embodichain_rl.replay.ledger import Ledger
from embodichain_rl.replay.ledger.invariants import check_ledger

VERSIONS = st.integers(-1, 5)


def make_ledger(*, margin: int = 0) -> Ledger:
    return Ledger(8, 60, 400, margin=margin)


def together(ledger: Ledger, lengths: list[int], versions: list[int]) -> list[int]:
    sizes = np.array(lengths)
    rooms = sizes + ledger.margin
    region = ledger.reserve(int(rooms.sum()) - ledger.margin)
    starts = region.start + np.cumsum(rooms) - rooms
    ids = ledger.publish_together(region, starts, sizes, sizes // 2 + 1, policy_versions=np.array(versions))
    return ids.tolist()


def one_by_one(ledger: Ledger, lengths: list[int], versions: list[int]) -> list[int]:
    return [
        ledger.publish(ledger.reserve(length), length // 2 + 1, policy_version=version)
        for length, version in zip(lengths, versions, strict=True)
    ]


def state(ledger: Ledger) -> dict[str, object]:
    rows = ledger.live_rows()
    kept = {name: getattr(rows, name).tolist() for name in ("ids", "lengths", "longest_segments", "policy_versions")}
    counts = {name: ledger.stats()[name] for name in ("trajectories", "steps", "published", "evicted", "writing")}
    before = ledger.steps_before(rows.ids).tolist()
    return {**kept, **counts, "newest": ledger.newest_policy_version, "steps_before": before}


CALLS = st.lists(st.lists(st.tuples(st.integers(1, 9), VERSIONS), min_size=1, max_size=6), min_size=1, max_size=8)


@settings(max_examples=60)
@given(calls=CALLS, margin=st.integers(0, 1), pinned=st.sets(st.integers(0, 5), max_size=3), priorities=st.booleans())
def test_equals_one_after_the_other(
    calls: list[list[tuple[int, int]]], margin: int, pinned: set[int], priorities: bool
) -> None:
    ledgers = make_ledger(margin=margin), make_ledger(margin=margin)
    for number, call in enumerate(calls):
        lengths, versions = [length for length, _ in call], [version for _, version in call]
        rows = ledgers[0].live_rows()
        pinned_steps = rows.lengths[np.isin(rows.ids, ledgers[0].pinned_ids())].sum()
        together_steps = sum(lengths) + margin * (len(lengths) - 1)
        assume(together_steps <= 60 - pinned_steps)  # they are reserved at once, beside what is pinned
        assert together(ledgers[0], lengths, versions) == one_by_one(ledgers[1], lengths, versions)
        assert state(ledgers[0]) == state(ledgers[1])
        check_ledger(ledgers[0])
        if number == 1:
            for ledger in ledgers:
                ledger.pin(
                    np.array([i for i in sorted(pinned) if ledger.live().contains(np.array([i])).all()], dtype=int)
                )
                if priorities:
                    ledger.prioritize()
    rows = ledgers[0].live_rows()
    ends = np.sort(rows.starts) + (rows.lengths + margin)[rows.starts.argsort()]
    assert (np.sort(rows.starts)[1:] >= ends[:-1]).all()


def test_rows_are_filled_before_they_are_live() -> None:
    ledger = make_ledger()
    region, seen = ledger.reserve(6), []

    def fill(row: int, number: int) -> None:
        seen.append((row, number, ledger.ids_at(np.array([row])).tolist(), len(ledger)))

    sizes = np.array([3, 2, 1])
    ledger.publish_together(
        region, region.start + np.array([0, 3, 5]), sizes, sizes, policy_versions=np.zeros(3, dtype=int), fill=fill
    )
    assert seen == [(0, 0, [-1], 0), (1, 1, [-1], 0), (2, 2, [-1], 0)]
    assert len(ledger) == 3


def test_a_reclaimed_region_is_refused() -> None:
    ledger = make_ledger()
    region, sizes = ledger.reserve(4), np.array([2, 2])
    ledger.give_back(region)
    with pytest.raises(SharingError, match="was reclaimed"):
        ledger.publish_together(region, region.start + np.array([0, 2]), sizes, sizes, policy_versions=sizes)
