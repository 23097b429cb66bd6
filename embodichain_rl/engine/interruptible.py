"""Waits that Ctrl-C, or another thread, can end, though what is waited for knows nothing of it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["run_interruptibly"]

LOOK_EVERY = 0.05
"""Seconds between two looks at whether to go on."""

T = TypeVar("T")


def run_interruptibly(function: Callable[[], T], check: Callable[[], None], child: str) -> T:
    """Returns what ``function`` returns, or raises what it raises; it is run on another thread.

    Args:
        function: starts a process of the name ``child`` at some time, and waits for it.
        check: called time and again meanwhile; when it raises, or a signal's handler does, that process is killed.
        child: the name of the process.
    """
    results: list[T | BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    before = set(multiprocessing.active_children())
    thread = threading.Thread(target=run, name="embodichain-rl-interruptible", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(LOOK_EVERY)
            check()
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            if process.name == child:
                _kill(process.pid)
        thread.join(1.0)
        raise
    result = results[0]
    if isinstance(result, BaseException):
        raise result
    return result


def _kill(pid: int | None) -> None:
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
        return
    with contextlib.suppress(ProcessLookupError):  # it has not come far enough to lead a group
        os.kill(pid, signal.SIGKILL)
