"""Pickles and checkpoints that an earlier version wrote are loaded.

The files in ``support/former_version`` were written by version 0.1.0, whose ``replay`` was one flat package: three
trajectories of 10, 11 and 12 steps, the observation counting up from 0, 100 and 200. ``collate.pkl`` has the same
trajectories in a buffer with a ``collate_fn``, whose class lay in ``replay/transformed.py`` after that; those in
``flat_sampling`` were written when ``replay/sampling`` was flat.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from embodichain_rl import ResolveText, TrajectoryReplayBuffer

FILES = Path(__file__).parents[1] / "support" / "former_version"
OBSERVATIONS = [[*range(0, 10)], [*range(100, 111)], [*range(200, 212)]]


def observations(rb: TrajectoryReplayBuffer) -> list[list[int]]:
    return [rb[number]["observation"].flatten().int().tolist() for number in range(len(rb))]


@pytest.mark.parametrize("pickled", sorted(FILES.rglob("*.pkl")), ids=lambda path: path.stem)
def test_a_pickled_buffer(pickled: Path) -> None:
    rb = pickle.loads(pickled.read_bytes())
    assert observations(rb) == OBSERVATIONS
    batch = rb.sample(20)
    chunks = batch["observation"].squeeze(-1)
    assert torch.equal(chunks[:, 1:], chunks[:, :-1] + 1)
    assert rb.texts.resolve(batch["instruction"][0, :1].numpy()) == ["reach"]
    rb.extend(ResolveText(rb, ["instruction", ("trajectory", "task")])(rb[0]).exclude("index"))
    assert len(rb) == 4
    assert pickle.loads(pickle.dumps(rb)).sample(20)["observation"].shape == (20, 4, 1)


def test_a_checkpoint() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=8, max_total_steps=200, chunk_size=4, batch_size=4)
    rb.loads(FILES / "checkpoint")
    assert observations(rb) == OBSERVATIONS
    assert rb.write_count == 33
