"""FetchPickAndPlace in which things go wrong: the goal jumps, the arm is pushed, and an expert knows what to do next.

It is made by `gymnasium.make("recovering_env:DisturbedPickAndPlace-v0")`, in this process and in every worker.
"""

from __future__ import annotations

import contextlib
import io

import gymnasium
import numpy as np

# The import prints a notice about other environments in every process, which would interrupt the progress bar.
with contextlib.redirect_stderr(io.StringIO()):
    import gymnasium_robotics

gymnasium.register_envs(gymnasium_robotics)

EPISODE_STEPS = 80

GAIN = 10.0  # from actions to metres; an action of 1 moves the gripper by up to 5 cm
OPEN, CLOSED = 1.0, -1.0
ABOVE = np.array([0.0, 0.0, 0.08])  # height at which the open fingers clear the cube
NEAR = 0.02
HELD = 0.028  # width between the fingers with the cube between them, in metres, at most


def expert_action(observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Return what the expert does in a state, however the robot got there, `[4]`."""
    gripper, cube, fingers = observation[:3], observation[3:6], observation[9:11].sum()
    way = cube - gripper
    if np.linalg.norm(way) < NEAR:
        # Around the cube: close the fingers, and lift it when they hold it.
        target = gripper + (goal - cube) if fingers < 2 * HELD else cube
        return _towards(gripper, target, CLOSED)
    if np.linalg.norm(way[:2]) < NEAR and way[2] < 0.0 and fingers > 0.07:
        return _towards(gripper, cube, OPEN)
    height = max(cube[2] + ABOVE[2], 0.5)
    return _towards(gripper, np.array([*cube[:2], height]), OPEN)


def _towards(gripper: np.ndarray, place: np.ndarray, fingers: float) -> np.ndarray:
    motion = (GAIN * (place - gripper)).clip(-1.0, 1.0)
    return np.array([*motion, fingers], np.float32)
