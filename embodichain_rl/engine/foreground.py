"""Signals to a whole job: only the engine's owner reacts to them, and its child processes end when it ends them.

Ctrl-C, `scancel`, systemd and others send a signal to every process of a job. If the workers died of it, or printed
tracebacks, the owner could not react to it as its program wants.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from embodichain_rl.errors import EngineStateError

__all__ = ["MARK", "leave_foreground", "starting_processes"]

OWNERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that end or notify a job. Its owner reacts to them."""

_TERMINAL_SIGNALS = (signal.SIGTTOU, signal.SIGTTIN)
"""The signals by which a terminal stops a process of a background group."""

MARK = "EMBODICHAIN_RL_STARTED_BY"
"""The environment variable by which the programs are found that a child process has started and not ended."""


@contextmanager
def starting_processes() -> Iterator[None]:
    """Start processes of the engine in the ``with`` block. Signals to the whole job do not reach them.

    Raises:
        EngineStateError: this process may not start processes.
    """
    _check_may_start_processes()
    with _without_signals():
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
def _without_signals() -> Iterator[None]:
    """Block the signals that belong to the owner in this thread, and in the processes that it starts meanwhile.

    They arrive at every process of a job, even at one that is still importing modules. A process that is started
    unblocks them in :func:`leave_foreground`. Under ``forkserver``, the server keeps the mask with which it was
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


def leave_foreground(mark: str) -> None:
    """Move this process to a process group of its own, and leave the signals that end or notify a job to its owner.

    * The group can be killed together with all processes that a simulator has started.
    * A signal to every process of the job is handled by the owner alone, which stops its workers. It is not ignored
      here, since that would be inherited by programs that this process starts: these react to it as they always do.
    * The terminal does not stop this process where it sets terminal attributes or reads; a read raises an error.

    Args:
        mark: the value of the environment variable ``MARK`` in the programs that this process starts.
    """
    os.setpgid(0, 0)
    for number in _TERMINAL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for number in OWNERS_SIGNALS:
        # Under nohup, a simulator must ignore the hang-up too.
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave_to_owner)
            signal.siginterrupt(number, False)
    os.register_at_fork(after_in_child=_restore_default_actions)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OWNERS_SIGNALS)
    os.environ[MARK] = mark


def _leave_to_owner(number: int, frame: FrameType | None) -> None:
    """Do nothing: the owner of this process reacts to the signal."""


def _restore_default_actions() -> None:
    """Let a forked child of this process react to signals as a process that it has executed."""
    for number in OWNERS_SIGNALS:
        if signal.getsignal(number) is _leave_to_owner:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
