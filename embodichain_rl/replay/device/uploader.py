"""The background thread of a device's owner. It takes trajectories out of the staging ring and uploads them."""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import OwnerGoneError, SharingError, TooManyWritersError, UploadError
from embodichain_rl.replay.device.arena import DeviceArena
from embodichain_rl.replay.device.cuda import Device
from embodichain_rl.replay.device.staging import LONGEST_PAUSE, StagingRing
from embodichain_rl.replay.host import TrajectoryTable
from embodichain_rl.replay.ledger import Ledger, Reservation, Rows
from embodichain_rl.replay.schema import Schema, SharedSchema, as_array
from embodichain_rl.shared import Deadline

__all__ = ["Uploader", "not_the_owner"]

MAX_UPLOADS = 2
"""Number of uploads at the same time (double buffering): one is copied while the next is enqueued."""

MAX_TRAJECTORIES = 512
"""Largest number of trajectories in one upload."""

SHARE_TOGETHER = 4
"""At most a quarter of ``max_trajectories`` is uploaded together, because so many are retired before they are live."""

PAUSE = 1e-3
"""Seconds between two polls while there is work. What comes in the meantime is uploaded together, and the interpreter
is free for the threads that sample."""

SHORT_PAUSE = 50e-6
"""The same while the ring is filling."""

JOIN_TIMEOUT = 10.0
"""Seconds to wait for the end of the thread. It may still poll the ring once and enqueue one upload."""


@dataclass(frozen=True, slots=True)
class _Upload:
    """Trajectories with consecutive ids in the ring, which are uploaded together."""

    rows: Rows
    region: Reservation | None
    """Region of the arena that they are copied to; None if they must be dropped."""
    starts: np.ndarray
    """First step of each in the arena."""
    event: Any


