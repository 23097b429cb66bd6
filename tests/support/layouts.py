"""The same trajectories in a buffer that stores each observation twice, and in one that stores it once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from embodichain_rl import TrajectoryReplayBuffer

SHIFTED = {("next", "observation"), ("next", "pixels"), ("next", "robot", "joints"), ("next", "clock")}


def trajectory(number: int, steps: int, *, segments: int = 3) -> TensorDict:
    """Random steps as a collector writes them, of every kind of entry, with NaNs and negative zeros among them."""
    generator = torch.Generator().manual_seed(number)
    observation = torch.randn(steps + 1, 3, generator=generator)
    observation[::3, 0], observation[1::3, 0] = float("nan"), -0.0
    pixels = torch.randint(256, (steps + 1, 4, 5, 3), dtype=torch.uint8, generator=generator)
    joints = torch.randn(steps + 1, 2, generator=generator).bfloat16()
    clock = torch.arange(steps + 1, dtype=torch.float64) + 1000 * number
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True

    def observed(which: slice) -> dict[str, Any]:
        # Copies: what is stored must not be the same only because it lies in the same memory.
        return {
            "observation": observation[which].clone(),
            "pixels": pixels[which].clone(),
            "robot": {"joints": joints[which].clone()},
            "clock": clock[which].clone(),
        }

    return TensorDict(
        {
            **observed(slice(None, -1)),
            "action": torch.randn(steps, 3, generator=generator),
            "segment_id": torch.arange(steps) * segments // steps,
            "reward": torch.randn(steps, 1, generator=generator),
            "done": torch.zeros(steps, 1, dtype=torch.bool),
            "next": {**observed(slice(1, None)), "reward": torch.randn(steps, 1, generator=generator), "done": done},
        },
        [steps],
    )


def buffer(compact: bool | str = True, **kwargs: Any) -> TrajectoryReplayBuffer:
    defaults: dict[str, Any] = {"max_trajectories": 5, "max_total_steps": 60, "batch_size": 16}
    if "sampler" not in kwargs:
        defaults["chunk_size"] = 4
    return TrajectoryReplayBuffer(compact=compact, **{**defaults, **kwargs})


def layouts(compact: bool | str = True, **kwargs: Any) -> list[TrajectoryReplayBuffer]:
    """The two layouts, empty, with the same stream of random numbers."""
    return [
        buffer(layout, generator=torch.Generator().manual_seed(0), **copy.deepcopy(kwargs))
        for layout in (False, compact)
    ]


def assert_same(got: TensorDictBase, expected: TensorDictBase) -> None:
    """To the bit, in every key."""
    assert got.batch_size == expected.batch_size
    assert {*got.keys(True, True)} == {*expected.keys(True, True)}
    for key, value in expected.items(True, True):
        assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape), key
        assert got[key].contiguous().flatten().view(torch.uint8).tolist() == (
            value.contiguous().flatten().view(torch.uint8).tolist()
        ), f"{key} differs"
