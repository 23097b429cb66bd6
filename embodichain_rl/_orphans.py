"""Ends a process that is being started if its parent is killed meanwhile.

A process that is spawned imports the modules of the program first, which takes seconds. If its parent gets SIGKILL in
this time, nothing else ends it: it holds the shared memory that it was given, and may wait forever. From the moment
when the process runs code of its own, this module does nothing.
"""

from __future__ import annotations

import os
import threading
import time
from multiprocessing import process

__all__: list[str] = []

POLL_INTERVAL = 0.25
"""Seconds between two checks of the parent."""


def _is_starting() -> bool:
    # multiprocessing sets this attribute while a process imports the main module and unpickles its arguments.
    return getattr(process.current_process(), "_inheriting", False)


def _end_with(parent: int) -> None:
    while _is_starting():
        if os.getppid() != parent:
            os._exit(1)
        time.sleep(POLL_INTERVAL)


if _is_starting():
    threading.Thread(target=_end_with, args=(os.getppid(),), name="embodichain-rl-orphan-watch", daemon=True).start()
