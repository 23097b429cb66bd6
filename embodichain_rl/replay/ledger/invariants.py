"""What always holds of a ledger, whoever was killed at whatever instruction, as one function."""

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
    """Holds a ledger against its invariants, inside its lock; others may read and write it meanwhile.

    * Counters are within their limits, and agree with the rows.
    * The ids of what is live follow each other, and each has its row, whose numbers are those of a trajectory.
    * A row carries only an id that belongs to it and was given out.
    * A writer's slot says a reservation that was given out, to a process, of a length that fits.
    * The regions of what is live, of what is being written and of the free window lie in the part of the arena that is
      in use, and do not overlap.
    * What a reader may still be copying, a retired trajectory whose row still carries its id, does not overlap with
      any of these.
    * Where there are priorities, each sum and each maximum of them follows from its two children.

    Raises:
        AssertionError: with all that does not hold.

    Example:
        >>> ledger = Ledger(max_trajectories=2, max_total_steps=20, arena_steps=60)
        >>> region = ledger.reserve(7)
        >>> check_ledger(ledger)
    """
    with ledger.frozen():
        counters = ledger._read()
        broken = [*_of_counters(ledger, counters), *_of_slots(ledger, counters)]
        if not broken:  # else the rows can't be found
            broken = [*_of_rows(ledger, counters), *_of_regions(ledger, counters)]
        if not ledger.priorities.is_consistent():
            broken.append("a sum of priorities, or a maximum, does not follow from its two children")
    if broken:
        raise AssertionError(f"The ledger is broken: {'; '.join(broken)}. It says {counters}.")


def _of_counters(ledger: Ledger, counters: Counters) -> Iterator[str]:
    if ledger._active[0] < 0:
        yield f"{ledger._active[0]} changes were made"
    if not 0 <= counters.oldest_id <= counters.next_id:
        yield f"ids from {counters.oldest_id} to {counters.next_id} are live"
    if counters.next_id - counters.oldest_id > ledger.max_trajectories:
        yield f"{counters.next_id - counters.oldest_id} trajectories are live of {ledger.max_trajectories} at most"
    if not 0 <= counters.live_steps <= ledger.max_total_steps:
        yield f"{counters.live_steps} steps are live of {ledger.max_total_steps} at most"
    if not 0 <= counters.window <= counters.window_end <= counters.high_water:
        yield f"the window [{counters.window}, {counters.window_end}) is not in use up to {counters.high_water}"
    if not ledger.max_total_steps <= counters.high_water <= ledger.arena_steps:
        yield f"{counters.high_water} steps are in use of {ledger.arena_steps}"
    if counters.evicted_early > counters.oldest_id:
        yield f"{counters.evicted_early} trajectories were evicted early of {counters.oldest_id} in all"
    if counters.next_id > counters.oldest_id and not (
        counters.oldest_id <= counters.newest_version_id < counters.next_id
    ):
        yield f"trajectory {counters.newest_version_id}, said to be of the newest policy version, is not live"
    if min(counters.next_ticket, counters.steps_written, counters.steps_published, counters.reclaimed) < 0:
        yield "something was counted less than 0 times"


def _of_slots(ledger: Ledger, counters: Counters) -> Iterator[str]:
    for slot in ledger._slots[ledger._slots[:, TICKET] != -1]:
        if not 0 <= slot[TICKET] <= counters.next_ticket:
            yield f"a writer has the ticket {slot[TICKET]}, which was not given out"
        if not 1 <= slot[SLOT_LENGTH] <= ledger.max_total_steps:
            yield f"a writer has a region of {slot[SLOT_LENGTH]} steps"
        if slot[PID] < 1:
            yield f"a writer has the process id {slot[PID]}"
        if not -1 <= slot[PUBLISHED_AS] <= counters.next_id:
            yield f"a writer publishes the trajectory {slot[PUBLISHED_AS]}, which is not the next"
    tickets = _writing(ledger, counters)[:, TICKET]
    if len(np.unique(tickets)) < len(tickets):
        yield f"two writers have one ticket of {tickets}"


