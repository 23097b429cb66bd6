"""Ends a process that is being started if its parent is killed meanwhile.

A process that is spawned imports the modules of the program first, which takes seconds. If its parent gets SIGKILL in
this time, nothing else ends it: it holds the shared memory that it was given, and may wait forever. So this file is run
by the first that such a process reads, before it imports anything. From the moment when the process runs code of its
own, it does nothing. It needs the standard library only, since the process may not know yet where this package is.

It also gives the process the signal mask of the thread that starts it, as a process that is forked or executed has it.
A process that a fork server starts would have the mask of the server.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time
from multiprocessing import process, spawn
from typing import Any

__all__: list[str] = []

POLL_INTERVAL = 0.25
"""Seconds between two checks of the parent."""


def _is_starting() -> bool:
    # multiprocessing sets this attribute while a process imports the main module and unpickles its arguments.
    return getattr(process.current_process(), "_inheriting", False)


def _is_gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            state = stat.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return os.path.exists("/proc/self/stat")  # without /proc, nothing is known of it
    return state in "ZX"  # ended, and not yet waited for


def _end_with(parent: int, starter: int) -> None:
    # Under forkserver, the parent is the server, which ends with the process that asked it to start this one. That may
    # have happened before this process looked for the first time, and then its parent does not change any more.
    while _is_starting():
        if os.getppid() != parent or _is_gone(starter):
            os._exit(1)
        time.sleep(POLL_INTERVAL)


if _is_starting():
    if "BLOCKED" in globals():
        signal.pthread_sigmask(signal.SIG_SETMASK, globals()["BLOCKED"])
    _parent = os.getppid()
    threading.Thread(
        target=_end_with,
        args=(_parent, globals().get("STARTER", _parent)),
        name="embodichain-rl-orphan-watch",
        daemon=True,
    ).start()


class _RunThisFile:
    """Runs this file in the process in which it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        blocked = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))
        return runpy.run_path, (__file__, {"STARTER": os.getpid(), "BLOCKED": blocked})


def _tell_children() -> None:
    prepare = spawn.get_preparation_data

    def with_watch(name: str) -> dict[str, Any]:
        # multiprocessing ignores an entry that it does not know. No public function runs code that early.
        return {"embodichain_rl": _RunThisFile(), **prepare(name)}

    setattr(spawn, "get_preparation_data", with_watch)  # noqa: B010


if __name__ == "embodichain_rl._orphans":
    _tell_children()
