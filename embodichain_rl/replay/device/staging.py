"""The way from other processes to a device: a ring of trajectories in memory that all of them share.

Producers write to it as to any storage on the CPU, and the owner of the device takes them out in the order in which
they were published. Other than a storage's, its ledger evicts nothing: a trajectory stays until it is on the device,
and who finds no room waits. All else holds as it does there, so that a producer that is killed at any instant blocks
nobody: the next one that looks for room takes its reservation back.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from embodichain_rl._checks import checked_int
from embodichain_rl.errors import (
    InvalidArgumentError,
    OwnerGoneError,
    StagingTimeoutError,
    TooManyWritersError,
    TrajectoryTooLongError,
    UploadError,
)
from embodichain_rl.replay.host import HostMemory
from embodichain_rl.replay.ledger import TICKET, Counters, Ledger, Reservation
from embodichain_rl.replay.schema import Schema, segment_field
from embodichain_rl.shared import SharedBlock, check_memory, own_process, process_is_alive

__all__ = ["STAGING_BYTES", "RingFullError", "RingLedger", "StagingRing"]

STAGING_BYTES = 256 << 20
"""The usual size of a ring."""

MAX_STAGED = 4096
"""How many trajectories a ring holds at most, with those that are being written."""

WAIT_FOR_ROOM = 60.0
"""Seconds that a writer waits for room."""

FIRST_PAUSE, LONGEST_PAUSE = 0.2e-3, 10e-3
"""Seconds between two looks of who waits: doubled from the first up to the longest."""

OWNER_PID, OWNER_START, STATE, DROPPED = range(4)  # words of the header
OPEN, CLOSED, FAILED = range(3)  # what STATE can be


class RingFullError(TooManyWritersError):
    """Raised by :meth:`RingLedger.reserve` when there is no room yet; never seen outside of this module."""


class RingLedger(Ledger):
    """A ledger that evicts nothing: live is what was published and not taken out.

    Its size follows from the schema, and so is only known when that is.
    """

    def __init__(self, *, margin: int) -> None:
        super().__init__(MAX_STAGED, 1, 1, margin=margin)

    def resize(self, steps: int) -> None:
        """Notes the size, in steps; by each process."""
        self.arena_steps, self.max_total_steps = steps, steps - self.margin

    def begin(self) -> None:
        """Makes all of it free; by one process, once, after :meth:`resize`."""
        with self._lock:
            counters = self._read()
            counters.window_end = counters.high_water = self.arena_steps
            self._commit(counters)

    def take_out(self, end: int) -> None:
        """Retires the trajectories below the id ``end``: their room is free."""
        with self._lock:
            counters = self._read()
            while counters.oldest_id < end:
                self._retire_oldest(counters)
            self._renew_newest_version(counters)
            self._commit(counters)

    def _refuse_if_full(self, counters: Counters) -> None:
        # Publishing retires what is beyond max_trajectories: so no more are let in. Steps can't be too many, since no
        # two regions overlap.
        writing = int(np.count_nonzero(self._slots[:, TICKET] >= 0))
        if counters.next_id - counters.oldest_id + writing >= self.max_trajectories:
            raise self._full(counters)

    def _make_room(self, counters: Counters, length: int, busy: int) -> None:
        raise self._full(counters)

    def _full(self, counters: Counters) -> RingFullError:
        self._commit(counters)  # what was reclaimed from the dead
        return RingFullError("The staging ring is full.")


class StagingRing(HostMemory):
    """The memory of a ring, and how a trajectory gets into it.

    Args:
        nbytes: its size, in bytes.
        compact: whether next observations are stored once.

    Raises:
        InvalidArgumentError: for a size that can't work.

    Attributes:
        nbytes (int): its size.
    """

    ledger: RingLedger

    def __init__(self, nbytes: int | None, *, compact: bool) -> None:
        self.nbytes = STAGING_BYTES if nbytes is None else checked_int("staging_bytes", nbytes, minimum=1)
        super().__init__(RingLedger(margin=int(compact)), compact=compact, expected_steps=0)
        self._header_block = SharedBlock(64)
        self._map_header()
        self._header[OWNER_PID], self._header[OWNER_START] = own_process()

    def _map_header(self) -> None:
        self._header = self._header_block.array(np.int64, (8,))

    # -------------------------------------------------------------------------------------------------- allocation

    def _steps(self, schema: Schema) -> int:
        of_segments = 0 if segment_field(schema) is None else 4
        return self.nbytes // max(1, self.stored_bytes(schema) + of_segments)

    def allocate(self, schema: Schema) -> None:
        steps = self._steps(schema)
        if steps < 1 + self.ledger.margin:
            raise InvalidArgumentError(
                f"staging_bytes={self.nbytes:,} has no room for a single step of {self.stored_bytes(schema):,} bytes. "
                "Give it room for some whole trajectories."
            )
        check_memory(self.nbytes, f"A staging ring of staging_bytes={self.nbytes:,}", "Lower staging_bytes.")
        self.ledger.resize(steps)
        self.ledger.begin()
        super().allocate(schema)

    def _check_room(self, schema: Schema) -> None:
        """Does nothing: it is held against ``staging_bytes``."""

    def open(self, schema: Schema) -> None:
        self.ledger.resize(self._steps(schema))
        super().open(schema)

    # ----------------------------------------------------------------------------------------------------- writing

    def check_length(self, length: int) -> None:
        if length > self.ledger.max_total_steps:
            raise TrajectoryTooLongError(
                f"Got a trajectory of at least {length:,} steps, but on its way to the device it must fit into "
                f"staging_bytes={self.nbytes:,}, which is {self.ledger.max_total_steps:,} steps. Raise staging_bytes, "
                "or end episodes earlier (max_episode_steps, max_frames_per_traj)."
            )

    def _reserve(self, length: int) -> Reservation:
        self.check_length(length)
        deadline, pause = time.monotonic() + WAIT_FOR_ROOM, FIRST_PAUSE
        while True:
            self.check_owner()
            try:
                return self.ledger.reserve(length)
            except RingFullError:
                if time.monotonic() > deadline:
                    break
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        raise StagingTimeoutError(
            f"No room for a trajectory of {length:,} steps in the staging ring within {WAIT_FOR_ROOM:.0f} s: it holds "
            f"{self.ledger.num_steps:,} of {self.ledger.max_total_steps:,} steps that its owner, process "
            f"{self._header[OWNER_PID]}, has not uploaded. See whether that process is stopped, or its device kept "
            "busy by others; else raise staging_bytes, or collect less."
        ) from None

    def flush(self, timeout: float) -> None:
        """Waits until all that was published here before is live on the device."""
        end = self.ledger.next_id
        deadline, pause = time.monotonic() + timeout, FIRST_PAUSE
        while self.ledger.live_range()[0] < end:
            self.check_owner()
            if time.monotonic() > deadline:
                raise StagingTimeoutError(
                    f"{len(self.ledger):,} trajectories wait in the staging ring, and are not live on the device after "
                    f"{timeout:g} s. See whether its owner, process {self._header[OWNER_PID]}, is stopped, or its "
                    "device kept busy by others; or wait longer."
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def discard(self) -> None:
        """Has the owner drop what was published here and is not live on the device yet."""
        self._header[DROPPED] = self.ledger.next_id

    # --------------------------------------------------------------------------------------------------- its owner

    def mapped(self) -> torch.Tensor:
        """Returns all bytes of the arena, as this process has them mapped: ``uint8`` ``[n]``."""
        return self.arena_block.mapped()

    @property
    def dropped_below(self) -> int:
        """Trajectories of the ring below this id are not wanted any more."""
        return int(self._header[DROPPED])

    def is_owner(self) -> bool:
        """Whether this is the process that made the ring."""
        return (int(self._header[OWNER_PID]), int(self._header[OWNER_START])) == own_process()

    def check_owner(self) -> None:
        """Raises where nobody will ever take anything out.

        Raises:
            OwnerGoneError: the owner has ended, or has closed the storage.
            UploadError: the upload has failed there.
        """
        pid, start, state = self._header[: STATE + 1].tolist()
        if state == FAILED:
            raise UploadError(
                f"Uploading to the device has failed in process {pid}, which owns the buffer, and nothing is written "
                "any more. Its error is raised there, by the next sample or extend. Make a new buffer."
            )
        if state == CLOSED:
            raise OwnerGoneError(f"Process {pid} has closed the buffer that it kept on a device. Make a new one.")
        if not process_is_alive(pid, start):
            raise OwnerGoneError(
                f"Process {pid}, which kept the buffer on its device, has ended, and the buffer with it: end this "
                "process too. All processes that share a buffer must see each other's process ids (one container, one "
                "pid namespace)."
            )

    def end(self, *, failed: bool = False) -> None:
        """Says in every process that nothing is taken out any more."""
        if self._header[STATE] == OPEN:
            self._header[STATE] = FAILED if failed else CLOSED

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_header"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._map_header()
