"""A small engine and those who watch it, for ``watched.py``: the terminal view on a pseudo terminal, and the page in a
headless Chromium."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from torchrl.envs import GymWrapper, TransformedEnv
from torchrl.envs.transforms import StepCounter

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from browser import CHROMIUM, Browser
from waiting import wait_until

__all__ = ["CHROMIUM", "Terminal", "WebBrowser", "killable_engine", "own_memory", "paced", "wait_until"]

STEP_SECONDS = 0.01
EPISODE_STEPS = 100
SIDE = 32
TO_THE_TOP = b"\x1b[H"
COLORS_AND_MOVES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")


class Camera(gymnasium.Env[Any, Any]):
    """A camera that looks at a moving edge, with steps that take as long as those of a simulator."""

    observation_space = gymnasium.spaces.Dict(
        image=gymnasium.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8),
        state=gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32),
    )
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    _step = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self._step = 0
        return self._observed(), {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        time.sleep(STEP_SECONDS)
        self._step += 1
        return self._observed(), float(action[0]), self._step >= EPISODE_STEPS, False, {}

    def _observed(self) -> dict[str, np.ndarray]:
        image = np.full((SIDE, SIDE, 3), 40, np.uint8)
        image[:, : self._step % SIDE] = 200
        return {"image": image, "state": self.np_random.standard_normal(4).astype(np.float32)}


def make_camera() -> Any:
    return TransformedEnv(GymWrapper(Camera()), StepCounter())


def killable_engine() -> OnlineDataEngine:
    """Return an engine of two workers, of which any number may be killed."""
    return OnlineDataEngine(
        OnlineDataEngineCfg(
            buffer_size=16,
            max_episode_steps=EPISODE_STEPS,
            env_factory=make_camera,
            num_workers=2,
            max_worker_restarts=100_000,
            progress_bar=False,
        )
    )


@contextlib.contextmanager
def paced(engine: OnlineDataEngine, every: float = 0.1) -> Iterator[None]:
    """Sample the engine on a thread, with a pause after each batch, so that a core has time for those who watch."""
    end = threading.Event()

    def learn() -> None:
        while not end.wait(every):
            engine.sample_batch(16, 16)

    thread = threading.Thread(target=learn, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def own_memory(pid: int) -> int:
    """Return the bytes of a process and its children that are not shared with others, or its share of them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return _private(pid) + sum(own_memory(int(child)) for child in children)


def _private(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return 1024 * int(line.split()[1])
    return 0


def _command(handle: str, every: float, *more: str) -> list[str]:
    return [sys.executable, "-m", "embodichain_rl.cli", "watch", "--pid", handle, "--every", f"{every:g}", *more]


class Terminal:
    """``embodichain-rl watch`` on a pseudo terminal, of which the last characters are kept."""

    name = "terminal"

    def __init__(self, handle: str, every: float) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 180, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color"}
        self._process = subprocess.Popen(_command(handle, every), stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self.pid = self._process.pid
        self._last: collections.deque[bytes] = collections.deque(maxlen=64)
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed when the process ends
            while read := os.read(self._master, 1 << 14):
                self._last.append(read)

    def text(self) -> str:
        """Return what is shown: the last picture, and what has been drawn of the next one."""
        pictures = b"".join(tuple(self._last)).split(TO_THE_TOP)[-2:]
        return COLORS_AND_MOVES.sub(b"", b"".join(pictures)).decode(errors="replace")

    def touch(self) -> None:
        """Do nothing: it only shows."""

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class WebBrowser:
    """``embodichain-rl watch --web``, and a Chromium that shows its page."""

    name = "web page"

    def __init__(self, handle: str, every: float) -> None:
        command = _command(handle, every, "--web", "--no-browser")
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._url = self._process.stdout.readline().strip()
        self.pid = self._process.pid
        self._folder = tempfile.TemporaryDirectory()
        self._browser = Browser(Path(self._folder.name), width=1280, height=1400)
        self.browser_pid = self._browser.pid
        self.reload()

    def text(self) -> str:
        """Return the text of the page."""
        return self._browser.text()

    def touch(self) -> None:
        """Look at the newest trajectory, as someone does who watches."""
        self._browser.value("[...document.querySelectorAll('button')].find(b => b.innerText == 'newest')?.click()")

    def used_by_scripts(self) -> int:
        """Return the bytes of the objects of the page's scripts, after what is not used any more is collected."""
        self._browser.call("HeapProfiler.collectGarbage")
        return int(self._browser.call("Runtime.getHeapUsage")["usedSize"])

    def reload(self) -> None:
        """Open the page anew, and wait until it shows something."""
        self._browser.go(self._url)
        wait_until(lambda: "trajectories" in self.text(), "the page")

    def close(self) -> None:
        self._browser.close()
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._folder.cleanup()
