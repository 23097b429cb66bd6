"""Pinned and discarded trajectories in the ledger: over many turns, between any two instructions, and when it dies."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
from instructions import at_every_instruction
from interleavings import History, Reader

from embodichain_rl.errors import PinLimitError, TrajectoryEvictedError
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger


def publish(ledger: Ledger, length: int) -> int:
    return ledger.publish(ledger.reserve(length))


def test_pins_discards_and_publications_in_random_order_over_many_turns_of_the_rows() -> None:
    ledger = Ledger(6, 60, 600, writer_slots=2)  # ten rows
    rng = np.random.default_rng(0)
    live: list[int] = []
    pinned: set[int] = set()
    lengths: dict[int, int] = {}
    for turn in range(1000):
        action = rng.integers(12)
        if action == 0 and live:
            number = int(rng.choice(live))
            if len(pinned | {number}) <= 3 and sum(lengths[n] for n in pinned | {number}) <= 30:
                ledger.pin(np.array([number]))
                pinned.add(number)
            else:
                with pytest.raises(PinLimitError):
                    ledger.pin(np.array([number]))
        elif action == 1 and pinned and rng.integers(3) == 0:
            number = int(rng.choice(sorted(pinned)))
            ledger.unpin(np.array([number]))
            pinned.remove(number)
        elif action == 2 and live:
            number = int(rng.choice(live))
            assert ledger.discard(np.array([number, number])) == 1
            live.remove(number)
            pinned.discard(number)
        else:
            length = int(rng.integers(1, 16))
            number = publish(ledger, length)
            assert not live or number > max(live)
            lengths[number] = length
            live.append(number)
            while len(live) > 6 or sum(lengths[n] for n in live) > 60:
                live.remove(min(set(live) - pinned))
        assert ledger.live().all().tolist() == live
        assert (ledger.rows_of(np.array(live, dtype=np.int64)).lengths >= 1).all()
        if turn % 7 == 0:
            check_ledger(ledger)
    counters = ledger._read_counters()
    assert counters.skipped > 20
    assert counters.evicted_early == 0


def test_a_stream_that_is_discarded_but_for_one_old_trajectory_goes_on() -> None:
    ledger = Ledger(6, 60, 100, writer_slots=2)
    first = publish(ledger, 5)
    for _ in range(200):
        ledger.discard(np.array([publish(ledger, 5)]))
        check_ledger(ledger)
    assert ledger.live().all().tolist() == [first]
    others = [publish(ledger, 5) for _ in range(6)]
    assert ledger.live().all().tolist() == others
    check_ledger(ledger)


def test_what_is_not_live_can_not_be_pinned_and_then_nothing_is() -> None:
    ledger = Ledger(6, 60, 100)
    first = publish(ledger, 20)
    for _ in range(3):
        last = publish(ledger, 20)
    with pytest.raises(TrajectoryEvictedError, match=r"the ids \[0\] to pin"):
        ledger.pin(np.array([first, last]))
    assert not len(ledger.pinned_ids())


def test_what_is_pinned_while_a_trajectory_is_written_leaves_room_for_it() -> None:
    ledger = Ledger(6, 60, 120, max_pinned=1.0)
    first = publish(ledger, 30)
    region = ledger.reserve(40)
    with pytest.raises(PinLimitError, match="being written must fit"):
        ledger.pin(np.array([first]))
    ledger.publish(region)
    check_ledger(ledger)


class Story:
    """A recorded ledger and its arena, with all that was ever live."""

    def __init__(self) -> None:
        self.ledger = Ledger(3, 7, 14, writer_slots=2, max_pinned=0.7)
        self.arena = np.full(14, -1)
        self.numbers = itertools.count(100)
        self.content: dict[int, tuple[int, list[int]]] = {}
        for _ in range(2):
            self.write()
        self.history = History(self.ledger, self.arena)
        self.live_at_some_moment = [self.ledger.live().all().tolist()]

    def write(self) -> None:
        region = self.ledger.reserve(2)
        self.arena[region.start : region.start + 2] = next(self.numbers)
        number = self.ledger._next_id(self.ledger._read_counters())
        self.content[number] = region.start, self.arena[region.start : region.start + 2].tolist()
        assert self.ledger.publish(region) == number

    def record(self, change: tuple[str, int] | None) -> None:
        name, number = change or ("write", 0)
        self.history.record(self.write if change is None else lambda: getattr(self.ledger, name)(np.array([number])))
        self.live_at_some_moment.append(self.ledger.live().all().tolist())
        check_ledger(self.ledger)

    def read(self, reader: Reader) -> str:
        """Read one trajectory as a sampler does."""
        ids = reader.ledger.live().all().tolist()
        assert ids in self.live_at_some_moment
        if not ids:
            return "empty"
        chosen = np.array([reader.choose(ids)])
        rows = reader.ledger.rows_of(chosen)
        if rows.lengths[0] < 0:
            return "gone"
        start = int(rows.starts[0])
        steps = reader.copy(start, int(rows.lengths[0]))
        if not reader.ledger.unchanged(rows)[0]:
            return "torn"
        assert (start, steps) == self.content[int(chosen[0])], "taken for intact, but is not"
        return "whole"


def test_a_reader_in_every_interleaving_with_pins_and_discards() -> None:
    """It draws only what is live at some moment, and what it takes for intact is intact."""
    outcomes: collections.Counter[str] = collections.Counter()
    for first, second in ((("pin", 0), ("discard", 1)), (("pin", 1), ("unpin", 1)), (("discard", 0), ("pin", 2))):
        story = Story()
        for change in (first, None, second, None, None):
            story.record(change)
        outcomes.update(Reader(story.ledger, story.history).executions_of(story.read))
    assert min(outcomes[outcome] for outcome in ("whole", "torn", "gone")) > 20, outcomes


def test_a_reader_between_any_two_instructions_of_a_relabelling_sees_the_old_values_or_the_new() -> None:
    ledger = Ledger(3, 20, 60, writer_slots=2)
    arena = np.zeros(60, dtype=np.uint8)
    ledger.memory = (arena,)
    for number in range(3):
        region = ledger.reserve(5)
        arena[region.start : region.start + 5] = 10 + number
        ledger.publish(region)
    outcomes: collections.Counter[str] = collections.Counter()
    begun: list[tuple] = []

    def look(_: int) -> None:
        rows = ledger.rows_of(np.array([1]))
        if rows.lengths[0] >= 0:
            start = int(rows.starts[0])
            begun.append((rows, arena[start : start + 2].tolist()))  # a copy that is slower than the writer
        else:
            outcomes["gone"] += 1
        for earlier, head in begun:
            copied = head + arena[int(earlier.starts[0]) + 2 : int(earlier.starts[0]) + 5].tolist()
            if ledger.unchanged(earlier)[0]:
                assert copied in ([11] * 5, [77] * 5), copied
                outcomes[str(copied[0])] += 1
            else:
                outcomes["torn"] += 1

    start = int(ledger.rows_of(np.array([1])).starts[0])
    new = np.full(5, 77, dtype=np.uint8)
    assert at_every_instruction(lambda: ledger.relabel(1, 0, start, new), look) > 50
    look(0)
    check_ledger(ledger)
    assert min(outcomes[outcome] for outcome in ("11", "77", "torn", "gone")) > 5, outcomes
