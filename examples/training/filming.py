"""Takes pictures of a policy in the simulator, where the machine can render without a screen.

Run as a script it is the process that renders: MuJoCo reads which renderer to take when it is imported, and a graphics
driver that does not go with the machine can end the process, or hang.
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
"""Those of MuJoCo's that need no screen, the better one first."""
TIMEOUT = 60.0
"""Seconds for an episode."""
CAMERA = {"distance": 1.5, "azimuth": 145.0, "elevation": -25.0, "lookat": np.array([1.3, 0.75, 0.6])}


class RenderingFailedError(Exception):
    """No way to render works on this machine."""


def film(policy: ChunkPolicy, actions_per_chunk: int, seed: int) -> tuple[np.ndarray, list[bool]]:
    """One episode as pictures, uint8 `[T, height, width, 3]`, and whether the cube was at its goal in each.

    Raises:
        RenderingFailedError: with what went wrong in each way of rendering that was tried.
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
    """None, and the episode lies at `path`; or why not."""
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
