"""Scripts that own an engine over a clockwork environment, run as processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import PATIENCE, wait_until

from embodichain_rl.shared.processes import process_start

MARK = "EMBODICHAIN_RL_TEST_OWNER"
"""An environment variable of an owner and of all processes that it starts, to find them."""


class Owner:
    """A script that owns an engine, as the leader of a process group of its own, like a terminal's foreground job.

    Args:
        script: its code, after the imports of ``clockwork``.
        commands: the directory of the environment's commands, ``commands`` in the script; also for its output.
        wrapper: the command line that starts the interpreter.
    """

    def __init__(self, script: str, commands: Path, wrapper: tuple[str, ...] = ()) -> None:
        self.commands = commands
        self._mark = f"{MARK}={commands}"
        self._file = commands / "owner.py"
        self._file.write_text(
            "import multiprocessing, os, pathlib, sys, time\n"
            "from clockwork import clockwork_cfg, clockwork_engine, order, update_policy\n"
            "from waiting import wait_for_children, wait_until\n"
            'multiprocessing.set_forkserver_preload(["embodichain_rl.engine.workers", "gymnasium", "pandas", "h5py"])\n'
            f"commands = pathlib.Path({str(commands)!r})\n{script}"
        )
        self._stdout, self._stderr = commands / "stdout", commands / "stderr"
        name, value = self._mark.split("=")
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, str(self._file)],
                env={**os.environ, name: value, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """The text that it printed."""
        return self._stdout.read_text()

    @property
    def errors(self) -> str:
        """The text that it and the processes it started wrote to stderr."""
        return self._stderr.read_text()

    def says(self, word: str) -> None:
        """Wait until it has printed ``word``."""
        wait_until(
            lambda: word in self.output or self.process.poll() is not None,
            lambda: f"the owner's {word!r} (it wrote {self.output + self.errors!r})",
        )
        assert word in self.output, self.errors

    def ends(self) -> int:
        """Wait until it and all processes it started have ended; return its exit code."""
        code = self.process.wait(PATIENCE)
        self.is_gone()
        return code

    def is_gone(self) -> None:
        """Wait until it and all processes it started have ended."""
        wait_until(lambda: not self.processes(), lambda: f"the end of {[_describe(pid) for pid in self.processes()]}")

    def processes(self) -> list[int]:
        """Return the ids of its live processes."""
        mark = self._mark.encode()
        return [
            pid for pid in _all_processes() if mark in _read(pid, "environ").split(b"\0") and process_start(pid) >= 0
        ]

    def shared_files(self) -> set[str]:
        """Return the files of ``/dev/shm`` that its processes have mapped."""
        return set().union(*(shared_files_of(pid) for pid in self.processes()))

    def end(self) -> None:
        """Kill all its processes."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def owner(script: str, commands: Path, wrapper: tuple[str, ...] = ()) -> Iterator[Owner]:
    running = Owner(script, commands, wrapper)
    try:
        yield running
    finally:
        running.end()


def shared_files_of(pid: int) -> set[str]:
    """Return the files of ``/dev/shm`` that a process has mapped; other processes make files there at the same time."""
    lines = [line.split(maxsplit=5) for line in _read(pid, "maps").decode().splitlines()]
    return {fields[5] for fields in lines if len(fields) == 6 and fields[5].startswith("/dev/shm/")}


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""


def _describe(pid: int) -> str:
    return f"{pid}: " + _read(pid, "cmdline").replace(b"\0", b" ").decode()
