"""The order of reads and writes of one arena by several streams of a device."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from embodichain_rl.replay.device.cuda import Device

__all__ = ["StreamOrder"]


class StreamOrder:
    """Remembers, of each stream, the last of its reads and the last of its writes, and lets others wait for them.

    **Why a chunk that is found valid is whole.** A reader reads the rows, enqueues its gather, records an event behind
    it (:meth:`after_reading`), and only then asks the ledger whether the rows are still its own. A writer has the
    ledger take the rows back first, and only then looks for events (:meth:`before_writing`). Both go by way of the
    ledger: if the reader still found its rows, they were taken back after its check, hence after its event was
    recorded, hence the writer has seen the event, and its stream does not overwrite the steps before the gather has
    read them. If it did not find them, what it gathered may be anything, and is drawn again. No thread waits for the
    device on either way.

    **Why what is published is there.** Uploads are published when their event is done, seen by this process, so that
    whatever is enqueued later finds them. What the owner writes on a stream of its own is published before it is there:
    readers on other streams wait for the last write of each (:meth:`before_reading`), which was recorded before it was
    published, and so before they could read its row.

    The methods enqueue, and are called by a thread with its own stream. There are as many events as streams: an event
    that is recorded anew covers all that was in front of it before.

    Args:
        device: whose streams they are.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._reads: dict[Hashable, Any] = {}
        self._writes: dict[Hashable, Any] = {}

    def before_reading(self) -> None:
        """Lets this stream wait for what other streams have written."""
        self._wait_for(self._writes)

    def after_reading(self) -> None:
        """Notes that this stream has read."""
        self._record(self._reads)

    def before_writing(self) -> None:
        """Lets this stream wait for what other streams have read or written."""
        self._wait_for(self._reads)
        self._wait_for(self._writes)

    def after_writing(self) -> None:
        """Notes that this stream has written."""
        self._record(self._writes)

    def _wait_for(self, events: dict[Hashable, Any]) -> None:
        if events:
            own = self._device.stream()
            for stream, event in list(events.items()):
                if stream != own:
                    self._device.wait(event)

    def _record(self, events: dict[Hashable, Any]) -> None:
        stream = self._device.stream()
        event = events.get(stream)
        if event is None:  # another thread may come by on the same stream: they must take the same
            event = events.setdefault(stream, self._device.event())
        self._device.record(event)
