"""The staging ring: a ring buffer of trajectories in shared memory, on their way from other processes to a device.

Producers write to the ring as to a storage on the CPU. The owner of the device takes the trajectories out in the order
of publication. Unlike the ledger of a storage, the ledger of the ring never evicts. A trajectory stays until it is on
the device, and a producer that finds no space waits (back-pressure). Everything else works as in a storage. So a
producer that is killed at any moment blocks no other: the next producer that needs space reclaims its reservation.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
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
from embodichain_rl.shared import Deadline, SharedBlock, check_memory, own_process, process_is_alive

__all__ = ["STAGING_BYTES", "RingFullError", "RingLedger", "StagingRing", "polls"]

STAGING_BYTES = 256 << 20
"""Default size of a ring, in bytes."""

MAX_STAGED = 4096
"""Largest number of trajectories in a ring, including those that are being written."""

WAIT_FOR_ROOM = 60.0
"""Seconds that a writer waits for space."""

FIRST_PAUSE, LONGEST_PAUSE = 0.2e-3, 10e-3
"""Seconds between two polls of a waiting thread. The pause doubles from the first to the longest."""

FLUSH_PAUSE = 0.5e-3
"""Longest pause of a thread that waits for uploads which are under way."""

OWNER_PID, OWNER_START, STATE, DROPPED = range(4)  # words of the header
OPEN, CLOSED, FAILED = range(3)  # values of STATE


def polls(timeout: float, longest: float = LONGEST_PAUSE) -> Iterator[None]:
    """Yield repeatedly, with pauses between that grow from ``FIRST_PAUSE`` to ``longest``.

    Args:
        timeout: seconds after which the iteration ends. It yields at least once.
        longest: the longest pause, in seconds.
    """
    deadline, pause = Deadline(timeout), FIRST_PAUSE
    while True:
        yield
        if deadline.passed():
            return
        time.sleep(pause)
        pause = min(2 * pause, longest)


class RingFullError(TooManyWritersError):
    """Raised by :meth:`RingLedger.reserve` while the ring has no space; it never leaves this module."""


class RingLedger(Ledger):
    """A ledger without eviction. A trajectory is live from its publication until it is taken out.

    The size depends on the schema, so it is set when the schema is known.

    Args:
        margin: extra steps at the end of every region; see :class:`Ledger`.
    """

    def __init__(self, *, margin: int) -> None:
        super().__init__(MAX_STAGED, 1, 1, margin=margin)

    def set_size(self, steps: int) -> None:
        """Set the size in steps, in this process. Every process must call this."""
        self.resize(steps - self.margin, steps, steps)

    def begin(self) -> None:
        """Make the whole ring one free gap. Only one process may call this, once, after :meth:`set_size`."""
        with self._lock:
            counters = self._read_counters()
            counters.gap_end = counters.high_water = self.arena_steps
            self._commit(counters)

    def take_out(self, end: int) -> None:
        """Retire the trajectories with ids below ``end``, which frees their space."""
        with self._lock:
            counters = self._read_counters()
            while counters.oldest_id < end:
                self._retire_oldest(counters)
            self._renew_newest_version(counters)
            self._commit(counters)

    def _check_capacity(self, counters: Counters) -> None:
        # publish() retires trajectories beyond max_trajectories, so no further reservation may be allowed here. The
        # limit of steps always holds, because regions do not overlap.
        writing = int(np.count_nonzero(self._slots[:, TICKET] >= 0))
        if counters.next_id - counters.oldest_id + writing >= self.max_trajectories:
            raise self._full(counters)

    def _make_room(self, counters: Counters, room: int, steps: int) -> None:
        raise self._full(counters)

    def _full(self, counters: Counters) -> RingFullError:
        self._commit(counters)  # keep the counts of reclaimed reservations
        return RingFullError("The staging ring is full.")


class StagingRing(HostMemory):
    """The memory of a staging ring.

    Args:
        nbytes: size in bytes; None for ``STAGING_BYTES``.
        compact: whether next observations are stored once.

    Raises:
        InvalidArgumentError: if the size is not a positive integer.

    Attributes:
        nbytes (int): size in bytes.
    """

    ledger: RingLedger

    def __init__(self, nbytes: int | None, *, compact: bool) -> None:
        self.nbytes = STAGING_BYTES if nbytes is None else checked_int("staging_bytes", nbytes, minimum=1)
        super().__init__(RingLedger(margin=int(compact)), compact=compact)
        self._header_block = SharedBlock(64)
        self._map_header()
        self._header[OWNER_PID], self._header[OWNER_START] = own_process()

    def _map_header(self) -> None:
        self._header = self._header_block.array(np.int64, (8,))

    # -------------------------------------------------------------------------------------------------- allocation

    def _steps(self, schema: Schema) -> int:
        segment_left = 0 if segment_field(schema) is None else 4
        return self.nbytes // max(1, self.stored_bytes(schema) + segment_left)

    def allocate(self, schema: Schema, *, beside: int = 0) -> None:
        steps = self._steps(schema)
        if steps < 1 + self.ledger.margin:
            raise InvalidArgumentError(
                f"Got staging_bytes={self.nbytes:,}, less than a single step of {self.stored_bytes(schema):,} bytes. "
                "Raise it, so that several whole trajectories fit."
            )
        check_memory(self.nbytes, f"A staging ring of staging_bytes={self.nbytes:,}", "Lower staging_bytes.")
        self.ledger.set_size(steps)
        self.ledger.begin()
        super().allocate(schema)

    def _check_available_memory(self, schema: Schema, beside: int) -> None:
        """Do nothing: :meth:`allocate` checks ``staging_bytes``."""

    def open(self, schema: Schema) -> None:
        self.ledger.set_size(self._steps(schema))
        super().open(schema)

    # ----------------------------------------------------------------------------------------------------- writing

    def check_length(self, length: int) -> None:
        if length > self.ledger.max_total_steps:
            raise TrajectoryTooLongError(
                f"Got a trajectory of at least {length:,} steps, but it must fit into the staging ring: "
                f"staging_bytes={self.nbytes:,} is {self.ledger.max_total_steps:,} steps. Raise staging_bytes, "
                "or end episodes earlier (max_episode_steps, max_frames_per_traj)."
            )

    def _reserve(self, length: int) -> Reservation:
        self.check_length(length)
        for _ in polls(WAIT_FOR_ROOM):
            self.check_owner()
            with contextlib.suppress(RingFullError):
                return self.ledger.reserve(length)
        raise StagingTimeoutError(
            f"No space for a trajectory of {length:,} steps in the staging ring within {WAIT_FOR_ROOM:.0f} s: "
            f"{self.ledger.num_steps:,} of its {self.ledger.max_total_steps:,} steps wait for an upload by its owner, "
            f"process {self._header[OWNER_PID]}. Check whether that process is stopped, or other work keeps its device "
            "busy; otherwise raise staging_bytes, or collect more slowly."
        )

    def flush(self, timeout: float) -> None:
        """Wait until all trajectories that were published in the ring before this call are live on the device."""
        end = self.ledger.next_id
        for _ in polls(timeout, FLUSH_PAUSE):
            if self.ledger.live_range()[0] >= end:
                return
            self.check_owner()
        raise StagingTimeoutError(
            f"{len(self.ledger):,} trajectories are still in the staging ring after {timeout:g} s. Check whether its "
            f"owner, process {self._header[OWNER_PID]}, is stopped, or other work keeps its device busy; otherwise "
            "wait longer."
        )

    def discard(self) -> None:
        """Request that the owner drops all trajectories in the ring that are not live on the device yet."""
        self._header[DROPPED] = self.ledger.next_id

    # --------------------------------------------------------------------------------------------------- its owner

    def mapped(self) -> torch.Tensor:
        """Return all bytes of the arena, ``uint8`` ``[n]``, mapped into this process."""
        return self.arena_block.mapped()

    @property
    def is_filling(self) -> bool:
        """Whether more than a quarter of the ring waits for an upload, so that writers may have to wait soon."""
        ledger = self.ledger
        return 4 * ledger.num_steps > ledger.max_total_steps or 4 * len(ledger) > ledger.max_trajectories

    @property
    def dropped_below(self) -> int:
        """Trajectories of the ring with ids below this one must be dropped; see :meth:`discard`."""
        return int(self._header[DROPPED])

    def is_owner(self) -> bool:
        """Whether this is the process that made the ring."""
        return (int(self._header[OWNER_PID]), int(self._header[OWNER_START])) == own_process()

    def check_owner(self) -> None:
        """Raise if the owner takes out no more trajectories.

        Raises:
            OwnerGoneError: if the owner has ended, or has closed the storage.
            UploadError: if an upload has failed in the owner.
        """
        pid, start, state = self._header[: STATE + 1].tolist()
        if state == FAILED:
            raise UploadError(
                f"Uploading to the device has failed in process {pid}, which owns the buffer, so nothing more can be "
                "written. The next sample or extend in that process raises the cause. Make a new buffer."
            )
        if state == CLOSED:
            raise OwnerGoneError(f"Process {pid} has closed the buffer that it kept on a device. Make a new one.")
        if not process_is_alive(pid, start):
            raise OwnerGoneError(
                f"Process {pid}, which kept the buffer on its device, has ended, and the buffer with it. End this "
                "process too. If that process is alive, run all processes in one container (one pid namespace): those "
                "that share a buffer must see each other's process ids."
            )

    def end(self, *, failed: bool = False) -> None:
        """Report to every process that no more trajectories are taken out."""
        if self._header[STATE] == OPEN:
            self._header[STATE] = FAILED if failed else CLOSED

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_header"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._map_header()