def _of_rows(ledger: Ledger, counters: Counters) -> Iterator[str]:
    rows = ledger._rows
    held = rows[:, ID] != -1
    # A writer that was killed before its publication took effect leaves the next id in the row of that.
    belongs = (rows[:, ID] % ledger.num_rows == np.arange(ledger.num_rows)) & (rows[:, ID] <= counters.next_id)
    if (held & ~belongs).any():
        yield f"rows {np.flatnonzero(held & ~belongs)} carry ids {rows[held & ~belongs, ID]}"
    ids = np.arange(counters.oldest_id, counters.next_id)
    live = rows[ids % ledger.num_rows]
    if (live[:, ID] != ids).any():
        yield f"live trajectories {ids[live[:, ID] != ids]} have lost their rows"
    if (live[:, LENGTH] < 1).any():
        yield f"live trajectories {ids[live[:, LENGTH] < 1]} have no steps"
    if live[:, LENGTH].sum() != counters.live_steps:
        yield f"live trajectories have {live[:, LENGTH].sum()} steps, counted are {counters.live_steps}"
    if ((live[:, LONGEST_SEGMENT] < 0) | (live[:, LONGEST_SEGMENT] > live[:, LENGTH])).any():
        yield "a segment is longer than its trajectory"
    before = np.append(live[:, STEPS_BEFORE], counters.steps_published)
    if len(ids) and (np.diff(before) != live[:, LENGTH]).any():
        yield f"steps before each live trajectory, {before}, do not grow by their lengths"
    newest = live[:, POLICY_VERSION].max(initial=NO_VERSION)
    if newest > counters.newest_version:
        yield f"a trajectory was made with a policy newer than {counters.newest_version}"
    if newest < counters.newest_version:
        yield f"no live trajectory was made with the newest policy version {counters.newest_version}"
    if len(ids) and live[counters.newest_version_id - counters.oldest_id, POLICY_VERSION] != counters.newest_version:
        yield f"trajectory {counters.newest_version_id} was not made with the newest policy version"
    if (np.diff(ledger._published_at[ids % ledger.num_rows]) < 0).any():
        yield "a trajectory was published before an older one"


def _of_regions(ledger: Ledger, counters: Counters) -> Iterator[str]:
    rows = ledger._rows
    is_live = (rows[:, ID] >= counters.oldest_id) & (rows[:, ID] < counters.next_id)
    readable = rows[(rows[:, ID] >= 0) & (rows[:, ID] < counters.oldest_id)][:, [START, LENGTH]]
    writing = _writing(ledger, counters)[:, [SLOT_START, SLOT_LENGTH]]
    live = rows[is_live][:, [START, LENGTH]]
    for regions in (readable, writing, live):  # copies, all three
        regions[:, 1] += ledger.margin
    window = np.array([[counters.window, counters.window_end - counters.window]])
    starts, lengths = np.concatenate([live, writing, window]).T
    order = np.argsort(starts[lengths > 0], kind="stable")
    starts, ends = starts[lengths > 0][order], (starts + lengths)[lengths > 0][order]
    if (starts < 0).any() or (ends > counters.high_water).any():
        yield f"steps [{starts.min()}, {ends.max()}) are taken, in use are those to {counters.high_water}"
    if (starts[1:] < ends[:-1]).any():
        yield f"regions overlap at steps {starts[1:][starts[1:] < ends[:-1]]}"
        return
    # Of the regions in order, the first that ends behind the start of a retired one must begin behind its end.
    nearest = np.searchsorted(ends, readable[:, 0], side="right")
    overlaps = np.append(starts, ledger.arena_steps)[nearest] < readable.sum(axis=1)
    if overlaps.any():
        yield f"retired trajectories at steps {readable[overlaps, 0]} can be read where others write"


def _writing(ledger: Ledger, counters: Counters) -> np.ndarray:
    """The slots of those who hold a region, without what a killed process left of a change that took no effect."""
    slots = ledger._slots
    return slots[(slots[:, TICKET] >= 0) & (slots[:, TICKET] < counters.next_ticket) & (slots[:, PUBLISHED_AS] < 0)]