class Uploader:
    """Uploads the trajectories of a ring in the order of their publication.

    The copies run on a separate stream. When the event behind the copies is done, the trajectories are published in the
    ledger, and then removed from the ring. So at every moment a trajectory is in at least one of the two. The thread
    polls the ring every millisecond while it finds work, and more often while the ring is filling. Without work the
    pause grows to 10 ms.

    An error stops the uploads permanently. Every later read or write in this process raises :class:`UploadError` with
    the error as its cause. In other processes it raises :class:`UploadError` without a cause.

    Args:
        device: the device of the arena.
        ring: the ring to take trajectories from.
        ledger: the ledger of the arena.
        schema: the schema of the storage. The first writer sets it.

    Attributes:
        device (Device): the given device.
        arena (DeviceArena | None): the arena, once it is allocated.
        table (TrajectoryTable | None): the trajectory values, once the arena is allocated.
        max_reserved_steps (int): largest number of steps that all uploads together may reserve and not yet have
            published. A single trajectory may have more.
    """

    def __init__(self, device: Device, ring: StagingRing, ledger: Ledger, schema: SharedSchema) -> None:
        self.device = device
        self._ring = ring
        self._ledger = ledger
        self._schema = schema
        self.arena: DeviceArena | None = None
        self.table: TrajectoryTable | None = None
        self._uploads: deque[_Upload] = deque()
        self._next = 0
        # Reservations must not evict live trajectories. So uploads may reserve one half of the head-room, and direct
        # writes the other half.
        self.max_reserved_steps = (ledger.arena_steps - ledger.max_total_steps) // 2
        self._max_trajectories = min(MAX_TRAJECTORIES, max(1, ledger.max_trajectories // SHARE_TOGETHER))
        self._error: BaseException | None = None
        self._is_pinned = False
        self._process = os.getpid()
        self._opening = threading.RLock()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------------------------------------- starting, stopping

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._work, name="embodichain_rl uploads", daemon=True)
        self._thread.start()

    def open(self, schema: Schema) -> DeviceArena:
        """Allocate the arena on the device, unless this was done before, and return it.

        Raises:
            BufferMemoryError: if the device does not have enough free memory.
        """
        with self._opening:
            if self.arena is None:
                shifted = self._ring.shifted_in(schema)
                arena = DeviceArena(schema, self._ledger.arena_steps, shifted, self.device, self.check)
                self._ring.open(schema)
                if schema.trajectory_fields:
                    self.table = TrajectoryTable.private(schema, self._ledger.num_rows)
                self._pin()
                self.arena = arena
            return self.arena

    def _pin(self) -> None:
        try:
            self.device.pin(self._ring.mapped())
            self._is_pinned = True
        except UploadError as error:
            warnings.warn(
                f"The staging ring can't be pinned, so uploads are much slower: {error} "
                "Check whether locked memory is limited (ulimit -l), or lower staging_bytes.",
                stacklevel=2,
            )

    def stop(self) -> None:
        """Stop the thread and wait for running copies. Does nothing in a forked child, which has no such thread."""
        if os.getpid() != self._process or self._ending.is_set():
            return
        self._ending.set()
        self._ring.end()
        if self._thread is not None and self._thread is not threading.current_thread():
            Deadline(JOIN_TIMEOUT).join(self._thread)
        if self.arena is not None:
            self.device.synchronize()
            if self._is_pinned:
                self.device.unpin(self._ring.mapped())

    def check(self) -> None:
        """Raise if the memory cannot be used.

        Raises:
            SharingError: if this process is not the owner.
            UploadError: if an upload has failed; with its error as the cause.
            OwnerGoneError: if the storage is closed.
        """
        if os.getpid() != self._process:
            raise not_the_owner(self.device.device)
        if self._error is not None:
            raise UploadError(
                f"Uploading to {self.device.device} has failed, so the buffer can no longer be used. Make a new one. "
                f"The error was: {self._error}"
            ) from self._error
        if self._ending.is_set():
            raise OwnerGoneError("This buffer is closed. Make a new one.")

    # --------------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        pause = PAUSE
        try:
            while not self._ending.wait(pause):
                advanced = self.advance()
                pause = min(PAUSE if advanced else 2 * pause, LONGEST_PAUSE)
                if self._ring.is_filling:
                    pause = SHORT_PAUSE
        except BaseException as error:
            self._error = error
            self._ring.end(failed=True)

    def advance(self) -> bool:
        """Publish finished uploads and start a new one; return whether either had something to do."""
        schema = self._schema.get()
        if schema is None:
            return False
        arena = self.open(schema)
        published = self._publish_finished()
        return self._begin_upload(arena) or published

    def _publish_finished(self) -> bool:
        published = False
        while self._uploads and self.device.is_done(self._uploads[0].event):
            self._publish(self._uploads.popleft())
            published = True
        return published

    def _publish(self, upload: _Upload) -> None:
        rows, ring_table = upload.rows, self._ring.table
        keep = np.flatnonzero(rows.ids >= self._ring.dropped_below)
        if upload.region is not None and not len(keep):
            self._ledger.give_back(upload.region)
        elif upload.region is not None:
            values = [] if ring_table is None else [as_array(value) for value in ring_table.copy(rows.ids[keep])]

            def fill(row: int, number: int) -> None:
                assert self.table is not None, "the schema has trajectory fields"
                self.table.write(row, values=[value[number] for value in values])

            self._ledger.publish_together(
                upload.region,
                upload.starts[keep],
                rows.lengths[keep],
                rows.longest_segments[keep],
                policy_versions=rows.policy_versions[keep],
                fill=None if self.table is None else fill,
            )
        self._ring.ledger.take_out(int(rows.ids[-1]) + 1)

    def _begin_upload(self, arena: DeviceArena) -> bool:
        end = self._ring.ledger.next_id
        if self._next >= end or len(self._uploads) == MAX_UPLOADS:
            return False
        rows = self._ring.ledger.rows_of(np.arange(self._next, min(end, self._next + self._max_trajectories)))
        margin = self._ledger.margin
        ends = np.cumsum(rows.lengths + margin)
        dropped = rows.ids < self._ring.dropped_below
        region: Reservation | None = None
        if dropped[0]:
            count = int(np.count_nonzero(dropped))
        else:
            count = self._count_that_fit(ends)
            try:
                region = self._ledger.reserve(int(ends[count - 1]) - margin) if count else None
            except TooManyWritersError:  # try again when the current direct writes are published
                return False
            if region is None:
                return False
        rows = rows.select(np.arange(count))
        starts = ends[:count] - rows.lengths - margin + (0 if region is None else region.start)
        staged = self._ring.arena
        with self.device.uploading():
            if region is not None:
                spans = zip(rows.starts.tolist(), starts.tolist(), (rows.lengths + margin).tolist(), strict=True)
                arena.copy_in(list(spans), staged.stored)
            event = self.device.event()
            self.device.record(event, self.device.stream())
        if region is not None and arena.segment_left is not None and staged.segment_left is not None:
            for begin, to, steps in zip(rows.starts.tolist(), starts.tolist(), rows.lengths.tolist(), strict=True):
                arena.segment_left[to : to + steps] = staged.segment_left[begin : begin + steps]
        self._uploads.append(_Upload(rows, region, starts, event))
        self._next += count
        return True

    def _count_that_fit(self, ends: np.ndarray) -> int:
        """Return how many of the next trajectories can be uploaded together; 0 while there is no space.

        Args:
            ends: number of steps that the first ones need, ``int64`` ``[n]``.
        """
        reserved = sum(upload.region.room for upload in self._uploads if upload.region is not None)
        # Half of the space for each upload, so that one is copied while the next is enqueued.
        most = min(self.max_reserved_steps - reserved, self.max_reserved_steps // MAX_UPLOADS)
        fit = int(np.searchsorted(ends, most, side="right"))
        return fit or int(not self._uploads)


def not_the_owner(device: torch.device) -> SharingError:
    """Return the error to raise when a process other than the owner reads the arena."""
    return SharingError(
        f"This process, {os.getpid()}, can write to the buffer on {device}, but not read it: only the process that "
        "made it can. Sample in that process; with a DataLoader, use num_workers=0 (batches are gathered on the "
        "device, so workers have no benefit). To sample in several processes, keep it on the CPU (device='cpu')."
    )
