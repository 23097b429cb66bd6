"""What a process does first that receives a dataset while it is being started.

Starting a process takes seconds, in which its parent may be killed. A ``DataLoader`` worker would then live on, with
the buffer: torch's own watchdog compares the parent with the one that it finds when it starts, and that is not the one
that was killed. This module is loaded before the heavier ones that a dataset needs.
"""

from __future__ import annotations

import os
import threading
import time
from functools import cache
from typing import Any

from torch.multiprocessing import get_sharing_strategy, set_sharing_strategy
from torch.utils.data import get_worker_info

from embodichain_rl.shared import own_process, process_is_alive

__all__ = ["StartedBy", "rebuild"]

POLL_INTERVAL = 1.0
"""Seconds between two checks of whether the process that started this one is alive."""


class StartedBy:
    """Identifies the process that passes a dataset to another one. It has an effect where it is unpickled.

    * If the other process is a ``DataLoader`` worker, it ends within seconds of this process.
    * The other process uses the sharing strategy of this one.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _started_by, (*own_process(), get_sharing_strategy())


def _started_by(pid: int, start: int, sharing_strategy: str) -> None:
    _end_worker_with(pid, start)
    set_sharing_strategy(sharing_strategy)


@cache
def _end_worker_with(pid: int, start: int) -> None:
    threading.Thread(target=_watch, args=(pid, start), name="embodichain-rl-parent-watch", daemon=True).start()


def _watch(pid: int, start: int) -> None:
    # PR_SET_PDEATHSIG does not serve: it is sent when the *thread* that started this process ends. And under forkserver
    # the parent of this process is the server.
    while process_is_alive(pid, start) or get_worker_info() is None:
        time.sleep(POLL_INTERVAL)
    os._exit(1)


def rebuild(started_by: None, kind: type[Any]) -> Any:
    """Return a new object without a state. The arguments are in the order in which they are unpickled."""
    return object.__new__(kind)
