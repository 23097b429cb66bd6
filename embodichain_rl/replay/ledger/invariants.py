"""Check the invariants of a ledger. They hold at every moment, even if writers are killed at any instruction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from embodichain_rl.replay.ledger.ledger import Ledger
from embodichain_rl.replay.ledger.relabels import COMPLETE, STATE
from embodichain_rl.replay.ledger.words import (
    CHANGES,
    ID,
    IN_PIECES,
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
    * The pinned ids, the holes and the stragglers are ascending. Pinned trajectories are live and within their limits.
    * No change of a trajectory is half made, unless the journal has the bytes that complete it.
    * Every inner node of the priority trees is the sum, or the maximum, of its children.

    Raises:
        AssertionError: if an invariant is violated; the message lists all violations.

    Example:
        >>> ledger = Ledger(max_trajectories=2, max_total_steps=20, arena_steps=60)
        >>> region = ledger.reserve(7)
        >>> check_ledger(ledger)
    """
    with ledger._lock:
        counters = ledger._read_counters()
        violations = [*_check_counters(ledger, counters), *_check_slots(ledger, counters)]
        if not violations:  # the rows are found by the counters and the lists
            violations = [*_check_lists(ledger, counters)]
        if not violations:
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
    if counters.live > ledger.max_trajectories:
        yield f"{counters.live} trajectories are live, at most {ledger.max_trajectories} may be"
    if not counters.lists and counters.live != counters.next_id - counters.oldest_id:
        yield f"{counters.live} trajectories are live, their ids are [{counters.oldest_id}, {counters.next_id})"
    if not 0 <= counters.live_steps <= ledger.max_total_steps:
        yield f"{counters.live_steps} steps are live, at most {ledger.max_total_steps} may be"
    if not 0 <= counters.gap_start <= counters.gap_end <= counters.high_water:
        gap = f"[{counters.gap_start}, {counters.gap_end})"
        yield f"the gap {gap} is not below the high-water mark {counters.high_water}"
    if not ledger.max_total_steps <= counters.high_water <= ledger.arena_steps:
        yield f"the high-water mark is {counters.high_water}, the arena has {ledger.arena_steps} steps"
    if counters.evicted_early > counters.oldest_id:
        yield f"{counters.evicted_early} trajectories were evicted early, {counters.oldest_id} were evicted in all"
    if counters.live and not ledger._live_of(counters).contains(np.array([counters.newest_version_id])).all():
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
        if not IN_PIECES <= slot[PUBLISHED_AS] <= counters.next_id + bool(counters.lists) * ledger.num_rows:
            yield f"a slot publishes the id {slot[PUBLISHED_AS]}, which is not the next id"
    tickets = _slots_being_written(ledger, counters)[:, TICKET]
    if len(np.unique(tickets)) < len(tickets):
        yield f"two slots have the same ticket, of {tickets}"


def _check_lists(ledger: Ledger, counters: Counters) -> Iterator[str]:
    lengths = counters.pinned, counters.holes, counters.stragglers
    if min(lengths) < 0 or max(lengths) > ledger.num_rows or not 0 <= counters.first_straggler <= lengths[2]:
        yield f"the lists have {lengths} entries, the first straggler is number {counters.first_straggler}"
        return
    pinned, holes, stragglers = ledger._lists_of(counters)
    live = ledger._live_of(counters)
    if any((np.diff(ids) <= 0).any() for ids in (pinned, holes, stragglers)):
        yield f"the pinned ids {pinned}, the holes {holes} or the stragglers {stragglers} are not ascending"
    if (stragglers >= counters.oldest_id).any() or np.isin(stragglers, pinned).any():
        yield f"the stragglers {stragglers} are of the range, or pinned"
    if not live.contains(pinned).all():
        yield f"of the pinned trajectories {pinned} some are not live"
    if len(live) != counters.live:
        yield f"{len(live)} ids are live, the counter is {counters.live}"
    steps = ledger._rows[pinned % ledger.num_rows, LENGTH].sum()
    if steps != counters.pinned_steps:
        yield f"pinned trajectories have {steps} steps, the counter is {counters.pinned_steps}"
    if len(pinned) > ledger.pin_limits[0] or counters.pinned_steps > ledger.pin_limits[1]:
        yield f"{len(pinned)} trajectories of {counters.pinned_steps} steps are pinned, at most {ledger.pin_limits}"
    changing = np.flatnonzero((ledger._rows[:, CHANGES] & 1) & (ledger._rows[:, ID] >= 0))
    if len(changing) and (ledger._journal[STATE] != COMPLETE or ledger._rows[changing, ID] != ledger._journal[1]).any():
        yield f"the rows {changing} are being changed, the journal is {ledger._journal}"


def _check_rows(ledger: Ledger, counters: Counters) -> Iterator[str]:
    rows = ledger._rows
    held = rows[:, ID] != -1
    # A writer that is killed before the commit of its publication leaves the next id in its row.
    # It is a later one if it has skipped some.
    most = max([counters.next_id, *ledger._slots[ledger._slots[:, TICKET] >= 0, PUBLISHED_AS]])
    belongs = (rows[:, ID] % ledger.num_rows == np.arange(ledger.num_rows)) & (rows[:, ID] <= most)
    if (held & ~belongs).any():
        yield f"rows {np.flatnonzero(held & ~belongs)} carry ids {rows[held & ~belongs, ID]}"
    ids = ledger._live_of(counters).all()
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
    if len(ids) and (np.diff(before) < live[:, LENGTH]).any():
        yield f"the steps before each live trajectory, {before}, do not grow"
    if len(ids) and not counters.lists and (np.diff(before) != live[:, LENGTH]).any():
        yield f"the steps before each live trajectory, {before}, do not grow by the lengths"
    newest = live[:, POLICY_VERSION].max(initial=NO_VERSION)
    if newest > counters.newest_version:
        yield f"a trajectory has a policy version above the newest, {counters.newest_version}"
    if newest < counters.newest_version:
        yield f"no live trajectory has the newest policy version {counters.newest_version}"
    if len(ids) and (live[ids == counters.newest_version_id, POLICY_VERSION] != counters.newest_version).any():
        yield f"trajectory {counters.newest_version_id} does not have the newest policy version"
    if (np.diff(ledger._published_at[ids % ledger.num_rows]) < 0).any():
        yield "a trajectory was published before an older one"


def _check_regions(ledger: Ledger, counters: Counters) -> Iterator[str]:
    rows = ledger._rows
    is_live = ledger._live_of(counters).contains(rows[:, ID])
    rooms = ledger._rooms if ledger.rooms_vary else rows[:, LENGTH] + ledger.margin
    regions = np.stack([rows[:, START], rooms], axis=1)
    readable = regions[(rows[:, ID] >= 0) & (rows[:, ID] < counters.next_id) & ~is_live]
    writing = _regions_being_written(ledger, counters)
    live = regions[is_live]
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
    return ledger._slots[_are_being_written(ledger, counters)]


def _regions_being_written(ledger: Ledger, counters: Counters) -> np.ndarray:
    """Return the first step and the size of the regions of these slots, ``int64`` ``[n, 2]``."""
    which = _are_being_written(ledger, counters)
    return np.stack([ledger._slots[which, SLOT_START], ledger._slot_rooms[which]], axis=1)


def _are_being_written(ledger: Ledger, counters: Counters) -> np.ndarray:
    slots = ledger._slots
    return (slots[:, TICKET] >= 0) & (slots[:, TICKET] < counters.next_ticket) & (slots[:, PUBLISHED_AS] < 0)
