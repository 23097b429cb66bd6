"""The same seeds give the same batches as in every version before, whichever way a batch is drawn and copied."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from embodichain_rl import ByGroup, ByPriority, ByRecency, ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.replay.schema import as_array

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"chunk_size": 4},
    "single steps": {"chunk_size": 1},
    "longer than some trajectories": {"chunk_size": 9},
    "longer than most trajectories": {"chunk_size": 13},
    "not the first and last steps": {"chunk_size": 3, "drop_n_first_frames": 2, "drop_n_last_frames": 1},
    "stride": {"chunk_size": 3, "stride": 2},
    "padded": {"chunk_size": 6, "pad": "both"},
    "within segments": {"chunk_size": 3, "sampling_mode": "segment"},
    "windows": {"windows": {"observation": (-1, 0), "action": (0, 3)}},
    "by steps": {"chunk_size": 4, "weights": "steps"},
    "by recency": {"chunk_size": 4, "weights": ByRecency(3.0)},
    "by priority": {"chunk_size": 4, "weights": ByPriority()},
    "by group": {"chunk_size": 4, "weights": ByGroup(("trajectory", "task"))},
    "without replacement": {"chunk_size": 4, "replacement": False},
    "a subset": {"chunk_size": 4, "subset": ("train", 0.7)},
}

EXPECTED = {
    "plain": "1720f6aafbb9",
    "single steps": "08d755a6e32d",
    "longer than some trajectories": "2a68fc79eefc",
    "longer than most trajectories": "b6758d8bce1b",
    "not the first and last steps": "ca055e60e1f5",
    "stride": "6a24ceba3c17",
    "padded": "2e00d52cdf68",
    "within segments": "fd9ac72de177",
    "windows": "a159e48afd14",
    "by steps": "ba071207b955",
    "by recency": "fabd2820081e",
    "by priority": "f17d7000ee61",
    "by group": "8d225ffa5d76",
    "without replacement": "760a16ec527a",
    "a subset": "00e013878d73",
}
"""Checksums of batches that were sampled by a version without compiled kernels."""


def make_trajectory(number: int, steps: int) -> TensorDict:
    """Return steps whose values say where they are from, without a random number."""
    values = 1000 * number + torch.arange(steps + 1).float()
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    observation = values[:, None] + torch.arange(5) / 8
    return TensorDict(
        {
            "observation": observation[:-1],
            "pixels": (values[:-1, None, None] * torch.arange(1, 13).view(3, 4) % 251).to(torch.uint8),
            "half": (values[:-1, None] / torch.tensor([64, 128])).bfloat16(),
            "action": values[:-1, None].double() / torch.arange(1, 4),
            "segment_id": torch.arange(steps) // 4,
            "trajectory": {
                "task": torch.tensor(number % 3).expand(steps),
                "goal": torch.tensor([number, 0.5]).expand(steps, 2),
            },
            "next": {"observation": observation[1:], "reward": values[:-1, None] / 4, "done": done},
        },
        [steps],
    )


def checksum_of(batches: list[TensorDict]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch.keys(True, True), key=str):
            value = batch[key]
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(as_array(value).tobytes())
    return digest.hexdigest()[:12]


def sample_all(compact: Any) -> dict[str, str]:
    rb = TrajectoryReplayBuffer(max_trajectories=9, max_total_steps=120, chunk_size=4, batch_size=16, compact=compact)
    for number in range(14):
        rb.extend(make_trajectory(number, 5 + number * 7 % 11))
    checksums = {}
    for name, options in OPTIONS.items():
        options = dict(options)
        rb.set_sampler(ChunkSampler(options.pop("chunk_size", None), **options))
        rb.set_rng(torch.Generator().manual_seed(5))
        batches = [*(rb.sample() for _ in range(3)), rb.sample(7)]
        rb.set_rng(None)
        torch.manual_seed(3)
        checksums[name] = checksum_of([*batches, rb.sample(1), rb.sample(33)])
    return checksums


@pytest.mark.parametrize("compact", [False, True, "views"])
def test_the_same_seeds_give_the_same_batches(compact: Any) -> None:
    assert sample_all(compact) == EXPECTED
