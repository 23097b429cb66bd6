"""What the owner of a device does in the background: takes trajectories out of the staging ring, and uploads them."""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import OwnerGoneError, SharingError, TooManyWritersError, UploadError
from embodichain_rl.replay.device.arena import DeviceArena
from embodichain_rl.replay.device.cuda import Device
from embodichain_rl.replay.device.staging import FIRST_PAUSE, LONGEST_PAUSE, StagingRing
from embodichain_rl.replay.host import TrajectoryTable
from embodichain_rl.replay.ledger import Ledger, Reservation, Rows
from embodichain_rl.replay.schema import Schema, SharedSchema, as_array

__all__ = ["Uploader", "not_the_owner"]

MAX_UPLOADS = 2
"""How many uploads are under way at the same time: one is copied while the next is enqueued."""

MAX_TRAJECTORIES = 64
"""How many trajectories one upload has at most; a ledger has slots for 256."""

JOIN_TIMEOUT = 10.0
"""Seconds that the thread may take to end: one look at the ring, and the enqueueing of an upload."""


@dataclass(frozen=True, slots=True)
class _Upload:
    """Trajectories that lay one behind the other in the ring."""

    rows: Rows
    regions: list[Reservation | None]
    """Where they go on the device; None where they are not wanted any more."""
    event: Any


