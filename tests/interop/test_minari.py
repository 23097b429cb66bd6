"""Minari datasets into a buffer and out of one, equal to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.errors import DatasetReadError, DatasetWriteError, SchemaMismatchError
from embodichain_rl.interop.minari import export, load

minari = pytest.importorskip("minari", reason="Minari is not installed: pip install 'embodichain-rl[minari]'")
pytest.importorskip("h5py", reason="h5py is not installed: pip install 'embodichain-rl[minari]'")


def make_buffer() -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=5000, chunk_size=2)


def trajectory(number: int) -> TensorDict:
    """Return an episode with every kind of entry; every other one is truncated."""
    length = 8 + number
    state, image = torch.randn(length + 1, 4), torch.randint(0, 256, (length + 1, 5, 6, 3), dtype=torch.uint8)
    speed = torch.randn(length + 1, dtype=torch.float64)
    ends = torch.zeros(length, 1, dtype=torch.bool)
    ends[-1] = True
    never = torch.zeros_like(ends)
    root = {"observation": state[:-1], "pixels": image[:-1], "infos": {"speed": speed[:-1]}}
    following = {"observation": state[1:], "pixels": image[1:], "infos": {"speed": speed[1:]}}
    following |= {"reward": torch.randn(length, 1), "done": ends}
    following |= {"terminated": never if number % 2 else ends, "truncated": ends if number % 2 else never}
    data = TensorDict({**root, "action": torch.randn(length, 2), "done": never, "next": following}, [length])
    data["goal"] = torch.arange(length)
    data["trajectory", "task"] = NonTensorStack(*[f"task {number}"] * length)
    return data


@pytest.fixture
def rb() -> TrajectoryReplayBuffer:
    torch.manual_seed(0)
    buffer = make_buffer()
    for number in range(4):
        buffer.extend(trajectory(number))
    return buffer


def test_what_is_exported_is_loaded_again_to_the_bit(rb: TrajectoryReplayBuffer, tmp_path: Path) -> None:
    assert export(rb, tmp_path / "dataset", progress=False) == 4
    fresh = make_buffer()
    assert load(tmp_path / "dataset", into=fresh, progress=False) == 4
    load(minari.MinariDataset(tmp_path / "dataset"), into=rb, episodes=[2], progress=False)  # beside what is there
    for number in range(4):
        for key in rb[number].exclude("index", "done", ("trajectory", "id")).keys(True, True):
            assert rb[number][key].dtype == fresh[number][key].dtype, key
            assert torch.equal(rb[number][key], fresh[number][key]), key
    for key in rb[2].exclude("index", ("trajectory", "id")).keys(True, True):
        assert torch.equal(rb[2][key], rb[4][key]), key


def test_minari_opens_what_is_exported(rb: TrajectoryReplayBuffer, tmp_path: Path) -> None:
    export(rb, tmp_path / "dataset", dataset_id="test/live-v3", progress=False)
    dataset = minari.MinariDataset(tmp_path / "dataset")
    assert dataset.spec.dataset_id == "test/live-v3"
    assert dataset.total_steps == 8 + 9 + 10 + 11
    episode, data = dataset[1], rb[1]
    assert np.array_equal(episode.observations["observation"][:-1], data["observation"].numpy())
    assert np.array_equal(episode.observations["pixels"][1:], data["next", "pixels"].numpy())
    assert np.array_equal(episode.rewards, data["next", "reward"][:, 0].numpy())
    assert episode.truncations.tolist() == [False] * 8 + [True]
    assert not episode.terminations.any()
    assert np.array_equal(episode.infos["speed"][:-1], data["infos", "speed"].numpy())


def test_what_minari_cannot_hold_is_refused(rb: TrajectoryReplayBuffer, tmp_path: Path) -> None:
    export(rb, tmp_path / "dataset", progress=False)
    with pytest.raises(DatasetWriteError, match="already available"):
        export(rb, tmp_path / "dataset", progress=False)
    with pytest.raises(DatasetReadError, match="no Minari dataset"):
        load(tmp_path / "nothing", into=make_buffer())
    actions_only = make_buffer()
    actions_only.extend(trajectory(0).exclude(("next", "observation"), ("next", "pixels")))
    with pytest.raises(SchemaMismatchError, match="an observation with its next one"):
        export(actions_only, tmp_path / "other", progress=False)
