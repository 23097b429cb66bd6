"""What is asked of a device that trajectories are kept on, and CUDA's answers: all calls of ``torch.cuda`` are here.

Work is handed to a device in streams. What is enqueued on one stream is done in the order in which it was; between
streams there is no order but that of events: an event is *recorded* on a stream behind what was enqueued there, and
another stream that *waits* for it does nothing that is enqueued later before that is done. Neither makes this process
wait. Which stream a thread enqueues on is its own, and its user's, choice (``torch.cuda.stream``).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch

from embodichain_rl.errors import BufferMemoryError, InvalidArgumentError, SharingError, UploadError

__all__ = ["CudaDevice", "Device", "checked_device"]

PORTABLE = 1
"""``cudaHostRegisterPortable``: the memory counts as pinned for every device."""


class Device(ABC):
    """A device, as a storage uses it. There is one such object for each storage, in the process that owns it."""

    device: torch.device

    @abstractmethod
    def empty(self, nbytes: int) -> torch.Tensor:
        """Returns uninitialised bytes, ``uint8`` ``[nbytes]``, on the device.

        Raises:
            BufferMemoryError: when there are not as many left.
        """

    @abstractmethod
    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor that is to be written lies on a device already."""

    @abstractmethod
    def tensor(self, host: torch.Tensor) -> torch.Tensor:
        """Enqueues the copy of a small tensor to the device, and returns it there; ``host`` may change at once."""

    @abstractmethod
    def stream(self) -> Hashable:
        """Returns the stream on which this thread enqueues."""

    @abstractmethod
    def uploading(self) -> AbstractContextManager[Any]:
        """Has this thread enqueue on a stream of the storage's own, within the block."""

    @abstractmethod
    def run(self, operation: Callable[[], Any]) -> None:
        """Enqueues an operation that writes to tensors that are there, or reads them."""

    @abstractmethod
    def event(self) -> Any:
        """Returns a new event, which nobody has to wait for before it is recorded."""

    @abstractmethod
    def record(self, event: Any) -> None:
        """Records an event behind all that is enqueued on this thread's stream."""

    @abstractmethod
    def wait(self, event: Any) -> None:
        """Lets what is enqueued from now on, on this thread's stream, wait for what was last recorded."""

    @abstractmethod
    def is_done(self, event: Any) -> bool:
        """Whether all in front of the event is done; does not wait."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until all that was enqueued on any stream is done."""

    @abstractmethod
    def pin(self, memory: torch.Tensor) -> None:
        """Keeps the pages of host memory where they are, so that copies from it need no copy in between.

        Raises:
            UploadError: when that can't be.
        """

    @abstractmethod
    def unpin(self, memory: torch.Tensor) -> None:
        """Ends what :meth:`pin` began."""


class CudaDevice(Device):
    """A CUDA device.

    Args:
        device: ``"cuda"``, which is the current device when this is made, or with an index.

    Raises:
        SharingError: in a process that was forked after CUDA was used.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            raise SharingError(
                f"{device} can't be used in this process. Was it forked after its parent had used CUDA? Then start it "
                f"with multiprocessing's 'spawn', or make the buffer in the parent. torch says: {error}"
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
                f"bytes ({free / 2**30:.2f} GiB) free. Lower max_total_steps, store less a step (smaller images, fewer "
                "keys, compact=True), or keep the buffer on the CPU (device='cpu')."
            ) from error

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def tensor(self, host: torch.Tensor) -> torch.Tensor:
        # Pinned memory comes from torch's pool, which keeps it until the copy is done.
        return host.pin_memory().to(self.device, non_blocking=True)

    def stream(self) -> Hashable:
        return torch.cuda.current_stream(self.device)

    def uploading(self) -> AbstractContextManager[Any]:
        if self._uploads is None:
            self._uploads = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self._uploads)

    def run(self, operation: Callable[[], Any]) -> None:
        operation()

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def record(self, event: torch.cuda.Event) -> None:
        event.record(torch.cuda.current_stream(self.device))

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def is_done(self, event: torch.cuda.Event) -> bool:
        return event.query()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def pin(self, memory: torch.Tensor) -> None:
        result = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE))
        if result != 0:
            # The runtime reports a failed call once more, at the next launch of a kernel, and then forgets it.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self.device)
            raise UploadError(f"cudaHostRegister of {memory.nbytes:,} bytes returned the error {result}.")

    def unpin(self, memory: torch.Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def checked_device(name: str, device: Any) -> torch.device:
    """Returns a device that trajectories can be kept on.

    Args:
        name: the argument's, as the caller of the public function knows it.
        device: what was given for it.

    Raises:
        InvalidArgumentError: when torch does not know it, it is neither the CPU nor a CUDA device, or is not there.

    Example:
        >>> checked_device("device", "cpu")
        device(type='cpu')
    """
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(f"Got {name}={device!r}, which torch does not know: {error}") from error
    if checked.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"Got {name}={device!r}; trajectories are kept on a CUDA device, or use 'cpu'.")
    if checked.type == "cuda":
        _check_is_there(name, device, checked)
    return checked


def _check_is_there(name: str, given: Any, device: torch.device) -> None:
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} sees no device"
        raise InvalidArgumentError(
            f"Got {name}={given!r}, but this torch {torch.__version__} {why}. Install a torch for CUDA and a driver "
            "(nvidia-smi shows the devices), or use 'cpu'."
        )
    count, index = torch.cuda.device_count(), _index_of(device)
    if index is not None and index >= count:
        raise InvalidArgumentError(
            f"Got {name}={given!r}, but there are {count} CUDA devices, 0 to {count - 1}. CUDA_VISIBLE_DEVICES says "
            "which are seen."
        )


def _index_of(device: torch.device) -> int | None:
    return device.index  # None for the current one, which torch's types do not say
