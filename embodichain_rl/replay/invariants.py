"""What always holds of a ledger, whoever was killed at whatever instruction, as one function."""

from __future__ import annotations

import numpy as np

from embodichain_rl.replay.ledger import ID, LENGTH, PUBLISHED_AS, SLOT_LENGTH, SLOT_START, START, TICKET, Ledger

__all__ = ["check_ledger"]


def check_ledger(ledger: Ledger) -> None:
    """Holds a ledger against its invariants, inside its lock.

    * The limits hold, and the counters agree with the rows.
    * What is live lies in the part of the arena that is in use, and its rows say so.
    * The regions of what is live, of what is being written and of the free window do not overlap.
    * Where there are priorities, each sum of them is that of its two parts.
    * What a reader may still be copying, a retired trajectory whose row still carries its id, does not overlap with
      what is being written or handed out next.

    Raises:
        AssertionError: with what does not hold.
    """
    with ledger.frozen():
        counters = ledger._read()
        rows = ledger._rows.copy()
        live_ids = np.arange(counters.oldest_id, counters.next_id)
        live = rows[live_ids % ledger.num_rows]

        assert 0 <= counters.oldest_id <= counters.next_id, counters
        assert len(live) <= ledger.max_trajectories, f"{len(live)} live trajectories"
        assert counters.live_steps == live[:, LENGTH].sum() <= ledger.max_total_steps, counters
        assert (live[:, ID] == live_ids).all(), "a live trajectory has lost its row"
        assert (live[:, LENGTH] >= 1).all(), "a live trajectory has no steps"
        assert 0 <= counters.window <= counters.window_end <= counters.high_water <= ledger.arena_steps, counters

        slots = ledger._slots
        in_use = (slots[:, TICKET] >= 0) & (slots[:, TICKET] < counters.next_ticket) & (slots[:, PUBLISHED_AS] < 0)
        tickets = slots[in_use, TICKET].tolist()
        assert len(set(tickets)) == len(tickets), "two writers have one reservation"
        writing = slots[in_use][:, [TICKET, SLOT_START, SLOT_LENGTH]]
        for regions in (rows, live, writing):
            regions[:, LENGTH] += ledger.margin

        window = np.array([[-1, counters.window, counters.window_end - counters.window]])
        not_to_touch = np.concatenate([live[:, [ID, START, LENGTH]], writing, window])
        assert _overlaps(not_to_touch) == 0, "regions overlap"
        assert (not_to_touch[:, START] + not_to_touch[:, LENGTH] <= counters.high_water).all(), "beyond the high water"

        assert ledger.priorities.sums_hold(), "a sum of priorities is not that of its parts"

        for row in rows[(rows[:, ID] >= 0) & (rows[:, ID] < counters.oldest_id)]:
            for other in (*writing, *window):
                apart = row[START] + row[LENGTH] <= other[START] or other[START] + other[LENGTH] <= row[START]
                assert apart, f"trajectory {row[ID]} can be read where others write"


def _overlaps(rows: np.ndarray) -> int:
    rows = rows[rows[:, LENGTH] > 0]
    rows = rows[np.argsort(rows[:, START], kind="stable")]
    return int((rows[1:, START] < rows[:-1, START] + rows[:-1, LENGTH]).sum())
