"""Identify a process, find out whether it is alive or stopped, and notice its end.

The ledger uses this to reclaim the reservations of killed writers, and the engine to supervise its workers.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from pathlib import Path

__all__ = [
    "ProcessWatch",
    "own_process",
    "process_is_alive",
    "process_start",
    "process_state",
    "processes_with",
    "stopped_note",
]

ENDED = ("Z", "X")
"""The states of a process that has ended and was not waited for yet."""

POLL_INTERVAL = 0.02
"""Seconds between two looks at a process that can't be watched otherwise."""


def _stat(pid: int) -> list[bytes] | None:
    """Return the fields of ``/proc/<pid>/stat`` from the state on; None if there is no such process.

    Raises:
        OSError: they can't be read for lack of resources.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat[stat.rindex(b")") + 2 :].split()


def process_start(pid: int) -> int:
    """Return the start time of process ``pid``, in clock ticks since boot, or -1 if it does not exist.

    The system reuses process ids. So only an id together with its start time identifies a process. A zombie, which has
    ended but was not waited for yet, counts as ended. On systems without ``/proc`` the start time of every process is
    0.
    """
    if sys.platform != "linux":
        return 0 if _exists(pid) else -1
    fields = _stat(pid)
    return -1 if fields is None or fields[0].decode() in ENDED else int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def process_is_alive(pid: int, start: int) -> bool:
    """Return whether process ``pid`` still runs and has the start time ``start``; see :func:`process_start`."""
    try:
        return process_start(pid) == start
    except OSError:  # this process can open no more files: assume that the id has not been reused
        return _exists(pid)


def process_state(pid: int) -> str:
    """Return the state of a process: ``"T"`` if it is stopped by a signal, ``"t"`` by a debugger.

    The other letters are those of ``/proc/<pid>/stat``. The result is empty if the state is not known.
    """
    try:
        fields = _stat(pid) if sys.platform == "linux" else None
    except OSError:
        return ""
    return "" if fields is None else fields[0].decode()


def stopped_note(pid: int) -> str:
    """Return a sentence about a process that is stopped, which begins with a space; empty if it is not stopped."""
    state = process_state(pid) if pid else ""
    if state == "T":
        return (
            f" Process {pid} is stopped (state T): somebody has sent it SIGSTOP, or its terminal has stopped it. "
            f"Continue it with `kill -CONT {pid}`."
        )
    if state == "t":
        return f" Process {pid} is stopped by a debugger (state t)."
    return ""


def processes_with(variable: str, value: str) -> list[int]:
    """Return the processes that were executed with an environment variable of this value, and are alive.

    Those of other users are not found. On systems without ``/proc`` none is.

    Raises:
        OSError: this process can open no more files.
    """
    entry = f"{variable}={value}".encode()
    found = []
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if entry in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
    return found


class ProcessWatch:
    """Notices the end of a process at once, whoever waits for that process.

    ``waitpid`` finds nothing if SIGCHLD is ignored, or if other code has waited for all children. The watch does not
    need it.

    Args:
        pid: the process, which has been started by this process or by its fork server.

    Example:
        >>> import subprocess
        >>> child = subprocess.Popen(["sleep", "0"])
        >>> ProcessWatch(child.pid).wait(60.0)
        True
        >>> child.wait()
        0
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ended = False
        self._start = -1
        self._fd = -1
        try:
            self._fd = os.pidfd_open(pid)  # type: ignore[attr-defined, unused-ignore]
        except ProcessLookupError:
            self._ended = True
        except (AttributeError, OSError):  # no such call here; or this process can open no more files
            try:
                self._start = process_start(pid)
            except OSError:
                self._start = -2
            self._ended = self._start == -1

    def alive(self) -> bool:
        """Return whether the process has not ended."""
        if self._ended:
            return False
        if self._fd >= 0:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            self._ended = bool(poll.poll(0))
        elif self._start == -2:
            self._ended = not _exists(self.pid)
        else:
            self._ended = not process_is_alive(self.pid, self._start)
        return not self._ended

    def wait(self, seconds: float) -> bool:
        """Wait until the process has ended, at most for these seconds; return whether it has."""
        if self._fd >= 0 and not self._ended:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            poll.poll(max(0.0, 1000 * seconds))
            return not self.alive()
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end:
            time.sleep(min(POLL_INTERVAL, seconds))
        return not self.alive()

    def waitables(self) -> list[int]:
        """Return objects for :func:`multiprocessing.connection.wait` that are ready when the process has ended."""
        return [self._fd] if self._fd >= 0 and not self._ended else []

    def close(self) -> None:
        """Release the file descriptor. The watch polls from then on."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._ended = self._ended or not _exists(self.pid)
            os.close(fd)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


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
