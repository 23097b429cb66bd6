"""Handling of Ctrl-C: only the engine's owner reacts to it, so that its child processes print no tracebacks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

__all__ = ["leave_foreground", "without_ctrl_c"]


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Block SIGINT in this thread during the context, and permanently in the processes that it starts.

    The terminal sends SIGINT to all foreground processes, even to one that is still importing modules. The processes
    of a ``forkserver`` inherit the signal mask with which the server was started.
    """
    resource_tracker.ensure_running()  # otherwise it starts with the first process, and unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_foreground() -> None:
    """Move this process to a new process group that ignores Ctrl-C.

    The group can be killed together with all processes that a simulator has started.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
