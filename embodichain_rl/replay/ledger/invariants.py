"""Check the invariants of a ledger. They hold at every moment, even if writers are killed at any instruction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from embodichain_rl.replay.ledger.ledger import Ledger
from embodichain_rl.replay.ledger.table import (
    ID,
    LENGTH,
    LONGEST_SEGMENT,
    NO_VERSION,
    PID,
    POLICY_VERSION,
    PUBLISHED_AS,
    SLOT_LENGTH,
    SLOT_START,
    START,
    STEPS_BEFORE,
    TICKET,
    Counters,
)

__all__ = ["check_ledger"]


def check_ledger(ledger: Ledger) -> None:
    """Check the invariants of a ledger inside its lock. Other processes may use the ledger meanwhile.

    * The counters are within their limits and agree with the rows.
    * Every live id has its row, and the values in the row are plausible.
    * A row carries only an id that belongs to it and was assigned.
    * A writer slot in use holds an assigned ticket, a process id and a length within the limits.
    * The regions of live trajectories, the regions being written and the free gap lie below the high-water mark, and do
      not overlap.
    * A reader may still copy a retired trajectory whose row carries its id. Its region overlaps none of these.
    * Every inner node of the priority trees is the sum, or the maximum, of its children.

    Raises:
        AssertionError: if an invariant is violated; the message lists all violations.

    Example:
        >>> ledger = Ledger(max_trajectories=2, max_total_steps=20, arena_steps=60)
        >>> region = ledger.reserve(7)
        >>> check_ledger(ledger)
    """
    with ledger.frozen():
        counters = ledger._read_counters()
        violations = [*_check_counters(ledger, counters), *_check_slots(ledger, counters)]
        if not violations:  # the rows are found by the counters
            violations = [*_check_rows(ledger, counters), *_check_regions(ledger, counters)]
        if not ledger.priorities.is_consistent():
            violations.append("an inner node of a priority tree does not follow from its children")
    if violations:
        raise AssertionError(f"The ledger is inconsistent: {'; '.join(violations)}. Its counters are {counters}.")


def _check_counters(ledger: Ledger, counters: Counters) -> Iterator[str]:
    if ledger._active[0] < 0:
        yield f"active is {ledger._active[0]}"
    if not 0 <= counters.oldest_id <= counters.next_id:
        yield f"the live ids are [{counters.oldest_id}, {counters.next_id})"
    if counters.next_id - counters.oldest_id > ledger.max_trajectories:
        yield f"{counters.next_id - counters.oldest_id} trajectories are live, at most {ledger.max_trajectories} may be"
    if not 0 <= counters.live_steps <= ledger.max_total_steps:
        yield f"{counters.live_steps} steps are live, at most {ledger.max_total_steps} may be"
    if not 0 <= counters.gap_start <= counters.gap_end <= counters.high_water:
        gap = f"[{counters.gap_start}, {counters.gap_end})"
        yield f"the gap {gap} is not below the high-water mark {counters.high_water}"
    if not ledger.max_total_steps <= counters.high_water <= ledger.arena_steps:
        yield f"the high-water mark is {counters.high_water}, the arena has {ledger.arena_steps} steps"
    if counters.evicted_early > counters.oldest_id:
        yield f"{counters.evicted_early} trajectories were evicted early, {counters.oldest_id} were evicted in all"
    if counters.next_id > counters.oldest_id and not (
        counters.oldest_id <= counters.newest_version_id < counters.next_id
    ):
        yield f"trajectory {counters.newest_version_id}, recorded as of the newest policy version, is not live"
    if min(counters.next_ticket, counters.steps_written, counters.steps_published, counters.reclaimed) < 0:
        yield "a counter is negative"


def _check_slots(ledger: Ledger, counters: Counters) -> Iterator[str]:
    for slot in ledger._slots[ledger._slots[:, TICKET] != -1]:
        if not 0 <= slot[TICKET] <= counters.next_ticket:
            yield f"a slot has the ticket {slot[TICKET]}, which was never assigned"
        if not 1 <= slot[SLOT_LENGTH] <= ledger.max_total_steps:
            yield f"a slot has a region of {slot[SLOT_LENGTH]} steps"
        if slot[PID] < 1:
            yield f"a slot has the process id {slot[PID]}"
        if not -1 <= slot[PUBLISHED_AS] <= counters.next_id:
            yield f"a slot publishes the id {slot[PUBLISHED_AS]}, which is not the next id"
    tickets = _slots_being_written(ledger, counters)[:, TICKET]
    if len(np.unique(tickets)) < len(tickets):
        yield f"two slots have the same ticket, of {tickets}"


def _check_rows(ledger: Ledger, counters: Counters) -> Iterator[str]:
    rows = ledger._rows
    held = rows[:, ID] != -1
    # A writer that is killed before the commit of its publication leaves the next id in its row.
    belongs = (rows[:, ID] % ledger.num_rows == np.arange(ledger.num_rows)) & (rows[:, ID] <= counters.next_id)
    if (held & ~belongs).any():
        yield f"rows {np.flatnonzero(held & ~belongs)} carry ids {rows[held & ~belongs, ID]}"
    ids = np.arange(counters.oldest_id, counters.next_id)
    live = rows[ids % ledger.num_rows]
    if (live[:, ID] != ids).any():
        yield f"live trajectories {ids[live[:, ID] != ids]} have no rows"
    if (live[:, LENGTH] < 1).any():
        yield f"live trajectories {ids[live[:, LENGTH] < 1]} have no steps"
    if live[:, LENGTH].sum() != counters.live_steps:
        yield f"live trajectories have {live[:, LENGTH].sum()} steps, the counter is {counters.live_steps}"
    if ((live[:, LONGEST_SEGMENT] < 0) | (live[:, LONGEST_SEGMENT] > live[:, LENGTH])).any():
        yield "a segment is longer than its trajectory"
    before = np.append(live[:, STEPS_BEFORE], counters.steps_published)
    if len(ids) and (np.diff(before) != live[:, LENGTH]).any():
        yield f"the steps before each live trajectory, {before}, do not grow by the lengths"
    newest = live[:, POLICY_VERSION].max(initial=NO_VERSION)
    if newest > counters.newest_version:
        yield f"a trajectory has a policy version above the newest, {counters.newest_version}"
    if newest < counters.newest_version:
        yield f"no live trajectory has the newest policy version {counters.newest_version}"
    if len(ids) and live[counters.newest_version_id - counters.oldest_id, POLICY_VERSION] != counters.newest_version:
        yield f"trajectory {counters.newest_version_id} does not have the newest policy version"
    if (np.diff(ledger._published_at[ids % ledger.num_rows]) < 0).any():
        yield "a trajectory was published before an older one"


def _check_regions(ledger: Ledger, counters: Counters) -> Iterator[str]:
    rows = ledger._rows
    is_live = (rows[:, ID] >= counters.oldest_id) & (rows[:, ID] < counters.next_id)
    readable = rows[(rows[:, ID] >= 0) & (rows[:, ID] < counters.oldest_id)][:, [START, LENGTH]]
    writing = _slots_being_written(ledger, counters)[:, [SLOT_START, SLOT_LENGTH]]
    live = rows[is_live][:, [START, LENGTH]]
    for regions in (readable, writing, live):  # all three are copies, so the ledger does not change
        regions[:, 1] += ledger.margin
    gap = np.array([[counters.gap_start, counters.gap_end - counters.gap_start]])
    starts, lengths = np.concatenate([live, writing, gap]).T
    order = np.argsort(starts[lengths > 0], kind="stable")
    starts, ends = starts[lengths > 0][order], (starts + lengths)[lengths > 0][order]
    if (starts < 0).any() or (ends > counters.high_water).any():
        yield f"regions cover steps [{starts.min()}, {ends.max()}), the high-water mark is {counters.high_water}"
    if (starts[1:] < ends[:-1]).any():
        yield f"regions overlap at steps {starts[1:][starts[1:] < ends[:-1]]}"
        return
    # A retired region overlaps none of the sorted ones if the first that ends after its start begins at or after its
    # end.
    nearest = np.searchsorted(ends, readable[:, 0], side="right")
    overlaps = np.append(starts, ledger.arena_steps)[nearest] < readable.sum(axis=1)
    if overlaps.any():
        yield f"retired trajectories at steps {readable[overlaps, 0]} can be read and overwritten at the same time"


def _slots_being_written(ledger: Ledger, counters: Counters) -> np.ndarray:
    """Return the slots that hold a region, without those of a killed process whose change was never committed."""
    slots = ledger._slots
    return slots[(slots[:, TICKET] >= 0) & (slots[:, TICKET] < counters.next_ticket) & (slots[:, PUBLISHED_AS] < 0)]
