"""Signals to a whole job: the process that owns the others reacts to them, and its child processes leave them to it.

Ctrl-C, ``scancel``, systemd and others send a signal to every process of a job. If the child processes ended by it, or
printed tracebacks, their owner could not react to it as its program wants.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

__all__ = ["leave_signals_to_owner", "without_owners_signals"]

OWNERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that end or notify a job."""


@contextmanager
def without_owners_signals() -> Iterator[None]:
    """Block the signals that belong to the owner in this thread, and in the processes that it starts meanwhile.

    They arrive at every process of a job, even at one that is still importing modules. A process that is started
    unblocks them in :func:`leave_signals_to_owner`. Under ``forkserver``, the server keeps the mask with which it was
    started, and the processes that it forks get that of the thread that asks for them (``_orphans.py``).
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OWNERS_SIGNALS)
    try:
        # Started first: it unblocks some of them in this thread, and would end by the others.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, OWNERS_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_owner() -> None:
    """Let this process do nothing at signals to the whole job.

    They are not ignored, since that would be inherited by programs that this process starts: these react to them as
    they always do. Called on the main thread.
    """
    for number in OWNERS_SIGNALS:
        # Under nohup, a program that this process starts must ignore the hang-up too.
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave_to_owner)
            signal.siginterrupt(number, False)
    os.register_at_fork(after_in_child=_restore_default_actions)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OWNERS_SIGNALS)


def _leave_to_owner(number: int, frame: FrameType | None) -> None:
    """Do nothing: the owner of this process reacts to the signal."""


def _restore_default_actions() -> None:
    """Let a forked child of this process react to signals as a process that it has executed."""
    for number in OWNERS_SIGNALS:
        if signal.getsignal(number) is _leave_to_owner:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
