"""The renderers of MuJoCo that need no screen, and which of them works on this machine.

MuJoCo selects the renderer when it is imported, and an incompatible graphics driver can crash or hang the process. So
each renderer is tried in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

RENDERERS = ("egl", "osmesa")
"""In order of preference."""
TIMEOUT = 60.0
"""Timeout of the process, in seconds."""


class RenderingFailedError(Exception):
    """Raised when no renderer works on this machine."""


def run_with_renderer(command: Sequence[str], job: bytes = b"") -> str:
    """Run a command that renders with each renderer, until it succeeds. Return the name of that renderer.

    Args:
        command: the command line. The renderer is in its environment, as `MUJOCO_GL`.
        job: its standard input.

    Raises:
        RenderingFailedError: no renderer works. The message says how each of them failed.
    """
    chosen = os.environ.get("MUJOCO_GL")
    reasons = []
    for renderer in (chosen,) if chosen else RENDERERS:
        reason = _run(command, job, renderer)
        if reason is None:
            return renderer
        reasons.append(f"{renderer}: {reason}")
    raise RenderingFailedError("; ".join(reasons))


def _run(command: Sequence[str], job: bytes, renderer: str) -> str | None:
    """Return None if the command succeeds, or the reason why it failed."""
    environment = {**os.environ, "MUJOCO_GL": renderer}
    try:
        done = subprocess.run(command, input=job, capture_output=True, env=environment, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"nothing after {TIMEOUT:.0f} s"
    if done.returncode == 0:
        return None
    last_words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return f"exit code {done.returncode}" + "".join(f", {line}" for line in last_words)
