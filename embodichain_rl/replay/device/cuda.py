"""The interface to a device that trajectories are kept on, and its implementation for CUDA.

All calls of ``torch.cuda`` are in this file. :class:`Device` is abstract, so that tests can simulate a device.

Operations are enqueued on *streams*. The operations of one stream run in the order in which they were enqueued. Only
*events* order the operations of different streams. An event is *recorded* on a stream behind all operations that were
enqueued there. If another stream then *waits* for the event, its later operations start only when those operations are
done. Neither call blocks the calling thread. Each thread has a current stream, which the user chooses
(``torch.cuda.stream``).
"""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import (
    BufferMemoryError,
    InvalidArgumentError,
    SharingError,
    UnsupportedOperationError,
    UploadError,
)
from embodichain_rl.replay.device.gathering import STEPS, GatherPlan, Output

__all__ = ["CudaDevice", "Device", "checked_device"]

PORTABLE = 1
"""``cudaHostRegisterPortable``: the memory is pinned for every device."""


class Device(ABC):
    """A device, as a storage uses it. Each storage has one such object, in the process that owns the storage."""

    device: torch.device

    gathers: bool
    """Whether :meth:`gather` works here. If not, batches are made by one operation for each kind of entries."""

    @abstractmethod
    def empty(self, nbytes: int) -> torch.Tensor:
        """Return uninitialised memory on the device, ``uint8`` ``[nbytes]``.

        Raises:
            BufferMemoryError: if the device does not have enough free memory.
        """

    @abstractmethod
    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor that a caller wants to write is already on a device."""

    @abstractmethod
    def tensor(self, host: torch.Tensor) -> torch.Tensor:
        """Enqueue the copy of a small tensor to the device and return the copy. ``host`` may change at once."""

    @abstractmethod
    def stream(self) -> Hashable:
        """Return the current stream of this thread."""

    @abstractmethod
    def uploading(self) -> AbstractContextManager[Any]:
        """Return a context manager that makes the storage's own upload stream the current stream of this thread."""

    @abstractmethod
    def run(self, operation: Callable[[], Any]) -> None:
        """Enqueue an operation that reads or writes tensors on the device."""

    @abstractmethod
    def gather(
        self,
        plan: GatherPlan,
        packet: Sequence[np.ndarray],
        addresses: np.ndarray,
        memory: Sequence[torch.Tensor],
        stream: Hashable,
    ) -> None:
        """Enqueue the copies of all outputs of a plan.

        Args:
            plan: what is copied.
            packet: the parts of the packet, ``int64`` each. They may change at once.
            addresses: where each output of the plan begins, ``int64``.
            memory: the tensors that these addresses are in.
            stream: the current stream of this thread.
        """

    @abstractmethod
    def event(self) -> Any:
        """Return a new event. Waiting for it has no effect before it is recorded."""

    @abstractmethod
    def record(self, event: Any, stream: Hashable) -> None:
        """Record an event behind all operations on a stream, which is the current one of this thread."""

    @abstractmethod
    def wait(self, event: Any, stream: Hashable) -> None:
        """Let later operations on a stream, the current one of this thread, wait for the last record of an event."""

    @abstractmethod
    def is_done(self, event: Any) -> bool:
        """Return whether all operations in front of the event are done. Does not block."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until all operations on all streams are done."""

    @abstractmethod
    def pin(self, memory: torch.Tensor) -> None:
        """Pin host memory, so that it is copied to the device without an intermediate copy.

        Raises:
            UploadError: if the memory cannot be pinned.
        """

    @abstractmethod
    def unpin(self, memory: torch.Tensor) -> None:
        """Unpin memory that :meth:`pin` has pinned."""


