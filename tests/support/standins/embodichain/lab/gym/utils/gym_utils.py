"""``config_to_cfg`` and ``get_manager_modules`` with the signatures of EmbodiChain 0.3."""

from __future__ import annotations

import os
from types import SimpleNamespace


def get_manager_modules() -> list[str]:
    return ["embodichain.lab.gym.envs.managers"]


def config_to_cfg(
    config: dict,
    manager_modules: list | None = None,
    *,
    source_path: str | os.PathLike[str] | None = None,
    task_program_path_override: str | os.PathLike[str] | None = None,
) -> SimpleNamespace:
    assert manager_modules == get_manager_modules()
    for key in ("id", "env", "robot"):
        if key not in config:
            raise ValueError(f"Missing required config key: {key}")
    sim_cfg = SimpleNamespace(headless=False, gpu_id=0, device="cpu", render_cfg=SimpleNamespace(renderer="hybrid"))
    return SimpleNamespace(
        num_envs=config.get("num_envs", 1),
        max_episode_steps=config.get("max_episode_steps", 300),
        sim_cfg=sim_cfg,
        dataset=SimpleNamespace(**{k: SimpleNamespace(**v) for k, v in config["env"].get("dataset", {}).items()}),
        source_path=source_path,
        task_program=None,
        filter_dataset_saving=False,
        init_rollout_buffer=True,
    )
