"""A checkpoint that is broken off: by a full disk, by SIGKILL, by a directory that can't be written to."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from steps import LABEL, Child, check_chunk, contents, make_buffer, make_trajectory

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.errors import CheckpointError, CheckpointWriteError

OLD, NEW = (10, 11, 12, 13), (20, 21, 22, 23)
LENGTH = 6

# Of a buffer of four trajectories of six steps the smallest column has 24 bytes, the largest 1,440.
SPACES = [0, 30, 100, 200, 800, 1400]


def buffer_of(numbers: tuple[int, ...]) -> TrajectoryReplayBuffer:
    return make_buffer([make_trajectory(number, LENGTH) for number in numbers])


def dump_with_space(saved: Any, path: str, space: int) -> None:
    """Saves where no file can have more than ``space`` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (space, resource.RLIM_INFINITY))
    saved.dumps(path)


@pytest.mark.parametrize("part", ["buffer", "storage"])
@pytest.mark.parametrize("space", SPACES)
def test_on_a_full_disk_is_refused_and_the_earlier_checkpoint_is_kept(space: int, part: str, tmp_path: Path) -> None:
    def saved(numbers: tuple[int, ...]) -> Any:
        return buffer_of(numbers) if part == "buffer" else buffer_of(numbers).storage

    saved(OLD).dumps(tmp_path)
    child = Child("fork", saved(NEW))
    with pytest.raises(CheckpointWriteError, match=r"not be written to the end at .*disk is full") as refusal:
        child.call(dump_with_space, str(tmp_path), space)
    child.end()
    assert isinstance(refusal.value, OSError)
    target = saved((1,))
    target.loads(tmp_path)
    assert contents(target) == [(number, LENGTH) for number in OLD]
    saved(NEW).dumps(tmp_path)
    target.loads(tmp_path)
    assert contents(target) == [(number, LENGTH) for number in NEW]


def test_into_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointWriteError, match="may be written to"):
            buffer_of(OLD).dumps(path)


def test_that_lost_its_last_file_changes_nothing(tmp_path: Path) -> None:
    buffer_of(NEW).dumps(tmp_path)
    target = buffer_of(OLD)
    for damage in ("", "[", None):
        metadata = tmp_path / "buffer_metadata.json"
        metadata.unlink() if damage is None else metadata.write_text(damage)
        with pytest.raises(CheckpointError, match=r"No readable buffer_metadata\.json"):
            target.loads(tmp_path)
        assert contents(target) == [(number, LENGTH) for number in OLD]


def dump_in_turns(rbs: tuple[TrajectoryReplayBuffer, ...], path: str) -> None:
    while True:
        for rb in rbs:
            rb.dumps(path)


def test_of_a_process_that_is_killed_while_it_saves_the_earlier_one_is_kept(tmp_path: Path) -> None:
    rbs = buffer_of(OLD), buffer_of(NEW)
    child = Child("fork", None)
    child.end()
    target = buffer_of((1,))
    rbs[0].dumps(tmp_path)
    for _ in range(25):
        child = Child("fork", rbs)
        child.begin(dump_in_turns, str(tmp_path))
        before = modified(tmp_path)
        while modified(tmp_path) == before:
            assert child.process.is_alive()
        os.kill(child.process.pid, signal.SIGKILL)
        child.process.join()
        target.loads(tmp_path)
        whole = check_chunk(target.storage[:])
        assert whole[LABEL][:, 0, 0].tolist() in ([*OLD], [*NEW])
    rbs[0].dumps(tmp_path)
    assert len([*tmp_path.glob("checkpoint-*")]) == 1, "what was broken off is left"


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
