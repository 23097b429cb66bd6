"""Which process is which, and whether it still lives."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["own_process", "process_is_alive", "process_start"]


def process_start(pid: int) -> int:
    """Returns the time at which process ``pid`` started, in clock ticks since boot, or -1 when there is no such one.

    Process ids are used again, so an id alone does not name a process; with its start time it does. A zombie, killed
    but not yet waited for, counts as gone. Where there is no ``/proc``, 0 stands for every process that exists.
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
    """Says whether the process ``pid`` that started at ``start`` (of :func:`process_start`) still runs."""
    return process_start(pid) == start


_this_process: tuple[int, int] | None = None


def own_process() -> tuple[int, int]:
    """Returns process id and start time of this process, read once."""
    global _this_process
    if _this_process is None:
        _this_process = (os.getpid(), process_start(os.getpid()))
    return _this_process


def _forget_own_process() -> None:
    global _this_process
    _this_process = None


os.register_at_fork(after_in_child=_forget_own_process)
