"""Blocking calls that Ctrl-C or another thread can interrupt, although the called function does not support it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

from embodichain_rl.shared import naming_shortage

__all__ = ["run_interruptibly"]

POLL_INTERVAL = 0.05
"""Seconds between two calls of ``check``."""

T = TypeVar("T")


def run_interruptibly(function: Callable[[], T], check: Callable[[], None], child: str) -> T:
    """Run ``function`` on another thread, and return its result or raise its exception.

    Args:
        function: a function that starts a process named ``child`` and waits for it.
        check: called every ``POLL_INTERVAL`` while the function runs. If it or a signal handler raises an exception,
            the process is killed and the exception is raised.
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
    with naming_shortage(f"The start of {child}"):
        thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL_INTERVAL)
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
    with contextlib.suppress(ProcessLookupError):  # it is not the leader of a process group yet
        os.kill(pid, signal.SIGKILL)
