"""LeRobot's ACT learns to reach from a live simulator, and from the recording of the same episodes.

Workers simulate FetchReach with an expert. LeRobot's own policy class is trained from their stream, with LeRobot's own
preprocessor. At the same time, a recorder writes all episodes to a LeRobot dataset. Afterwards the same policy is
trained from this dataset, by LeRobot's own dataset class, with as many updates. Both are evaluated on goals that they
have not seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium_robotics
import torch
import tyro
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch.utils.data import DataLoader

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.interop.lerobot import LeRobotRecorder, as_lerobot

gymnasium.register_envs(gymnasium_robotics)

ENVIRONMENT, EPISODE_STEPS, FPS = "gymnasium_robotics:FetchReach-v4", 50, 25
GAIN = 10.0  # from metres to actions; an action of 1 moves the gripper by up to 5 cm
NAMES = {"observation": "observation.state", "desired_goal": "observation.environment_state"}
KEYS = ["observation", "desired_goal", "action"]
UNSEEN = 1_000_000  # seed of the first evaluated episode


@dataclass(frozen=True)
class Config:
    updates: int = 2000
    """Updates of each policy."""
    batch_size: int = 64
    """Frames per update."""
    evaluate_every: int = 500
    """Updates between two evaluations."""
    evaluation_episodes: int = 20
    """Episodes per evaluation."""
    chunk_size: int = 8
    """Number of actions that ACT plans at once."""
    actions_per_chunk: int = 4
    """Number of these actions that are executed before it plans again."""
    num_workers: int = 2
    """Number of processes in which the expert acts."""
    buffer_size: int = 64
    """Number of episodes that the buffer keeps, the newest ones."""
    noise: float = 0.3
    """Standard deviation of the noise on the expert's actions, so that it visits more states."""
    seed: int = 0
    """Seed of the simulation."""
    out: Path = Path("outputs/lerobot_act")
    """Folder of the recording; a new one for each run."""


class Expert(torch.nn.Module):
    """Moves the gripper towards the goal, with noise."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, gripper: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        action = torch.zeros(*goal.shape[:-1], 4)
        action[..., :3] = GAIN * (goal - gripper) + self.noise * torch.randn(goal.shape)
        return action.clamp(-1.0, 1.0)


def make_engine(config: Config) -> OnlineDataEngine:
    expert = TensorDictModule(Expert(config.noise), in_keys=["achieved_goal", "desired_goal"], out_keys=["action"])
    cfg = OnlineDataEngineCfg(
        buffer_size=config.buffer_size,
        max_episode_steps=EPISODE_STEPS,
        gym_config={"id": ENVIRONMENT, "max_episode_steps": EPISODE_STEPS},
        num_workers=config.num_workers,
        refill_threshold=500.0,
        seed=config.seed,
        policy=expert,
        progress_bar=False,
    )
    return OnlineDataEngine(cfg)


class Trainee:
    """LeRobot's ACT, with its preprocessor, postprocessor and optimizer.

    Args:
        config: of the example.
        meta: of a LeRobot dataset, or of a live one.
    """

    def __init__(self, config: Config, meta: Any) -> None:
        from lerobot.configs.types import FeatureType
        from lerobot.datasets.utils import dataset_to_policy_features
        from lerobot.policies.act.configuration_act import ACTConfig
        from lerobot.policies.act.modeling_act import ACTPolicy
        from lerobot.policies.factory import make_pre_post_processors

        features = dataset_to_policy_features(meta.features)
        actions = {name: feature for name, feature in features.items() if feature.type is FeatureType.ACTION}
        self.cfg = ACTConfig(
            input_features={name: feature for name, feature in features.items() if name not in actions},
            output_features=actions,
            chunk_size=config.chunk_size,
            n_action_steps=config.actions_per_chunk,
            dim_model=64,
            n_heads=4,
            dim_feedforward=128,
            n_encoder_layers=2,
            use_vae=False,
            device="cpu",
        )
        torch.manual_seed(config.seed)
        self.policy = ACTPolicy(self.cfg)
        self.preprocess, self.postprocess = make_pre_post_processors(self.cfg, dataset_stats=meta.stats)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-3)

    def update(self, batch: dict[str, Any]) -> float:
        self.policy.train()
        loss, _ = self.policy.forward(self.preprocess(batch))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.item())

    @torch.no_grad()
    def success(self, episodes: int) -> float:
        """Return the part of episodes that end at their goal."""
        self.policy.eval()
        env = gymnasium.make(ENVIRONMENT, max_episode_steps=EPISODE_STEPS)
        reached = 0
        for number in range(episodes):
            state, _ = env.reset(seed=UNSEEN + number)
            self.policy.reset()
            done, info = False, {"is_success": 0.0}
            while not done:
                observed = {name: torch.from_numpy(state[key]).float()[None] for key, name in NAMES.items()}
                action = self.postprocess(self.policy.select_action(self.preprocess(observed)))
                state, _, terminated, truncated, info = env.step(action[0].numpy())
                done = terminated or truncated
            reached += info["is_success"] > 0
        env.close()
        return reached / episodes


def train(config: Config, trainee: Trainee, dataset: Any) -> list[tuple[float, float]]:
    """Train for some updates; return the seconds and the success of each evaluation."""
    history, seconds, updates = [], 0.0, 0
    while updates < config.updates:
        begun = time.perf_counter()
        for batch in _epoch(dataset, config.batch_size):
            trainee.update(batch)
            updates += 1
            if updates % config.evaluate_every == 0 or updates == config.updates:
                break
        seconds += time.perf_counter() - begun
        if updates % config.evaluate_every == 0 or updates == config.updates:
            history.append((seconds, trainee.success(config.evaluation_episodes)))
            print(f"  {updates:6,} updates  {seconds:7.1f} s  success {history[-1][1]:.0%}", flush=True)
    return history


def _epoch(dataset: Any, batch_size: int) -> Iterator[dict[str, Any] | TensorDictBase]:
    return iter(DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True))


def main(config: Config) -> None:
    """Train ACT from a live stream and from its recording."""
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    torch.set_num_threads(1)  # the simulators use the cores
    root = config.out / f"recording-{int(time.time())}"
    engine = make_engine(config)
    with engine, LeRobotRecorder(engine, root, fps=FPS, keys=KEYS, names=NAMES) as recorder:
        live = as_lerobot(engine, fps=FPS, keys=KEYS, names=NAMES)
        trainee = Trainee(config, live.meta)
        windows = resolve_delta_timestamps(trainee.cfg, live.meta)
        print(f"From the live stream, whose buffer keeps {config.buffer_size} episodes:")
        train(config, trainee, live.with_windows(windows))
    print(f"From the recording of {recorder.num_episodes} episodes, {root}:")
    recorded = LeRobotDataset("local/recording", root=root, delta_timestamps=windows)
    train(config, Trainee(config, recorded.meta), recorded)


if __name__ == "__main__":
    main(tyro.cli(Config))
