"""Rendering of a policy in the simulator, if the machine can render without a screen.

Run as a script, this file is the process that renders. MuJoCo selects the renderer when it is imported, and an
incompatible graphics driver can crash or hang the process.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium
import numpy as np
from evaluation import ENVIRONMENT, roll_out
from policies import ChunkPolicy

RENDERERS = ("egl", "osmesa")
"""The renderers of MuJoCo that need no screen, in order of preference."""
TIMEOUT = 60.0
"""Timeout for an episode, in seconds."""
CAMERA = {"distance": 1.5, "azimuth": 145.0, "elevation": -25.0, "lookat": np.array([1.3, 0.75, 0.6])}


class RenderingFailedError(Exception):
    """Raised when no renderer works on this machine."""


def film(policy: ChunkPolicy, actions_per_chunk: int, seed: int) -> tuple[np.ndarray, list[bool]]:
    """Return one episode as frames, uint8 `[T, height, width, 3]`, and whether the cube was at its goal in each.

    Raises:
        RenderingFailedError: no renderer works. The message says how each of them failed.
    """
    job = pickle.dumps((policy, actions_per_chunk, seed))
    chosen = os.environ.get("MUJOCO_GL")
    reasons = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "episode.npz"
        for renderer in (chosen,) if chosen else RENDERERS:
            reason = _render(renderer, job, path)
            if reason is None:
                episode = np.load(path)
                return episode["frames"], episode["at_goal"].tolist()
            reasons.append(f"{renderer}: {reason}")
    raise RenderingFailedError("; ".join(reasons))


def _render(renderer: str, job: bytes, path: Path) -> str | None:
    """Write the episode to `path`. Return None, or the reason why it failed."""
    command = [sys.executable, __file__, str(path)]
    environment = {**os.environ, "MUJOCO_GL": renderer}
    try:
        done = subprocess.run(command, input=job, capture_output=True, env=environment, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"nothing after {TIMEOUT:.0f} s"
    if done.returncode == 0:
        return None
    last_words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return f"exit code {done.returncode}" + "".join(f", {line}" for line in last_words)


def _render_episode(policy: ChunkPolicy, actions_per_chunk: int, seed: int, path: str) -> None:
    env = gymnasium.make(ENVIRONMENT, render_mode="rgb_array", default_camera_config=CAMERA)
    frames, at_goal = [], []
    for success in roll_out(env, policy, actions_per_chunk, seed):
        frames.append(env.render())
        at_goal.append(success)
    np.savez(path, frames=np.stack(frames), at_goal=at_goal)
    env.close()


if __name__ == "__main__":
    _render_episode(*pickle.load(sys.stdin.buffer), sys.argv[1])
