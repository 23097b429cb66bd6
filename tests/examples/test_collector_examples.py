"""Runs the examples as a user would, in short form."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from example_process import running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for leftover processes in /proc"),
]


@pytest.mark.parametrize("script", ["collectors/multi_async_mujoco.py", "collectors/multi_sync_mujoco.py"])
def test_collector_writes_while_the_example_samples(script: str, tmp_path: Path) -> None:
    for seconds in ("1.5", "12", "96"):  # as short as lets an episode be written on this machine
        with running(script, "--seconds", seconds, directory=tmp_path) as example:
            assert example.wait_for_exit() == 0, example.stderr
        assert "Traceback" not in example.stderr
        assert "One batch, [32, 32]:" in example.stdout
        assert re.search(r"next\.observation +\[32, 32, 17\] +torch\.float64", example.stdout)
        written = re.search(r"written: [1-9][\d,]* steps/s", example.stdout)
        sampled = re.search(r"sampled: [1-9][\d,]* batches/s", example.stdout)
        if written and sampled:
            break
    assert written, example.stdout
    assert sampled, example.stdout
    assert re.search(r"\d+ episodes, .* kept, \d+\.\d s old", example.stderr), "no progress bar"


def test_slice_sampler_and_chunk_sampler_return_the_same_shape(tmp_path: Path) -> None:
    arguments = ("--episodes", "4", "--episode-steps", "50", "--samples", "20")
    with running("collectors/slice_sampler_before_after.py", *arguments, directory=tmp_path) as example:
        assert example.wait_for_exit() == 0, example.stderr
    assert re.search(r"before +TensorDictReplayBuffer +\[32, 32\] +\d+\.\d+ ms a batch", example.stdout)
    assert re.search(r"after +TrajectoryReplayBuffer +\[32, 32\] +\d+\.\d+ ms a batch", example.stdout)
    assert "times faster" in example.stdout


def test_ctrl_c_ends_the_async_example_with_exit_code_0(tmp_path: Path) -> None:
    with running("collectors/multi_async_mujoco.py", "--seconds", "600", directory=tmp_path) as example:
        example.wait_for_output("batches/s sampled")  # of the progress bar
        assert len(example.workers()) == 2
        os.killpg(example.process.pid, signal.SIGINT)  # as a terminal does: to all processes at once
        assert example.wait_for_exit() == 0, example.stderr
    assert "Stopped by Ctrl-C." in example.stdout
    assert "batches/s" in example.stdout, "no summary"
    assert "Traceback" not in example.stderr


def test_async_example_says_that_a_worker_was_killed(tmp_path: Path) -> None:
    with running("collectors/multi_async_mujoco.py", "--seconds", "600", directory=tmp_path) as example:
        example.wait_for_output("trajectory.step")
        os.kill(example.workers()[0], signal.SIGKILL)
        assert example.wait_for_exit() == 1
    assert re.search(r"Worker [01] of 2, process \d+, was killed by SIGKILL\.", example.stderr)
    assert "Traceback" not in example.stderr


def test_async_example_gives_up_when_there_is_nothing_to_sample(tmp_path: Path) -> None:
    for timeout in ("1", "8", "64"):  # as short as lets an episode be written on this machine
        arguments = ("--episode-steps", "5", "--timeout", timeout)
        with running("collectors/multi_async_mujoco.py", *arguments, directory=tmp_path) as example:
            assert example.wait_for_exit() == 1
        assert "Traceback" not in example.stderr
        assert f"Nothing to sample after {timeout} s. " in example.stderr
        if "Got chunk_size 32, but the longest of" in example.stderr:
            break
    assert "Got chunk_size 32, but the longest of" in example.stderr
