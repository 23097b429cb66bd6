"""The order of reads and writes of an arena on different streams of a device."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from embodichain_rl.replay.device.cuda import Device

__all__ = ["StreamOrder"]


class StreamOrder:
    """The last read and the last write of each stream, as events that other streams wait for.

    **Why a valid chunk is intact.** A reader works in this order:

    1. It reads the rows from the ledger.
    2. It enqueues its gather and records an event behind it (:meth:`reading`).
    3. It checks in the ledger that the rows still carry its ids.

    A writer first reserves a region, which clears the ids of the rows whose steps are reused. Then its stream waits for
    all events (:meth:`before_writing`). If the reader still finds the ids, they are cleared after its check, so after
    its event was recorded. Then the writer sees the event, and its stream does not overwrite the steps before the
    gather has read them. If the reader does not find the ids, its gather may return anything, and it draws again. In
    both cases no thread waits for the device.

    **Why the steps of a published trajectory are present.** An upload is published after the owner has seen that its
    event is done. So every later operation finds the steps. A direct write on the owner's current stream is published
    before its copies are done. But its event is recorded before the publication, so before any reader can read the row.
    Readers on other streams wait for this event (:meth:`reading`).

    All methods enqueue operations on the current stream of the calling thread and do not block. Each stream has one
    event for its reads and one for its writes. Recording an event again is enough, because the new record lies behind
    all earlier operations of the stream.

    Args:
        device: the device of the streams.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._reads: dict[Hashable, Any] = {}
        self._writes: dict[Hashable, Any] = {}

    @contextmanager
    def reading(self) -> Iterator[Hashable]:
        """Let the current stream wait for the writes of other streams; afterwards, record that it has read.

        It yields the current stream.
        """
        stream = self._device.stream()
        self._wait_for(self._writes, stream)
        yield stream
        self._record(self._reads, stream)

    def before_writing(self) -> None:
        """Let the current stream wait for the reads and writes of other streams."""
        stream = self._device.stream()
        self._wait_for(self._reads, stream)
        self._wait_for(self._writes, stream)

    def after_writing(self) -> None:
        """Record that the current stream has written."""
        self._record(self._writes, self._device.stream())

    def _wait_for(self, events: dict[Hashable, Any], current: Hashable) -> None:
        for stream, event in list(events.items()):
            if stream != current:
                self._device.wait(event, current)

    def _record(self, events: dict[Hashable, Any], stream: Hashable) -> None:
        event = events.get(stream)
        if event is None:  # setdefault: threads on the same stream must use the same event
            event = events.setdefault(stream, self._device.event())
        self._device.record(event, stream)
