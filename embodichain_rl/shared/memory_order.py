"""Memory barriers between processes, for processors with a weaker memory order than x86-64.

Readers of the ledger take no lock. So they depend on two orders: in which order a writer's stores become visible, and
in which order their own loads are made. x86-64 keeps both in program order (total store order), and needs no barrier.

On other processors, such as ARM, a writer calls ``membarrier(2)`` between two stores whose order matters. Before the
call returns, every thread of every process that maps a ledger has passed a full memory barrier. This gives two
guarantees:

* A reader that sees the second store makes all its later loads after the first store.
* A reader that made a load before the call has not seen any store that follows the call.

So the cost is all on the writer's side. A reader only registers once per process.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

from embodichain_rl.errors import SharingError

__all__ = ["Membarrier", "register_for_barriers", "write_barrier"]

_CALLS = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "loongarch64": 283, "ppc64le": 365, "s390x": 356}
"""Number of the system call ``membarrier``, by machine."""

_GLOBAL_EXPEDITED, _REGISTER_GLOBAL_EXPEDITED = 2, 4
"""Commands of ``membarrier(2)``."""


class Membarrier:
    """The system call ``membarrier(2)``.

    Raises:
        SharingError: if the machine is unknown, or its kernel does not have the call (Linux 4.16).

    Example:
        >>> barrier = Membarrier()
        >>> barrier.register()
        >>> barrier()
    """

    def __init__(self) -> None:
        number = _CALLS.get(platform.machine())
        if number is None:
            raise SharingError(
                f"Got a machine of type {platform.machine()!r}, for which the number of the system call membarrier(2) "
                f"is unknown. A buffer can be shared on {[*_CALLS]}."
            )
        self._number = number
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall

    def register(self) -> None:
        """Include the threads of this process in the barriers of other processes."""
        self._call(_REGISTER_GLOBAL_EXPEDITED)

    def __call__(self) -> None:
        """Wait until every thread of every registered process, and this thread, has passed a full barrier."""
        self._call(_GLOBAL_EXPEDITED)

    def _call(self, command: int) -> None:
        if self._syscall(self._number, command, 0, 0) != 0:
            raise SharingError(
                f"membarrier(2) failed: {os.strerror(ctypes.get_errno())}. This processor needs the call to share a "
                "buffer between processes. Use Linux 4.16 or later."
            )


_barrier = Membarrier() if sys.platform == "linux" and platform.machine() != "x86_64" else None


def register_for_barriers() -> None:
    """Include this process in the barriers of others. Every process that maps a ledger must call this."""
    if _barrier is not None:
        _barrier.register()


def write_barrier() -> None:
    """Make all earlier stores of this thread visible to other processes before any later store."""
    if _barrier is not None:
        _barrier()


os.register_at_fork(after_in_child=register_for_barriers)
