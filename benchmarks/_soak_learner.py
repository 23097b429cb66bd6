"""The learner of ``soak.py --cluster``: an engine on a cluster, whose samples it checks. It writes down how it is."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.cluster import RayCluster

EPISODE, CHUNK = 20, 5
STATUS_INTERVAL = 0.05


class Numbered(gymnasium.Env):
    """Observes (a number of the episode, the number of the step, their product)."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._episode, self._step = float(self.np_random.integers(1, 1 << 20)), 0.0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        time.sleep(0.001)
        self._step += 1.0
        return self._observation(), self._step, self._step == EPISODE, False, {}

    def _observation(self) -> np.ndarray:
        return np.array([self._episode, self._step, self._episode * self._step])


def make_env() -> Any:
    from torchrl.envs import GymWrapper

    return GymWrapper(Numbered())


def is_torn(batch: Any) -> bool:
    here, after = batch["observation"].numpy(), batch["next", "observation"].numpy()
    steps = here[..., 1]
    whole = (
        (here[..., 0] == here[:, :1, 0]).all()
        and (np.diff(steps, axis=1) == 1).all()
        and (here[..., 2] == here[..., 0] * steps).all()
        and (after[..., 1] == steps + 1).all()
        and (after[..., 2] == after[..., 0] * after[..., 1]).all()
        and (batch["next", "reward"].numpy()[..., 0] == steps + 1).all()
    )
    return not whole


def main(address: str, file: Path, workers: int, worker_timeout: float) -> None:
    cfg = OnlineDataEngineCfg(
        buffer_size=32,
        env_factory=make_env,
        policy="random",
        max_episode_steps=EPISODE,
        num_workers=workers,
        refill_threshold=None,
        max_worker_restarts=1_000,
        worker_timeout=worker_timeout,
        initialization_timeout=240.0,
        progress_bar=False,
        cluster=RayCluster(address, message_bytes=1 << 16),
    )
    torn = samples = 0
    slowest = written_at = 0.0
    with OnlineDataEngine(cfg) as engine:
        while True:
            begin = time.monotonic()
            torn += is_torn(engine.sample_batch(16, CHUNK))
            samples += 1
            now = time.monotonic()
            slowest = max(slowest, now - begin)
            if now - written_at >= STATUS_INTERVAL:
                written_at = now
                stats = engine.stats()
                status = {name: stats[name] for name in ("restarts", "inserted", "state", "nodes", "workers")}
                status |= {"torn": torn, "samples": samples, "slowest": slowest, "at": time.monotonic()}
                new = file.with_suffix(".new")
                new.write_text(json.dumps(status))
                os.replace(new, file)
            time.sleep(0.005)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
