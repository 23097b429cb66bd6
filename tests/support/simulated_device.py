"""A device made of streams that do nothing until they are let, so that everything can happen in any order.

What is enqueued is kept, stream by stream, and done when the test says so: in the order in which it was enqueued on
its stream, and not before the events that its stream waits for. Where a device is free to do something late, this one
can be made to do it as late as possible. The memory is that of the CPU.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import BufferMemoryError, UploadError
from embodichain_rl.replay.device.cuda import Device
from embodichain_rl.replay.device.gathering import IDS, OFFSETS, VALUES, GatherPlan

UPLOADS = "uploads"


class Event:
    """Done when as many operations of its stream are done as were enqueued when it was recorded."""

    def __init__(self) -> None:
        self.point: tuple[Stream, int] | None = None

    def is_done(self) -> bool:
        return self.point is None or self.point[0].done >= self.point[1]


class Stream:
    """What is enqueued on one stream."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], Any] | tuple[Stream, int]] = deque()
        self.enqueued = self.done = 0

    def step(self) -> bool:
        """Does the next operation, unless there is none or it has to wait; returns whether it did."""
        if not self.waiting:
            return False
        following = self.waiting[0]
        if isinstance(following, tuple):
            if following[0].done < following[1]:
                return False
        else:
            following()
        self.waiting.popleft()
        self.done += 1
        return True


def _gather(plan: GatherPlan, packet: np.ndarray, addresses: np.ndarray, memory: Sequence[torch.Tensor]) -> None:
    """What the kernel of a device does, see ``triton_gather.py``; ``memory`` is what the addresses are in."""
    count = plan.count
    ids, starts, _, _, _, offsets = packet[: 6 * count].reshape(6, count)
    for output, address in zip(plan.outputs, addresses.tolist(), strict=True):
        shape = (count, output.repeats, output.step_bytes)
        if output.kind == IDS:
            copied: np.ndarray = np.repeat(ids, output.repeats)
        elif output.kind == OFFSETS:
            copied = offsets[:, None] + np.arange(output.repeats)
        elif output.kind == VALUES:
            at = output.packet_offset
            values = packet.view(np.uint8)[at : at + count * output.step_bytes].reshape(count, 1, output.step_bytes)
            copied = np.broadcast_to(values, shape)
        else:
            column = _bytes_at(output.source.data_ptr(), output.source.nbytes).reshape(-1, output.step_bytes)
            copied = column[(starts + offsets)[:, None] + np.arange(output.repeats)]
        target = _bytes_at(address, count * output.chunk_bytes)
        target[:] = np.ascontiguousarray(copied).reshape(-1).view(np.uint8)
    assert memory, "kept until here"


def _bytes_at(address: int, nbytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=np.uint8)


class SimulatedDevice(Device):
    """See the module.

    Args:
        eager: whether all is done at once, as far as it need not wait.
        capacity: bytes that :meth:`empty` gives.
        direct: whether tensors that are written count as lying on the device.
        gathers: whether it has a gather of all entries of a batch.
    """

    def __init__(
        self, *, eager: bool = True, capacity: int = 1 << 30, direct: bool = False, gathers: bool = True
    ) -> None:
        self.device = torch.device("cpu")
        self.eager, self.capacity, self.direct = eager, capacity, direct
        self.gathers = gathers
        self.held: set[Hashable] = set()
        self.streams: dict[Hashable, Stream] = {}
        self.operations = 0
        self.pinned = 0
        self.can_pin = True
        self.error: Exception | None = None
        self.interrupt: Callable[[], Any] | None = None
        """Called, once, before something is enqueued the next time: what another thread does at that moment."""
        self._of_thread = threading.local()
        self._mutex = threading.RLock()

    # ------------------------------------------------------------------------------------------- what a storage asks

    def empty(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.capacity:
            raise BufferMemoryError(f"The buffer needs {nbytes:,} bytes, and {self.capacity:,} are free.")
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def holds(self, tensor: torch.Tensor) -> bool:
        return self.direct

    def tensor(self, host: torch.Tensor) -> torch.Tensor:
        return host.clone()

    def stream(self) -> Hashable:
        return getattr(self._of_thread, "stream", "default")

    @contextmanager
    def using(self, stream: Hashable) -> Iterator[None]:
        """Has this thread enqueue on another stream, as ``torch.cuda.stream`` does."""
        before = self.stream()
        self._of_thread.stream = stream
        try:
            yield
        finally:
            self._of_thread.stream = before

    @contextmanager
    def uploading(self) -> Iterator[None]:
        with self.using(UPLOADS):
            yield

    def run(self, operation: Callable[[], Any]) -> None:
        if self.error is not None:
            raise self.error
        self._enqueue(operation)

    def gather(
        self,
        plan: GatherPlan,
        packet: Sequence[np.ndarray],
        addresses: np.ndarray,
        memory: Sequence[torch.Tensor],
        stream: Hashable,
    ) -> None:
        assert stream == self.stream()
        self.run(partial(_gather, plan, np.concatenate(packet), addresses.copy(), list(memory)))

    def event(self) -> Event:
        return Event()

    def record(self, event: Event, stream: Hashable) -> None:
        assert stream == self.stream()
        self._be_interrupted()
        with self._mutex:
            current = self._current()
            event.point = current, current.enqueued

    def wait(self, event: Event, stream: Hashable) -> None:
        assert stream == self.stream()
        if event.point is not None:
            self._enqueue(event.point)

    def is_done(self, event: Event) -> bool:
        return event.is_done()

    def synchronize(self) -> None:
        self.held.clear()
        self.finish()

    def pin(self, memory: torch.Tensor) -> None:
        if not self.can_pin:
            raise UploadError("cudaHostRegister returned the error 2.")
        self.pinned += memory.nbytes

    def unpin(self, memory: torch.Tensor) -> None:
        self.pinned -= memory.nbytes

    # ------------------------------------------------------------------------------------------- what a test lets it do

    def _current(self) -> Stream:
        return self.streams.setdefault(self.stream(), Stream())

    def _be_interrupted(self) -> None:
        if self.interrupt is not None:
            interrupt, self.interrupt = self.interrupt, None
            with self.using("default"):
                interrupt()

    def _enqueue(self, operation: Callable[[], Any] | tuple[Stream, int]) -> None:
        self._be_interrupted()
        with self._mutex:
            stream = self._current()
            stream.waiting.append(operation)
            stream.enqueued += 1
            self.operations += callable(operation)
            if self.eager:
                self.finish()

    def hold(self, stream: Hashable) -> None:
        """Does nothing more of what is enqueued on a stream."""
        with self._mutex:
            self.held.add(stream)

    def release(self, stream: Hashable) -> None:
        """Does what is enqueued on a stream, and what has waited for it."""
        with self._mutex:
            self.held.discard(stream)
            self.finish()

    def finish(self) -> None:
        """Does all that need not wait for a stream that is held."""
        with self._mutex:
            while any(stream.step() for name, stream in list(self.streams.items()) if name not in self.held):
                pass

    def step(self, stream: Hashable) -> bool:
        """Does one operation of a stream, if it may."""
        with self._mutex:
            return self.streams.setdefault(stream, Stream()).step()

    def waiting(self, stream: Hashable) -> int:
        """How many operations of a stream are not done."""
        with self._mutex:
            return len(self.streams.setdefault(stream, Stream()).waiting)

    def __reduce__(self) -> Any:
        return SimulatedDevice, ()
