"""A short version of ``benchmarks/power_cuts.py``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import power_cuts
from _checked_steps import count_torn, make_trajectory
from _power_cut import Disk

from embodichain_rl import TrajectoryReplayBuffer


@pytest.mark.parametrize("ragged", [False, True])
def test_what_was_synced_survives_power_cuts_and_nothing_is_torn(ragged: bool) -> None:
    found = power_cuts.run(power_cuts.Config(cuts=16, seed=3, ragged=ragged))
    assert found["cuts"] >= 16
    assert found["trajectories"] > 10
    assert {name: found[name] for name in power_cuts.BROKEN} == dict.fromkeys(power_cuts.BROKEN, 0)


class DiskThatWaits(Disk):
    """A disk that has what was synced, and nothing else."""

    def moment(self) -> None:
        """Write nothing back."""


@pytest.mark.parametrize("formats", [{}, power_cuts.RAGGED], ids=["of one size", "ragged"])
@pytest.mark.parametrize("first", [True, False], ids=["synced before there is anything", "synced then"])
def test_what_was_synced_is_on_a_disk_that_writes_nothing_back_by_itself(formats: dict[str, Any], first: bool) -> None:
    keys = [*power_cuts.KEYS, *(["points", "points_lengths"] if formats else [])]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path, after = Path(folder) / "buffer", Path(folder) / "after"
        rb = TrajectoryReplayBuffer(path=path, max_trajectories=6, max_total_steps=60, chunk_size=2, **formats)
        with DiskThatWaits(path, 0, lambda disk: None) as disk:
            if first:
                rb.sync()
            for number in range(3):
                rb.extend(make_trajectory(number, 5, keys))
                rb.sync()
            disk.fail(after)
        found = TrajectoryReplayBuffer.open(after)
        assert len(found) == 3
        for number in range(3):
            trajectory = found.storage.trajectory(number).exclude("index", "trajectory")
            assert trajectory["label"][:, 0].tolist() == [number] * 5
            assert count_torn(trajectory[:, None]) == 0
