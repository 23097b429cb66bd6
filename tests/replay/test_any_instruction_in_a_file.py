"""Kill a process at any instruction of ``extend`` and ``sync`` of a buffer in a file, then let the power fail."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from instructions import EVERY, run_in_child_until
from ragged_steps import check_ragged, ragged_trajectory
from steps import contents, make_buffer, small
from tensordict import TensorDict

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.replay.durable import syncing
from embodichain_rl.replay.ledger.invariants import check_ledger

pytestmark = pytest.mark.slow


@pytest.fixture
def folder() -> Iterator[Path]:
    # Memory: a disk takes milliseconds for each sync.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if sys.platform == "linux" else None) as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the thread pool of OpenMP does not survive a fork
    yield
    torch.set_num_threads(threads)


FORMATS: dict[str, dict[str, Any]] = {
    "of one size": {},
    "ragged": {"ragged": ["points"], "every": {"frame": 1}, "ragged_bytes": 300},
}


def trajectory(formats: str, number: int, length: int) -> TensorDict:
    return ragged_trajectory(number, length) if formats == "ragged" else small(number, length)


def checked(formats: str, rb: TrajectoryReplayBuffer) -> list[tuple[int, int]]:
    """Check all values; return number and length of each live trajectory, oldest first."""
    check_ledger(rb.storage.ledger)
    if formats != "ragged":
        return contents(rb)
    found = [check_ragged(rb[at]) for at in range(len(rb))]
    for data in found:
        assert data["label"].tolist() == [[int(data["label"][0, 0]), step] for step in range(len(data))]
        assert data["next", "done"].flatten().tolist() == [False] * (len(data) - 1) + [True]
    return [(int(data["label"][0, 0]), len(data)) for data in found]


@pytest.mark.parametrize("log_bytes", [8 << 20, 1], ids=["the same log", "the other log"])
@pytest.mark.parametrize("formats", FORMATS)
def test_killed_at_any_instruction_and_then_the_power_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, formats: str, log_bytes: int
) -> None:
    monkeypatch.setattr(syncing, "LOG_BYTES", log_bytes)
    rb = make_buffer(path=folder / "buffer", max_trajectories=3, max_total_steps=40, **FORMATS[formats])
    number = instruction = killed = 0

    def write_and_sync() -> None:
        rb.extend(trajectory(formats, number, 9))
        rb.sync()

    write_and_sync()
    while run_in_child_until(instruction, write_and_sync):
        synced = checked(formats, rb)
        number += 1
        rb.sync()
        rb.extend(trajectory(formats, number, 5 + number % 9))
        kept = checked(formats, opened_after_a_power_cut(folder))
        assert kept[-len(synced) :] == synced[-len(kept) :], "what was synced is gone"
        assert len(kept) >= len(synced) - 2
        killed += 1
        number += 1
        instruction += 11 * EVERY
    assert killed > 10, f"only {killed} instructions were reached"


def opened_after_a_power_cut(folder: Path) -> TrajectoryReplayBuffer:
    """Return a copy of the buffer as the machine would find it if everything had been written back just now."""
    shutil.rmtree(folder / "copy", ignore_errors=True)
    (folder / "copy").mkdir()
    for file in (folder / "buffer").iterdir():
        if file.name == "texts":  # a GiB of address space
            with open(file, "rb") as source, open(folder / "copy" / "texts", "wb") as target:
                target.write(source.read(1 << 16))
                target.truncate(file.stat().st_size)
        else:
            shutil.copyfile(file, folder / "copy" / file.name)
    users = folder / "copy" / "users.json"
    users.write_text(json.dumps({**json.loads(users.read_text()), "boot": "before"}))
    return TrajectoryReplayBuffer.open(folder / "copy")
