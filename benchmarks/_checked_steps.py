"""Self-checking trajectories: every value can be verified. With their check and an environment that produces them.

The label of a step contains the number of its trajectory, its index in the trajectory, the length of the trajectory,
and a checksum of the three. Every other stored value is a function of these. So a chunk is intact if, and only if, its
labels are consecutive and every other value matches its label.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

__all__ = ["CheckedSteps", "act", "count_torn", "make_trajectory", "new_numbers"]

TASKS = 3

IMAGE = (16, 16, 3)

LABEL = "label"

ENDS = ("done", "terminated", "truncated")

NOTE = "note"

OF_THE_CHUNK = [("collector", "traj_ids"), ("trajectory", "id"), NOTE]
"""The keys with an arbitrary number that must be the same at every step of a chunk."""

MOST_POINTS = 6

BESIDE_VALUES = {"index", "priority_weight", "td_error", ("collector", "mask"), ("trajectory", "step"), *OF_THE_CHUNK}
"""The keys of a sample that are not checked against its labels."""


class _Steps:
    """Steps of trajectories and their expected values.

    Args:
        number: the trajectory number of each step, ``int64`` ``[*B]``.
        step: the index of each step in its trajectory, ``[*B]``.
        length: the number of steps of its trajectory, ``[*B]``.
    """

    def __init__(self, number: np.ndarray, step: np.ndarray, length: np.ndarray) -> None:
        self._number, self._step, self._length = number, step, length
        self._checksum = (number * 8191 + step * 31 + length * 7) & 0x7FFFFFFF
        self._next: _Steps | None = None

    def expected(self, key: Any) -> np.ndarray:
        """Return the expected values under ``key``, ``[*B, *feature]``. For an image they are ``[*B, 1, 1, 1]``."""
        if isinstance(key, tuple) and key[0] == "next":
            return self._expected_next(key[1])
        if key in ENDS:
            return np.zeros((*self._step.shape, 1), bool)
        if key == LABEL:
            return np.stack([self._number, self._step, self._length, self._checksum], -1)
        if key == "observation":
            rows = [self._number & 0xFFFF, self._step, self._checksum & 0xFFFF]
            return np.stack(rows, -1).astype(np.float32)
        if key == "pixels":
            return (self._number * 7 + self._step * 13).astype(np.uint8)[..., None, None, None]
        if key == "action":
            return act(self.expected("observation"))
        if key == "points_lengths":
            return (3 * self._number + 5 * self._step) % (MOST_POINTS + 1)
        if key == "points":  # padded with zeros
            rows = np.arange(MOST_POINTS)
            values = self._checksum[..., None] + rows
            return np.where(rows < self.expected("points_lengths")[..., None], values, 0)[..., None]
        if key == NOTE:
            return np.zeros(self._step.shape, np.int64)
        if key == "step_count":
            return self._step[..., None]
        assert key == "task", f"{key} does not follow from the label of a step"
        return self._number % TASKS

    def _expected_next(self, key: str) -> np.ndarray:
        if key in ENDS:
            return (self._step == self._length - 1)[..., None] & (key != "truncated")
        if key == "reward":
            return (self._checksum & 0xFFFF)[..., None].astype(np.float32)
        self._next = self._next or _Steps(self._number, self._step + 1, self._length)
        return self._next.expected(key)


def act(observation: Any) -> Any:
    """Return the actions ``[*B, 2]`` of the policy for observations ``[*B, 3]``."""
    return observation[..., [2, 0]]


def make_trajectory(number: int, length: int, keys: Iterable[Any]) -> TensorDict:
    """Return the steps ``[length]`` of trajectory ``number``, with its label, ``keys`` and end flags."""
    steps = _Steps(np.full(length, number), np.arange(length), np.full(length, length))
    data = TensorDict({}, [length])
    for key in {LABEL, ("next", "done"), *keys}:
        if key == ("collector", "traj_ids"):
            data[key] = torch.full((length,), number)
            continue
        value = steps.expected(key)
        data[key] = torch.from_numpy(np.broadcast_to(value, (length, *IMAGE)).copy() if value.ndim == 4 else value)
    return data


def count_torn(chunks: TensorDictBase) -> int:
    """Return how many chunks of ``[B, L]`` are not consecutive steps of one trajectory, in every key.

    In padded chunks, which have a mask, every step must still match its label.
    """
    values = {key: value.numpy() for key, value in chunks.items(True, True)}
    number, step, length, _ = np.moveaxis(values[LABEL], -1, 0)
    real = values.get(("collector", "mask"), np.ones(step.shape, bool))
    begins = step - np.arange(step.shape[1])
    first_real = begins[np.arange(len(begins)), real.argmax(-1)]
    follows = ((begins == first_real[:, None]) | ~real) & (number == number[:, :1])
    follows &= (step >= 0) & (step < length)
    if ("trajectory", "step") in values:
        follows &= values["trajectory", "step"] == step
    for key in OF_THE_CHUNK:
        if key in values:
            follows &= values[key] == values[key][:, :1]
    whole = follows.all(-1)
    steps = _Steps(number, step, length)
    for key in values.keys() - BESIDE_VALUES:
        expected = steps.expected(key)
        if key == "points":  # padded to the longest of the batch only
            width = values[key].shape[-2]
            whole &= (expected[..., width:, :] == 0).reshape(len(whole), -1).all(-1)
            expected = expected[..., :width, :]
        right = values[key] == expected
        whole &= right.reshape(len(whole), -1).all(-1)
    return int(np.count_nonzero(~whole))


def new_numbers() -> Iterator[int]:
    """Return trajectory numbers of this process that no other live process uses."""
    return itertools.count(os.getpid() << 24)


class CheckedSteps(gymnasium.Env):
    """Episodes of 1 to ``longest`` steps whose observations are those of :func:`make_trajectory`.

    Args:
        longest: maximum steps of an episode.
        images: whether the observation has ``"pixels"``.
    """

    action_space = gymnasium.spaces.Box(0.0, 65535.0, (2,), np.float32)

    def __init__(self, longest: int, images: bool) -> None:
        limits = np.iinfo(np.int64)
        spaces: dict[str, gymnasium.Space[Any]] = {
            LABEL: gymnasium.spaces.Box(limits.min, limits.max, (4,), np.int64),
            "observation": gymnasium.spaces.Box(0.0, 65535.0, (3,), np.float32),
        }
        if images:
            spaces["pixels"] = gymnasium.spaces.Box(0, 255, IMAGE, np.uint8)
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self._longest = longest
        self._numbers = new_numbers()
        self._lengths = random.Random()  # unseeded, so that a replacement worker has other lengths

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict]:
        super().reset(seed=seed)
        self._step = 0
        self._length = self._lengths.randint(1, self._longest)
        count = self._length + 1
        steps = _Steps(np.full(count, next(self._numbers)), np.arange(count), np.full(count, self._length))
        self._rows = {name: steps.expected(name) for name in self.observation_space.spaces}
        self._rewards = steps.expected(("next", "reward"))[:, 0].tolist()
        return self._observed(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict]:
        reward = self._rewards[self._step]
        self._step += 1
        return self._observed(), reward, self._step == self._length, False, {}

    def _observed(self) -> dict[str, Any]:
        observed = {name: rows[self._step] for name, rows in self._rows.items()}
        if "pixels" in observed:
            observed["pixels"] = np.full(IMAGE, observed["pixels"].item(), np.uint8)
        return observed


gymnasium.register("CheckedSteps-v0", entry_point=CheckedSteps)
