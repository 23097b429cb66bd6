"""The ledger compared with a plain Python model, under any order of calls by writers and readers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from instructions import at_every_instruction

from embodichain_rl.errors import PinLimitError, TooManyWritersError, TrajectoryEvictedError
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.ledger.ledger import Ledger, Reservation
from embodichain_rl.replay.ledger.words import (
    NO_VERSION,
    PID,
    SINCE,
    TICKET,
    Rows,
)

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
        self.pinned: set[int] = set()
        self.discarded = self.skipped = 0
        self.arena = np.full(ARENA_STEPS, -1)  # ticket under which each step was written

    # ---------------------------------------------------------------------------------------------------- writers

    @precondition(lambda self: len(self.writing) < WRITER_SLOTS)
    @rule(target=reservations, length=st.integers(1, LONGEST))
    def reserve(self, length: int) -> Reservation | None:
        try:
            reservation = self.ledger.reserve(length)
        except TooManyWritersError:
            taken = sum(r.length + self.margin for r in self.writing.values()) + length + self.margin
            # Pinned trajectories and their margins may lie so that every gap is too short.
            pinned = [each.length for each in self.live if each.number in self.pinned]
            split = len(pinned) * (LONGEST + 2 * self.margin) + sum(pinned)
            assert taken > ARENA_STEPS - MAX_STEPS - MAX_TRAJECTORIES * self.margin - LONGEST - split
            self._forget_all_but(len(self.pinned))
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
        assert self.ledger.publish(reservation, longest, policy_version=version) == self._next_number()
        del self.writing[reservation.ticket]
        self._published(reservation, longest, version)

    def _next_number(self) -> int:
        """Return the next id whose row no live trajectory has."""
        rows = self.ledger.num_rows
        taken = {each.number % rows for each in self.live}
        return next(number for number in itertools.count(self.next_id) if number % rows not in taken)

    def _published(self, reservation: Reservation, longest: int, version: int) -> None:
        start, length = reservation.start, reservation.length
        self.skipped += self._next_number() - self.next_id
        self.next_id = self._next_number()
        self.live.append(Trajectory(self.next_id, start, length, longest, version, self.steps_written))
        self.written_under[self.next_id] = reservation.ticket
        self.steps_written += length
        while len(self.live) > MAX_TRAJECTORIES or sum(each.length for each in self.live) > MAX_STEPS:
            self._evict()
        if self.weights is not None:
            self.weights[self.next_id] = max([self.weights[each.number] for each in self.live[:-1]], default=1.0)
        self.next_id += 1

    def _forget_all_but(self, count: int) -> None:
        assert count <= len(self.live)
        while len(self.live) > count:
            self._evict()

    def _evict(self) -> None:
        """Evict the oldest trajectory that is not pinned."""
        self.live.remove(next(each for each in self.live if each.number not in self.pinned))

    # ------------------------------------------------------------------------------------------- pins and discards

    @precondition(lambda self: self.live)
    @rule(which=st.sets(st.integers(-1, MAX_TRAJECTORIES - 1)))
    def pin(self, which: set[int]) -> None:
        ids = {self.live[number].number if number < len(self.live) else -1 for number in which}
        wanted = self.pinned | ids
        steps = sum(each.length for each in self.live if each.number in wanted)
        try:
            self.ledger.pin(np.array(sorted(ids), dtype=np.int64))
        except TrajectoryEvictedError:
            assert -1 in ids
        except PinLimitError:
            assert len(wanted) > MAX_TRAJECTORIES // 2 or steps > MAX_STEPS // 2
        else:
            self.pinned = wanted

    @rule(which=st.sets(st.integers(0, 60)))
    def unpin(self, which: set[int]) -> None:
        self.ledger.unpin(np.array(sorted(which), dtype=np.int64))
        self.pinned -= which

    @precondition(lambda self: self.live)
    @rule(which=st.sets(st.integers(0, MAX_TRAJECTORIES), max_size=2), gone=st.sets(st.integers(0, 5)))
    def discard(self, which: set[int], gone: set[int]) -> None:
        live = {each.number for each in self.live}
        ids = {each.number for number, each in enumerate(self.live) if number in which} | (gone - live)
        assert self.ledger.discard(np.array(sorted(ids), dtype=np.int64)) == len(ids & live)
        self.discarded += len(ids & live)
        self._removed(ids)
        assert not self.ledger.still_valid(np.array(sorted(ids & live), dtype=np.int64)).any()

    def _removed(self, ids: set[int]) -> None:
        self.live = [each for each in self.live if each.number not in ids]
        self.pinned -= ids

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
        self.live, self.pinned = [], set()
        if self.weights is not None:
            self.weights = {}

    # --------------------------------------------------------------------------------------------- killed writers

    @precondition(lambda self: self.live)
    @rule(
        which=st.integers(0, MAX_TRAJECTORIES - 1),
        call=st.sampled_from(["pin", "unpin", "discard"]),
        at=st.integers(0, 400),
    )
    def die_while_changing(self, which: int, call: str, at: int) -> None:
        """All of the call is done, or nothing."""
        number = self.live[which % len(self.live)].number
        with suppress(PinLimitError):
            self._killed_at(at, lambda: getattr(self.ledger, call)(np.array([number])))
        live, pinned = self.ledger.live().all().tolist(), set(self.ledger.pinned_ids().tolist())
        assert live in (
            [each.number for each in self.live],
            [each.number for each in self.live if each.number != number],
        )
        assert pinned in (self.pinned, self.pinned ^ {number})
        self.discarded += call == "discard" and len(live) < len(self.live)
        self._removed({number} - set(live))
        self.pinned = pinned

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
        live = self.ledger.live()
        rows = self.ledger.rows_of(live.at(np.array(which) % len(live)))
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
        assert self.ledger.live().all().tolist() == [each.number for each in self.live]
        assert set(self.ledger.pinned_ids().tolist()) == self.pinned
        stats = self.ledger.stats()
        assert (stats["pinned"], stats["discarded"]) == (len(self.pinned), self.discarded)
        assert stats["published"] == self.next_id - self.skipped
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
