"""Two writers and a reader in every interleaving: what the reader takes for intact is intact."""

from __future__ import annotations

import collections
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from both_kernels import compile_with
from interleavings import CompiledReader, History, Killed, Reader

from embodichain_rl.replay.kernels import EMPTY
from embodichain_rl.replay.kernels.plans import IDS, LENGTHS, OFFSETS, STARTS
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger, Reservation
from embodichain_rl.replay.ledger.words import (
    PID,
    SINCE,
)


class Writers:
    """Recorded writers of one ledger. They take turns at any point outside of the ledger's lock.

    Args:
        max_steps: limit of live steps.
        arena_steps: size of the arena.
        beside: steps of a region behind its trajectory, as ragged values take them.
    """

    def __init__(self, max_steps: int = 5, arena_steps: int = 9, beside: int = 0) -> None:
        self.ledger = Ledger(2, max_steps, arena_steps, writer_slots=2)
        self.beside = beside
        if beside:
            self.ledger.resize(max_steps, arena_steps, arena_steps, rooms_vary=True)
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
            self.held[writer] = self.ledger.reserve(length, length + self.beside)
        elif step == "reserve pieces":
            self.held[writer] = self.ledger.reserve_pieces(length)
        elif step == "grow":
            self.held[writer] = self.ledger.grow(self.held[writer], length) or self.held[writer]
        elif step == "end pieces":
            self.held[writer] = self.ledger.end_pieces(self.held[writer], length)
        elif step == "copy":
            start = self.held[writer].start
            self.arena[start : start + length + self.beside] = next(self._numbers)
        else:
            # Recorded before the call, because a writer that is killed inside may have published.
            start, length = self.held[writer].start, self.held[writer].length
            self.content[self.ledger.next_id] = start, self.arena[start : start + length + self.beside].tolist()
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
    steps = reader.copy(start, int(rows.lengths[0]) + writers.beside)
    if not reader.ledger.still_valid(ids)[0]:
        return "torn"
    assert (start, steps) == writers.content[int(ids[0])], "taken for intact, but is not"
    return "whole"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The kernels, compiled so that the tests decide what each load returns; None without a compiler."""
    try:
        return compile_with(tmp_path_factory.mktemp("kernels"), "-DEVERY_LOAD")
    except pytest.skip.Exception:
        return None


def read_one_compiled(kernels: CompiledReader, reader: Reader, writers: Writers) -> str:
    """Read one step of one trajectory with the compiled kernels."""
    left = kernels.draw(reader, reader.choose(NUMBERS))
    if left:
        return "empty" if left == EMPTY else "gone"
    trajectory, start, length, offset = kernels.draws.arrays[[IDS, STARTS, LENGTHS, OFFSETS], 0].tolist()
    copied = kernels.gather(reader)
    if kernels.check(reader):
        return "torn"
    assert trajectory in writers.content
    assert writers.content[trajectory][0] == start
    assert len(writers.content[trajectory][1]) == length + writers.beside
    assert writers.content[trajectory][1][offset] == copied, "taken for intact, but is not"
    return "whole"


NUMBERS = [0.0, 0.99]
"""Random numbers: the first step of the oldest trajectory, and the last step of the newest."""


class Outcomes:
    """What came of all reads: with the methods of the ledger, and with the compiled kernels if there are any."""

    def __init__(self, library: Path | None) -> None:
        self._library = library
        self.of_ledger: collections.Counter[str] = collections.Counter()
        self.of_kernels: collections.Counter[str] = collections.Counter()

    def read_in_every_way(self, writers: Writers) -> None:
        for upwards in (True, False):
            reader = Reader(writers.ledger, writers.history, upwards=upwards)
            self.of_ledger.update(reader.executions_of(lambda reader: read_one(reader, writers)))
        if self._library is not None:
            kernels = CompiledReader(self._library, writers.ledger, writers.arena)
            reader = Reader(writers.ledger, writers.history)
            self.of_kernels.update(reader.executions_of(lambda reader: read_one_compiled(kernels, reader, writers)))

    def check(self, at_least: int) -> None:
        """Check that there was enough of each outcome."""
        assert min(self.of_ledger[outcome] for outcome in ("whole", "torn", "gone")) > at_least, self.of_ledger
        if self._library is not None:
            assert min(self.of_kernels[outcome] for outcome in ("whole", "torn", "gone")) > at_least // 10


STEPS = ("reserve", "copy", "publish")


@pytest.mark.parametrize(("lengths", "beside"), [((2, 3, 1), 0), ((1, 1, 5), 0), ((1, 2, 1), 1)])
def test_two_writers_and_a_reader_in_every_interleaving(
    lengths: tuple[int, int, int], beside: int, library: Path | None
) -> None:
    first, second, other = ([(writer, step, n) for step in STEPS] for writer, n in zip((0, 0, 1), lengths, strict=True))
    outcomes = Outcomes(library)
    for turns_of_other in itertools.combinations(range(9), 3):
        queues: dict[bool, list[Any]] = {False: first + second, True: other.copy()}
        writers = Writers(beside=beside)
        for turn in range(9):
            writers.record(*queues[turn in turns_of_other].pop(0))
        outcomes.read_in_every_way(writers)
    outcomes.check(100)


def test_a_trajectory_in_pieces_and_a_reader_in_every_interleaving(library: Path | None) -> None:
    in_pieces = [("reserve pieces", 2), ("copy", 2), ("grow", 3), ("end pieces", 2), ("publish", 2)]
    outcomes = Outcomes(library)
    for turns_of_other in list(itertools.combinations(range(8), 3))[::2]:
        queues: dict[bool, list[Any]] = {
            False: [(0, *step) for step in in_pieces],
            True: [(1, step, 3) for step in STEPS],
        }
        writers = Writers(arena_steps=12)
        writers.ledger.usual_steps = 9
        for turn in range(8):
            writers.record(*queues[turn in turns_of_other].pop(0))
        outcomes.read_in_every_way(writers)
    outcomes.check(0)


def test_a_reused_row_and_a_reader_in_every_interleaving(library: Path | None) -> None:
    writers = Writers(max_steps=60, arena_steps=90)  # so large that no step is reused
    for _ in range(writers.ledger.num_rows):
        for step in STEPS:
            writers.record(0, step, 1)
    outcomes = Outcomes(library)
    outcomes.read_in_every_way(writers)
    outcomes.check(10)


@pytest.mark.parametrize(("step", "every", "beside"), [("reserve", 17, 0), ("publish", 5, 0), ("publish", 31, 1)])
def test_a_killed_writer_and_a_reader_in_every_interleaving(
    step: str, every: int, beside: int, library: Path | None
) -> None:
    outcomes = Outcomes(library)
    for instruction in itertools.count(0, every):
        writers = Writers(arena_steps=9 + 3 * beside, beside=beside)
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
        for length in (3, 3):  # so that steps of live trajectories are written over
            for each in STEPS:
                writers.record(0, each, length)
        outcomes.read_in_every_way(writers)
    assert instruction > 70
    outcomes.check(10)
