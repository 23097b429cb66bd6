"""Two writers and a reader in every interleaving: what the reader takes for intact is intact."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import numpy as np
import pytest
from interleavings import History, Killed, Reader

from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger, Reservation
from embodichain_rl.replay.ledger.table import PID, SINCE


class Writers:
    """Recorded writers of one ledger. They take turns at any point outside of the ledger's lock."""

    def __init__(self, max_steps: int = 5, arena_steps: int = 9) -> None:
        self.ledger = Ledger(2, max_steps, arena_steps, writer_slots=2)
        self.arena = np.full(arena_steps, -1)
        self.held: dict[int, Reservation] = {}
        self.content: dict[int, tuple[int, list[int]]] = {}
        """The start and the steps of each published trajectory."""
        self._numbers = itertools.count(100)
        for _ in range(3):
            for step in ("reserve", "copy", "publish"):
                self.turn(0, step, 2)
        self.history = History(self.ledger, self.arena)

    def record(self, writer: int, step: str, length: int, killed_at: int | None = None) -> None:
        self.history.record(lambda: self.turn(writer, step, length), killed_at)
        check_ledger(self.ledger)

    def turn(self, writer: int, step: str, length: int) -> None:
        if step == "reserve":
            self.held[writer] = self.ledger.reserve(length)
        elif step == "copy":
            start = self.held[writer].start
            self.arena[start : start + length] = next(self._numbers)
        else:
            # Recorded before the call, because a writer that is killed inside may have published.
            start, length = self.held[writer].start, self.held[writer].length
            self.content[self.ledger.next_id] = start, self.arena[start : start + length].tolist()
            self.ledger.publish(self.held.pop(writer))


def read_one(reader: Reader, writers: Writers) -> str:
    """Read one trajectory as a sampler does."""
    oldest, end = reader.ledger.live_range()
    assert 0 <= end - oldest <= 2
    assert all(number in writers.content for number in range(oldest, end))
    if end == oldest:
        return "empty"
    ids = np.array([reader.choose(list(range(oldest, end)))])
    rows = reader.ledger.rows_of(ids)
    if rows.lengths[0] < 0:
        return "gone"
    start = int(rows.starts[0])
    steps = reader.copy(start, int(rows.lengths[0]))
    if not reader.ledger.still_valid(ids)[0]:
        return "torn"
    assert (start, steps) == writers.content[int(ids[0])], "taken for intact, but is not"
    return "whole"


def read_in_every_way(writers: Writers) -> collections.Counter[str]:
    outcomes: collections.Counter[str] = collections.Counter()
    for upwards in (True, False):
        reader = Reader(writers.ledger, writers.history, upwards=upwards)
        outcomes.update(reader.executions_of(lambda reader: read_one(reader, writers)))
    return outcomes


STEPS = ("reserve", "copy", "publish")


@pytest.mark.parametrize("lengths", [(2, 3, 1), (1, 1, 5)])
def test_two_writers_and_a_reader_in_every_interleaving(lengths: tuple[int, int, int]) -> None:
    first, second, other = ([(writer, step, n) for step in STEPS] for writer, n in zip((0, 0, 1), lengths, strict=True))
    outcomes: collections.Counter[str] = collections.Counter()
    for turns_of_other in itertools.combinations(range(9), 3):
        queues: dict[bool, list[Any]] = {False: first + second, True: other.copy()}
        writers = Writers()
        for turn in range(9):
            writers.record(*queues[turn in turns_of_other].pop(0))
        outcomes += read_in_every_way(writers)
    assert min(outcomes[outcome] for outcome in ("whole", "torn", "gone")) > 100, outcomes


def test_a_reused_row_and_a_reader_in_every_interleaving() -> None:
    writers = Writers(max_steps=60, arena_steps=90)  # so large that no step is reused
    for _ in range(writers.ledger.num_rows):
        for step in STEPS:
            writers.record(0, step, 1)
    outcomes = read_in_every_way(writers)
    assert min(outcomes[outcome] for outcome in ("whole", "torn", "gone")) > 10, outcomes


@pytest.mark.parametrize(("step", "every"), [("reserve", 17), ("publish", 5)])
def test_a_killed_writer_and_a_reader_in_every_interleaving(step: str, every: int) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    for instruction in itertools.count(0, every):
        writers = Writers()
        for before in STEPS[: STEPS.index(step)]:
            writers.record(1, before, 3)
        try:
            writers.record(1, step, 3, killed_at=instruction)
        except Killed:
            # The id of a process that does not exist, with an old reservation.
            writers.ledger._slots[writers.ledger._slots[:, PID] > 0, PID : SINCE + 1] = 2**22 - 1, 1, 0
        else:
            break
        check_ledger(writers.ledger)
        for length in (2, 3):
            for each in STEPS:
                writers.record(0, each, length)
        outcomes += read_in_every_way(writers)
    assert instruction > 70
    assert min(outcomes[outcome] for outcome in ("whole", "torn", "gone")) > 10, outcomes
