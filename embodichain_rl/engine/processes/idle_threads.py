"""Threads that wait for work, so that none has to be started when a worker is lost.

A worker may be lost because memory or processes are short. Then no thread can be started, or ``Thread.start()`` never
returns, since the new thread ends before it reports that it runs.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

__all__ = ["IdleThreads", "Job"]

LOGGER = logging.getLogger("embodichain_rl.engine")


class Job:
    """A function that one of the threads calls.

    Args:
        function: the function. It handles its exceptions.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self.done = threading.Event()

    def run(self) -> None:
        """Call the function."""
        try:
            self.function()
        except Exception:
            LOGGER.exception("A thread of the engine failed")
        finally:
            self.done.set()


class IdleThreads:
    """Daemon threads that call functions, and are kept for the next ones.

    Args:
        spare: the number of threads that are started now. More are started when all are busy.

    Raises:
        RuntimeError: no thread can be started.

    Example:
        >>> threads = IdleThreads(spare=1)
        >>> threads.call(lambda: None).done.wait(60.0)
        True
        >>> threads.close()
    """

    def __init__(self, spare: int) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._closed = False
        for _ in range(spare):
            self._start_thread()
            self._idle += 1

    def _start_thread(self) -> None:
        threading.Thread(target=self._run, name="embodichain-rl-engine", daemon=True).start()

    def call(self, function: Callable[[], None]) -> Job:
        """Let a thread call a function.

        Raises:
            RuntimeError: all threads are busy, and no further one can be started.
        """
        job = Job(function)
        with self._lock:
            if self._idle == 0:
                self._start_thread()
            else:
                self._idle -= 1
            self._jobs.put(job)
        return job

    def call_anyway(self, function: Callable[[], None]) -> Job:
        """Do the same as :meth:`call`; if no thread can be started, call the function in this one."""
        try:
            return self.call(function)
        except RuntimeError:
            job = Job(function)
            job.run()
            return job

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            job.run()
            del job
            with self._lock:
                if self._closed:
                    return
                self._idle += 1

    def close(self) -> None:
        """End each thread after its current function."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in range(self._idle):
                    self._jobs.put(None)
                self._idle = 0
