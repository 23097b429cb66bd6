"""An environment that breaks Gymnasium's rules, in one way at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

EPISODE = 5

WRONG_AT = 3
"""The step, or the reset, at which it goes wrong: not the first ones, which a probe sees."""

Step = tuple[Any, ...]


def observing(**entries: Any) -> Callable[[Step], Step]:
    """Other entries in the observation; None leaves one out."""

    def change(step: Step) -> Step:
        observation = {**step[0], **entries}
        return ({key: value for key, value in observation.items() if value is not MISSING}, *step[1:])

    return change


def instead(number: int, value: Any) -> Callable[[Step], Step]:
    """Another value in one place of what ``step()`` returns."""
    return lambda step: (*step[:number], value, *step[number + 1 :])


MISSING = object()
OBSERVATION, REWARD, TERMINATED, TRUNCATED, INFO = range(5)

WRONG_STEPS: dict[str, Callable[[Step], Any]] = {
    "an observation of another shape": observing(position=np.zeros(3, np.float32)),
    "an observation without dimensions": observing(position=np.float32(0)),
    "an observation of text": observing(position="here"),
    "an observation of objects": observing(position=np.array([None, 1])),
    "an observation of complex numbers": observing(position=np.zeros(2, np.complex64)),
    "an entry that is None": observing(position=None),
    "an entry missing": observing(image=MISSING),
    "an entry too many": observing(depth=np.zeros(2, np.float32)),
    "an observation that is no dict": instead(OBSERVATION, np.zeros(2, np.float32)),
    "an observation that is None": instead(OBSERVATION, None),
    "a reward of text": instead(REWARD, "much"),
    "two rewards": instead(REWARD, np.ones(2)),
    "a list as reward": instead(REWARD, [1.0]),
    "a complex reward": instead(REWARD, 1j),
    "terminated that is None": instead(TERMINATED, None),
    "terminated that is text": instead(TERMINATED, "no"),
    "terminated that is a number": instead(TERMINATED, 2),
    "terminated that is NaN": instead(TERMINATED, float("nan")),
    "terminated that is two": instead(TERMINATED, np.array([True, False])),
    "truncated that is None": instead(TRUNCATED, None),
    "four values": lambda step: step[:4],
    "six values": lambda step: (*step, 1),
    "nothing": lambda step: None,
}

WRONG_RESETS: dict[str, Callable[[Step], Any]] = {
    "reset without info": lambda reset: reset[0],
    "reset to nothing": lambda reset: None,
    "reset to another shape": observing(position=np.zeros(3, np.float32)),
    "reset to what is no dict": instead(OBSERVATION, np.zeros(2, np.float32)),
}

KEPT_STEPS: dict[str, tuple[Callable[[Step], Step], str | tuple[str, ...], list[float]]] = {
    "float64": (observing(position=np.full(2, 0.5)), ("next", "position"), [0.5, 0.5]),
    "integers": (observing(position=np.ones(2, np.int64)), ("next", "position"), [1.0, 1.0]),
    "a list": (observing(position=[0.0, 0.5]), ("next", "position"), [0.0, 0.5]),
    "outside of the space": (observing(position=np.full(2, 7, np.float32)), ("next", "position"), [7.0, 7.0]),
    "NaN": (observing(position=np.full(2, np.nan, np.float32)), ("next", "position"), [np.nan, np.nan]),
    "a reward of NaN": (instead(REWARD, float("nan")), ("next", "reward"), [np.nan]),
    "a reward of None": (instead(REWARD, None), ("next", "reward"), [0.0]),
    "info that is None": (instead(INFO, None), ("next", "reward"), [1.0]),
}
"""What is not as it should be, but has a place, with what is stored: the same as TorchRL's collector stores."""


class OutOfOrderError(Exception):
    """What the environment raises."""


class Wrong(gymnasium.Env):
    """Goes wrong at the step, or the reset, number ``at`` of all; from then on it is right again.

    Args:
        wrong: of ``WRONG_STEPS``, ``WRONG_RESETS`` or ``KEPT_STEPS``; "raises in step" and "raises in reset".
        at: when.
    """

    observation_space = Dict({"position": Box(-1, 1, (2,), np.float32), "image": Box(0, 255, (4,), np.uint8)})
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, wrong: str, at: int = WRONG_AT) -> None:
        self._wrong, self._at = wrong, at
        self._step = self._steps = self._resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._step = 0
        self._resets += 1
        returned = self._observation(), {}
        if self._resets != self._at:
            return returned
        if self._wrong == "raises in reset":
            raise OutOfOrderError("out of order in reset")
        return WRONG_RESETS.get(self._wrong, lambda same: same)(returned)

    def step(self, action: np.ndarray) -> Any:
        self._step += 1
        self._steps += 1
        returned = self._observation(), 1.0, self._step == EPISODE, False, {}
        if self._steps != self._at:
            return returned
        if self._wrong == "raises in step":
            raise OutOfOrderError("out of order in step")
        if self._wrong in KEPT_STEPS:
            return KEPT_STEPS[self._wrong][0](returned)
        return WRONG_STEPS.get(self._wrong, lambda same: same)(returned)

    def _observation(self) -> dict[str, np.ndarray]:
        return {"position": np.full(2, self._step / 10, np.float32), "image": np.full(4, self._step, np.uint8)}


gymnasium.register("Wrong-v0", entry_point=Wrong)
