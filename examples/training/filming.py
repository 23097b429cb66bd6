"""Films of a policy in the simulator, if the machine can render without a screen.

Run as a script, this file is the process that renders.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
from evaluation import MakeEnv, roll_out
from policies import ChunkPolicy
from renderers import run_with_renderer


def film(make_env: MakeEnv, policy: ChunkPolicy, actions_per_chunk: int, seed: int) -> tuple[np.ndarray, list[bool]]:
    """Return one episode as frames, uint8 `[T, height, width, 3]`, and whether the goal was reached in each.

    Args:
        make_env: makes the environment, with the render mode "rgb_array".
        policy: who acts.
        actions_per_chunk: number of actions of a chunk that are executed before the policy plans again.
        seed: of the episode.

    Raises:
        RenderingFailedError: no renderer works. The message says how each of them failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "episode.npz"
        run_with_renderer(
            [sys.executable, __file__, str(path)], pickle.dumps((make_env, policy, actions_per_chunk, seed))
        )
        episode = np.load(path)
        return episode["frames"], episode["at_goal"].tolist()


def _render_episode(make_env: MakeEnv, policy: ChunkPolicy, actions_per_chunk: int, seed: int, path: str) -> None:
    env = make_env()
    frames, at_goal = [], []
    for success in roll_out(env, policy, actions_per_chunk, seed):
        frames.append(env.render())
        at_goal.append(success)
    np.savez(path, frames=np.stack(frames), at_goal=at_goal)
    env.close()


if __name__ == "__main__":
    _render_episode(*pickle.load(sys.stdin.buffer), sys.argv[1])