class CudaDevice(Device):
    """A CUDA device.

    Args:
        device: ``"cuda"`` for the current device at this moment, or a device with an index.

    Raises:
        SharingError: if the process was forked after its parent had used CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            raise SharingError(
                f"{device} cannot be used in this process. If it was forked after its parent had used CUDA, start it "
                f"with multiprocessing's 'spawn', or make the buffer in the parent. torch's error: {error}"
            ) from error
        index = _index_of(device)
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self._uploads: torch.cuda.Stream | None = None

    def empty(self, nbytes: int) -> torch.Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as error:
            free, _ = torch.cuda.mem_get_info(self.device)
            raise BufferMemoryError(
                f"The buffer needs {nbytes:,} bytes ({nbytes / 2**30:.2f} GiB) on {self.device}, which has {free:,} "
                f"bytes ({free / 2**30:.2f} GiB) free. Lower max_total_steps, store less per step (smaller images, "
                "fewer keys, compact=True), or keep the buffer on the CPU (device='cpu')."
            ) from error

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def tensor(self, host: torch.Tensor) -> torch.Tensor:
        self._refuse_capture()
        # torch's pool of pinned memory does not reuse this block before the copy is done.
        return host.pin_memory().to(self.device, non_blocking=True)

    @staticmethod
    def _refuse_capture() -> None:
        if torch.cuda.is_current_stream_capturing():
            raise UnsupportedOperationError(
                "Got a read of the buffer while a CUDA graph is captured. Chunks are drawn on the host, so that each "
                "replay would return the same ones. Capture the training step on a batch in memory of its own; before "
                "each replay, sample and copy the new batch there: static.update_(rb.sample())."
            )

    def stream(self) -> Hashable:
        return torch.cuda.current_stream(self.device)

    def uploading(self) -> AbstractContextManager[Any]:
        if self._uploads is None:
            self._uploads = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self._uploads)

    def run(self, operation: Callable[[], Any]) -> None:
        operation()

    @cached_property
    def gathers(self) -> bool:  # type: ignore[override]
        try:
            from embodichain_rl.replay.device.triton_gather import TritonGather

            self._prepare = TritonGather
            self._try_gather()
        except Exception as error:  # of Triton, of the compiler that it calls, or of the driver
            warnings.warn(
                f"Batches on {self.device} are gathered by several operations, which takes a few times as long, "
                f"because Triton does not work: {type(error).__name__}: {error}. It comes with torch for CUDA, and "
                "needs a C compiler (apt-get install gcc, or set CC).",
                stacklevel=2,
            )
            return False
        return True

    def _try_gather(self) -> None:
        """Gather two steps of a column, so that the kernel is compiled, and what fails does so here."""
        column = torch.arange(4, dtype=torch.float64, device=self.device)
        copies = torch.empty(1, 2, dtype=torch.float64, device=self.device)
        plan = GatherPlan(1, 2, [Output(STEPS, 8, 2, column)], GatherPlan.drawn_bytes(1))
        draws = np.array([0, 1, 0, 0, 0, 1])  # from the third step on
        self.gather(plan, [draws], np.array([copies.data_ptr()]), [copies], self.stream())
        if copies.tolist() != [[2.0, 3.0]]:
            raise UploadError(f"it has copied {copies.tolist()} instead of [[2.0, 3.0]]")

    def gather(
        self,
        plan: GatherPlan,
        packet: Sequence[np.ndarray],
        addresses: np.ndarray,
        memory: Sequence[torch.Tensor],
        stream: Hashable,
    ) -> None:
        if torch.cuda.current_device() != self.device.index:  # that on which Triton launches
            with torch.cuda.device(self.device):
                self.gather(plan, packet, addresses, memory, stream)
            return
        on_device = self.tensor(torch.from_numpy(np.concatenate([*packet, addresses])))
        assert isinstance(stream, torch.cuda.Stream), "from stream()"
        if plan.prepared is None:
            plan.prepared = self._prepare(plan, self.device, stream)
        plan.prepared(on_device, stream)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def record(self, event: torch.cuda.Event, stream: Hashable) -> None:
        assert isinstance(stream, torch.cuda.Stream), "from stream()"
        event.record(stream)

    def wait(self, event: torch.cuda.Event, stream: Hashable) -> None:
        assert isinstance(stream, torch.cuda.Stream), "from stream()"
        stream.wait_event(event)

    def is_done(self, event: torch.cuda.Event) -> bool:
        return event.query()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def pin(self, memory: torch.Tensor) -> None:
        result = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE))
        if result != 0:
            # The CUDA runtime reports a failed call a second time at the next kernel launch. This launch clears it.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self.device)
            raise UploadError(f"cudaHostRegister of {memory.nbytes:,} bytes returned error {result}.")

    def unpin(self, memory: torch.Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def checked_device(name: str, device: Any) -> torch.device:
    """Check that trajectories can be kept on a device, and return it as a ``torch.device``.

    Args:
        name: name of the argument, for error messages.
        device: value of the argument.

    Raises:
        InvalidArgumentError: if torch does not know the device, if it is neither the CPU nor a CUDA device, or if this
            machine does not have it.

    Example:
        >>> checked_device("device", "cpu")
        device(type='cpu')
    """
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(f"Got {name}={device!r}, which is no torch device: {error}") from error
    if checked.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(
            f"Got {name}={device!r}, but trajectories are kept on a CUDA device or on the CPU. Use a CUDA device such "
            "as 'cuda:0', or use 'cpu'."
        )
    if checked.type == "cuda":
        _check_exists(name, device, checked)
    return checked


def _check_exists(name: str, given: Any, device: torch.device) -> None:
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} sees no device"
        raise InvalidArgumentError(
            f"Got {name}={given!r}, but this torch {torch.__version__} {why}. Install a torch for CUDA and a driver "
            "(nvidia-smi shows the devices), or use 'cpu'."
        )
    count, index = torch.cuda.device_count(), _index_of(device)
    if index is not None and index >= count:
        raise InvalidArgumentError(
            f"Got {name}={given!r}, but there are {count} CUDA devices, 0 to {count - 1}. Use one of them; "
            "CUDA_VISIBLE_DEVICES selects the visible devices."
        )


def _index_of(device: torch.device) -> int | None:
    return device.index  # None for the current device, which torch's type annotations do not say
