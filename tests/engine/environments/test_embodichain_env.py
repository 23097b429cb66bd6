"""Environments and configurations of EmbodiChain, against a stand-in with the signatures of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from embodichain_rl import EmbodiChainLayout, OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.errors import ConfigError

STANDINS = Path(__file__).parents[2] / "support" / "standins"

CONFIG: dict[str, Any] = {
    "id": "RowsOfArms-v1",
    "max_episodes": 24,
    "num_envs": 2,
    "env": {"dataset": {"lerobot": {"params": {"instruction": {"lang": "Hand over the cup."}}}}},
    "robot": {"uid": "arm"},
    "renderer": "fast",
    "gpu_id": [3, 5],
}


def cfg(gym_config: Any = CONFIG, **settings: Any) -> OnlineDataEngineCfg:
    defaults: dict[str, Any] = {
        "buffer_size": 4,
        "max_episode_steps": 6,
        "num_workers": 0,
        "start_method": "forkserver",
    }
    return OnlineDataEngineCfg(gym_config=gym_config, progress_bar=False, **{**defaults, **settings})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(STANDINS)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "embodichain"]:
        del sys.modules[name]


def test_without_embodichain_the_error_says_what_it_is() -> None:
    with pytest.raises(ConfigError, match=r"DexForce's simulation framework .* 'embodichain-rl\[embodichain\]'"):
        cfg()


@pytest.mark.usefixtures("installed")
def test_an_environment_of_rows() -> None:
    env = cfg().env_maker.for_worker(1)()  # type: ignore[union-attr]
    check_env_specs(env)
    assert env.batch_size == (2,)
    assert env.action_spec.shape == (2, 2)
    simulator = env.unwrapped if hasattr(env, "unwrapped") else env.base_env.unwrapped
    sim = env.base_env.unwrapped.cfg.sim_cfg
    assert (sim.headless, sim.render_cfg.renderer, sim.gpu_id) == (True, "fast", 5)
    assert simulator is not None
    steps = env.rollout(6, lambda td: td.set("action", torch.full((2, 2), 3.0)), break_when_any_done=False)
    # The first row is done at once, each time; its last observation is not that of the next episode.
    assert steps["next", "done"][0].all()
    assert not steps["next", "terminated"][1].any()
    assert (steps["next", "robot", "qpos"] == 3.0).all()
    assert steps["next", "success"].squeeze(-1).tolist() == [[True] * 6, [False] * 6]
    assert env.base_env.unwrapped.resets[-1]["reset_ids"].tolist() == [0]


@pytest.mark.usefixtures("installed")
def test_an_engine_streams_its_demonstrations(tmp_path: Path) -> None:
    file = tmp_path / "arms.json"
    file.write_text(json.dumps(CONFIG))
    with OnlineDataEngine(cfg(str(file))) as engine:
        stored = engine.shared_buffer
        lengths = stored["collector", "mask"].sum(-1)
        assert sorted(lengths.unique().tolist()) == [3, 4]  # rows are done after 3 and 4 steps
        longest = stored[lengths == 4][0]
        assert longest["robot", "qpos"][:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
        assert longest["action"].tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]
        texts = engine.texts.resolve(longest["instruction"])
        assert texts == ["Approach the cup."] * 2 + ["Hand over the cup."] * 2
        assert engine.texts.resolve(longest["target_uid"]) == ["cup", "cup", "", ""]
        batch = EmbodiChainLayout()(engine.sample_batch(8, 3))
        assert batch["obs", "robot", "qpos"].shape == (8, 3, 2)
        assert batch["obs", "sensor", "cam", "color"].dtype == torch.uint8
        assert batch["rewards"].unique().tolist() == [-1.0]
        assert batch["segment_id"].unique().tolist() == [0, 1]
        assert batch["gpu"].unique().tolist() == [3] if "gpu" in batch else True
