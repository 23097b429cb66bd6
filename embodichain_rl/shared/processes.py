"""Identify a process, and find out whether it is alive.

The ledger uses this to reclaim the reservations of killed writers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["own_process", "process_is_alive", "process_start"]


def process_start(pid: int) -> int:
    """Return the start time of process ``pid``, in clock ticks since boot, or -1 if it does not exist.

    The system reuses process ids. So only an id together with its start time identifies a process. A zombie, which has
    ended but was not waited for yet, counts as ended. On systems without ``/proc`` the start time of every process is
    0.
    """
    if sys.platform != "linux":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return -1
        except PermissionError:
            pass
        return 0
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    fields = stat[stat.rindex(b")") + 2 :].split()
    return -1 if fields[0] in (b"Z", b"X") else int(fields[19])


def process_is_alive(pid: int, start: int) -> bool:
    """Return whether process ``pid`` still runs and has the start time ``start``; see :func:`process_start`."""
    return process_start(pid) == start


_this_process: tuple[int, int] | None = None


def own_process() -> tuple[int, int]:
    """Return the process id and start time of this process. They are read once and cached."""
    global _this_process
    if _this_process is None:
        _this_process = (os.getpid(), process_start(os.getpid()))
    return _this_process


def _forget_own_process() -> None:
    global _this_process
    _this_process = None


os.register_at_fork(after_in_child=_forget_own_process)
