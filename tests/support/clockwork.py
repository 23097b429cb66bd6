"""An environment that misbehaves on command, and engines over it.

A command is a file in a directory. Its name is the method that obeys it ("construct", "reset", "step"). Its content is
the action: "raise", "hang", "exit", or seconds to sleep. One process takes the file and obeys it once; the content
"... always" leaves it there. The probe process obeys nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from waiting import PATIENCE, wait_until

from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg

EPISODE = 6  # steps
PROBE = "embodichain-rl-env-probe"  # the process that only looks; imported, its module would bring simulators


class MisbehavedError(RuntimeError):
    """The error that the environment raises on command."""


class Clockwork(gymnasium.Env):
    """Observes (number of the episode, number of the step), float32 ``[2]``, and ends after ``EPISODE`` steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, commands: str, step_time: float = 0.001) -> None:
        self._commands = Path(commands)
        self._step_time = step_time
        self._episode = self._step = 0
        self._obey("construct")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._obey("reset")
        self._episode += 1
        self._step = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._obey("step")
        time.sleep(self._step_time)
        self._step += 1
        return self._observation(), float(action[0]), self._step == EPISODE, False, {}

    def close(self) -> None:
        (self._commands / f"closed-{os.getpid()}").touch()

    def _observation(self) -> np.ndarray:
        return np.array([self._episode, self._step], np.float32)

    def _obey(self, place: str) -> None:
        file = self._commands / place
        if not file.exists() or multiprocessing.current_process().name == PROBE:
            return
        try:
            command = file.read_text()
            if not command.endswith("always"):
                file.rename(self._commands / f"{place}-obeyed-by-{os.getpid()}")
        except FileNotFoundError:
            return  # another process was faster
        command = command.split()[0]
        if command == "raise":
            raise MisbehavedError(f"misbehaved at {place}")
        if command == "exit":
            os._exit(7)
        time.sleep(3600 if command == "hang" else float(command))


class Camera(Clockwork):
    """Observes an image, uint8 ``[256, 256, 3]``, of which every element is the number of the step."""

    observation_space = gymnasium.spaces.Box(0, 255, (256, 256, 3), np.uint8)

    def _observation(self) -> np.ndarray:
        return np.full((256, 256, 3), self._step, np.uint8)


class Scribe(Clockwork):
    """Observes an image, each element the step, and twelve texts that no other step has, beside what clockwork does."""

    TEXTS = tuple(f"text {number}" for number in range(12))

    observation_space = gymnasium.spaces.Dict(
        observation=Clockwork.observation_space,
        pixels=gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8),
        **{name: gymnasium.spaces.Text(80) for name in TEXTS},
    )

    def _observation(self) -> Any:
        texts = {name: f"{name} of {self._episode} {self._step} {os.getpid()}" for name in self.TEXTS}
        return {"observation": super()._observation(), "pixels": np.full((8, 8, 3), self._step, np.uint8), **texts}


gymnasium.register("Clockwork-v0", entry_point=Clockwork)
gymnasium.register("Camera-v0", entry_point=Camera)
gymnasium.register("Scribe-v0", entry_point=Scribe)


def order(commands: Path, place: str, what: str) -> None:
    """Write a command file atomically."""
    (commands / "new").write_text(what)
    (commands / "new").rename(commands / place)


def clockwork_cfg(
    commands: Path, step_time: float = 0.001, env: str = "Clockwork-v0", **settings: Any
) -> OnlineDataEngineCfg:
    """Return the configuration of an engine over it, with timeouts that no healthy worker reaches on any machine.

    So ``stop()`` waits long for a worker that hangs: if one does, give a ``shutdown_timeout``.
    """
    settings = {
        "buffer_size": 4,
        "max_episode_steps": EPISODE,
        "start_method": "forkserver",
        "initialization_timeout": PATIENCE,
        "worker_timeout": PATIENCE,
        "shutdown_timeout": PATIENCE,
        "refill_threshold": None,  # so that the worker acts although nobody samples
        **settings,
    }
    kwargs = {"commands": str(commands), "step_time": step_time, "disable_env_checker": True}
    return OnlineDataEngineCfg(gym_config={"id": f"{__name__}:{env}", "kwargs": kwargs}, progress_bar=False, **settings)


def clockwork_engine(commands: Path, **settings: Any) -> OnlineDataEngine:
    return OnlineDataEngine(clockwork_cfg(commands, **settings))


def update_policy(engine: OnlineDataEngine, policy: Any) -> int:
    """Update the weights until all workers have them; return the number of calls. A call skips a slow worker."""
    updates = 0
    everybody = [*range(engine.cfg.num_workers)]

    def updated() -> bool:
        nonlocal updates
        updates += 1
        return engine.update_policy_weights_(policy) == everybody

    wait_until(updated, "an update of the weights of all workers")
    return updates