class Uploader:
    """Takes trajectories out of a ring in the order in which they were published there.

    They are copied on a stream of their own. When the event behind the copies is done, they are published in the
    ledger, and then their room in the ring is given back: at every moment a trajectory is in one of the two. It looks
    for work every 0.2 ms while there is some, and less and less often, down to every 10 ms, while there is none.

    An error ends it for good. It is raised by everything that reads or writes afterwards, here as the cause of an
    :class:`UploadError`, in other processes without it.

    Args:
        device: where the arena lies.
        ring: where trajectories come from.
        ledger: that of the arena.
        schema: that of the storage, set by whoever writes first.

    Attributes:
        device (Device): what was given.
        arena (DeviceArena | None): the arena, when it is allocated.
        table (TrajectoryTable | None): the values of whole trajectories, likewise.
        most_steps (int): how many may be reserved, and not published, by all uploads; one trajectory always may.
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
        # What is reserved and not published must not be so much that live trajectories have to leave for it: one half
        # of the head-room is for uploads, the other for what is written directly.
        self.most_steps = (ledger.arena_steps - ledger.max_total_steps) // 2
        self._error: BaseException | None = None
        self._is_pinned = False
        self._process = os.getpid()
        self._opening = threading.RLock()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------- beginning, and ending

    def start(self) -> None:
        """Begins to look for work, on a thread."""
        self._thread = threading.Thread(target=self._work, name="embodichain_rl uploads", daemon=True)
        self._thread.start()

    def open(self, schema: Schema) -> DeviceArena:
        """Allocates the arena on the device, unless it is; returns it.

        Raises:
            BufferMemoryError: when the device has not as much memory left.
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
                f"The staging ring can't be pinned, so trajectories are uploaded at a fraction of the speed: {error} "
                "See whether locked memory is limited (ulimit -l), or lower staging_bytes.",
                stacklevel=2,
            )

    def stop(self) -> None:
        """Ends the thread and what is under way; in a forked child, which has no thread, it does nothing."""
        if os.getpid() != self._process or self._ending.is_set():
            return
        self._ending.set()
        self._ring.end()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_TIMEOUT)
        if self.arena is not None:
            self.device.synchronize()
            if self._is_pinned:
                self.device.unpin(self._ring.mapped())

    def check(self) -> None:
        """Raises what uploading has failed with, or that it has ended, or that this is not the owner's process."""
        if os.getpid() != self._process:
            raise not_the_owner(self.device.device)
        if self._error is not None:
            raise UploadError(
                f"Uploading to {self.device.device} has failed, and the buffer can't be used any more: {self._error}"
            ) from self._error
        if self._ending.is_set():
            raise OwnerGoneError("This buffer is closed. Make a new one.")

    # --------------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        pause = FIRST_PAUSE
        try:
            while not self._ending.wait(pause):
                pause = FIRST_PAUSE if self.advance() else min(2 * pause, LONGEST_PAUSE)
        except BaseException as error:
            self._error = error
            self._ring.end(failed=True)

    def advance(self) -> bool:
        """Publishes what is uploaded and begins to upload what has come; returns whether there was any of it."""
        schema = self._schema.get()
        if schema is None:
            return False
        arena = self.open(schema)
        published = self._publish_uploaded()
        return self._begin_upload(arena) or published

    def _publish_uploaded(self) -> bool:
        published = False
        while self._uploads and self.device.is_done(self._uploads[0].event):
            self._publish(self._uploads.popleft())
            published = True
        return published

    def _publish(self, upload: _Upload) -> None:
        rows, dropped_below = upload.rows, self._ring.dropped_below
        of_ring = self._ring.table
        values = [] if of_ring is None else [as_array(value) for value in of_ring.copy(rows.ids)]
        for number, (trajectory, region) in enumerate(zip(rows.ids.tolist(), upload.regions, strict=True)):
            if region is None:
                continue
            if trajectory < dropped_below:
                self._ledger.give_back(region)
                continue
            fill = None
            if self.table is not None:
                fill = partial(self.table.write, values=[value[number] for value in values])
            self._ledger.publish(
                region,
                int(rows.longest_segments[number]),
                policy_version=int(rows.policy_versions[number]),
                fill=fill,
            )
        self._ring.ledger.take_out(int(rows.ids[-1]) + 1)

    def _begin_upload(self, arena: DeviceArena) -> bool:
        end = self._ring.ledger.next_id
        if self._next == end or len(self._uploads) == MAX_UPLOADS:
            return False
        rows = self._ring.ledger.rows_of(np.arange(self._next, min(end, self._next + MAX_TRAJECTORIES)))
        regions = self._reserve(rows)
        if not regions:
            return False
        rows = rows.select(np.arange(len(regions)))
        margin = self._ledger.margin
        spans = [
            (begin, region.start, region.length + margin)
            for begin, region in zip(rows.starts.tolist(), regions, strict=True)
            if region is not None
        ]
        staged = self._ring.arena
        with self.device.uploading():
            arena.copy_in(spans, staged.stored)
            event = self.device.event()
            self.device.record(event)
        if arena.segment_left is not None and staged.segment_left is not None:
            for begin, to, steps in spans:
                arena.segment_left[to : to + steps - margin] = staged.segment_left[begin : begin + steps - margin]
        self._uploads.append(_Upload(rows, regions, event))
        self._next += len(regions)
        return True

    def _reserve(self, rows: Rows) -> list[Reservation | None]:
        """Regions for the first of ``rows``, as many as go in one upload; none where there is no room at the moment."""
        regions: list[Reservation | None] = []
        taken = sum(int(upload.rows.lengths.sum()) for upload in self._uploads)
        dropped_below = self._ring.dropped_below
        for trajectory, length in zip(rows.ids.tolist(), rows.lengths.tolist(), strict=True):
            if trajectory < dropped_below:
                regions.append(None)
                continue
            if taken and taken + length > self.most_steps:
                break
            try:
                regions.append(self._ledger.reserve(length))
            except TooManyWritersError:  # until what is written directly at the moment is published
                break
            taken += length + self._ledger.margin
        return regions


def not_the_owner(device: torch.device) -> SharingError:
    """Returns what to raise in a process that can't read what lies on the device."""
    return SharingError(
        f"This process, {os.getpid()}, can write to the buffer on {device}, but not read it: only the process that "
        "made it can. Sample there; with a DataLoader, use num_workers=0 (batches are gathered on the device, and need "
        "no workers). To sample in several processes, keep the buffer on the CPU (device='cpu')."
    )
