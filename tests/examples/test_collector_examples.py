"""The examples of collectors as a user runs them, but short."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from example_process import EXAMPLES, running
from scripts import run_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for leftover processes in /proc"),
]

COLLECTORS = EXAMPLES / "collectors"

BATCH = re.compile(r"next\.observation +\[32, 32, 17\] +torch\.float64")
WRITTEN = re.compile(r"written: [1-9][\d,]* steps/s")
SAMPLED = re.compile(r"sampled: [1-9][\d,]* batches/s")
PROGRESS_BAR = re.compile(r"\d+ episodes, .* kept, \d+\.\d s old")


def test_sync_example_alternates_until_its_time_is_up(tmp_path: Path) -> None:
    for seconds in ("1.5", "12", "96"):  # the shortest in which an episode is written on this machine
        done = run_script(COLLECTORS / "multi_sync_mujoco.py", "--seconds", seconds, directory=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "One batch, [32, 32]:" in done.stdout
        assert BATCH.search(done.stdout)
        if WRITTEN.search(done.stdout) and SAMPLED.search(done.stdout):
            break
    assert WRITTEN.search(done.stdout), done.stdout
    assert SAMPLED.search(done.stdout), done.stdout
    assert PROGRESS_BAR.search(done.stderr)


def test_slice_sampler_and_chunk_sampler_return_the_same_shape(tmp_path: Path) -> None:
    arguments = ("--episodes", "4", "--episode-steps", "50", "--samples", "20")
    done = run_script(COLLECTORS / "slice_sampler_before_after.py", *arguments, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"before +TensorDictReplayBuffer +\[32, 32\] +\d+\.\d+ ms a batch", done.stdout)
    assert re.search(r"after +TrajectoryReplayBuffer +\[32, 32\] +\d+\.\d+ ms a batch", done.stdout)
    assert "times faster" in done.stdout


def test_async_example_samples_while_workers_write_until_ctrl_c(tmp_path: Path) -> None:
    with running("collectors/multi_async_mujoco.py", "--seconds", "600", directory=tmp_path) as example:
        example.wait_for_output("batches/s sampled")  # in the progress bar
        assert len(example.workers()) == 2
        os.killpg(example.process.pid, signal.SIGINT)  # as a terminal does: to all processes at once
        assert example.wait_for_exit() == 0, example.stderr
    assert "One batch, [32, 32]:" in example.stdout
    assert BATCH.search(example.stdout)
    assert PROGRESS_BAR.search(example.stderr)
    assert "Stopped by Ctrl-C." in example.stdout
    assert SAMPLED.search(example.stdout), "no summary"
    assert "Traceback" not in example.stderr


def test_async_example_says_that_a_worker_was_killed(tmp_path: Path) -> None:
    with running("collectors/multi_async_mujoco.py", "--seconds", "600", directory=tmp_path) as example:
        example.wait_for_output("trajectory.step")
        os.kill(example.workers()[0], signal.SIGKILL)
        assert example.wait_for_exit() == 1
    assert re.search(r"Worker [01] of 2, process \d+, was killed by SIGKILL\.", example.stderr)
    assert "Traceback" not in example.stderr


def test_async_example_gives_up_when_there_is_nothing_to_sample(tmp_path: Path) -> None:
    for timeout in ("1", "8", "64"):  # the shortest in which an episode is written on this machine
        arguments = ("--episode-steps", "5", "--timeout", timeout)
        done = run_script(COLLECTORS / "multi_async_mujoco.py", *arguments, directory=tmp_path)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert f"Nothing to sample after {timeout} s. " in done.stderr
        if "Got chunk_size 32, but the longest of" in done.stderr:
            break
    assert "Got chunk_size 32, but the longest of" in done.stderr
