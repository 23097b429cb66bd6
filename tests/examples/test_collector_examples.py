"""Runs the examples as a user would, in short form."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "collectors"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for leftover processes in /proc"),
]


class Example:
    """A running example, and every process it has started: they share its session."""

    def __init__(self, script: str, arguments: tuple[str, ...], directory: Path) -> None:
        self.script = script
        self._stdout = directory / "stdout"
        self._stderr = directory / "stderr"
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, EXAMPLES / script, *arguments], stdout=stdout, stderr=stderr, start_new_session=True
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait_for_output(self, text: str) -> None:
        self._wait(lambda: text in self.stdout + self.stderr, f"to print {text!r}", limit=60)

    def wait_for_exit(self, *, limit: float) -> int:
        self._wait(lambda: self.process.poll() is not None, "to end", limit=limit)
        # multiprocessing's resource tracker ends when it finds that the main process has.
        self._wait(lambda: not self.processes(), "to leave no process behind", limit=5)
        return self.process.returncode

    def _wait(self, condition: Callable[[], bool], what: str, *, limit: float) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"{self.script} was given {limit} s {what}. It has printed:\n{self.stdout}{self.stderr}")
            time.sleep(0.02)

    def processes(self) -> dict[int, str]:
        """Process ids and command lines of its session."""
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


@contextmanager
def running(script: str, *arguments: str, directory: Path) -> Iterator[Example]:
    example = Example(script, arguments, directory)
    try:
        yield example
    finally:
        for process in example.processes():
            os.kill(process, signal.SIGKILL)
        example.process.wait()


@pytest.mark.parametrize("script", ["multi_async_mujoco.py", "multi_sync_mujoco.py"])
def test_collector_writes_while_the_example_samples(script: str, tmp_path: Path) -> None:
    with running(script, "--seconds", "1.5", directory=tmp_path) as example:
        assert example.wait_for_exit(limit=60) == 0, example.stderr
    assert "One batch, [32, 32]:" in example.stdout
    assert re.search(r"next\.observation +\[32, 32, 17\] +torch\.float64", example.stdout)
    assert re.search(r"written: [1-9][\d,]* steps/s", example.stdout)
    assert re.search(r"sampled: [1-9][\d,]* batches/s", example.stdout)
    assert re.search(r"\d+ episodes, .* kept, \d+\.\d s old", example.stderr), "no progress bar"
    assert "Traceback" not in example.stderr


def test_slice_sampler_and_chunk_sampler_return_the_same_shape(tmp_path: Path) -> None:
    arguments = ("--episodes", "4", "--episode-steps", "50", "--samples", "20")
    with running("slice_sampler_before_after.py", *arguments, directory=tmp_path) as example:
        assert example.wait_for_exit(limit=60) == 0, example.stderr
    assert re.search(r"before +TensorDictReplayBuffer +\[32, 32\] +\d+\.\d+ ms a batch", example.stdout)
    assert re.search(r"after +TrajectoryReplayBuffer +\[32, 32\] +\d+\.\d+ ms a batch", example.stdout)
    assert "times faster" in example.stdout


def test_ctrl_c_ends_the_async_example_with_exit_code_0(tmp_path: Path) -> None:
    with running("multi_async_mujoco.py", "--seconds", "600", directory=tmp_path) as example:
        example.wait_for_output("batches/s sampled")  # of the progress bar
        assert len(example.workers()) == 2
        os.killpg(example.process.pid, signal.SIGINT)  # as a terminal does: to all processes at once
        assert example.wait_for_exit(limit=20) == 0, example.stderr
    assert "Stopped by Ctrl-C." in example.stdout
    assert "batches/s" in example.stdout, "no summary"
    assert "Traceback" not in example.stderr


def test_async_example_says_that_a_worker_was_killed(tmp_path: Path) -> None:
    with running("multi_async_mujoco.py", "--seconds", "600", directory=tmp_path) as example:
        example.wait_for_output("trajectory.step")
        os.kill(example.workers()[0], signal.SIGKILL)
        assert example.wait_for_exit(limit=20) == 1
    assert re.search(r"Worker [01] of 2, process \d+, was killed by SIGKILL\.", example.stderr)
    assert "Traceback" not in example.stderr


def test_async_example_gives_up_when_there_is_nothing_to_sample(tmp_path: Path) -> None:
    arguments = ("--episode-steps", "5", "--timeout", "1")
    with running("multi_async_mujoco.py", *arguments, directory=tmp_path) as example:
        assert example.wait_for_exit(limit=60) == 1
    assert "Nothing to sample after 1 s. Got chunk_size 32, but the longest of" in example.stderr
    assert "Traceback" not in example.stderr
