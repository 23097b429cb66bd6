"""A child process of multiprocessing, with what belongs to it: its process group and what that leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from embodichain_rl.engine.processes.foreground import kill_marked
from embodichain_rl.shared import Deadline, ProcessWatch

__all__ = ["ChildProcess"]

EXIT_CODE_GRACE = 1.0
"""Seconds after the end of a process in which its exit code must arrive. A fork server sends it a little later."""

REAP_GRACE = 1.0
"""Seconds in which processes that were killed must have ended."""

UNKNOWN_EXIT_CODE = 255
"""What multiprocessing takes as the exit code of a process of which it can't be known."""


class ChildProcess:
    """A child process whose end is noticed at once, whoever waits for it.

    multiprocessing takes a process as alive for ever if somebody else has waited for it, or if SIGCHLD is ignored. It
    takes all processes of a fork server as ended if the server has ended.

    Args:
        process: the process. It has been started.
        mark: what it passes to :func:`~embodichain_rl.engine.processes.foreground.leave_foreground`.
    """

    def __init__(self, process: BaseProcess, mark: str) -> None:
        assert process.pid is not None
        self.process = process
        self.pid = process.pid
        self._watch = ProcessWatch(self.pid)
        self._mark = mark
        self._exit_code_is_lost = False
        self._exit_code: int | None = None
        self._collected = False

    def alive(self) -> bool:
        """Return whether the process has not ended."""
        if not self._watch.alive():
            return False
        self._exit_code_is_lost = self._exit_code_is_lost or self._sentinel_is_ready()
        return True

    def _sentinel_is_ready(self) -> bool:
        # Only a fork server that has ended closes the sentinel of a process that lives; its poll() reaps nothing then.
        return (
            getattr(self.process._popen, "method", "") == "forkserver"  # type: ignore[attr-defined]
            and self.process.exitcode is not None
            and self._watch.alive()
        )

    def wait(self, deadline: Deadline) -> bool:
        """Wait until the process has ended or the deadline has passed; return whether it has ended."""
        return deadline.wait(self._watch.wait)

    def waitables(self) -> list[Any]:
        """Return objects for :func:`multiprocessing.connection.wait` that are ready when the process has ended."""
        return self._watch.waitables()

    def exit_code(self) -> int | None:
        """Return the exit code of the process, which has ended; None if it is not known.

        What it has started and not ended is killed: its process group, whose id is not free for others as long as this
        process has not waited for it, and the programs that have left the group.
        """
        if not self._collected:
            self._collected = True
            self.signal(signal.SIGKILL, also_alone=False)
            _marks_of_ended.add(self._mark)
            away = _kill_all_marked()
            self.process.join(EXIT_CODE_GRACE)
            if self.process.exitcode is None:  # somebody else has it; otherwise multiprocessing would wait for it
                self.process._popen.returncode = UNKNOWN_EXIT_CODE  # type: ignore[attr-defined]
            elif not self._exit_code_is_lost:
                self._exit_code = self.process.exitcode
            for pid in (-self.pid, *away):
                _reap(pid)
        return self._exit_code

    def signal(self, number: signal.Signals, *, also_alone: bool = True) -> None:
        """Send a signal to the process group of the process, which outlives it.

        Args:
            number: the signal.
            also_alone: send it to the process alone if it has no process group of its own yet.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
            return
        if also_alone and self._watch.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end(self, patience: float, kill_grace: float, *, unblock: Callable[[], None] = lambda: None) -> None:
        """Wait until the process exits, then kill it; with all processes that it has started.

        Args:
            patience: seconds to wait until it exits by itself.
            kill_grace: seconds between SIGTERM, which simulators may handle, and SIGKILL.
            unblock: called after the process has been killed.
        """
        if self._collected:
            return unblock()
        self.wait(Deadline(patience))
        if self.alive():
            self.signal(signal.SIGTERM)
            self.wait(Deadline(kill_grace))
        self.signal(signal.SIGKILL)
        unblock()
        self.wait(Deadline(REAP_GRACE))
        if not self.alive():
            self.exit_code()

    def close(self) -> None:
        """Release the file descriptors."""
        self._watch.close()
        with contextlib.suppress(ValueError):  # it runs in spite of SIGKILL
            self.process.close()


_marks_of_ended: set[str] = set()
"""The marks of processes that have ended, whose programs could not be looked for yet."""


def _kill_all_marked() -> list[int]:
    """Kill the programs of processes that have ended, and return their ids."""
    found: list[int] = []
    for mark in list(_marks_of_ended):
        try:
            found += kill_marked(mark)
        except OSError:  # this process can open no more files: they are looked for at the end of the next process
            break
        _marks_of_ended.discard(mark)
    return found


def _reap(pid: int) -> None:
    """Wait for a process that was killed, or for all of the process group ``-pid``, if it is a child of this process.

    What a worker has left is a child of this process if this is the first process of a container.
    """
    end = time.monotonic() + REAP_GRACE
    while time.monotonic() < end:
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        except OSError:  # there is no such child any more
            return
        if ended == 0:
            time.sleep(0.005)
        elif pid > 0:
            return
