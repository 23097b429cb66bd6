"""The order of loads and stores between processes, on processors that do not keep it by themselves.

Readers of the ledger take no lock, so what they see depends on the order in which the stores of a writer reach them,
and in which their own loads are made. x86-64 keeps both as written (total store order), and nothing is done there. On
others, such as ARM, a writer calls ``membarrier(2)`` between two stores that must not be seen the other way round:
every thread of every process that maps a ledger passes a full memory barrier before the call returns. So a reader that
sees the second store has made all its later loads after the first one, and a reader that made a load before the call
has not seen what was stored after it. Readers do nothing for it but to register once.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

from embodichain_rl.errors import SharingError

__all__ = ["Membarrier", "keep_order", "take_part_in_order"]

_CALLS = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "loongarch64": 283, "ppc64le": 365, "s390x": 356}
"""The number of the system call, by machine."""

_GLOBAL_EXPEDITED, _REGISTER_GLOBAL_EXPEDITED = 2, 4


class Membarrier:
    """The system call ``membarrier(2)``.

    Raises:
        SharingError: the machine is not known, or its kernel lacks the call (Linux 4.16).

    Example:
        >>> barrier = Membarrier()
        >>> barrier.register()
        >>> barrier()
    """

    def __init__(self) -> None:
        number = _CALLS.get(platform.machine())
        if number is None:
            raise SharingError(
                f"This machine is a {platform.machine()!r}, whose way to order memory between processes is not known "
                f"here; known are {[*_CALLS]}."
            )
        self._number = number
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall

    def register(self) -> None:
        """Has the threads of this process take part in the barriers of others."""
        self._call(_REGISTER_GLOBAL_EXPEDITED)

    def __call__(self) -> None:
        """Returns when every thread that takes part has passed a full barrier, this one included."""
        self._call(_GLOBAL_EXPEDITED)

    def _call(self, command: int) -> None:
        if self._syscall(self._number, command, 0, 0) != 0:
            raise SharingError(
                f"membarrier(2) failed: {os.strerror(ctypes.get_errno())}. This processor needs it to share a buffer "
                "between processes; it came with Linux 4.16."
            )


_barrier = Membarrier() if sys.platform == "linux" and platform.machine() != "x86_64" else None


def take_part_in_order() -> None:
    """Has this process see the stores of others in order. Called by whoever maps a ledger."""
    if _barrier is not None:
        _barrier.register()


def keep_order() -> None:
    """Has nobody see a store from here on before one from before."""
    if _barrier is not None:
        _barrier()


os.register_at_fork(after_in_child=take_part_in_order)
