"""A Ctrl-C in the terminal is the owner's: its children must not die of it, each with a traceback of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

__all__ = ["leave_foreground", "without_ctrl_c"]


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Blocks SIGINT in this thread and, for good, in the processes that it starts meanwhile.

    The terminal sends it to all of its foreground processes, also to one that has only begun to import what it needs.
    A server that processes are forked from (``forkserver``) hands on what it was itself started with.
    """
    resource_tracker.ensure_running()  # else it is started with the first process, and unblocks SIGINT then
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_foreground() -> None:
    """Makes this process a group of its own that ignores Ctrl-C, and can be ended with all that a simulator starts."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
