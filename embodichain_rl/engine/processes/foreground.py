"""How the engine starts its child processes, and how they leave the foreground of the terminal and of the job."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from embodichain_rl.errors import EngineStateError
from embodichain_rl.shared import leave_signals_to_owner, processes_with, without_owners_signals

__all__ = ["end_process_group", "kill_marked", "leave_foreground", "starting_processes"]

PIPES_OF_A_START = 32
"""More than the start of a worker takes with its queues, since other threads may open files at the same time."""

_TERMINAL_SIGNALS = (signal.SIGTTOU, signal.SIGTTIN)
"""The signals by which a terminal stops a process of a background group."""

MARK = "EMBODICHAIN_RL_STARTED_BY"
"""The environment variable by which the programs are found that a child process has started and not ended."""


@contextmanager
def starting_processes() -> Iterator[None]:
    """Start processes of the engine in the ``with`` block. Signals to the whole job do not reach them.

    Raises:
        EngineStateError: this process may not start processes.
        OSError: this process may not open the files that the start of another one takes.
    """
    _check_may_start_processes()
    _check_open_files()
    with without_owners_signals():
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


def _check_open_files() -> None:
    """Check that this process may open the files that the start of another one takes.

    A fork server ends, and with it all that it has started, if a client connects to it that can't open its pipes then.
    """
    opened: list[int] = []
    try:
        for _ in range(PIPES_OF_A_START):
            opened += os.pipe()
    finally:
        for file in opened:
            os.close(file)


def leave_foreground(mark: str) -> None:
    """Move this process to a process group of its own, and leave the signals that end or notify a job to its owner.

    * The group can be killed together with all processes that a simulator has started.
    * A signal to every process of the job is handled by the owner alone, which stops its workers.
    * The terminal does not stop this process where it sets terminal attributes or reads; a read raises an error.

    Args:
        mark: the value of the environment variable ``MARK`` in the programs that this process starts.
    """
    os.setpgid(0, 0)
    for number in _TERMINAL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ[MARK] = mark
    leave_signals_to_owner()


def kill_marked(mark: str) -> list[int]:
    """Kill the programs that were started by a process with this mark, and return their ids.

    Raises:
        OSError: this process can open no more files.
    """
    found = processes_with(MARK, mark)
    for pid in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return found


def end_process_group() -> None:
    """Kill this process, which has left the foreground, and all that it has started."""
    with contextlib.suppress(OSError):
        kill_marked(os.environ[MARK])
    os.killpg(0, signal.SIGKILL)
