"""The ledger compared with a plain Python model, under any order of calls by writers and readers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from instructions import at_every_instruction

from embodichain_rl.errors import TooManyWritersError
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger, Reservation
from embodichain_rl.replay.ledger.table import NO_VERSION, PID, SINCE, TICKET, Rows

MAX_TRAJECTORIES, MAX_STEPS, ARENA_STEPS, WRITER_SLOTS = 5, 40, 100, 6
LONGEST = 14


class Trajectory(NamedTuple):
    """A trajectory in the model."""

    number: int
    start: int
    length: int
    longest_segment: int
    policy_version: int
    steps_before: int


class Killed(BaseException):
    """Interrupts a call of the ledger at an instruction."""


class LedgerMachine(RuleBasedStateMachine):
    """Every operation of the ledger, and the death of writers at any instruction, against plain lists."""

    reservations = Bundle("reservations")
    ended = Bundle("ended")
    reads = Bundle("reads")
    margin = 0

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(MAX_TRAJECTORIES, MAX_STEPS, ARENA_STEPS, margin=self.margin, writer_slots=WRITER_SLOTS)
        self.live: list[Trajectory] = []  # oldest first
        self.writing: dict[int, Reservation] = {}
        self.dead = 0  # writers that died since the last reservation
        self.tickets: set[int] = set()
        self.written_under: dict[int, int] = {}  # ticket of each published id
        self.next_id = 0
        self.steps_written = 0
        self.weights: dict[int, float] | None = None
        self.arena = np.full(ARENA_STEPS, -1)  # ticket under which each step was written

    # ---------------------------------------------------------------------------------------------------- writers

    @precondition(lambda self: len(self.writing) < WRITER_SLOTS)
    @rule(target=reservations, length=st.integers(1, LONGEST))
    def reserve(self, length: int) -> Reservation | None:
        try:
            reservation = self.ledger.reserve(length)
        except TooManyWritersError:
            taken = sum(r.length + self.margin for r in self.writing.values()) + length + self.margin
            assert taken > ARENA_STEPS - MAX_STEPS - MAX_TRAJECTORIES * self.margin - LONGEST
            self._forget_all_but(0)
            return None
        self.dead = 0
        assert reservation.ticket not in self.tickets
        self._forget_all_but(len(self.ledger))  # reserve() may have evicted the oldest
        self.tickets.add(reservation.ticket)
        self.writing[reservation.ticket] = reservation
        self.arena[reservation.start : reservation.start + length + self.margin] = reservation.ticket
        return reservation

    @rule(reservation=consumes(reservations), longest=st.integers(1, LONGEST), version=st.integers(NO_VERSION, 3))
    def publish(self, reservation: Reservation | None, longest: int, version: int) -> None:
        if reservation is None:
            return
        longest = min(longest, reservation.length)
        assert self.ledger.publish(reservation, longest, policy_version=version) == self.next_id
        del self.writing[reservation.ticket]
        self._published(reservation, longest, version)

    def _published(self, reservation: Reservation, longest: int, version: int) -> None:
        start, length = reservation.start, reservation.length
        self.live.append(Trajectory(self.next_id, start, length, longest, version, self.steps_written))
        self.written_under[self.next_id] = reservation.ticket
        self.steps_written += length
        while len(self.live) > MAX_TRAJECTORIES or sum(each.length for each in self.live) > MAX_STEPS:
            del self.live[0]
        if self.weights is not None:
            self.weights[self.next_id] = max([self.weights[each.number] for each in self.live[:-1]], default=1.0)
        self.next_id += 1

    def _forget_all_but(self, count: int) -> None:
        assert count <= len(self.live)
        self.live = self.live[len(self.live) - count :]

    @rule(target=ended, reservation=consumes(reservations))
    def give_back(self, reservation: Reservation | None) -> Reservation | None:
        if reservation is not None:
            self.ledger.give_back(reservation)
            del self.writing[reservation.ticket]
        return reservation

    @rule(reservation=ended)
    def give_back_again(self, reservation: Reservation | None) -> None:
        """The current holder of the slot keeps it."""
        if reservation is not None:
            self.ledger.give_back(reservation)

    @rule()
    def empty(self) -> None:
        self.ledger.retire_all()
        self._emptied()

    @rule(ahead=st.integers(-3, 7))
    def restore(self, ahead: int) -> None:
        self.ledger.resume_from(next_id=max(0, self.next_id + ahead))
        self.next_id += max(0, ahead)
        self._emptied()

    def _emptied(self) -> None:
        self.live = []
        if self.weights is not None:
            self.weights = {}

    # --------------------------------------------------------------------------------------------- killed writers

    @rule(reservation=consumes(reservations))
    def die_while_copying(self, reservation: Reservation | None) -> None:
        if reservation is not None:
            self.arena[reservation.start : reservation.start + reservation.length // 2] = -2
            self._bury(reservation)

    @rule(reservation=consumes(reservations), instruction=st.integers(0, 400))
    def die_while_publishing(self, reservation: Reservation | None, instruction: int) -> None:
        if reservation is None:
            return
        self._killed_at(instruction, lambda: self.ledger.publish(reservation, reservation.length))
        if self.ledger.next_id > self.next_id:
            self._published(reservation, reservation.length, NO_VERSION)
        self._bury(reservation)

    @precondition(lambda self: len(self.writing) + self.dead < WRITER_SLOTS)
    @rule(length=st.integers(1, LONGEST), instruction=st.integers(0, 400))
    def die_while_reserving(self, length: int, instruction: int) -> None:
        try:
            self._killed_at(instruction, lambda: self.ledger.reserve(length))
        except TooManyWritersError:
            self._forget_all_but(0)
            return
        self._forget_all_but(len(self.ledger))
        self._mark_the_dead()
        self.tickets.update(range(self.ledger._read_counters().next_ticket))

    def _killed_at(self, instruction: int, action: Callable[[], Any]) -> None:
        def visit(n: int) -> None:
            if n == instruction:
                raise Killed

        with suppress(Killed):
            at_every_instruction(action, visit)

    def _bury(self, reservation: Reservation) -> None:
        del self.writing[reservation.ticket]
        self._mark_the_dead()

    def _mark_the_dead(self) -> None:
        """Mark every slot in use that no living writer holds as one of a dead process."""
        slots = self.ledger._slots
        slots_of_the_living = [reservation.slot for reservation in self.writing.values()]
        dead = np.setdiff1d(np.flatnonzero(slots[:, TICKET] >= 0), slots_of_the_living)
        slots[dead, PID : SINCE + 1] = (2**22 - 1, 1, 0)  # no such process; an old reservation
        self.dead = len(dead)

    # ---------------------------------------------------------------------------------------------------- readers

    @precondition(lambda self: self.live)
    @rule(target=reads, which=st.lists(st.integers(0, MAX_TRAJECTORIES - 1), min_size=1, max_size=4))
    def begin_to_read(self, which: list[int]) -> Rows:
        oldest, end = self.ledger.live_range()
        rows = self.ledger.rows_of(np.array([oldest + number % (end - oldest) for number in which]))
        assert (rows.lengths >= 1).all()
        return rows

    @rule(rows=consumes(reads))
    def end_reading(self, rows: Rows) -> None:
        """A trajectory that is still valid is intact, whatever happened since its row was read."""
        valid = rows.select(self.ledger.still_valid(rows.ids))
        for number, start, length in zip(valid.ids.tolist(), valid.starts, valid.lengths, strict=True):
            assert (self.arena[start : start + length + self.margin] == self.written_under[number]).all()
        live = {each.number for each in self.live}
        assert live.intersection(rows.ids.tolist()) <= set(valid.ids.tolist()), "live, but not valid"

    @precondition(lambda self: self.live)
    @rule(which=st.sets(st.integers(-2, MAX_TRAJECTORIES + 1)), weight=st.floats(0.1, 10.0))
    def prioritize(self, which: set[int], weight: float) -> None:
        ids = [self.live[0].number + number for number in sorted(which)]
        self.ledger.prioritize(np.array(ids, dtype=np.int64), np.full(len(ids), weight))
        if self.weights is None:
            self.weights = {each.number: 1.0 for each in self.live}
        for number in {each.number for each in self.live}.intersection(ids):
            self.weights[number] = weight

    # ------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def keeps_its_own_invariants(self) -> None:
        check_ledger(self.ledger)

    @invariant()
    def agrees_with_the_model(self) -> None:
        rows = self.ledger.live_rows()
        before = self.ledger.steps_before(rows.ids)
        columns = rows.ids, rows.starts, rows.lengths, rows.longest_segments, rows.policy_versions, before
        live = [Trajectory(*numbers) for numbers in zip(*(column.tolist() for column in columns), strict=True)]
        assert live == self.live
        assert len(self.ledger) == len(self.live)
        assert self.ledger.num_steps == sum(each.length for each in self.live)
        assert self.ledger.steps_written == self.steps_written
        assert self.ledger.next_id == self.next_id
        newest = max([each.policy_version for each in self.live], default=NO_VERSION)
        assert self.ledger.newest_policy_version == newest
        assert len(self.writing) <= self.ledger.stats()["writing"] <= len(self.writing) + self.dead + 1
        for each in self.live:
            written = self.arena[each.start : each.start + each.length + self.margin]
            assert (written == self.written_under[each.number]).all(), "a live trajectory was overwritten"
        if self.weights is not None:
            assert self.ledger.weights_of(rows.ids).tolist() == [self.weights[each.number] for each in self.live]

    @invariant()
    def valid_trajectories_are_intact(self) -> None:
        ids = np.array(sorted(self.written_under), dtype=np.int64)
        rows = self.ledger.rows_of(ids)
        valid = self.ledger.still_valid(ids) & (rows.lengths >= 0)
        for number, start, length in zip(ids[valid], rows.starts[valid], rows.lengths[valid], strict=True):
            assert (self.arena[start : start + length + self.margin] == self.written_under[int(number)]).all()


class MarginMachine(LedgerMachine):
    """The same with a margin behind every trajectory."""

    margin = 2


TestLedgerMachine = LedgerMachine.TestCase
TestMarginMachine = MarginMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=50, stateful_step_count=60)
TestMarginMachine.settings = settings(max_examples=25, stateful_step_count=60)
