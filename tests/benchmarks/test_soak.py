"""The soak, for some seconds: the same processes, faults and checks as in ``benchmarks/soak.py``, in small numbers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _checked_steps import count_torn, make_trajectory
from _soak_file import BROKEN_IN_FILES, soak_a_file
from soak import BROKEN, Config, broken, run

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer

KEYS = ["observation", "pixels", "action", "step_count", ("next", "pixels"), ("next", "reward"), ("next", "label")]


@pytest.fixture
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that is tested here is the one that the processes of the soak import."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_path")
def test_no_promise_is_broken() -> None:
    results = run(Config(seconds=2.0, every=0.2, faults=10, patience=10.0, rounds=("two",)))
    assert broken(results) == dict.fromkeys(BROKEN, 0)
    (result,) = results.values()
    faults = sum(result["faults"].values()) - result["faults"]["full disk: saver"]
    assert faults >= 10
    assert result["chunks"] > 200  # a busy machine does hardly more than to come back from each fault
    assert result["trajectories written"] > 50


@pytest.mark.slow
def test_everything_that_uses_a_buffer_in_a_file_is_killed() -> None:
    counts = soak_a_file(3, seed=1, patience=5.0)
    assert {name: counts[name] for name in BROKEN_IN_FILES} == dict.fromkeys(BROKEN_IN_FILES, 0)
    assert counts["kills"] > 3
    assert counts["published"] >= 3  # the first turn is not killed while it starts
    assert counts["compared after it"] >= 3


@pytest.mark.parametrize("pad", ["none", "before", "after", "both"])
@pytest.mark.parametrize("compact", [False, True])
class TestTheCheckItself:
    def sampled(self, pad: str, compact: bool) -> TensorDictBase:
        rb = TrajectoryReplayBuffer(
            max_trajectories=3, max_total_steps=60, sampler=ChunkSampler(5, pad=pad), batch_size=32, compact=compact
        )
        for number in (7, 8, 2**40):
            rb.extend(make_trajectory(number, 12, KEYS))
        return rb.sample()

    def test_finds_nothing_in_whole_chunks(self, pad: str, compact: bool) -> None:
        assert count_torn(self.sampled(pad, compact)) == 0

    def test_finds_one_wrong_element_in_every_key(self, pad: str, compact: bool) -> None:
        chunks = self.sampled(pad, compact)
        for key in ["label", ("next", "done"), *KEYS]:
            value = chunks[key].clone()
            value.numpy().view(np.uint8).reshape(len(value), -1)[3, -1] ^= 1
            assert count_torn(chunks.clone(False).set(key, value)) == 1, key

    def test_finds_a_chunk_of_two_trajectories_and_one_of_two_places(self, pad: str, compact: bool) -> None:
        chunks = self.sampled(pad, compact).clone()
        ids = chunks["trajectory", "id"][:, 0]
        other = int((ids != ids[0]).nonzero()[0])
        chunks[0, 3:] = chunks[other, 3:]
        assert count_torn(chunks) == 1
        chunks = self.sampled(pad, compact).clone()
        real = chunks.get(("collector", "mask"), torch.ones(chunks.shape, dtype=torch.bool)).all(-1)
        whole = int(real.nonzero()[0])
        chunks[whole] = chunks[whole, [0, 1, 2, 1, 0]]
        assert count_torn(chunks) == 1
