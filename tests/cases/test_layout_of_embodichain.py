"""EmbodiChain's layout of keys, there and back, and its import paths."""

from __future__ import annotations

import importlib

import pytest
import torch
from tensordict import TensorDict

import embodichain_rl
from embodichain_rl import EmbodiChainLayout, OnlineDataset, TrajectoryReplayBuffer
from embodichain_rl.errors import SchemaMismatchError


def episode(steps: int, first: float) -> TensorDict:
    """One episode with segments of two steps."""
    numbers = torch.arange(steps + 1.0).unsqueeze(-1) + first
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    following = {"done": done, "terminated": done.clone(), "reward": numbers[1:], "robot": {"qpos": numbers[1:]}}
    segment = torch.arange(steps)
    return TensorDict(
        {
            "robot": {"qpos": numbers[:-1]},
            "action": -numbers[:-1],
            "segment_id": segment // 2,
            "segment_step": segment % 2,
            "instruction": ["Lift it."] * steps,
            "next": following,
        },
        [steps],
    )


@pytest.fixture
def rb() -> TrajectoryReplayBuffer:
    rb = TrajectoryReplayBuffer(max_trajectories=9, max_total_steps=90, chunk_size=3, batch_size=16)
    rb.extend(episode(5, 0.0))
    rb.extend(episode(3, 100.0))
    return rb


def test_a_chunk_has_its_keys(rb: TrajectoryReplayBuffer) -> None:
    batch = next(iter(OnlineDataset(rb, chunk_size=3, batch_size=64, transform=EmbodiChainLayout())))
    step, qpos = batch["episode_step"], batch["obs", "robot", "qpos"].squeeze(-1)
    assert torch.equal(qpos % 100, step.float())
    assert torch.equal(batch["actions"].squeeze(-1), -qpos)
    assert torch.equal(batch["rewards"], qpos + 1)
    assert torch.equal(batch["segment_id"], step // 2)
    assert torch.equal(batch["segment_start"], step % 2 == 0)
    last = step == torch.where(qpos < 100, 4, 2)
    assert torch.equal(batch["terminated"], last)
    assert torch.equal(batch["segment_end"][:, :-1], (step % 2 == 1)[:, :-1])
    assert torch.equal(batch["segment_end"][:, -1], last[:, -1])
    assert rb.texts.resolve(batch["subtask_index"][0]) == ["Lift it."] * 3
    assert batch["valid"].all()
    assert "next" not in batch
    item = next(iter(OnlineDataset(rb, chunk_size=3, transform=EmbodiChainLayout())))
    assert item["rewards"].shape == (3,)


def test_its_rows_become_trajectories_and_rows_again(rb: TrajectoryReplayBuffer) -> None:
    rows = EmbodiChainLayout()(rb[:])
    assert rows["valid"].tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert rows["episode_step"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]]
    assert rows["segment_end"].tolist()[1] == [False, True, True, False, False]
    theirs = rows.exclude("trajectory", "index")
    other = TrajectoryReplayBuffer(
        max_trajectories=9, max_total_steps=90, chunk_size=3, batch_size=4, transform=EmbodiChainLayout()
    )
    other.extend(theirs)
    assert len(other) == 2
    again = EmbodiChainLayout()(other.storage[:])
    for key in ("actions", "rewards", "valid", "episode_step", "segment_id", "terminated", "truncated", "segment_end"):
        assert torch.equal(again[key][rows["valid"]], rows[key][rows["valid"]]), key
    assert torch.equal(again["obs", "robot", "qpos"], rows["obs", "robot", "qpos"])


def test_a_row_is_cut_where_its_state_was_restored(rb: TrajectoryReplayBuffer) -> None:
    rows = EmbodiChainLayout()(rb[:]).exclude("trajectory", "index", "subtask_index")
    rows["continuity_id"][0, 3:] = 1
    steps = EmbodiChainLayout().inv(rows)
    assert steps["next", "done"].flatten().nonzero().flatten().tolist() == [2, 4, 7]
    assert steps["next", "truncated"].flatten().nonzero().flatten().tolist() == [2]
    rows["valid"][0, 1] = False
    with pytest.raises(SchemaMismatchError, match="stitched"):
        EmbodiChainLayout().inv(rows)


@pytest.mark.parametrize("era", ["agents", "data_pipeline"])
def test_its_import_paths(era: str) -> None:
    for path, names in {
        "engine": ["OnlineDataEngine", "OnlineDataEngineCfg"],
        "engine.data": ["OnlineDataEngine", "OnlineDataEngineCfg", "OnlineDataEngineState"],
        "datasets": ["OnlineDataset", "UniformChunkSampler", "GMMChunkSampler", "ChunkSizeSampler"],
        "datasets.online_data": ["OnlineDataset"],
        "datasets.sampler": ["UniformChunkSampler", "GMMChunkSampler", "ChunkSizeSampler"],
    }.items():
        module = importlib.import_module(f"embodichain_rl.compat.{era}.{path}")
        for name in names:
            assert getattr(module, name) is getattr(embodichain_rl, name)
