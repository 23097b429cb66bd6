"""Handling of Ctrl-C: only the engine's owner reacts to it, so that its child processes print no tracebacks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from embodichain_rl.errors import EngineStateError

__all__ = ["leave_foreground", "starting_processes"]


@contextmanager
def starting_processes() -> Iterator[None]:
    """Start processes of the engine in the ``with`` block. Ctrl-C does not reach them.

    Raises:
        EngineStateError: this process may not start processes.
    """
    _check_may_start_processes()
    with _without_ctrl_c():
        yield


def _check_may_start_processes() -> None:
    """Check that multiprocessing lets this process start others.

    Raises:
        EngineStateError: this process is daemonic, or was started by another library in a way of its own.
    """
    process = multiprocessing.current_process()
    if process.daemon:
        raise EngineStateError(
            f"The engine is started in {process.name}, a daemonic process, which may not start processes of its own. "
            "(Workers of a DataLoader or of a multiprocessing.Pool are daemonic, and so is Process(..., daemon=True).) "
            "Start the engine in the main process, or in one with daemon=False, and pass the engine, or a dataset of "
            "it, to this process as an argument."
        )
    method = multiprocessing.get_start_method(allow_none=True)
    if method not in (None, *multiprocessing.get_all_start_methods()):
        raise EngineStateError(
            f"The engine is started in {process.name}, which has the start method {method!r} of a library such as "
            "joblib, so that it can't start processes of multiprocessing. Start the engine in the main process; or "
            "give the library threads (for joblib: backend='threading')."
        )


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
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
