"""Examples in an interpreter of their own, for tests that send them signals; and the check that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import PATIENCE_WITH_SCRIPTS, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"


class Example:
    """A running example, given by its path in `examples/`, and all processes it started: they share its session."""

    def __init__(self, script: str, arguments: tuple[str, ...], directory: Path) -> None:
        self.script = script
        self._stdout = directory / "stdout"
        self._stderr = directory / "stderr"
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, EXAMPLES / script, *arguments],
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=_obey_ctrl_c,
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait_for_output(self, text: str) -> None:
        self._wait(lambda: text in self.stdout + self.stderr, f"to print {text!r}")

    def wait_for_exit(self) -> int:
        self._wait(lambda: self.process.poll() is not None, "to end")
        # multiprocessing's resource tracker ends when it finds that the main process has.
        self._wait(lambda: not self.processes(), "to leave no process behind")
        return self.process.returncode

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(
            condition,
            lambda: f"{self.script} was {what}, which has printed:\n{self.stdout}{self.stderr}\nThis",
            timeout=PATIENCE_WITH_SCRIPTS,
        )

    def processes(self) -> dict[int, str]:
        """Return the process ids and command lines of its session."""
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session, *_ = (directory / "stat").read_text().rpartition(")")[2].split()
                if int(session) == self.process.pid and state != "Z":
                    found[int(directory.name)] = (directory / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def workers(self) -> list[int]:
        return [process for process, command in self.processes().items() if "spawn_main" in command]


def _obey_ctrl_c() -> None:
    """Undo what this process inherited: a shell lets its background jobs ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(script: str, *arguments: str, directory: Path) -> Iterator[Example]:
    example = Example(script, arguments, directory)
    try:
        yield example
    finally:
        for process in example.processes():
            os.kill(process, signal.SIGKILL)
        example.process.wait()
